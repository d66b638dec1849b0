"""Blocks that save nothing reuse the memory of each other's results, without any effect on them.

The kernels run here, on blocks of one layout in a row, and are compared with the references.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.formulations import families
from support.kernels.recording_driver import compared, recording
from test_first_rows import BATCH, HEADS, KINDS, ROWS, WIDTH, rand, sources, weights
from torch import Tensor

from vpt_fast import VAPT, VPTDeep, prompt_tune
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.function import run_blocks
from vpt_fast.ops.block.parts import BlockConfig, BlockWeights
from vpt_fast.ops.block.sites import REFERENCE_SITES, PlannedSites, Sites
from vpt_fast.ops.operation import Operation
from vpt_fast.ops.window_attention.rows import Windows

pytest_plugins = ("support.kernels.kernel_device",)

BLOCKS = 4
WINDOWS = Windows((2, 3), (2, 2), (0, 1))
Results = dict[str, list[int]]


def spied(results: Results) -> Sites:
    """Return the kernels' sites, which add the addresses of each operation's results."""

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            found = function(*arguments, **options)
            tensors = found if isinstance(found, tuple) else [found]
            results.setdefault(name, []).extend(
                t.data_ptr() for t in tensors if isinstance(t, Tensor)
            )
            return found

        return call

    class Spied(PlannedSites):
        def implementation(self, operation: Operation) -> Callable[..., Any]:
            return spy(operation.name, super().implementation(operation))

    return Spied()


def row(
    kind: str, sites: Sites, device: torch.device, windows: Windows | None = None
) -> tuple[list[BlockSteps], list[Any]]:
    """Return blocks of different weights, and the tensors of their prompts, in fp32."""

    def moved(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        return tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    source, tensors = sources(kind)
    if kind == "folded":
        tensors = (F.pad(tensors[0], (0, 60)), *tensors[1:])  # padded as the kernels take it
    config = BlockConfig(HEADS, 0.6, 0.1, 0.2, "gelu", "speed", source, windows)
    blocks, given = [], []
    for index in range(BLOCKS):
        scaled = [None if w is None else moved(w) * (1 + 0.1 * index) for w in weights()]
        w = BlockWeights._make(scaled)
        if windows is not None:
            w = w._replace(position_bias=moved(rand(9, HEADS, seed=index)))
        blocks.append(BlockSteps(config, w, torch.float32, sites))
        given.append(tuple(map(moved, tensors)))
    return blocks, given


def check_row(kind: str, device: torch.device, windows: Windows | None = None) -> Results:
    rows = ROWS if windows is None else 6
    results: Results = {}
    blocks, given = row(kind, spied(results), device, windows)
    references, plain = row(kind, REFERENCE_SITES, torch.device("cpu"), windows)
    outputs = []
    # Launch plans of one autograd mode serve the others.
    for seed, mode in ((21, torch.inference_mode), (22, torch.enable_grad), (23, torch.no_grad)):
        x, branch = rand(BATCH, rows, WIDTH, seed=seed), rand(BATCH, rows, WIDTH, seed=seed + 5)
        x, branch = x.float(), branch.float()
        on_device = x.to(device).clone(), branch.to(device).clone()
        with mode():
            found = run_blocks(blocks, *on_device, given)
            expected = run_blocks(references, x, branch, plain)
        outputs.append((found, expected))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(on_device, (x, branch), strict=True))
    # Compared last: no call may write over an earlier call's results.
    for found, expected in outputs:
        for ours, right in zip(found, expected, strict=True):
            assert (ours.cpu() - right).norm() <= 1e-5 * right.norm()
    assert (outputs[0][1][0] - outputs[1][1][0]).abs().max() > 0.1
    return results


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.full if k in ("static", "paper") else ()) for k in KINDS],
)
def test_a_row_of_blocks(kind: str, kernel_device: torch.device) -> None:
    results = check_row(kind, kernel_device)
    # Results of the first call: two of attention, three of each of the two norms.
    assert len(set(results["attention"][: 2 * BLOCKS])) == 2
    if kind not in ("static", "dropped"):  # their prompts are normalised, too
        assert len(set(results["residual_norm"][: 6 * BLOCKS])) == 6


@pytest.mark.parametrize("kind", ["none", "keys"])
def test_a_row_of_blocks_with_windows(kind: str, kernel_device: torch.device) -> None:
    results = check_row(kind, kernel_device, WINDOWS)
    assert len(set(results["window_attention"][: 2 * BLOCKS])) == 2


def test_with_gradients_every_block_has_results_of_its_own(kernel_device: torch.device) -> None:
    results: Results = {}
    blocks, given = row("keys", spied(results), kernel_device)
    x = rand(BATCH, ROWS, WIDTH, seed=21).float().to(kernel_device).requires_grad_()
    output, branch = run_blocks(blocks, x, x.detach().clone(), given)
    assert len(set(results["attention"])) == 2 * BLOCKS
    references, plain = row("keys", REFERENCE_SITES, torch.device("cpu"))
    again = x.detach().cpu().requires_grad_()
    right, right_branch = run_blocks(references, again, again.detach().clone(), plain)
    (output * branch).sum().backward()
    (right * right_branch).sum().backward()
    assert x.grad is not None and again.grad is not None
    assert (x.grad.cpu() - again.grad).norm() <= 1e-4 * again.grad.norm()


@pytest.mark.parametrize("method", [VPTDeep(3), VAPT(3)], ids=["deep", "vapt"])
def test_launches_of_training_and_inference_alternate(method: Any) -> None:
    """Every launch has the arguments of a launch built anew: no plan serves both uses."""
    with recording():
        model = prompt_tune(families.build(families.TOKEN, dtype=torch.bfloat16, depth=5), method)
        images = families.images(families.TOKEN, batch=2, dtype=torch.bfloat16)
        with compared() as found:
            built = 0
            for index in range(3):
                for infer in (torch.no_grad(), torch.inference_mode()):
                    with infer:
                        model.eval()(images)
                    if index:
                        assert found.built == built, "the layouts are known"
                model.train()(images).sum().backward()
                built = found.built
        assert found.replayed > 2 * found.built
