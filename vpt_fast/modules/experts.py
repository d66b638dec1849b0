"""VAPT's modules: prompt experts, which compute a block's prompts from the block's own input.

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv 2501.18936),
section 4. Convolution and token-wise projector are both linear over the patches, so they are folded
into one (p, gh * gw) matrix M, and there is no convolution. Fused blocks store no normalised copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.methods import VAPT, register_method
from vpt_fast.modules.block_info import BlockInfo
from vpt_fast.modules.hooks import hooks_version, is_watched
from vpt_fast.modules.prompt_module import PromptModule
from vpt_fast.modules.prompt_tokens import PromptTokens
from vpt_fast.ops.backend import in_full_precision, statistics_dtype
from vpt_fast.ops.block.parts import contiguous
from vpt_fast.ops.block.prompt_source import ExpertPrompts
from vpt_fast.ops.experts.operator import FeatureInputs, fold_convolution
from vpt_fast.ops.experts.reference import features
from vpt_fast.ops.tracing import is_transformed

EPS = 1e-5
"""Epsilon of the experts' LayerNorms."""


class FeatureProjector(nn.Module):
    """Feature projector that all blocks of one width share: up(dropout(relu(down(g)))).

    Args:
        width: Number D of channels of the blocks.
        hidden_dim: Number r of channels of the hidden layer.
        dropout: Probability of dropout in the hidden layer.
        like: Tensor with the device and dtype of the weights.
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
    """Raise ValueError unless a grid is the one that prompt experts were built for.

    Args:
        experts: Height and width of the experts' grid.
        grid: Height and width of the other grid.
        what: Owner of the other grid, for the message.
        of: Elements of the grid, for the message.
    """
    if tuple(grid) != tuple(experts):
        raise ValueError(
            f"the prompt experts mix a {experts[0]} x {experts[1]} grid of {of}, but {what} has "
            f"{grid[0]} x {grid[1]}; resize it to the size that the model was tuned with"
        )


class PromptExperts(PromptModule):
    """Prompts of one block, computed from its input.

    P = g + up(dropout(relu(down(g)))) with g = W vec(dropout(conv(LayerNorm(patches)))) + b; the
    paper's variant has neither the residual nor b.

    Args:
        method: Settings of the method.
        block: The block. Its owner, a model or a stage of a Swin, has the `prompt_projector`.
    """

    reads = "tokens"
    known_ahead = True  # its sources are made inside of a fused block

    def __init__(self, method: VAPT, block: BlockInfo) -> None:
        super().__init__()
        code = method.variant == "code"
        size, self.num_rows = method.kernel_size, method.num_prompts
        self.dropout = 0.0  # prompt dropout is in block 0 alone
        options: Any = {"device": block.like.device, "dtype": block.like.dtype}
        self.grid = (int(block.grid[0]), int(block.grid[1]))
        rows, columns = (n - size + 1 for n in self.grid)
        self.norm = nn.LayerNorm(block.width, eps=EPS, **options)
        self.conv = nn.Conv2d(1, 1, size, bias=False, **options)
        nn.init.normal_(self.conv.weight)
        self.mix = nn.Linear(rows * columns, method.num_prompts, bias=code, **options)
        if code:
            # The paper's variant has no residual: as relu'(0) = 0, its experts would never get a
            # gradient.
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)
        self.residual = code
        self.channel_dropout = method.channel_dropout
        # In a tuple, so that the owner does not become a submodule of its own prompts.
        self._owner = (block.owner,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the prompts (B, p, D) of a block's input x (B, N, D), before the block's norm1.

        Raises:
            ValueError: The input does not have the rows of the model's patch grid, or the experts'
                weights are on the meta device and x is not.
        """
        self._check_present(x)
        patches = self._patches(x.shape[1])
        weight, mixing_sum = self._folded()
        with in_full_precision(x):
            rows = x[:, x.shape[1] - patches :].to(weight.dtype)
            mixing = weight[:, :patches] @ F.layer_norm(rows, x.shape[-1:], eps=self.norm.eps)
            inputs = FeatureInputs(mixing, mixing_sum, *self._applied(x.shape[0]))
            return features(inputs, self.residual)

    def sources(
        self,
        x: Tensor,
        feature: Any = None,
        folded: tuple[Tensor, Tensor] | None = None,
        masks: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> tuple[ExpertPrompts, tuple[Tensor | None, ...]]:
        """Return the prompt source of a fused block, and its tensors.

        Args:
            x: Input (B, N, D) of the block; only its shape and device matter.
            feature: Nothing.
            folded: M and its row sums, folded from `folded_parts`; None to fold in the block.
            masks: Dropout masks, as `masks` returns them; None to draw them here.

        Raises:
            ValueError: If the number of rows does not fit the patch grid.
        """
        self._patches(x.shape[1])
        first = map(contiguous, self.folded_parts()) if folded is None else folded
        norm: Any = self._modules["norm"]
        source = ExpertPrompts(self.residual, self.grid, norm.eps, folded is not None)
        return source, (*first, *map(contiguous, self._applied(x.shape[0], masks)))

    # The methods below look modules and parameters up in their dictionaries: they run for every
    # block of every step, and nn.Module's attribute access is slow.

    def folded_parts(self) -> tuple[Tensor, Tensor]:
        """Return weights of token-wise projector (p, gh' * gw') and convolution (1, 1, K, K)."""
        modules: Any = self._modules
        return modules["mix"]._parameters["weight"], modules["conv"]._parameters["weight"]

    def dropouts(self) -> tuple[float, float]:
        """Return the dropout probabilities, of channels and hidden layer; 0 in eval mode."""
        projector: Any = self._owner[0]._modules["prompt_projector"]
        channels = self.channel_dropout if self.training else 0.0
        return channels, projector.dropout if projector.training else 0.0

    def mask_shapes(self, batch: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Return the shapes of channel mask (B, D) and hidden mask (B, p, r)."""
        projector: Any = self._owner[0]._modules["prompt_projector"]
        hidden_dim, width = projector._modules["down"]._parameters["weight"].shape
        return (batch, width), (batch, self.folded_parts()[0].shape[0], hidden_dim)

    def masks(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Draw channel mask (B, D) and hidden mask (B, p, r); None where nothing is dropped."""
        like = self.folded_parts()[0]
        channel_mask, hidden_mask = (
            dropout_mask(shape, dropout, like) if dropout else None
            for shape, dropout in zip(self.mask_shapes(batch), self.dropouts(), strict=True)
        )
        return channel_mask, hidden_mask

    def _applied(
        self, batch: int, masks: tuple[Tensor | None, Tensor | None] | None = None
    ) -> tuple[Any, ...]:
        """Return all fields of `FeatureInputs` except the first two."""
        self._refuse_hooks()
        modules: Any = self._modules
        norm, mix = modules["norm"]._parameters, modules["mix"]._parameters
        projector: Any = self._owner[0]._modules["prompt_projector"]
        down = projector._modules["down"]._parameters["weight"]
        up = projector._modules["up"]._parameters["weight"]
        channel_mask, hidden_mask = self.masks(batch) if masks is None else masks
        return (
            norm["weight"], norm["bias"], mix["bias"], channel_mask, down, up, hidden_mask,
        )  # fmt: skip

    def token_mixing(self) -> Tensor:
        """Return the mixing weight M as (p, gh, gw), of each patch in each prompt."""
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
        """Raise ValueError if the weights are on the meta device and x is not.

        Several modules' weights are combined, so they must be present at the same time.
        """
        if self.mix.weight.is_meta and not x.is_meta:
            raise ValueError(
                "the prompt experts' weights are on the meta device: where modules have their "
                "weights only while they are called (accelerate's cpu_offload), leave `prompt` of "
                "every block and `prompt_projector` out"
            )

    def _refuse_hooks(self) -> None:
        """Raise ValueError if a module that is never called carries a hook.

        The modules are searched again only after a hook was registered.
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


def add_projector(method: VAPT, block: BlockInfo) -> None:
    """Add the feature projector to the owner of a block with prompt experts.

    VAPT is published for ViT only; in its form for Swin the blocks of one width share a feature
    projector.
    """
    if block.index:
        block.owner.prompt_projector = FeatureProjector(
            block.width, method.hidden_dim, method.projector_dropout, block.like
        )


@register_method("vapt", VAPT, add_projector)
def new_vapt_prompts(method: VAPT, block: BlockInfo) -> PromptModule:
    """Return the module of a block: static prompts in block 0, prompt experts in later ones."""
    return PromptExperts(method, block) if block.index else PromptTokens(method, block)


def dropout_mask(shape: tuple[int, ...], dropout: float, like: Tensor) -> Tensor:
    """Return dropout factors, 0 or 1 / (1 - dropout), in fp32 at least, on `like`'s device."""
    if is_transformed():  # vmap cannot draw in place
        ones = torch.ones(shape, dtype=statistics_dtype(like.dtype), device=like.device)
        return F.dropout(ones, dropout)
    mask = torch.empty(shape, dtype=statistics_dtype(like.dtype), device=like.device)
    return mask.bernoulli_(1.0 - dropout).div_(1.0 - dropout) if dropout < 1 else mask.zero_()
