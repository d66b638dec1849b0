"""A frozen block after its norm1, as one autograd function.

    x, norm1(x) -> x' = x + ls1 * proj(attention(norm1(x), prompts)), MLP(norm2(x'))

The last sum is left to whoever reads it: the next block adds it in the pass that normalises it.
Backward is written out, so that nothing is computed for weights that are frozen, gradients are
added where they are made, and the mode of `memory_modes` decides what is kept and what is made
again. Visual Prompt Tuning (arXiv 2203.12119), section 3.2, without the prompts' dead rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpt_fast.ops.activation import activation, activation_backward
from vpt_fast.ops.attention import attention_operator, attention_operator_backward
from vpt_fast.ops.backend import in_full_precision, uses_kernels
from vpt_fast.ops.block_entry import Norm
from vpt_fast.ops.prompt_source import PromptSource
from vpt_fast.ops.residual_norm import residual_norm, residual_norm_backward
from vpt_fast.ops.window_attention_rows import Windows, attend_in_windows, windows_gradients


class BlockWeights(NamedTuple):
    """The frozen weights of a block, as nn.Linear and nn.LayerNorm have them; biases may be None.

    D channels, H * d = A channels of attention, C channels of the MLP's hidden layer.
    """

    norm1_weight: Tensor | None  # (D,)
    norm1_bias: Tensor | None
    qkv_weight: Tensor  # (3 A, D)
    qkv_bias: Tensor | None
    proj_weight: Tensor  # (D, A)
    proj_bias: Tensor | None
    scale1: Tensor | None  # (D,), LayerScale
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    fc1_weight: Tensor  # (C, D)
    fc1_bias: Tensor | None
    fc2_weight: Tensor  # (D, C)
    fc2_bias: Tensor | None
    position_bias: Tensor | None = None  # (positions, H), of attention in windows


@dataclass(frozen=True)
class BlockConfig:
    """What of a block is no tensor.

    Attributes:
        heads: H.
        scale: factor of the attention scores.
        eps1, eps2: of norm1 and norm2.
        activation: one of `vpt_fast.ops.activation.KINDS`.
        memory: one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
        source: of the block's prompts, or None.
        windows: where attention is in windows of an image's rows, or None.
    """

    heads: int
    scale: float
    eps1: float
    eps2: float
    activation: str
    memory: str
    source: PromptSource | None
    windows: Windows | None = None

    def keeps(self, keys: Tensor) -> bool:
        """Whether the prompts' keys (B or 1, p, 2, H, d) are kept for backward.

        Those that the batch shares weigh nothing beside its tokens.
        """
        if self.source is None or not self.source.keeps_keys:
            return False
        return self.memory == "speed" or keys.shape[0] == 1


class _Kept(NamedTuple):
    """What backward needs of forward; None for what it makes again."""

    x: Tensor | None = None  # (B, N, D), the block's input
    keys: Tensor | None = None  # (B or 1, p, 2, H, d), the prompts'
    prompt_statistics: tuple[Tensor, ...] = ()
    qkv: Tensor | None = None  # (B, N, 3, H, d)
    out: Tensor | None = None  # (B, N, A)
    lse: Tensor | None = None  # (B, H, N)
    middle: Tensor | None = None  # (B, N, D), x'
    statistics: Tensor | None = None  # (2, B, N), of x'
    hidden: Tensor | None = None  # (B, N, C), fc1's output


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) through a Linear in x's dtype, as one matrix product."""
    bias = None if bias is None else bias.to(x.dtype)
    rows = F.linear(x.flatten(0, -2), weight.to(x.dtype), bias)
    return rows.view(*x.shape[:-1], weight.shape[0])


def _linear_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient (..., in) of a Linear's input from that of its output (..., out)."""
    rows = torch.mm(grad.flatten(0, -2), weight.to(grad.dtype))
    return rows.view(*grad.shape[:-1], weight.shape[1])


class BlockSteps:
    """The steps of a block, forward and backward; plain functions of tensors."""

    def __init__(self, config: BlockConfig, weights: BlockWeights, dtype: torch.dtype) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.norm1 = Norm(weights.norm1_weight, weights.norm1_bias, config.eps1)

    def normalise(self, x: Tensor) -> Tensor:
        return residual_norm(x, None, None, *self.norm1, None, self.dtype)[1]

    def prompt_keys(self, sources: tuple[Any, ...]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Keys and values (B or 1, p, 2, H, d) of the prompts, and their norm1's statistics."""
        if self.config.source is None:
            return None, ()
        prompts, statistics = self.config.source.make(sources, self.norm1, self.dtype)
        width = self.weights.qkv_weight.shape[0] // 3
        bias = None if self.weights.qkv_bias is None else self.weights.qkv_bias[width:]
        keys = _linear(prompts, self.weights.qkv_weight[width:], bias)
        return keys.unflatten(-1, (2, self.config.heads, -1)), statistics

    def prompt_gradients(
        self, sources: tuple[Any, ...], statistics: tuple[Tensor, ...], grad_keys: Tensor
    ) -> list[Tensor | None]:
        source = self.config.source
        if source is None:
            return []
        width = self.weights.qkv_weight.shape[0] // 3
        grad = _linear_backward(grad_keys.flatten(2), self.weights.qkv_weight[width:])
        return source.gradients(sources, self.norm1, statistics, grad)

    def project(self, y: Tensor) -> Tensor:
        qkv = _linear(y, self.weights.qkv_weight, self.weights.qkv_bias)
        return qkv.unflatten(-1, (3, self.config.heads, -1))

    def attend(self, qkv: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        scale, windows = self.config.scale, self.config.windows
        if windows is None:
            return attention_operator([qkv], [] if keys is None else [keys], scale)
        bias = _there(self.weights.position_bias)
        return attend_in_windows(windows, qkv, self.weights.qkv_bias, bias, keys, scale)

    def attention_gradients(
        self, full: _Kept, grad_out: Tensor, needs_tokens: bool, needs_prompts: bool
    ) -> list[Tensor]:
        """Gradients of qkv and of the prompts' keys, those that are asked for."""
        qkv, out, lse = _there(full.qkv), _there(full.out), _there(full.lse)
        scale, windows = self.config.scale, self.config.windows
        if windows is None:
            return attention_operator_backward(
                [qkv], [] if full.keys is None else [full.keys], out, lse, grad_out, scale,
                needs_tokens, needs_prompts,
            )  # fmt: skip
        bias = _there(self.weights.position_bias)
        return windows_gradients(
            windows, qkv, self.weights.qkv_bias, bias, full.keys, out, lse, grad_out, scale,
            needs_tokens, needs_prompts,
        )  # fmt: skip

    def add_attention(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x', norm2(x') and the row statistics of x'."""
        w = self.weights
        branch = _linear(out, w.proj_weight, w.proj_bias)
        return residual_norm(
            x, branch, w.scale1, w.norm2_weight, w.norm2_bias, self.config.eps2, None, self.dtype
        )

    def normalise_middle(self, middle: Tensor) -> tuple[Tensor, Tensor]:
        """norm2(x') and the row statistics of x'."""
        w = self.weights
        return residual_norm(
            middle, None, None, w.norm2_weight, w.norm2_bias, self.config.eps2, None, self.dtype
        )[1:]

    def _bias_apart(self, rows: Tensor) -> Tensor | None:
        """fc1's bias, where the kernel of the activation adds it."""
        return self.weights.fc1_bias if uses_kernels(rows) else None

    def expand(self, y: Tensor) -> Tensor:
        bias = None if uses_kernels(y) else self.weights.fc1_bias
        return _linear(y, self.weights.fc1_weight, bias)

    def contract(self, hidden: Tensor) -> Tensor:
        active = activation(hidden, self._bias_apart(hidden), self.config.activation)
        return _linear(active, self.weights.fc2_weight, self.weights.fc2_bias)

    def mlp_gradient(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Gradient of norm2(x') from that of the MLP's output."""
        grad = _linear_backward(grad.contiguous(), self.weights.fc2_weight)
        activation_backward(hidden, self._bias_apart(hidden), grad, self.config.activation)
        return _linear_backward(grad, self.weights.fc1_weight)

    def forward(
        self, x: Tensor, y: Tensor, sources: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, _Kept]:
        memory = self.config.memory
        keys, prompt_statistics = self.prompt_keys(sources)
        qkv = self.project(y)
        out, lse = self.attend(qkv, keys)
        middle, y, statistics = self.add_attention(x, out)
        hidden = self.expand(y)
        result = self.contract(hidden)
        kept = _Kept(x=x)
        if memory in ("speed", "balanced"):
            kept = _Kept(qkv=qkv, out=out, lse=lse, middle=middle, statistics=statistics)
        elif memory == "lean":
            kept = _Kept(x=x, out=out, lse=lse, middle=middle, statistics=statistics)
        if memory == "speed":
            kept = kept._replace(hidden=hidden)
        if keys is not None and self.config.keeps(keys):
            kept = kept._replace(keys=keys, prompt_statistics=prompt_statistics)
        return middle, result, kept

    def made_again(self, kept: _Kept, sources: tuple[Any, ...]) -> _Kept:
        """What was not kept, from what was."""
        keys, prompt_statistics = kept.keys, kept.prompt_statistics
        if keys is None:
            keys, prompt_statistics = self.prompt_keys(sources)
        qkv, out, lse, middle, statistics = kept[3:8]
        y = None
        if qkv is None:
            qkv = self.project(self.normalise(_there(kept.x)))
        if out is None or lse is None:
            out, lse = self.attend(qkv, keys)
        if middle is None:
            middle, y, statistics = self.add_attention(_there(kept.x), out)
        hidden = kept.hidden
        if hidden is None:
            hidden = self.expand(self.normalise_middle(middle)[0] if y is None else y)
        return _Kept(kept.x, keys, prompt_statistics, qkv, out, lse, middle, statistics, hidden)

    def backward(
        self,
        kept: _Kept,
        sources: tuple[Any, ...],
        grad_middle: Tensor | None,
        grad_result: Tensor | None,
        needs_tokens: bool,
        needs_prompts: bool,
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Gradients of x, of norm1(x) and of the prompts' tensors."""
        full = self.made_again(kept, sources)
        branch = self._middle_gradient(full, grad_middle, grad_result)
        grad_x, grad_branch = branch[0], branch[-1]
        grad_out = _linear_backward(grad_branch, self.weights.proj_weight)
        del grad_branch
        grads = self.attention_gradients(full, grad_out, needs_tokens, needs_prompts)
        grad_y = None
        if needs_tokens:
            grad_y = _linear_backward(grads[0].flatten(2), self.weights.qkv_weight)
        prompt_grads: list[Tensor | None] = [None for _ in sources]
        if needs_prompts:
            prompt_grads = self.prompt_gradients(sources, full.prompt_statistics, grads[-1])
        return grad_x, grad_y, prompt_grads

    def _middle_gradient(
        self, full: _Kept, grad_middle: Tensor | None, grad_result: Tensor | None
    ) -> list[Tensor]:
        """[gradient of x'], and what of it attention's branch gets where that is not the same."""
        w, middle = self.weights, _there(full.middle)
        apart = w.scale1 is not None or middle.dtype != self.dtype
        if grad_result is not None:
            grad = self.mlp_gradient(grad_result, _there(full.hidden))
            return residual_norm_backward(
                middle, _there(full.statistics), w.norm2_weight, w.scale1, grad, grad_middle,
                self.dtype if apart else None,
            )  # fmt: skip
        grad = _there(grad_middle).to(middle.dtype)
        branch = grad if w.scale1 is None else grad * w.scale1
        return [grad, branch.to(self.dtype)]


def _there(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("a tensor that backward needs was neither kept nor made again")
    return tensor


class _Body(torch.autograd.Function):
    @staticmethod
    def forward(ctx, config, x, y, *tensors):  # type: ignore[no-untyped-def]
        count = len(BlockWeights._fields)
        weights, sources = BlockWeights(*tensors[:count]), tensors[count:]
        middle, result, kept = BlockSteps(config, weights, y.dtype).forward(x, y, sources)
        ctx.config, ctx.dtype = config, y.dtype
        ctx.set_materialize_grads(False)
        flat = [t for t in kept if not isinstance(t, tuple)]
        ctx.save_for_backward(*tensors, *flat, *kept.prompt_statistics)
        return middle, result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_middle, grad_result):  # type: ignore[no-untyped-def]
        count = len(BlockWeights._fields)
        number = len(ctx.needs_input_grad) - 3
        every = ctx.saved_tensors  # once: under activation checkpointing it may be read only once
        tensors, saved = every[:number], every[number:]
        flat, statistics = saved[: len(_Kept._fields) - 1], saved[len(_Kept._fields) - 1 :]
        kept = _Kept(flat[0], flat[1], tuple(statistics), *flat[2:])
        if grad_middle is None and grad_result is None:
            return (None,) * len(ctx.needs_input_grad)
        with in_full_precision(tensors[2]):
            block = BlockSteps(ctx.config, BlockWeights(*tensors[:count]), ctx.dtype)
            grad_x, grad_y, grads = block.backward(
                kept, tensors[count:], grad_middle, grad_result,
                ctx.needs_input_grad[2], any(ctx.needs_input_grad[3 + count :]),
            )  # fmt: skip
        grad_x = grad_x if ctx.needs_input_grad[1] else None
        return None, grad_x, grad_y, *[None] * count, *grads


def run_block(
    config: BlockConfig,
    x: Tensor,
    y: Tensor,
    weights: BlockWeights,
    sources: tuple[Tensor | None, ...] = (),
) -> tuple[Tensor, Tensor]:
    """A frozen block from its normalised input on, but for its last sum.

    Args:
        config: what is no tensor.
        x: the block's input (B, N, D).
        y: norm1(x), (B, N, D), in the dtype that the block computes in.
        weights: frozen; they get no gradients.
        sources: the tensors of `config.source`.

    Returns:
        x' (B, N, D), the sum after attention, in x's dtype or a wider one, and MLP(norm2(x'))
        (B, N, D) in y's, without LayerScale. The block's output is x' + ls2 * MLP(norm2(x')).
    """
    with in_full_precision(x):
        return _Body.apply(config, x, y, *weights, *sources)
