"""Windowed attention with prompts against timm's own windows, masks and softmax, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.formulations.plain import distance
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    get_relative_position_index,
    window_partition,
    window_reverse,
)
from torch import Tensor

from vpt_fast.ops.attention import reference as attention_reference
from vpt_fast.ops.window_attention import reference
from vpt_fast.ops.window_attention.operator import (
    window_attention,
    window_attention_operator,
    window_attention_operator_backward,
)

# height, width, window, shift
GEOMETRIES: dict[str, Any] = {
    "one_window": (4, 4, (4, 4), (0, 0)),
    "four_windows": (8, 8, (4, 4), (0, 0)),
    "shifted": (8, 12, (4, 4), (2, 2)),
    "padded": (7, 9, (4, 4), (0, 0)),
    "padded_and_shifted": (7, 9, (4, 4), (2, 2)),
    "oblong": (8, 14, (4, 7), (2, 3)),
    "oblong_padded": (9, 10, (4, 7), (2, 3)),
    "rows_only": (8, 4, (4, 4), (2, 0)),
    "columns_only": (3, 9, (3, 4), (0, 2)),
    "smaller_than_a_window": (3, 2, (4, 4), (2, 2)),
    "one_token": (1, 1, (2, 2), (1, 1)),
    "window_of_one": (2, 3, (1, 1), (0, 0)),
}
SCALE = 0.3


def make(
    geometry: str,
    prompts: int | None = 3,
    shared: bool = True,
    batch: int = 2,
    heads: int = 2,
    dim: int = 4,
    dtype: torch.dtype = torch.float64,
    pad: bool = True,
) -> list[Any]:
    """Return qkv, pad, table and prompts of order one, leaves that require a gradient."""
    height, width, window, _ = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    table = draw((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    rows = None if prompts is None else draw(1 if shared else batch, prompts, 2, heads, dim)
    return [
        draw(batch, height, width, 3, heads, dim),
        draw(3, heads, dim) if pad else None,
        table,
        rows,
    ]


def textbook(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Tensor:
    """Compute attention window by window, with timm's shift, padding and mask, by concatenation."""
    batch, height, width, _, heads, dim = qkv.shape
    x = torch.roll(qkv.flatten(3), (-shift[0], -shift[1]), (1, 2))
    full_height, full_width = (-(-n // w) * w for n, w in zip((height, width), window, strict=True))
    grid = x.new_zeros(batch, full_height, full_width, x.shape[-1])
    if pad is not None:
        grid = grid + pad.flatten()
    inside = torch.zeros(full_height, full_width, 1, dtype=torch.bool)
    inside[:height, :width] = True
    x = torch.where(inside, F.pad(x, (0, 0, 0, full_width - width, 0, full_height - height)), grid)
    area = window[0] * window[1]
    windows = window_partition(x, window).view(-1, area, 3, heads, dim)
    count = len(windows) // max(batch, 1)
    q, k, v = windows.permute(2, 0, 3, 1, 4)
    extra = 0
    if prompts is not None:
        extra = prompts.shape[1]
        rows = prompts.expand(batch, -1, -1, -1, -1).repeat_interleave(count, 0)
        prompt_k, prompt_v = rows.permute(2, 0, 3, 1, 4)
        k, v = torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)
    bias = table[get_relative_position_index(*window)].permute(2, 0, 1)
    bias = F.pad(bias, (extra, 0)).expand(len(windows), -1, -1, -1)
    if any(shift):
        block = SwinTransformerBlock(
            8, (height, width), 1, window_size=window, shift_size=shift, always_partition=True
        )
        mask = block.attn_mask.to(bias.dtype)  # (windows of an image, area, area)
        bias = bias + F.pad(mask, (extra, 0)).repeat(batch, 1, 1)[:, None]
    scores = scale * q @ k.transpose(-2, -1) + bias
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(windows), *window, heads * dim)
    out = window_reverse(out, window, full_height, full_width)
    return torch.roll(out[:, :height, :width], shift, (1, 2))


def run(function: Any, geometry: str, inputs: list[Any]) -> list[Tensor]:
    """Return the output, and the gradient of every input that there is."""
    _, _, window, shift = GEOMETRIES[geometry]
    out = function(*inputs, window, shift, SCALE)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [
        out,
        *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)),
    ]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected)
    for have, want in zip(found, expected, strict=True):
        if want.numel() and not want.any():
            assert have.abs().max() <= tolerance
        else:
            assert distance(have, want) <= tolerance


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("prompts", "shared"), [(3, True), (3, False), (None, True)])
def test_output_and_gradients(geometry: str, prompts: int | None, shared: bool) -> None:
    inputs = make(geometry, prompts, shared)
    same(run(window_attention, geometry, inputs), run(textbook, geometry, inputs))


@pytest.mark.parametrize("geometry", ["padded_and_shifted", "oblong", "smaller_than_a_window"])
@pytest.mark.parametrize("frozen", [(1, 2), (0, 1, 2), (1, 2, 3), (0, 1, 3), (0, 2, 3)])
def test_only_what_is_asked_for(geometry: str, frozen: tuple[int, ...]) -> None:
    """With frozen inputs backward takes other paths: fused attention, the prompts' columns."""
    inputs = [t.detach() if i in frozen else t for i, t in enumerate(make(geometry))]
    same(run(window_attention, geometry, inputs), run(textbook, geometry, inputs))


@pytest.mark.parametrize("geometry", ["padded_and_shifted", "oblong", "four_windows"])
@pytest.mark.parametrize(
    "sizes",
    [{"batch": 1}, {"batch": 0}, {"prompts": 0}, {"prompts": 40}, {"dim": 5}, {"pad": False}],
)
@pytest.mark.parametrize("table", ["trained", "frozen"])
def test_sizes(geometry: str, sizes: dict[str, Any], table: str) -> None:
    inputs = make(geometry, **sizes)
    if table == "frozen":
        inputs[2] = inputs[2].detach()
    same(run(window_attention, geometry, inputs), run(textbook, geometry, inputs))


@pytest.mark.parametrize("geometry", ["padded_and_shifted", "rows_only", "one_window"])
def test_no_prompts_twice(geometry: str) -> None:
    """No prompts and prompts without rows give the same bits."""
    inputs = make(geometry, 0)
    without = [*inputs[:3], None]
    assert torch.equal(
        run(window_attention, geometry, inputs)[0], run(window_attention, geometry, without)[0]
    )


@pytest.mark.parametrize("geometry", ["padded_and_shifted", "oblong", "one_window"])
@pytest.mark.parametrize("shared", [True, False])
def test_formula_for_other_devices(
    geometry: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(geometry, shared=shared)
    expected = run(textbook, geometry, inputs)
    monkeypatch.setattr(attention_reference, "has_flash", lambda q: False)
    same(run(window_attention, geometry, inputs), expected)


@pytest.mark.parametrize("geometry", ["padded_and_shifted", "one_window"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("table", ["trained", "frozen"])
def test_images_a_few_at_a_time(
    geometry: str, shared: bool, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large batch is computed in parts, the last one smaller."""
    inputs = make(geometry, shared=shared, batch=5)
    if table == "frozen":
        inputs[2] = inputs[2].detach()
    expected = run(textbook, geometry, inputs)
    monkeypatch.setattr(reference, "_CHUNK", 2 * inputs[0][0].numel())
    same(run(window_attention, geometry, inputs), expected)


@pytest.mark.parametrize("geometry", ["padded_and_shifted", "oblong"])
def test_log_sum_exp_is_of_the_whole_score(geometry: str) -> None:
    """exp2(lse) is the denominator of a prompt's weight."""
    qkv, pad, table, prompts = (t.detach() for t in make(geometry))
    _, _, window, shift = GEOMETRIES[geometry]
    qkv[..., 2, :, :] = 0
    pad[2] = 0
    prompts[:, :, 1] = 0
    prompts[:, 0, 1] = 1  # only the first prompt's value is not 0, so that out is its weight
    out, lse = window_attention_operator(qkv, pad, table, prompts, list(window), list(shift), SCALE)
    scores = SCALE * torch.einsum("byxhd,hd->bhyx", qkv[..., 0, :, :], prompts[0, 0, 0])
    weight = out.unflatten(-1, (2, -1))[..., 0].permute(0, 3, 1, 2)
    assert distance(scores.exp() / lse.exp2(), weight) <= 1e-12


@pytest.mark.parametrize("geometry", ["padded_and_shifted", "one_window"])
def test_gradcheck(geometry: str) -> None:
    _, _, window, shift = GEOMETRIES[geometry]
    inputs = make(geometry, 2, batch=1, heads=1, dim=2)
    assert torch.autograd.gradcheck(
        lambda *tensors: window_attention(*tensors, window, shift, SCALE), inputs
    )


@pytest.mark.parametrize("geometry", ["padded_and_shifted", "oblong"])
def test_batch_mates_do_not_matter(geometry: str) -> None:
    inputs = [t.detach() for t in make(geometry, shared=False, batch=3)]
    _, _, window, shift = GEOMETRIES[geometry]
    together = window_attention(*inputs, window, shift, SCALE)
    for i in range(3):
        alone = window_attention(
            inputs[0][i : i + 1], *inputs[1:3], inputs[3][i : i + 1], window, shift, SCALE
        )
        assert distance(alone, together[i : i + 1]) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
def test_error_is_no_larger_than_eager(dtype: torch.dtype, shared: bool) -> None:
    """The error against fp64 is that of the textbook in the same dtype."""
    geometry = "padded_and_shifted"
    inputs = make(geometry, 9, shared, dim=32, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = run(textbook, geometry, exact)
    slack = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    rounded = [*inputs[:2], inputs[2].detach().float().requires_grad_(), inputs[3]]
    for ours, eager, true in zip(
        run(window_attention, geometry, rounded),
        run(textbook, geometry, inputs),
        truth,
        strict=True,
    ):
        assert distance(ours, true) <= distance(eager, true) + slack


def test_same_batch_gives_the_same_bits() -> None:
    inputs = make("padded_and_shifted", batch=5, dtype=torch.float32)
    first, second = (run(window_attention, "padded_and_shifted", inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("geometry", ["padded_and_shifted", "one_window"])
@pytest.mark.parametrize("prompts", [None, 3])
def test_opcheck(geometry: str, prompts: int | None) -> None:
    _, _, window, shift = GEOMETRIES[geometry]
    shape = (list(window), list(shift), SCALE)
    inputs = make(geometry, prompts, dtype=torch.float32)
    torch.library.opcheck(window_attention_operator, (*inputs, *shape))
    inputs = [None if t is None else t.detach() for t in inputs]
    out, lse = window_attention_operator(*inputs, *shape)
    for asked in (
        (True, True, True, True),
        (True, False, False, False),
        (False, True, False, False),
    ):
        torch.library.opcheck(
            window_attention_operator_backward,
            (*inputs, out, lse, torch.ones_like(out), *shape, *asked),
        )


def test_compiles_without_a_graph_break() -> None:
    inputs = make("padded_and_shifted", dtype=torch.float32)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    same(
        run(compiled, "padded_and_shifted", inputs),
        run(window_attention, "padded_and_shifted", inputs),
        1e-6,
    )


def test_autocast_rounds_but_for_the_table() -> None:
    inputs = make("padded_and_shifted", dtype=torch.float32)
    _, _, window, shift = GEOMETRIES["padded_and_shifted"]
    with torch.autocast("cpu", torch.bfloat16):
        out = window_attention(*inputs, window, shift, SCALE)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (2, 7, 9, 2, 2, 4)}, r"qkv must be \(B, H, W, 3, h, d\)"),
        ({2: (48, 2)}, r"table is .* take \(49, 2\)"),
        ({1: (3, 2, 5)}, r"pad is .* \(3, 2, 4\) is expected"),
        ({3: (1, 3, 2, 2, 5)}, r"prompts must be"),
        ({3: (3, 3, 2, 2, 4)}, "prompts are of 3 images"),
    ],
)
def test_wrong_shapes_are_named(change: dict[int, tuple[int, ...]], message: str) -> None:
    inputs: list[Any] = make("padded_and_shifted")
    for index, shape in change.items():
        inputs[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        window_attention(*inputs, (4, 4), (2, 2), SCALE)


def test_wrong_shifts_and_dtypes_are_named() -> None:
    inputs = make("padded_and_shifted")
    with pytest.raises(ValueError, match=r"shift is \(4, 2\)"):
        window_attention(*inputs, (4, 4), (4, 2), SCALE)
    inputs[3] = inputs[3].detach().float()
    with pytest.raises(TypeError, match="float32"):
        window_attention(*inputs, (4, 4), (2, 2), SCALE)
