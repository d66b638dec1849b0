"""The launches of VAPT's experts for a problem, without a GPU, to read the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vpt_fast.kernels.experts.features import features_launch
from vpt_fast.kernels.experts.features_backward import features_backward_launches
from vpt_fast.kernels.experts.fold import fold_backward_launch, fold_launch
from vpt_fast.kernels.experts.inputs import FeatureInputs
from vpt_fast.kernels.experts.mix import mix_launch
from vpt_fast.kernels.experts.mix_backward import mix_backward_launch
from vpt_fast.kernels.runtime.chunks import chunk_count
from vpt_fast.kernels.runtime.launch import Launch, Target

_SM_80 = Target(80)


class ExpertProblem(NamedTuple):
    """The prompt experts of one block.

    Attributes:
        grid: Rows and columns of patches.
        prompts: Number of prompts p.
        width: Channels D.
        dtype: Dtype of tokens and parameters.
        prefix: Tokens before the patches.
        batch: Number of images B.
        kernel_size: Side of the convolution kernel.
        hidden_dim: Hidden channels of the feature projector.
        dropout: Whether there are dropout masks.
    """

    grid: tuple[int, int] = (14, 14)
    prompts: int = 10
    width: int = 768
    dtype: torch.dtype = torch.bfloat16
    prefix: int = 1
    batch: int = 64
    kernel_size: int = 2
    hidden_dim: int = 8
    dropout: bool = True

    @property
    def patches(self) -> int:
        """Patches per image."""
        return self.grid[0] * self.grid[1]

    def necessary_bytes(self) -> int:
        """Return the bytes that the forward update (token mixing, features) has to move.

        The patches of x and their mean and reciprocal standard deviation are read once, the mixing
        weight is read once, the token mixing (fp32) is written and read once, and the normalised
        prompts are written once.
        """
        tokens = self.batch * self.patches
        rows = self.batch * self.prompts
        size = self.dtype.itemsize
        matrix = 4 * self.prompts * self.patches
        return tokens * (self.width * size + 8) + matrix + rows * self.width * (2 * 4 + size)


def expert_plan(problem: ExpertProblem, target: Target = _SM_80) -> dict[str, Launch]:
    """Return the launches of a forward and a backward pass by name, on tensors without memory.

    The code that makes the real launches makes these.

    Args:
        problem: Shapes and dtype.
        target: Target to tune for.
    """
    batch, prompts, width = problem.batch, problem.prompts, problem.width
    rows, r = problem.prefix + problem.patches, problem.hidden_dim

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def param(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=problem.dtype)

    inner = [n - problem.kernel_size + 1 for n in problem.grid]
    weight = param(prompts, inner[0] * inner[1])
    kernel = param(1, 1, problem.kernel_size, problem.kernel_size)
    mixing_weight = empty(prompts, -(-problem.patches // 64) * 64)
    mixing_sum = empty(prompts)
    x, y = param(batch, rows, width), param(batch, rows, width)
    statistics, mixing = empty(3, batch, rows), empty(batch, prompts, width)
    out, row = param(batch, prompts, width), empty(batch, prompts)
    inputs = FeatureInputs(
        mixing,
        mixing_sum,
        norm_weight=param(width),
        norm_bias=param(width),
        projector_bias=param(prompts),
        channel_mask=empty(batch, width) if problem.dropout else None,
        down=param(r, width),
        up=param(width, r),
        hidden_mask=empty(batch, prompts, r) if problem.dropout else None,
    )
    launches = [
        fold_launch(weight, kernel, mixing_weight, mixing_sum, problem.grid),
        mix_launch(x, mixing_weight, statistics, mixing, problem.patches, target),
        features_launch(
            inputs, param(width), param(width), out, row, empty(batch, prompts), True, 1e-6, target
        ),
        *features_backward_launches(
            inputs, param(width), row, row, out, empty(*mixing.shape),
            empty(2, batch * prompts, r), empty(4, batch * prompts),
            empty(chunk_count(batch * prompts), 2 * r + 2, width), True, target,
        ),
        mix_backward_launch(
            x, mixing_weight, param(width), statistics, y, mixing, param(*x.shape),
            param(*x.shape), empty(chunk_count(batch), prompts, problem.patches), problem.patches,
            target,
        ),
        fold_backward_launch(
            weight, kernel, mixing_weight, mixing_sum, param(*weight.shape),
            empty(prompts, kernel.numel()), problem.grid,
        ),
    ]  # fmt: skip
    return {launch.name: launch for launch in launches}
