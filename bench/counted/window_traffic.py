"""Tensors that the window-attention kernels access, and the FLOP of their products.

Parts of tensors for `bench.counted.declared`. A view stands for as many bytes as a launch accesses:
where a launch reads the keys of some tokens of every window, it is a view of as many tokens.

FLOP of a launch, for B images of n tokens in windows of a positions, p prompts and h heads of d
channels, of the products that the formulas need, without the padding of tiles; a key counts if a
gradient that it takes part in is required. A token attends to all a positions of its window,
padding included. In units of 2 B n d h:

- window_forward, window_forward_tiled: 2 products with a + p keys
- window_backward: S, dP, dS K, dS^T Q and P^T dO, 5 with a + p
- window_dq: S, dP and dS K, 3 with a + p; window_delta has none
- window_dkdv: S, dP, dS^T Q and P^T dO, 4 with a + p
- window_backward_dbias, window_dbias: S and dP, 2 with a
"""

from __future__ import annotations

from torch import Tensor

from vpt_fast.kernels.runtime.launch import Launch


def queries(_: Launch, packed: Tensor) -> Tensor:
    """Return q, or its gradient, of a packed (..., 3, h, d)."""
    return packed[..., :1, :, :]


def keys_and_values(_: Launch, packed: Tensor) -> Tensor:
    """Return k and v, or their gradients, of a packed (..., 3, h, d)."""
    return packed[..., 1:, :, :]


def _only_prompts(launch: Launch) -> bool:
    """Return whether a pass over whole windows computes only gradients of separately tiled prompts.

    It needs no scores of tokens then, and loads nothing for them.
    """
    sizes = launch.constexprs
    return bool(sizes["BLOCK_P"]) and not (sizes["NEEDS_TOKENS"] or sizes["NEEDS_TABLE"])


def kv_of_whole_windows(launch: Launch, qkv: Tensor) -> Tensor:
    """Return k and v of the tokens that the backward pass over whole windows reads."""
    return qkv[:0] if _only_prompts(launch) else keys_and_values(launch, qkv)


def padding_of_whole_windows(launch: Launch, pad: Tensor) -> Tensor:
    """Return k and v of the padding that it reads."""
    return pad[:0] if _only_prompts(launch) else keys_and_values(launch, pad)


def table_of_whole_windows(launch: Launch, table: Tensor) -> Tensor:
    """Return the position bias that it reads."""
    return table[:0] if _only_prompts(launch) else table


def prompts_of_whole_windows(launch: Launch, prompts: Tensor) -> Tensor:
    """Return the prompts that it reads: the table's gradient needs none in a separate tile."""
    sizes = launch.constexprs
    unread = sizes["BLOCK_P"] and not (sizes["NEEDS_TOKENS"] or sizes["NEEDS_PROMPTS"])
    return prompts[:0] if unread else prompts


def _first_tokens(launch: Launch) -> int:
    """Return how many tokens of each window have their keys in a launch's tiles."""
    given, sizes = launch.arguments, launch.constexprs
    end = (given["first_tile"] + given["num_tiles"]) * sizes["BLOCK_N"]
    area = sizes["WINDOW_H"] * sizes["WINDOW_W"]
    return int(max(0, min(end - given["num_prompts"], area)))


def _tokens_of_tiles(launch: Launch) -> int:
    """Return how many tokens of an image those are; the others are padding."""
    given, sizes = launch.arguments, launch.constexprs
    whole, part = divmod(_first_tokens(launch), sizes["WINDOW_W"])

    def inside(axis: str, first: int, length: int) -> int:
        return max(0, min(length, given[axis] - first))

    return sum(
        inside("height", y, whole) * inside("width", x, sizes["WINDOW_W"])
        + inside("height", y + whole, 1) * inside("width", x, part)
        for y in range(0, given["height"], sizes["WINDOW_H"])
        for x in range(0, given["width"], sizes["WINDOW_W"])
    )


def kv_of_tiles(launch: Launch, qkv: Tensor) -> Tensor:
    """Return k and v of the tokens whose keys are in a launch's tiles."""
    tokens = len(qkv) * _tokens_of_tiles(launch)
    return keys_and_values(launch, qkv.flatten(0, 2)[:tokens])


def padding_of_tiles(launch: Launch, pad: Tensor) -> Tensor:
    """Return k and v of the padding, if any is in a launch's tiles."""
    windows = launch.arguments["grid_h"] * launch.arguments["grid_w"]
    padding = windows * _first_tokens(launch) - _tokens_of_tiles(launch)
    return keys_and_values(launch, pad) if padding else pad[:0]


def prompts_of_tiles(launch: Launch, prompts: Tensor) -> Tensor:
    """Return the prompts in a launch's tiles."""
    return prompts[:, launch.arguments["first_tile"] * launch.constexprs["BLOCK_N"] :]


def table_of_tiles(launch: Launch, table: Tensor) -> Tensor:
    """Return the position bias between all queries and the keys in a launch's tiles.

    A prompt, which has no position, reads the first token's entries.
    """
    height, width = (launch.constexprs[f"WINDOW_{axis}"] for axis in "HW")
    whole, part = divmod(max(1, _first_tokens(launch)), width)
    rows = height + whole - 1 if whole else 0
    entries = rows * (2 * width - 1)
    if part:
        entries += (width + part - 1) * (1 if whole else height)
    return table[:entries]


def window_flop(launch: Launch) -> int:
    """Return the FLOP of the products that a window-attention launch computes (see the module).

    Raises:
        ValueError: If it is another launch.
    """
    given, sizes = launch.arguments, launch.constexprs
    prompts = given["num_prompts"]
    area = sizes["WINDOW_H"] * sizes["WINDOW_W"]
    needs_tokens, needs_prompts = (
        bool(sizes.get(f"NEEDS_{name}")) for name in ("TOKENS", "PROMPTS")
    )
    required = area * needs_tokens + prompts * needs_prompts
    if launch.name in ("window_forward", "window_forward_tiled"):
        pairs = 2 * (area + prompts)
    elif launch.name == "window_backward":
        pairs = 3 * (area + prompts) + 2 * required if needs_tokens else 4 * required
    elif launch.name in ("window_dq", "window_delta"):
        pairs = 3 * (area + prompts) * needs_tokens
    elif launch.name == "window_dkdv":
        pairs = 4 * required
    elif launch.name in ("window_backward_dbias", "window_dbias"):
        pairs = 2 * area
    else:
        raise ValueError(f"{launch.name!r} is no launch of window attention")
    batch, height, width, _, heads, dim = given["qkv_ptr"].shape
    return int(2 * batch * height * width * heads * dim * pairs)
