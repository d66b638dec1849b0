"""timm's WindowAttention and Swin block with prompts: the classes that tuned ones are given.

In VPT-Deep a prompt is a key and a value that every window of its image reads, and the block is
(B, H, W, D) -> (B, H, W, D) like the one it replaces: nothing is rolled, padded or cut. Live prompt
rows (VPT-Shallow, a prompted block before an unprompted one) pass beside the image.
"""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vpt_fast.models.attention_inputs import check_attention, projected_kv, reads_plainly
from vpt_fast.models.fusion import fused_block
from vpt_fast.models.fusion.fused_block import Fused, Use, own_sources
from vpt_fast.models.prompt_rows import LiveRows, PromptRows
from vpt_fast.models.recompute import in_mode, recomputed
from vpt_fast.models.residual import add_branches
from vpt_fast.models.swin.windows import attend_beside, is_plain_softmax, through_windows
from vpt_fast.modules.experts import PromptExperts, check_grid
from vpt_fast.modules.hooks import has_own_forward, is_watched
from vpt_fast.modules.norms import normalised_prompts
from vpt_fast.modules.row_by_row import treats_rows_apart
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.block.prompt_source import appended
from vpt_fast.ops.tracing import is_transformed
from vpt_fast.ops.window_attention.operator import window_attention
from vpt_fast.ops.window_attention.rows import Windows, attend_from_prompts, padding_of

_WINDOW_BY_WINDOW = (
    "a part of this block is hooked or not timm's, so that it runs window by window, which keys "
    "and values of prompts' own cannot join; remove the hook, or hook the block"
)


class PromptedWindowAttention(WindowAttention):
    """timm's WindowAttention on an image in one piece, whose queries also read prompts."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        windows: Windows | None = None,
        prompts: Tensor | None = None,
        live: LiveRows | None = None,
        count: int = 0,
        kv: Tensor | None = None,
    ) -> Tensor:
        """Attend from every token to its window and to the prompts.

        Args:
            x: Normalised tokens (B, H, W, D); without `windows` (windows, count + area, D), as
                timm's.
            mask: As timm's; without `windows` only.
            windows: Windows of the image.
            prompts: Normalised prompts (B or 1, p, D).
            live: Normalised prompt rows (B, p, D) in place of `prompts`, which attend, too; their
                output replaces them.
            count: Number of prompts among the rows of x; without `windows` only.
            kv: Keys and values (B or 1, n, 2, H, d) beside those of the prompts, or None.

        Returns:
            Output, in the shape of x.
        """
        if windows is None:
            return super().forward(x, mask) if not count else attend_beside(self, x, mask, count)
        heads = self.num_heads
        qkv = self.qkv(x).unflatten(-1, (3, heads, -1))  # (B, H, W, 3, h, d)
        check_attention(self, qkv.shape[-1])
        pad = padding_of(windows, self.qkv_of_zeros(x), qkv)
        keys = rows = None
        if live is not None and live.rows is not None:
            # These modules have no hooks: see `_needs_windows`.
            rows = self.qkv.forward(live.rows).unflatten(-1, (3, heads, -1))
            keys = rows[:, :, 1:]
        elif prompts is not None:
            keys = projected_kv(self, prompts, qkv.shape[-1])
        if kv is not None:
            keys = kv if keys is None else appended(keys, kv)
        table = self.relative_position_bias_table
        out = window_attention(qkv, pad, table, keys, windows.window, windows.shift, self.scale)
        if live is not None and rows is not None:
            # The windows' copies of keys and values are recomputed in backward.
            read = recomputed(self, attend_from_prompts, windows, rows, qkv, pad, self.scale, kv)
            live.rows = self.proj_drop.forward(self.proj.forward(read))
        return self.proj_drop(self.proj(out))

    def qkv_of_zeros(self, x: Tensor) -> Tensor | None:
        """Return the projection (3 h d,) of a row of padding; None for 0."""
        if reads_plainly(self.qkv):
            return self.qkv.bias
        zeros: Tensor = self.qkv.forward(x.new_zeros(1, x.shape[-1]))
        return zeros[0]


class PromptedSwinBlock(SwinTransformerBlock):
    """timm's SwinTransformerBlock with prompts of its own, live rows beside it, or both.

    A submodule `adapter`, if it has one, maps the MLP's output (B, N, D) before the residual sum.

    Attributes:
        prompt: Module that computes this block's prompts from its tokens, or None.
        rows: Numbers of prompt rows that enter and leave.
        memory: What it saves for backward, one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
    """

    attn: PromptedWindowAttention
    prompt: nn.Module | None
    rows: PromptRows
    memory: str

    def forward(self, x: Tensor, live: LiveRows | None = None) -> Tensor:
        """Return the output (B, H, W, D).

        Args:
            x: Tokens (B, H, W, D).
            live: Prompt rows that enter; those that leave replace them.

        Raises:
            ValueError: Prompt rows must enter, but `live` has none.
        """
        grid = grid_of(x)
        rows = DeferredSum(x.flatten(1, 2))
        total = self.forward_deferred(rows, grid, self.memory, live or LiveRows())
        return total.materialize().unflatten(1, grid)

    def forward_deferred(
        self, total: DeferredSum, grid: tuple[int, int], memory: str, live: LiveRows
    ) -> DeferredSum:
        """Compute the block from one deferred sum to the next, past its own hooks.

        Args:
            total: Tokens (B, H * W, D), row by row of the image.
            grid: Height and width (H, W).
            memory: What is saved for backward.
            live: As for `forward`.
        """
        prompt, rows = self._modules.get("prompt"), self.rows
        if prompt is None and rows.entering and live.rows is None:
            raise ValueError(
                f"this block reads {rows.entering} prompt rows of an earlier block, but none "
                "were passed on; call the model, or pass live=LiveRows(rows)"
            )
        check_expert_grid(prompt, grid)
        windows = windows_of(self, grid)
        apart = rows.leaving or (prompt is None and rows.entering)
        now = None if apart else fused(self, total.residual)
        if now is not None:
            live.rows = None
            total, prompts = own_sources(prompt, total, memory, live.feature)
            return fused_block.run(self, now, prompts, total, Use(memory, windows))
        x = total.materialize()
        args = (x, windows, live.rows, live.feature)
        x, live.rows = in_mode(memory, self, self._by_modules, *args)
        return DeferredSum(x)

    def _by_modules(
        self, x: Tensor, windows: Windows, entering: Tensor | None, feature: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output (B, N, D) of tokens x (B, N, D), and the prompt rows that leave."""
        prompt: Any = self.prompt
        prompts, kv = (entering, None) if prompt is None else prompt.made(x, feature)
        if self._needs_windows(prompts is not None or kv is not None):
            if kv is not None:
                raise ValueError(_WINDOW_BY_WINDOW)
            prompts = None if prompts is None else prompts.to(x.dtype)
            x, prompts = through_windows(self, x, prompts, windows)
            return x, prompts if self.rows.leaving else None
        normed = live = None
        if prompts is not None:
            normed = normalised_prompts(self.norm1, prompts, x.dtype)
            if self.rows.leaving:
                live, normed = LiveRows(normed.expand(x.shape[0], -1, -1)), None
        y = self.norm1(x).unflatten(1, windows.grid)
        kv = None if kv is None else kv.to(y.dtype)
        attended = self.attn(y, windows=windows, prompts=normed, live=live, kv=kv)
        x = add_branches(self, x, attended.flatten(1, 2))
        if live is None or live.rows is None or prompts is None:
            return x, None
        prompts = prompts.to(x.dtype).expand(x.shape[0], -1, -1)
        return x, add_branches(self, prompts, live.rows)

    def _needs_windows(self, prompts: bool) -> bool:
        """Return whether a part may do anything with the rows, or a hook would miss some of them.

        Hooks may change what they see. Where prompts are keys and values only, parts after the
        projection see tokens alone.
        """
        attn: Any = self._modules["attn"]
        others = [part for name, part in self._modules.items() if name not in ("attn", "prompt")]
        inner = [part for name, part in attn._modules.items() if name != "softmax"]
        if (
            is_transformed()
            or type(attn) is not PromptedWindowAttention
            or has_own_forward(attn)
            or not treats_rows_apart(*others, *inner)
            or (not attn.fused_attn and not is_plain_softmax(attn))
        ):
            return True
        if prompts and self.rows.leaving and is_watched(attn, *others):
            return True
        return (
            bool(attn._forward_pre_hooks or attn._backward_hooks)
            or nn_module._has_any_global_hook()
            or is_watched(self.norm1, attn.qkv)  # which projects padding too
            or (not prompts and is_watched(self.drop_path1))  # of an image, as timm has it
        )


def check_blocks(blocks: list[Any]) -> None:
    """Raise ValueError if a tuned block was replaced by another module."""
    for kind in {*map(type, blocks)}:
        if not issubclass(kind, PromptedSwinBlock):
            raise ValueError(
                f"a {kind.__name__} stands in the place of a tuned block, which passes prompts on; "
                "put it around the block's parts or the stage, or hook the block"
            )


def check_expert_grid(prompt: nn.Module | None, grid: tuple[int, int]) -> None:
    """Raise ValueError if a grid of tokens is not that of a block's prompt experts."""
    if isinstance(prompt, PromptExperts):
        check_grid(prompt.grid, grid, "the input of this block", "tokens")


def windows_of(block: Any, grid: tuple[int, int]) -> Windows:
    """Return the windows of a block on an image of `grid` tokens."""
    return Windows(grid, _pair(block.window_size), _pair(block.shift_size))


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def grid_of(x: Tensor) -> tuple[int, int]:
    """Return height and width of tokens (B, H, W, D)."""
    return x.shape[1], x.shape[2]


def fused(block: Any, x: Tensor | None) -> Fused | None:
    """Return `fused_block.fused` of our classes; other classes compute anything."""
    attn = block._modules.get("attn")
    known = type(block) is PromptedSwinBlock and type(attn) is PromptedWindowAttention
    if not known or attn._parameters["relative_position_bias_table"].requires_grad:
        return None
    return fused_block.fused(block, x)
