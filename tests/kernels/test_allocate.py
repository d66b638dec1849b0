"""Memory for what kernels write is what `torch.empty` allocates."""

from __future__ import annotations

import pytest
import torch

from vpt_fast.kernels.runtime.allocate import empty

SHAPES = [(), (0,), (3,), (2, 3), (3, 0, 5), (0, 4, 0), (4, 1, 5, 1, 2), torch.Size((2, 7, 16))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_torch_has_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for _ in range(2):
        found = empty(shape, dtype, torch.device("meta"))
        right = torch.empty(shape, dtype=dtype, device="meta")
        assert (found.shape, found.stride(), found.dtype) == (right.shape, right.stride(), dtype)
        assert found.device == right.device and found.is_contiguous()
    assert empty(shape, dtype, torch.device("cpu")).device.type == "cpu"
