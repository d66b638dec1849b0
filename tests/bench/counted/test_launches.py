"""Kernel launches of a block: the counter, and the number for a prompted block."""

from __future__ import annotations

import pytest
import torch

from bench.counted.launches import counted, launches_per_block, main, providers
from vpt_fast.kernels.runtime.launch import Launch

FORWARD, BACKWARD = 9, 13


def test_products_passes_and_copies_count_and_views_do_not() -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    with counted() as counts:
        torch.addmm(bias, x, weight.T)  # a vector is added in the product's epilogue
        y = torch.addmm(torch.zeros(3, 5), x, weight.T)  # a matrix is copied first
        y.view(15)[None].transpose(0, 1).detach()
        torch.promote_types(torch.float16, torch.float32)
        torch.empty(3)
        y.add_(1.0)
    assert dict(counts) == {"addmm": 2, "copy_": 1, "zeros": 1, "add_": 1}


def test_our_operators_count_their_launches() -> None:
    qkv = torch.randn(2, 5, 3, 1, 16).bfloat16()
    run = Launch.run
    with counted() as counts:
        torch.ops.vpt_fast.attention([qkv], [], 0.25)
    assert dict(counts) == {"forward": 1}
    assert Launch.run is run


@pytest.mark.parametrize("layer_scale", [False, True])
def test_a_block_of_vpt_deep_launches_no_more_than_it_may(layer_scale: bool) -> None:
    builders = providers(10, layer_scale)
    forward, backward = launches_per_block(builders["VPT-Deep, speed"])
    eager_forward, eager_backward = launches_per_block(builders["VPT-Deep, eager"])
    assert 8 <= forward.total() <= FORWARD < eager_forward.total()
    assert 11 <= backward.total() <= BACKWARD < eager_backward.total()
    assert forward["forward"] == backward["dq"] == backward["shared_prompt_dkdv"] == 1
    assert forward["residual_norm"] == 2, "the block's two sums; all prompts are normalised at once"


def test_a_block_of_vapt_launches_no_more_than_it_may() -> None:
    """The mixing weights of all blocks are folded by one launch."""
    forward, backward = launches_per_block(providers(10)["VAPT, speed"])
    assert forward.total() <= 11 and backward.total() <= 22
    assert "fold" not in forward and forward["features"] == forward["mix"] == 1


def test_modes_that_save_less_launch_more_in_backward_only() -> None:
    builders = providers(10)
    pairs = [
        launches_per_block(builders[f"VPT-Deep, {memory}"])
        for memory in ("speed", "balanced", "lean", "minimal")
    ]
    assert {forward.total() for forward, _ in pairs} == {FORWARD}
    backward = [counts.total() for _, counts in pairs]
    assert backward == sorted(backward) and backward[0] < backward[-1] <= backward[0] + FORWARD


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompts", "5"]) == 0
    printed = capsys.readouterr().out
    assert "VPT-Deep, speed" in printed and "counted" in printed
