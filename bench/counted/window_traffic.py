"""What the window-attention kernels touch of their tensors, and the FLOP of their products.

Parts of tensors for `bench.counted.declared`. A view stands for as many bytes as a launch touches:
where a launch reads the keys of some tokens of every window, it is a view of as many tokens.

FLOP of a launch, for B images of n tokens in windows of a places, p prompts and h heads of d
channels, of the products that the formulas need, without the padding of tiles; a key counts where
the gradient that it takes part in is asked for. A token reads all a places of its window, padding
included. In units of 2 B n d h:

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
    """q, or its gradient, of a packed (..., 3, h, d)."""
    return packed[..., :1, :, :]


def keys_and_values(_: Launch, packed: Tensor) -> Tensor:
    """k and v, or their gradients, of a packed (..., 3, h, d)."""
    return packed[..., 1:, :, :]


def _only_prompts(launch: Launch) -> bool:
    """Whether all that a backward pass over whole windows makes is of prompts in their own tile.

    It needs no scores of tokens then, and loads nothing for them.
    """
    sizes = launch.constexprs
    return bool(sizes["BLOCK_P"]) and not (sizes["NEEDS_TOKENS"] or sizes["NEEDS_TABLE"])


def kv_of_whole_windows(launch: Launch, qkv: Tensor) -> Tensor:
    """k and v of the tokens, for the backward pass over whole windows."""
    return qkv[:0] if _only_prompts(launch) else keys_and_values(launch, qkv)


def padding_of_whole_windows(launch: Launch, pad: Tensor) -> Tensor:
    """k and v of the padding, likewise."""
    return pad[:0] if _only_prompts(launch) else keys_and_values(launch, pad)


def table_of_whole_windows(launch: Launch, table: Tensor) -> Tensor:
    """The position bias, likewise."""
    return table[:0] if _only_prompts(launch) else table


def prompts_of_whole_windows(launch: Launch, prompts: Tensor) -> Tensor:
    """The prompts, likewise: the gradient of the table takes none that have their own tile."""
    sizes = launch.constexprs
    unread = sizes["BLOCK_P"] and not (sizes["NEEDS_TOKENS"] or sizes["NEEDS_PROMPTS"])
    return prompts[:0] if unread else prompts


def _first_tokens(launch: Launch) -> int:
    """How many of each window's tokens have their keys in the tiles of a launch over tiles."""
    given, sizes = launch.arguments, launch.constexprs
    end = (given["first_tile"] + given["num_tiles"]) * sizes["BLOCK_N"]
    area = sizes["WINDOW_H"] * sizes["WINDOW_W"]
    return int(max(0, min(end - given["num_prompts"], area)))


def _tokens_of_tiles(launch: Launch) -> int:
    """How many tokens of an image those are; the others are padding."""
    given, sizes = launch.arguments, launch.constexprs
    whole, part = divmod(_first_tokens(launch), sizes["WINDOW_W"])

    def there(axis: str, first: int, length: int) -> int:
        return max(0, min(length, given[axis] - first))

    return sum(
        there("height", y, whole) * there("width", x, sizes["WINDOW_W"])
        + there("height", y + whole, 1) * there("width", x, part)
        for y in range(0, given["height"], sizes["WINDOW_H"])
        for x in range(0, given["width"], sizes["WINDOW_W"])
    )


def kv_of_tiles(launch: Launch, qkv: Tensor) -> Tensor:
    """k and v of the tokens whose keys are in the tiles of a launch."""
    tokens = len(qkv) * _tokens_of_tiles(launch)
    return keys_and_values(launch, qkv.flatten(0, 2)[:tokens])


def padding_of_tiles(launch: Launch, pad: Tensor) -> Tensor:
    """k and v of the padding, if any is in the tiles of a launch."""
    windows = launch.arguments["grid_h"] * launch.arguments["grid_w"]
    padding = windows * _first_tokens(launch) - _tokens_of_tiles(launch)
    return keys_and_values(launch, pad) if padding else pad[:0]


def prompts_of_tiles(launch: Launch, prompts: Tensor) -> Tensor:
    """The prompts in the tiles of a launch."""
    return prompts[:, launch.arguments["first_tile"] * launch.constexprs["BLOCK_N"] :]


def table_of_tiles(launch: Launch, table: Tensor) -> Tensor:
    """Entries of the position bias between all queries and the keys in the tiles of a launch.

    A prompt, which has no place, reads those of the first token's.
    """
    height, width = (launch.constexprs[f"WINDOW_{axis}"] for axis in "HW")
    whole, part = divmod(max(1, _first_tokens(launch)), width)
    rows = height + whole - 1 if whole else 0
    entries = rows * (2 * width - 1)
    if part:
        entries += (width + part - 1) * (1 if whole else height)
    return table[:entries]


def window_flop(launch: Launch) -> int:
    """FLOP of the products that a window-attention launch is for (see the module).

    Raises:
        ValueError: another launch.
    """
    given, sizes = launch.arguments, launch.constexprs
    prompts = given["num_prompts"]
    area = sizes["WINDOW_H"] * sizes["WINDOW_W"]
    tokens_need, prompts_need = (bool(sizes.get(f"NEEDS_{name}")) for name in ("TOKENS", "PROMPTS"))
    asked = area * tokens_need + prompts * prompts_need
    if launch.name in ("window_forward", "window_forward_tiled"):
        pairs = 2 * (area + prompts)
    elif launch.name == "window_backward":
        pairs = 3 * (area + prompts) + 2 * asked if tokens_need else 4 * asked
    elif launch.name in ("window_dq", "window_delta"):
        pairs = 3 * (area + prompts) * tokens_need
    elif launch.name == "window_dkdv":
        pairs = 4 * asked
    elif launch.name in ("window_backward_dbias", "window_dbias"):
        pairs = 2 * area
    else:
        raise ValueError(f"{launch.name!r} is no launch of window attention")
    batch, height, width, _, heads, dim = given["qkv_ptr"].shape
    return int(2 * batch * height * width * heads * dim * pairs)
