"""timm's WindowAttention, Swin block and stage with prompts: the classes that tuned ones are given.

In VPT-Deep a prompt is a key and a value that every window of its image reads, and the block is
(B, H, W, D) -> (B, H, W, D) like the one it replaces: nothing is rolled, padded or cut. Prompt rows
that are read later (VPT-Shallow, a prompted block before an unprompted one) have no place in an
image; they travel beside it.
"""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import (
    SwinTransformerBlock,
    WindowAttention,
)
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vpt_fast.models.attention_inputs import check_attention, projected, reads_plainly
from vpt_fast.models.fusion import fused_block
from vpt_fast.models.fusion.fused_block import Fused, Use
from vpt_fast.models.fusion.look_ahead import prompts_of
from vpt_fast.models.prompt_rows import PromptRows
from vpt_fast.models.recompute import recomputed
from vpt_fast.models.swin.windows import attend_beside, is_plain_softmax, through_windows
from vpt_fast.modules.experts import PromptExperts, takes_experts
from vpt_fast.modules.hooks import (
    has_own_forward,
    is_watched,
)
from vpt_fast.modules.row_by_row import treats_rows_apart
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.tracing import is_transformed
from vpt_fast.ops.window_attention.operator import window_attention
from vpt_fast.ops.window_attention.rows import Windows, attend_from_prompts, padding_of


class LiveRows:
    """Live prompt rows (B, p, D) on their way beside an image's tokens; None while there are none.

    An object of its own, so that modules and their hooks see images only.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        self.rows = rows


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
    ) -> Tensor:
        """Attend from every token to its window and to the prompts.

        Args:
            x: normalised tokens (B, H, W, D); (windows, count + area, D) without `windows`, as
                timm's.
            mask: as timm's; without `windows` only.
            windows: how the image is cut.
            prompts: normalised prompts (B or 1, p, D).
            live: normalised prompt rows (B, p, D) in place of `prompts`, which attend too; what
                they read is put into it.
            count: of prompts among the rows of x; without `windows` only.

        Returns:
            As x.
        """
        if windows is None:
            return super().forward(x, mask) if not count else attend_beside(self, x, mask, count)
        heads = self.num_heads
        qkv = self.qkv(x).unflatten(-1, (3, heads, -1))  # (B, H, W, 3, h, d)
        check_attention(self, qkv.shape[-1])
        pad = padding_of(windows, self.qkv_of_zeros(x), qkv)
        keys = rows = None
        if live is not None and live.rows is not None:
            # Nobody watches these modules: see `_needs_windows`.
            rows = self.qkv.forward(live.rows).unflatten(-1, (3, heads, -1))
            keys = rows[:, :, 1:]
        elif prompts is not None:
            keys = projected(self, prompts, slice(heads * qkv.shape[-1], None))
            keys = keys.unflatten(-1, (2, heads, -1))
        table = self.relative_position_bias_table
        out = window_attention(qkv, pad, table, keys, windows.window, windows.shift, self.scale)
        if live is not None and rows is not None:
            # The windows' copies of keys and values are made again in backward.
            read = recomputed(self, attend_from_prompts, windows, rows, qkv, pad, self.scale)
            live.rows = self.proj_drop.forward(self.proj.forward(read))
        return self.proj_drop(self.proj(out))

    def qkv_of_zeros(self, x: Tensor) -> Tensor | None:
        """What the projection makes of a row of padding, (3 h d,); None for nothing."""
        if reads_plainly(self.qkv):
            return self.qkv.bias
        zeros: Tensor = self.qkv.forward(x.new_zeros(1, x.shape[-1]))
        return zeros[0]


class PromptedSwinBlock(SwinTransformerBlock):
    """timm's SwinTransformerBlock with prompts of its own, live rows beside it, or both.

    A submodule `adapter`, if it has one, maps the MLP's output (B, N, D) before the residual sum.

    Attributes:
        prompt: module that makes this block's prompts from its tokens, or None.
        rows: how many prompt rows enter and leave.
        memory: what it keeps for backward, one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
    """

    attn: PromptedWindowAttention
    prompt: nn.Module | None
    rows: PromptRows
    memory: str

    def forward(self, x: Tensor, live: LiveRows | None = None) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D).

        Args:
            x: tokens.
            live: the prompt rows that enter; those that leave are put into it.

        Raises:
            ValueError: prompt rows should enter, but `live` has none.
        """
        grid = grid_of(x)
        total = self.forward_open(
            DeferredSum(x.flatten(1, 2)), grid, self.memory, live or LiveRows()
        )
        return total.materialize().unflatten(1, grid)

    def forward_open(
        self, total: DeferredSum, grid: tuple[int, int], memory: str, live: LiveRows
    ) -> DeferredSum:
        """As `forward`, from and to a sum of rows (B, H * W, D) that is left to its reader.

        Hooks on the block itself are not called.

        Args:
            total: tokens, row by row of the image.
            grid: (H, W).
            memory: what is kept for backward.
            live: as for `forward`.
        """
        prompt, rows = self._modules.get("prompt"), self.rows
        if prompt is None and rows.entering and live.rows is None:
            raise ValueError(
                f"this block reads {rows.entering} prompt rows of an earlier block, but none "
                "were passed on; call the model, or pass live=LiveRows(rows)"
            )
        check_grid(prompt, grid)
        windows = windows_of(self, grid)
        apart = rows.leaving or (prompt is None and rows.entering)
        now = None if apart else fused(self, total.residual)
        if now is not None:
            live.rows = None
            prompts = prompts_of(prompt, total.residual)
            return fused_block.run(self, now, prompts, total, Use(memory, windows))
        if memory == "speed":
            x, live.rows = self._forward(total, windows, live.rows)
        else:
            x, live.rows = recomputed(
                self,
                lambda x, entering: self._forward(DeferredSum(x), windows, entering),
                total.materialize(),
                live.rows,
            )
        return DeferredSum(x)

    def _normalise(
        self, total: DeferredSum, entering: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Tokens and norm1 of them (B, N, D), prompts and norm1 of them (B or 1, p, D)."""
        prompt = self.prompt
        if takes_experts(prompt, self.norm1):
            tokens, y, made = prompt.with_norm(total, self.norm1)
            return tokens, y, None, made
        x = total.materialize()
        prompts = entering if prompt is None else prompt(x).to(x.dtype)
        normed = None if prompts is None else self.norm1.forward(prompts)
        return x, self.norm1(x), prompts, normed

    def _forward(
        self, total: DeferredSum, windows: Windows, entering: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Module by module; tokens (B, N, D), and the prompt rows that leave."""
        if self._needs_windows(self.prompt is not None or entering is not None):
            x = total.materialize()
            rows = entering if self.prompt is None else self.prompt(x).to(x.dtype)
            x, rows = through_windows(self, x, rows, windows)
            return x, rows if self.rows.leaving else None
        x, y, prompts, normed = self._normalise(total, entering)
        live: LiveRows | None = None
        if self.rows.leaving and prompts is not None and normed is not None:
            prompts = prompts.expand(x.shape[0], -1, -1)
            live, normed = LiveRows(normed.expand(x.shape[0], -1, -1)), None
        y = y.unflatten(1, windows.grid)
        branch = self.attn(y, windows=windows, prompts=normed, live=live)
        x = x + self.drop_path1(branch.flatten(1, 2))
        x = x + self.drop_path2(self.after_mlp(self.mlp(self.norm2(x))))
        if live is None or live.rows is None or prompts is None:
            return x, None
        rows = prompts + self.drop_path1(live.rows)
        return x, rows + self.drop_path2(self.after_mlp(self.mlp(self.norm2(rows))))

    def _needs_windows(self, prompts: bool) -> bool:
        """Whether a part may do anything with the rows, or a hook would miss some of them.

        Hooks may change what they see. Where prompts are keys and values only, what comes after
        those is the tokens' own.
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

    def after_mlp(self, branch: Tensor) -> Tensor:
        """The MLP's output, adapted or not."""
        adapter = self._modules.get("adapter")
        return branch if adapter is None else adapter(branch)


def check_blocks(blocks: list[Any]) -> None:
    """Raise ValueError if something else stands in a tuned block's place."""
    for kind in {*map(type, blocks)}:
        if not issubclass(kind, PromptedSwinBlock):
            raise ValueError(
                f"a {kind.__name__} stands in the place of a tuned block, which passes prompts on; "
                "put it around the block's parts or the stage, or hook the block"
            )


def check_grid(prompt: nn.Module | None, grid: tuple[int, int]) -> None:
    """Refuse a grid of tokens that a block's prompt experts were not made for."""
    if isinstance(prompt, PromptExperts) and prompt.grid != grid:
        raise ValueError(
            f"the prompt experts mix a {prompt.grid[0]} x {prompt.grid[1]} grid of tokens, "
            f"but this block's input has {grid[0]} x {grid[1]}; resize the image to the size "
            "that the model was tuned with"
        )


def windows_of(block: Any, grid: tuple[int, int]) -> Windows:
    """How a block cuts an image of `grid` tokens."""
    return Windows(grid, _pair(block.window_size), _pair(block.shift_size))


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def grid_of(x: Tensor) -> tuple[int, int]:
    """Height and width of tokens (B, H, W, D)."""
    return x.shape[1], x.shape[2]


def fused(block: Any, x: Tensor | None) -> Fused | None:
    """`fused_block.fused`; no subclass or wrapper, whose `forward` would be passed by."""
    attn = block._modules.get("attn")
    known = type(block) is PromptedSwinBlock and type(attn) is PromptedWindowAttention
    if not known or attn._parameters["relative_position_bias_table"].requires_grad:
        return None
    return fused_block.fused(block, x)
