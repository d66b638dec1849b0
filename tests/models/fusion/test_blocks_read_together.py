"""Weights that several blocks read together are freed, replaced and shared correctly."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE
from support.formulations.plain import distance
from test_block_reading import assert_as_read_anew, autocast, images, tuned
from torch import Tensor, nn

from vpt_fast.models.graphs.watched import Watched


def used(model: Any, image: Tensor) -> Tensor:
    with torch.no_grad(), autocast(torch.bfloat16):
        return model.forward_features(image)


CUTS: dict[str, Callable[[Any], Any]] = {
    "slice": lambda model: setattr(model, "blocks", model.blocks[:2]),
    "prune": lambda model: model.prune_intermediate_layers([1]),
    "delete": lambda model: model.blocks.__delitem__(2),
}


@pytest.mark.parametrize("cut", CUTS)
def test_blocks_that_are_taken_out_are_freed(cut: str) -> None:
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    used(model, image)
    held = weakref.ref(model.blocks[2].mlp.fc1.weight)
    gc.collect()
    gc.disable()
    try:
        CUTS[cut](model)
        used(model, image)
        assert held() is None
    finally:
        gc.enable()


def test_weights_that_are_loaded_over_are_freed() -> None:
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    used(model, image)
    held = weakref.ref(model.blocks[1].mlp.fc1.weight)
    state = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert held() is None
    with torch.no_grad():
        assert distance(model(image), copy.deepcopy(model)(image)) == 0


def test_a_block_has_one_copy_of_its_weights_and_recordings_hold_it() -> None:
    """Blocks that were read anew without the first one are read together again."""
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    used(model, image)
    handle = model.blocks[2].mlp.register_forward_hook(lambda *_: None)
    with torch.no_grad(), autocast(torch.bfloat16):
        model.forward_from(model.forward_until(image, 1), 1)
    handle.remove()
    for _ in range(2):
        used(model, image)
    held = {id(cast) for cast in Watched(model, ("blocks",)).casts()}
    read = model.blocks[2].__dict__["_together"].weights
    assert len(read) == 3
    for block, weights in zip(model.blocks, read, strict=True):
        assert block._reading.known is weights
        assert id(weights._cast) in held


def _swapped(block: Any) -> None:
    block.mlp.fc1.weight.data = 1.5 * block.mlp.fc1.weight.data


def _transposed(block: Any) -> None:
    """Swap rows and columns of a weight in the same memory."""
    block.attn.proj.weight.data = block.attn.proj.weight.data.t()


def _pruned(block: Any) -> None:
    """Cut the MLP to its first hidden channels, in the same memory."""
    mlp, count = block.mlp, block.mlp.fc1.weight.shape[0] // 2
    mlp.fc1.weight.data, mlp.fc1.bias.data = mlp.fc1.weight.data[:count], mlp.fc1.bias.data[:count]
    mlp.fc2.weight.data = mlp.fc2.weight.data[:, :count]


@pytest.mark.parametrize("change", [_swapped, _transposed, _pruned])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replaced_data_are_seen(change: Callable[[Any], None], dtype: torch.dtype | None) -> None:
    """Versions do not change with them, and the new data may begin at the old address."""
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    with autocast(dtype):
        for _ in range(6 if change is _swapped else 1):
            with torch.no_grad():
                before = model(image)
            change(model.blocks[1])
            assert distance(assert_as_read_anew(model, image), before) > 1e-4


def test_threads_that_see_a_change_at_once() -> None:
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    errors: list[BaseException] = []
    interval = sys.getswitchinterval()

    def work(start: threading.Barrier) -> None:
        start.wait()
        try:
            with torch.no_grad():
                model.forward_features(image)
        except BaseException as error:
            errors.append(error)

    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            weight = model.blocks[0].mlp.fc1.weight.detach().clone()
            model.blocks[0].mlp.fc1.weight = nn.Parameter(weight, requires_grad=False)
            start = threading.Barrier(3)
            threads = [threading.Thread(target=work, args=(start,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_runs_of_other_lengths() -> None:
    """Runs of several lengths of one model alternate; each equals that of a copy read anew."""
    model, image = tuned(), families.images(AVERAGE)
    for _ in range(2):
        for call in (
            lambda m: m(image),
            lambda m: m.forward_features(image),
            lambda m: m.forward_from(m.forward_until(image, 1), 1),
            lambda m: m.forward_from(m.forward_until(image, 2), 2),
        ):
            assert distance(call(model), call(copy.deepcopy(model))) == 0
