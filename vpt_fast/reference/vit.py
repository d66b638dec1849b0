"""The published formulation in eager PyTorch: prompt rows concatenated into timm's own blocks.

The formulation that vpt_fast is compared with. Nothing is skipped: prompt rows pass through all of
every block that they enter, with timm's fused scaled-dot-product attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpt_fast.kernels.attention.layouts import split
from vpt_fast.methods import VAPT, Method, PromptMethod, VPTDeep, VPTShallow, check_method
from vpt_fast.methods.baselines import Baseline, LinearProbe
from vpt_fast.models.add_prompts import block_infos, new_prompts, new_updates
from vpt_fast.models.attention_inputs import attention_tokens, projected_out
from vpt_fast.models.family import family_of
from vpt_fast.models.isotropic.inputs import block_inputs, table_of
from vpt_fast.models.isotropic.prompts_apart import attend_to_prompts
from vpt_fast.models.residual import add_branches
from vpt_fast.models.tuned import SHARED, blocks_of
from vpt_fast.modules.block_info import init_bound
from vpt_fast.reference.swin import ConcatenatedWindows, use_fused_attention

Model = TypeVar("Model", bound=nn.Module)

Rows = Callable[[int, Tensor], Tensor]
"""Function of a block's index and input (B, N, D) without prompts; returns its prompts
(B or 1, p, D)."""


class _Concatenated(nn.Module):
    model: Any

    def train(self: Model, mode: bool = True) -> Model:
        """Set the mode of the prompts' dropouts; the model stays in eval mode."""
        nn.Module.train(self, mode)
        self.get_submodule("model").eval()
        return self


class ConcatenatedPrompts(_Concatenated):
    """VPT-Shallow and VPT-Deep as they are usually run: prompt rows in the sequence.

    Prompts of a block replace the prompt rows of its input. Without prompts of the next block these
    rows pass through it as tokens; they are dropped before the final norm.

    Args:
        model: Timm vision transformer; it is frozen except for its head.
        method: Method without projection, sharing and pooling of prompts.

    Attributes:
        prompts: Parameter (prompted blocks, p, D).

    Raises:
        ValueError: If `method` has a field that is not in this formulation.
    """

    def __init__(self, model: VisionTransformer | Eva, method: VPTShallow | VPTDeep) -> None:
        super().__init__()
        _check_plain(method)
        self.model: Any = freeze(model)
        self.dropout = method.dropout
        self.blocks = method.prompted_blocks(len(self.model.blocks))
        self.prompts = _tokens(self.model, len(self.blocks), method.num_prompts)

    def rows(self) -> Rows:
        """Return the function that gives the prompts of one forward pass."""
        # Unbound once: the gradient of a slice for each block would have the size of all blocks.
        own = dict(zip(self.blocks, self.prompts.unbind(), strict=True))

        def rows_of(index: int, x: Tensor) -> Tensor:
            if not (self.dropout and self.training):
                return own[index][None]
            return F.dropout(own[index].expand(len(x), -1, -1), self.dropout)

        return rows_of

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 3, height, width)."""
        vit, count, rows_of = self.model, 0, self.rows()
        x, tables = block_inputs(vit, images)
        for index, block in enumerate(vit.blocks):
            if index in self.blocks:
                rows = rows_of(index, x).expand(len(x), -1, -1)
                x = _replaced(x, rows, vit, count)
                count = rows.shape[1]
            x = _through(block, x, table_of(tables, index), count)
        return _classified(vit, x, count)


class ConcatenatedExperts(_Concatenated):
    """VAPT as its equations are written: a normalised copy, a grid, a convolution, concatenation.

    Initial values are PyTorch's own, not the published ones.

    Args:
        model: Timm vision transformer; it is frozen except for its head.
        method: Sizes, dropouts and variant.
    """

    def __init__(self, model: VisionTransformer | Eva, method: VAPT) -> None:
        super().__init__()
        self.model: Any = freeze(model)
        self.method = method
        vit = self.model
        width, self.grid = vit.embed_dim, vit.patch_embed.grid_size
        count, kernel = len(vit.blocks) - 1, method.kernel_size
        positions = (self.grid[0] - kernel + 1) * (self.grid[1] - kernel + 1)
        like = _weight(vit)
        own: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        plain = {"bias": False, **own}
        mixing = {"bias": method.variant == "code", **own}
        self.tokens = _tokens(vit, method.num_prompts)
        self.norms = nn.ModuleList([nn.LayerNorm(width, **own) for _ in range(count)])
        self.convs = nn.ModuleList([nn.Conv2d(1, 1, kernel, **plain) for _ in range(count)])
        self.mixes = nn.ModuleList(
            [nn.Linear(positions, method.num_prompts, **mixing) for _ in range(count)]
        )
        self.down = nn.Linear(width, method.hidden_dim, **plain)
        self.up = nn.Linear(method.hidden_dim, width, **plain)

    def experts(self, index: int, x: Tensor) -> Tensor:
        """Return the prompts (B, p, D) of block `index` >= 1 from its input x (B, N, D)."""
        batch, _, width = x.shape
        y = self.norms[index - 1](x)[:, self.model.num_prefix_tokens :]
        y = y.transpose(1, 2).reshape(batch * width, 1, *self.grid)
        y = self.convs[index - 1](y).view(batch, width, -1)
        y = F.dropout1d(y, self.method.channel_dropout, self.training)
        g = self.mixes[index - 1](y).transpose(1, 2)
        h = F.dropout(self.down(g).relu(), self.method.projector_dropout, self.training)
        return g + self.up(h) if self.method.variant == "code" else self.up(h)

    def rows(self) -> Rows:
        """Return the function that gives the prompts of one forward pass."""
        return self._rows_of

    def _rows_of(self, index: int, x: Tensor) -> Tensor:
        if index:
            return self.experts(index, x)
        rows = self.tokens.expand(len(x), -1, -1)
        return F.dropout(rows, self.method.dropout, self.training)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 3, height, width)."""
        vit, count, rows_of = self.model, len(self.tokens), self.rows()
        x, tables = block_inputs(vit, images)
        for index, block in enumerate(vit.blocks):
            rows = rows_of(index, _stripped(x, vit, count) if index else x)
            x = _replaced(x, rows, vit, count if index else 0)
            x = _through(block, x, table_of(tables, index), count)
        return _classified(vit, x, count)


class ConcatenatedMethod(_Concatenated):
    """Any prompt method: its prompts in the sequence, its keys and values beside the tokens' own.

    Args:
        model: Timm vision transformer; it is frozen except for its head.
        method: Method whose modules make the prompts.

    Attributes:
        prompts: Module of each prompted block, by its index.
        shared: Module that they share, or None.
    """

    def __init__(self, model: VisionTransformer | Eva, method: PromptMethod) -> None:
        super().__init__()
        self.model: Any = freeze(model)
        family: Any = family_of(model)
        infos = block_infos(model, family)
        self.prompts, self.updates = (
            nn.ModuleDict({str(index): module for index, module in made(infos, method).items()})
            for made in (new_prompts, new_updates)
        )
        self.shared = self.model._modules.pop(SHARED, None)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 3, height, width)."""
        vit, count = self.model, 0
        x, tables = block_inputs(vit, images)
        reads = any(module.reads == "feature" for module in self.prompts.children())
        feature = self.shared(x) if reads and self.shared is not None else None
        for index, block in enumerate(vit.blocks):
            kv, rope = None, table_of(tables, index)
            module: Any = self.prompts._modules.get(str(index))
            if module is not None and module.attends_apart:
                tokens = attend_to_prompts(block, module, _stripped(x, vit, count), rope, feature)
                live = vit.num_prefix_tokens + count
                x = _replaced(tokens, x[:, vit.num_prefix_tokens : live], vit, 0)
            elif module is not None:
                x = _stripped(x, vit, count)
                rows, kv = module.made(x, feature)
                count = 0 if rows is None else rows.shape[1]
                x = x if rows is None else _replaced(x, rows.expand(len(x), -1, -1), vit, 0)
            entered = x
            x = _through(block, x, rope, count) if kv is None else _beside(block, x, rope, kv)
            if str(index) in self.updates:
                rows = (t[:, vit.num_prefix_tokens :][:, :count] for t in (x, entered))
                x = _replaced(x, self.updates[str(index)](*rows), vit, count)
        return _classified(vit, x, count)


def concatenated(model: VisionTransformer | Eva | SwinTransformer, method: Method) -> nn.Module:
    """Return the published formulation of a timm model with `method`; freeze `model` in place.

    Args:
        model: Plain timm model.
        method: Prompt method or `LinearProbe`.

    Returns:
        Module around `model`, in training mode; `model` itself if no block has prompts.

    Raises:
        TypeError: If `method` is not a method.
        ValueError: If `method` has a field that is not in this formulation, or trains a backbone or
            layers of its own instead of prompts.
    """
    method = check_method(method)
    check_compared(method)
    if isinstance(method, Baseline) or not method.prompted_blocks(len(blocks_of(model))):
        return freeze(model)
    if isinstance(model, SwinTransformer):
        return _concatenated_windows(model, method)
    if type(method) is VAPT:
        return ConcatenatedExperts(model, method)
    if type(method) in (VPTShallow, VPTDeep):
        return ConcatenatedPrompts(model, method)  # type: ignore[arg-type]
    return ConcatenatedMethod(model, method)


def _concatenated_windows(model: SwinTransformer, method: PromptMethod) -> ConcatenatedWindows:
    if not isinstance(method, VPTShallow | VPTDeep):
        raise ValueError(
            f"{method.name} has no published form on Swin to compare with; compare vpt-shallow or "
            "vpt-deep"
        )
    _check_plain(method)
    return ConcatenatedWindows(freeze(model), method)


def _check_plain(method: VPTShallow | VPTDeep) -> None:
    for field in ("project_dim", "shared", "pool_prompts"):
        if value := getattr(method, field):
            raise ValueError(f"{field}={value!r} is not in the eager baseline; leave it out")


def check_compared(method: Method) -> None:
    """Raise ValueError for baselines except `LinearProbe`: they have no second implementation."""
    if isinstance(method, Baseline) and not isinstance(method, LinearProbe):
        raise ValueError(
            f"method {method.name!r} has no prompts, and no second implementation; compare linear "
            "or a method with prompts"
        )


def freeze(model: Model) -> Model:
    """Freeze everything except the classifiers, in place, and set eval mode."""
    model.requires_grad_(False)
    classifier: Any = model
    heads = classifier.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.requires_grad_(True)
    return model.eval()


def without_prompts(model: Model, first: int = 0) -> Model:
    """Freeze a model in place, with a gradient through its blocks from `first` on; return it.

    The norm1 of block `first` requires a gradient, so that gradients flow as they do with prompts.
    A SwinTransformer is set to PyTorch's fused attention, the default of other models.
    """
    freeze(model)
    if isinstance(model, SwinTransformer):
        use_fused_attention(model)
    require_gradient(model, first)
    return model


def require_gradient(model: Any, first: int) -> None:
    """Make the norm1 of block `first` require a gradient."""
    blocks_of(model)[first].norm1.requires_grad_(True)


def _weight(model: Any) -> Tensor:
    """Return a weight that has the device and dtype of the model."""
    return model.blocks[0].attn.proj.weight


def _tokens(model: Any, *shape: int) -> nn.Parameter:
    """Return prompts (*shape, D), initialised as in VPT."""
    width = model.embed_dim
    bound = init_bound(model.patch_embed.patch_size, width)
    return nn.Parameter(_weight(model).new_empty(*shape, width).uniform_(-bound, bound))


def _through(block: Any, x: Tensor, rope: Tensor | None, count: int) -> Tensor:
    """Return the output of timm's block; its attention rotates none of `count` prompt rows."""
    if rope is None:
        return block(x)
    block.attn.num_prefix_tokens += count
    try:
        return block(x, rope=rope)
    finally:
        block.attn.num_prefix_tokens -= count


def _beside(block: Any, x: Tensor, rope: Tensor | None, kv: Tensor) -> Tensor:
    """Return the output of timm's block, whose attention also reads keys and values.

    Args:
        block: timm's block.
        x: Rows (B, N, D).
        rope: Table of the rotary position embedding of the last rows, or None.
        kv: Keys and values (B or 1, n, 2, H, d).
    """
    y = block.norm1(x)
    tokens = attention_tokens(block.attn, y, None, rope, rope)
    q, *others = (t.transpose(1, 2) for t in split(tokens))
    more = kv.expand(len(x), *[-1] * 4).transpose(1, 3).unbind(2)
    k, v = (torch.cat([*pair], 2) for pair in zip(more, others, strict=True))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return add_branches(block, x, projected_out(block.attn, out, y))


def _stripped(x: Tensor, vit: Any, count: int) -> Tensor:
    """Return x (B, N + count, D) without the prompt rows after its prefix tokens."""
    prefix = vit.num_prefix_tokens
    return torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)


def _replaced(x: Tensor, rows: Tensor, vit: Any, count: int) -> Tensor:
    """Return x (B, N + count, D) with `rows` (B, p, D) in place of its `count` prompt rows."""
    prefix = vit.num_prefix_tokens
    return torch.cat([x[:, :prefix], rows, x[:, prefix + count :]], dim=1)


def _classified(vit: Any, x: Tensor, count: int) -> Tensor:
    return vit.forward_head(vit.norm(_stripped(x, vit, count)))
