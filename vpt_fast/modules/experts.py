"""VAPT's modules: prompt experts, which make a block's prompts from the block's own input.

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv 2501.18936),
section 4. Convolution and token-wise projector are both linear over the patches, so they are used
as one (p, gh * gw) matrix, and no grid, normalised copy or convolution output is ever made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.methods import VAPT
from vpt_fast.modules.hooks import hooks_version, is_watched
from vpt_fast.ops.backend import in_full_precision, statistics_dtype
from vpt_fast.ops.block.parts import contiguous
from vpt_fast.ops.block.prompt_source import ExpertPrompts
from vpt_fast.ops.experts.operator import FeatureInputs, fold_convolution, project_features
from vpt_fast.ops.tracing import is_transformed

EPS = 1e-5
"""Epsilon of the experts' LayerNorms."""


class FeatureProjector(nn.Module):
    """The feature projector that all blocks of one width share: up(dropout(relu(down(g)))).

    Args:
        width: channels D of the blocks.
        hidden_dim: channels r of the hidden layer.
        dropout: of the hidden layer.
        like: tensor whose device and dtype the weights get.
    """

    def __init__(self, width: int, hidden_dim: int, dropout: float, like: Tensor) -> None:
        super().__init__()
        options: Any = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.down = nn.Linear(width, hidden_dim, **options)
        self.up = nn.Linear(hidden_dim, width, **options)
        self.dropout = dropout

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


def check_grid(
    experts: tuple[int, int], grid: tuple[int, ...], what: str = "this image", of: str = "patches"
) -> None:
    """Raise ValueError where prompt experts meet another grid than the one they were made for.

    Args:
        experts: Height and width of the experts' grid.
        grid: Height and width of the grid that they meet.
        what: What has the grid.
        of: What the grid is of.
    """
    if tuple(grid) != tuple(experts):
        raise ValueError(
            f"the prompt experts mix a {experts[0]} x {experts[1]} grid of {of}, but {what} has "
            f"{grid[0]} x {grid[1]}; resize it to the size that the model was tuned with"
        )


class PromptExperts(nn.Module):
    """Prompts of one block, made from its input.

    P = g + up(dropout(relu(down(g)))) with g = W vec(dropout(conv(LayerNorm(patches)))) + b; in the
    paper's variant without the residual and without b.

    Args:
        method: the method's settings.
        owner: the module whose `prompt_projector` is used, and before whose patches
            `num_prefix_tokens` stand (none, if it has no such attribute): the model, or Swin's
            stage.
        grid: height and width of the block's patch grid.
        width: channels D of the block.
        like: tensor whose device and dtype the weights get.
    """

    def __init__(
        self, method: VAPT, owner: Any, grid: tuple[int, int], width: int, like: Tensor
    ) -> None:
        super().__init__()
        code = method.variant == "code"
        size = method.kernel_size
        options: Any = {"device": like.device, "dtype": like.dtype}
        self.grid = (int(grid[0]), int(grid[1]))
        rows, columns = (n - size + 1 for n in self.grid)
        self.norm = nn.LayerNorm(width, eps=EPS, **options)
        self.conv = nn.Conv2d(1, 1, size, bias=False, **options)
        nn.init.normal_(self.conv.weight)
        self.mix = nn.Linear(rows * columns, method.num_prompts, bias=code, **options)
        if code:
            # Not so for the paper's variant: without the residual, relu'(0) = 0 would leave
            # every expert without a gradient for ever.
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)
        self.residual = code
        self.channel_dropout = method.channel_dropout
        # In a tuple the owner is no submodule of its own prompts.
        self._owner = (owner,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the prompts (B, p, D) of a block's input x (B, N, D), before the block's norm1.

        Raises:
            ValueError: The input does not have the rows of the model's patch grid, or the experts'
                weights are on the meta device and x is not.
        """
        self._check_present(x)
        patches = self._patches(x.shape[1])
        matrix, mixing_sum = self._folded()
        with in_full_precision(x):
            rows = x[:, x.shape[1] - patches :].to(matrix.dtype)
            mixed = matrix[:, :patches] @ F.layer_norm(rows, x.shape[-1:], eps=self.norm.eps)
        inputs = FeatureInputs(mixed, mixing_sum, *self._applied(x.shape[0]))
        return project_features(inputs, self.residual, None, matrix.dtype)

    def sources(
        self,
        x: Tensor,
        folded: tuple[Tensor, Tensor] | None = None,
        masks: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> tuple[ExpertPrompts, tuple[Tensor | None, ...]]:
        """The source of a fused block's prompts, and its tensors.

        Args:
            x: the block's input (B, N, D), of which only the shape and the device matter.
            folded: what `folded_parts` are folded to; None to fold them in the block.
            masks: as `masks` draws them, which it does here if they are None.

        Raises:
            ValueError: the input does not have the rows of the model's patch grid.
        """
        self._patches(x.shape[1])
        first = map(contiguous, self.folded_parts()) if folded is None else folded
        norm: Any = self._modules["norm"]
        source = ExpertPrompts(self.residual, self.grid, norm.eps, folded is not None)
        return source, (*first, *map(contiguous, self._applied(x.shape[0], masks)))

    # Below, modules and parameters are looked up in their dictionaries: this runs for every block
    # of every step, and nn.Module's attribute access is slow.

    def folded_parts(self) -> tuple[Tensor, Tensor]:
        """Weight of the token-wise projector (p, gh' * gw'), and the convolution (1, 1, K, K)."""
        modules: Any = self._modules
        return modules["mix"]._parameters["weight"], modules["conv"]._parameters["weight"]

    def dropouts(self) -> tuple[float, float]:
        """Probabilities at work: of whole channels, and in the projector's hidden layer."""
        projector: Any = self._owner[0]._modules["prompt_projector"]
        channels = self.channel_dropout if self.training else 0.0
        return channels, projector.dropout if projector.training else 0.0

    def mask_shapes(self, batch: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Of the masks of the channels (B, D) and of the hidden layer (B, p, r)."""
        projector: Any = self._owner[0]._modules["prompt_projector"]
        hidden_dim, width = projector._modules["down"]._parameters["weight"].shape
        return (batch, width), (batch, self.folded_parts()[0].shape[0], hidden_dim)

    def masks(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Dropout masks of the channels (B, D) and of the hidden layer (B, p, r); None for none."""
        like = self.folded_parts()[0]
        channels, hidden = (
            dropout_mask(shape, dropout, like) if dropout else None
            for shape, dropout in zip(self.mask_shapes(batch), self.dropouts(), strict=True)
        )
        return channels, hidden

    def _applied(
        self, batch: int, masks: tuple[Tensor | None, Tensor | None] | None = None
    ) -> tuple[Any, ...]:
        """What is applied to the mix: the fields of `FeatureInputs` but the first two."""
        self._refuse_hooks()
        modules: Any = self._modules
        norm, mix = modules["norm"]._parameters, modules["mix"]._parameters
        projector: Any = self._owner[0]._modules["prompt_projector"]
        down = projector._modules["down"]._parameters["weight"]
        up = projector._modules["up"]._parameters["weight"]
        channels, hidden = self.masks(batch) if masks is None else masks
        return norm["weight"], norm["bias"], mix["bias"], channels, down, up, hidden

    def token_mixing(self) -> Tensor:
        """The weight of every patch in every prompt before the feature projector, (p, gh, gw)."""
        count = self.grid[0] * self.grid[1]
        return self._folded()[0][:, :count].unflatten(1, self.grid)

    def _patches(self, rows: int) -> int:
        count = self.grid[0] * self.grid[1]
        prefix = getattr(self._owner[0], "num_prefix_tokens", 0)
        if rows != prefix + count:
            raise ValueError(
                f"the prompt experts mix {count} patches ({self.grid[0]} x {self.grid[1]}) after "
                f"{prefix} prefix tokens, but this block's input has {rows} rows"
            )
        return count

    def _check_present(self, x: Tensor) -> None:
        """Experts put the weights of several modules together, which so must be there at once.

        Raises:
            ValueError: they are on the meta device, and x is not.
        """
        if self.mix.weight.is_meta and not x.is_meta:
            raise ValueError(
                "the prompt experts' weights are on the meta device: where modules have their "
                "weights only while they are called (accelerate's cpu_offload), leave `prompt` of "
                "every block and `prompt_projector` out"
            )

    def _refuse_hooks(self) -> None:
        """Refuse hooks on what is never called, looked for when somebody has registered one.

        Raises:
            ValueError: one of the modules whose weights are put together is hooked.
        """
        if torch.compiler.is_compiling():
            return
        version = hooks_version()
        if version == self.__dict__.get("_unhooked"):
            return
        if is_watched(*self.children(), self._owner[0].prompt_projector):
            raise ValueError(
                "a part of the prompt experts (norm, conv, mix, prompt_projector) is hooked, but "
                "their weights are put together and no part is called; hook `prompt` of the block"
            )
        self.__dict__["_unhooked"] = version

    def _folded(self) -> tuple[Tensor, Tensor]:
        return fold_convolution(self.mix.weight, self.conv.weight, self.grid)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, channel_dropout={self.channel_dropout}, residual={self.residual}"


def dropout_mask(shape: tuple[int, ...], dropout: float, like: Tensor) -> Tensor:
    """Dropout's factors: 0, or 1 / (1 - dropout); fp32 at least, on the device of `like`."""
    if is_transformed():  # vmap draws for each image, but not in place
        ones = torch.ones(shape, dtype=statistics_dtype(like.dtype), device=like.device)
        return F.dropout(ones, dropout)
    kept = torch.empty(shape, dtype=statistics_dtype(like.dtype), device=like.device)
    return kept.bernoulli_(1.0 - dropout).div_(1.0 - dropout) if dropout < 1 else kept.zero_()
