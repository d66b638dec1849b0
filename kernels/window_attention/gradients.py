"""Attention inside windows, backward pass: the launches in order, and the sums of their results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..runtime.allocate import empty
from ..runtime.launch import Launch, Target
from .backward import window_backward_kernel
from .backward_tiled import window_dkdv_kernel, window_dq_kernel
from .grid import Pair, WindowGrid, shared_arguments, shared_constexprs, window_grid
from .tiles import (
    WindowTiles,
    bias_tiles,
    dq_tiles,
    key_tiles,
    whole_backward_tiles,
    whole_stages,
    windows_of_a_sum,
)


class Sums(NamedTuple):
    """Groups of windows: each program sums gradients over at most `chunk` windows.

    Attributes:
        lists: Number of lists of images that are summed together: one, or one per image.
        images: Images of a list.
        chunk: Most windows of a sum.
        of_list: Sums of a list.
    """

    lists: int
    images: int
    chunk: int
    of_list: int

    @property
    def total(self) -> int:
        """Sums of all lists."""
        return self.lists * self.of_list


def sums_of(grid: WindowGrid) -> Sums:
    """Return the sums of a problem. With prompts per image they do not depend on the batch."""
    if grid.shared:
        chunk = windows_of_a_sum(grid.batch * grid.windows, grid.num_heads)
        return Sums(1, grid.batch, chunk, grid.sums(grid.batch, chunk))
    chunk = windows_of_a_sum(grid.windows, grid.num_heads)
    return Sums(grid.batch, 1, chunk, grid.sums(1, chunk))


class Gradients(NamedTuple):
    """Results of a backward pass; None where they are not needed.

    Attributes:
        qkv: Gradient of qkv.
        prompts: Gradients of the prompts by sum, (sums, p, 2, h, d) fp32.
        scores: dS of the tokens by sum, (sums, h, area, area) fp32.
        delta: Row sums of dO * O, (B, h, H, W) fp32, written by the first launch for later ones.
    """

    qkv: Tensor | None
    prompts: Tensor | None
    scores: Tensor | None
    delta: Tensor | None = None


def empty_gradients(
    qkv: Tensor, grid: WindowGrid, needs_tokens: bool, needs_prompts: bool, needs_table: bool
) -> Gradients:
    """Allocate the gradients that are needed."""
    sums, heads = sums_of(grid).total, grid.num_heads

    def fp32(*shape: int) -> Tensor:
        return empty(shape, torch.float32, qkv.device)

    asked = needs_tokens or (needs_prompts and grid.num_prompts) or needs_table
    whole = whole_backward_tiles(grid.area, grid.keys, grid.head_dim, qkv.dtype)
    return Gradients(
        torch.empty_like(qkv) if needs_tokens else None,
        fp32(sums, grid.num_prompts, 2, heads, grid.head_dim)
        if needs_prompts and grid.num_prompts
        else None,
        fp32(sums, heads, grid.area, grid.area) if needs_table else None,
        fp32(grid.batch, heads, grid.height, grid.width) if asked and whole is None else None,
    )


def backward_launches(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    gradients: Gradients,
    window: Pair,
    shift: Pair,
    scale: float,
    target: Target,
) -> list[Launch]:
    """Return the launches of one backward pass, in order; all tensors are contiguous.

    Args:
        qkv, pad, table, prompts, window, shift, scale: Arguments of the forward pass.
        out, lse, grad_out: Its results, and the gradient of `out`.
        gradients: Gradients; written.
        target: Target to tune for.
    """
    needs = {
        "NEEDS_TOKENS": gradients.qkv is not None,
        "NEEDS_PROMPTS": gradients.prompts is not None,
        "NEEDS_TABLE": gradients.scores is not None,
    }
    # Sums of dS take a launch of their own: with other gradients they do not fit in registers.
    table_only = {**dict.fromkeys(needs, False), "NEEDS_TABLE": needs["NEEDS_TABLE"]}
    parts = [p for p in ({**needs, "NEEDS_TABLE": False}, table_only) if any(p.values())]
    if not parts:
        return []
    grid = window_grid(qkv, prompts, window, shift)
    sums = sums_of(grid)
    used = prompts if grid.num_prompts else None
    common: dict[str, Any] = {
        **shared_arguments(grid, qkv, pad, table, prompts),
        "grad_out_ptr": grad_out, "lse_ptr": lse, "scale": scale,
        "grad_qkv_ptr": qkv if gradients.qkv is None else gradients.qkv,
    }  # fmt: skip
    constexprs = {
        **shared_constexprs(grid, pad, qkv, used, out, grad_out, gradients.qkv),
        "PRECISION": "ieee",
    }
    arguments = {
        **common,
        "grad_prompts_ptr": lse if gradients.prompts is None else gradients.prompts,
        "grad_scores_ptr": lse if gradients.scores is None else gradients.scores,
        "chunk": sums.chunk, "sums_of_list": sums.of_list, "images_of_list": sums.images,
    }  # fmt: skip
    tiles = whole_backward_tiles(grid.area, grid.keys, grid.head_dim, qkv.dtype)
    if tiles is not None:
        arguments["out_ptr"] = out if tiles.tail else grad_out
        tiles = tiles._replace(num_stages=whole_stages(target))
        return [_whole_launch(grid, sums, arguments, constexprs, part, tiles) for part in parts]
    delta = gradients.delta
    if delta is None:
        raise ValueError("gradients.delta is None; windows in tiles need it (see empty_gradients)")
    read = {"out_ptr": out, "delta_ptr": delta}
    first = _dq_launch(grid, {**common, **read}, constexprs, needs["NEEDS_TOKENS"])
    arguments["delta_ptr"] = delta
    return [first, *[_keys_launch(grid, sums, arguments, constexprs, part) for part in parts]]


def _whole_launch(
    grid: WindowGrid,
    sums: Sums,
    arguments: dict[str, Any],
    constexprs: dict[str, Any],
    needs: dict[str, bool],
    tiles: WindowTiles,
) -> Launch:
    """Return the launch that fills the gradients of windows that fit in one tile."""
    return Launch(
        name="window_backward_dbias" if needs["NEEDS_TABLE"] else "window_backward",
        kernel=window_backward_kernel,
        grid=(grid.num_heads * sums.total, 1, 1),
        arguments=arguments,
        constexprs={
            **constexprs, **needs,
            "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, "BLOCK_P": tiles.tail,
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips={"windows": sums.chunk},
    )  # fmt: skip


def _dq_launch(
    grid: WindowGrid, arguments: dict[str, Any], constexprs: dict[str, Any], needs_tokens: bool
) -> Launch:
    """Return the launch that fills delta, and dq if tokens need a gradient."""
    tiles = dq_tiles(grid.area, grid.head_dim, arguments["qkv_ptr"].dtype)
    programs = grid.num_heads * grid.batch * grid.windows * triton.cdiv(grid.area, tiles.queries)
    return Launch(
        name="window_dq" if needs_tokens else "window_delta",
        kernel=window_dq_kernel,
        grid=(programs, 1, 1),
        arguments=arguments,
        constexprs={
            **constexprs, "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys,
            "NEEDS_TOKENS": needs_tokens,
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips={"keys": triton.cdiv(grid.keys, tiles.keys)} if needs_tokens else {},
    )  # fmt: skip


def _keys_launch(
    grid: WindowGrid,
    sums: Sums,
    arguments: dict[str, Any],
    constexprs: dict[str, Any],
    needs: dict[str, bool],
) -> Launch:
    """Return the launch over tiles of keys that fills their gradients, or the sums of dS."""
    needs_table, dtype = needs["NEEDS_TABLE"], arguments["qkv_ptr"].dtype
    tiles = key_tiles(grid.area, grid.keys, grid.head_dim, dtype)
    if needs_table:
        tiles = bias_tiles(grid.area, grid.head_dim, dtype)
    first = 0 if needs["NEEDS_PROMPTS"] else grid.num_prompts // tiles.keys
    last_key = grid.keys if needs["NEEDS_TOKENS"] or needs_table else grid.num_prompts
    count = triton.cdiv(last_key, tiles.keys) - first
    query_tiles = triton.cdiv(grid.area, tiles.queries)
    programs = grid.num_heads * sums.total * count * (query_tiles if needs_table else 1)
    return Launch(
        name="window_dbias" if needs_table else "window_dkdv",
        kernel=window_dkdv_kernel,
        grid=(programs, 1, 1),
        arguments={**arguments, "first_tile": first, "num_tiles": count},
        constexprs={**constexprs, **needs, "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys},
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips={"windows": sums.chunk, "queries": 1 if needs_table else query_tiles},
    )  # fmt: skip


def prompt_gradient(partial: Tensor, prompts: Tensor) -> Tensor:
    """Return the gradient of `prompts` from sums (sums, p, 2, h, d), added in a fixed order."""
    if not len(prompts):
        return torch.empty_like(prompts)
    lists = partial.unflatten(0, (len(prompts), len(partial) // len(prompts)))
    return lists.sum(1).to(prompts.dtype)


def table_gradient(partial: Tensor, window: Pair) -> Tensor:
    """Return the gradient of the position-bias table, fp32, from sums of dS (sums, h, area, area).

    An entry sums dS over all pairs with its offset, a diagonal of the rows' and of the columns'
    coordinates.
    """
    grad = partial.sum(0).unflatten(2, window).unflatten(1, window)  # (h, yq, xq, yk, xk)
    grad = _diagonal_sums(grad.permute(0, 2, 4, 1, 3))  # (h, xq, xk, rows)
    return _diagonal_sums(grad.permute(0, 3, 1, 2)).flatten(1).T.contiguous()


def _diagonal_sums(square: Tensor) -> Tensor:
    """Sum (..., n, n) to (..., 2n - 1): entry t is the sum over (a, b) with a - b + n - 1 = t.

    With the columns reversed and row a shifted by a, diagonals become columns.
    """
    size = square.shape[-1]
    moved = F.pad(square.flip(-1), (0, size)).flatten(-2)[..., : size * (2 * size - 1)]
    return moved.unflatten(-1, (size, 2 * size - 1)).sum(-2)
