"""How far attention's kernels may be from fp64: as plain PyTorch in the same dtype, and a slack."""

from __future__ import annotations

import torch
from torch import Tensor

# In units in the last place of 1 (eps), of a tensor's largest value. For 16-bit dtypes the slack is
# the rounding of the result itself, half a unit, or half of that rounding's RMS. In fp32 sums in
# another order differ by a few units, and 2**(score - lse), which the backward pass recomputes,
# loses as many as its exponent, 10 to 20.
MAX_SLACK = {torch.float32: 16.0, torch.float16: 0.5, torch.bfloat16: 0.5}
RMS_SLACK = {torch.float32: 3.0, torch.float16: 0.15, torch.bfloat16: 0.15}


def assert_within_budget(
    name: str,
    dtype: torch.dtype,
    values: Tensor,
    eager: Tensor,
    exact: Tensor,
    noise: Tensor | float = 0.0,
) -> None:
    """Assert largest and RMS error of `values` within those of `eager`, plus some roundings.

    Args:
        name: Name of the tensor.
        dtype: Dtype of the problem.
        values: What a kernel computed.
        eager: The same by plain PyTorch in `dtype`.
        exact: The same in fp64.
        noise: Size of an error that the kernel's inputs have, and those of `eager` do not.
    """
    error, allowed = (t.double() - exact for t in (values, eager))
    unit = torch.finfo(dtype).eps * (exact.abs().max() + noise)
    assert error.abs().max() <= allowed.abs().max() + MAX_SLACK[dtype] * unit, name
    rms = RMS_SLACK[dtype] * unit
    assert error.square().mean().sqrt() <= allowed.square().mean().sqrt() + rms, name
