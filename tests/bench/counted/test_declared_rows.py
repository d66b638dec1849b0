"""Declared loads and stores of the row-wise kernels, compared with the executed ones."""

from __future__ import annotations

import pytest
import torch
from support.kernels.traffic import Draw, both

from vpt_fast.kernels.rowwise import activation, gated_activation, residual_norm, rotation

pytest_plugins = ("support.kernels.kernel_device",)
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counted by ttsem, which runs kernels on the CPU"
)

BF16 = torch.bfloat16


@pytest.mark.parametrize("plain", [False, True])
def test_residual_norm(plain: bool, kernel_device: torch.device) -> None:
    draw, shape, width = Draw(kernel_device), (2, 9, 72), 72
    branch, scale, weight, bias = (
        [None] * 4 if plain else [draw(*shape), draw(width), draw(width), draw(width)]
    )
    with both() as (declared_bytes, executed_bytes):
        x, y, statistics = residual_norm.residual_norm(
            draw(*shape), branch, scale, weight, bias, 1e-6, None if plain else 1e-5, BF16
        )
        residual_norm.residual_norm_backward(
            y if plain else x, statistics, weight, scale, draw(*shape),
            None if plain else draw(*shape), None if plain else BF16,
        )  # fmt: skip
    assert set(executed_bytes) == {"residual_norm", "residual_norm_backward"}
    assert declared_bytes == executed_bytes


@pytest.mark.parametrize("biased", [False, True])
def test_activation(biased: bool, kernel_device: torch.device) -> None:
    draw, shape = Draw(kernel_device), (2, 9, 100)
    h, bias = draw(*shape), draw(100) if biased else None
    with both() as (declared_bytes, executed_bytes):
        activation.activation(h, bias, "gelu")
        activation.activation_backward(h, bias, draw(*shape), "gelu")
    assert set(executed_bytes) == {"activation", "activation_backward"}
    assert declared_bytes == executed_bytes


@pytest.mark.parametrize("biased", [False, True])
def test_gated_activation(biased: bool, kernel_device: torch.device) -> None:
    draw, shape = Draw(kernel_device), (2, 9, 100)
    biases = (draw(50), draw(50)) if biased else (None, None)
    with both() as (declared_bytes, executed_bytes):
        gated_activation.gated(draw(*shape), *biases, "silu", False)
        gated_activation.gated_backward(draw(*shape), *biases, draw(2, 9, 50), "silu", True)
    assert set(executed_bytes) == {"gated", "gated_backward"}
    assert declared_bytes == executed_bytes


@pytest.mark.parametrize("per_head", [False, True])
def test_rotation(per_head: bool, kernel_device: torch.device) -> None:
    draw, size = Draw(kernel_device), (2,) if per_head else ()
    table = draw(*size, 7, 48).float()
    with both() as (declared_bytes, executed_bytes):
        rotation.rotate(draw(2, 9, 3, 2, 24), table, 2, True, False)
    assert set(executed_bytes) == {"rotation"}
    assert declared_bytes == executed_bytes
