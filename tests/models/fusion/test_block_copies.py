"""Cast copies of a block's weights, and copies of the block itself.

A model that was used, changed and used again is compared with a copy of it, which is read anew.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE
from support.formulations.plain import distance
from test_block_reading import (
    METHODS,
    MIDDLE,
    assert_as_read_anew,
    autocast,
    images,
    in_place,
    linear,
    not_contiguous,
    parameter,
    results,
    swap,
    tuned,
)
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vpt_fast import VPTDeep, prompt_tune, remove_prompts
from vpt_fast.models.fusion.block_reading import BlockReading
from vpt_fast.ops.block.parts import BlockWeights


@pytest.mark.parametrize("method", METHODS)
def test_the_cast_copy_follows_the_weights(method: str) -> None:
    model, image = tuned(method, torch.float32), images(torch.float32)
    edits = (in_place, swap, parameter, linear, not_contiguous, in_place, in_place)
    for dtype in (torch.bfloat16, None, torch.float16, torch.bfloat16):
        with autocast(dtype):
            assert_as_read_anew(model, image)
    with autocast(torch.bfloat16):
        for edit in edits:
            before, _ = results(model, image)
            edit(model.blocks[MIDDLE])
            assert distance(assert_as_read_anew(model, image), before) > 1e-3, edit.__name__
    in_place(model.blocks[MIDDLE])
    assert_as_read_anew(model, image)


def test_weights_without_a_version_are_cast_in_every_call() -> None:
    with torch.inference_mode():
        model, image = tuned(dtype=torch.float32), images(torch.float32)
        with autocast(torch.bfloat16):
            before = model(image)
            model.blocks[MIDDLE].mlp.fc1.weight.mul_(1.5)
            found, expected = model(image), copy.deepcopy(model)(image)
    assert distance(found, expected) == 0 and distance(found, before) > 1e-3


def test_one_copy_is_cached_and_dropped_with_its_use() -> None:
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    block = model.blocks[MIDDLE]

    def copies() -> list[Any]:
        return [block._reading.current(block).in_dtype(torch.bfloat16) for _ in range(2)]

    with autocast(torch.bfloat16):
        results(model, image)
    first, second = copies()
    assert first is second and first.fc1_weight.dtype == torch.bfloat16
    held = weakref.ref(first.fc1_weight)
    del first, second
    results(model, image)
    assert held() is None
    with autocast(torch.bfloat16):
        results(model, image)
        held = weakref.ref(copies()[0].fc1_weight)
        block.mlp.fc1.weight.requires_grad_(True)
        results(model, image)
    assert held() is None and "_reading" not in block.__dict__


def test_a_cast_of_another_thread_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread casts to another dtype in the middle of this thread's cast."""
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    results(model, image)
    reading, cast = model.blocks[MIDDLE]._reading.known, BlockWeights.to

    def interrupted(self: BlockWeights, dtype: torch.dtype) -> BlockWeights:
        found = cast(self, dtype)
        if dtype == torch.bfloat16:
            reading.in_dtype(other)
        return found

    monkeypatch.setattr(BlockWeights, "to", interrupted)
    for other in (torch.float32, torch.float16):  # noqa: B007
        found = reading.in_dtype(torch.bfloat16)
        assert found.fc1_weight.dtype == torch.bfloat16
        reading.in_dtype(torch.float32)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_used_without_gradients_first(mode: Any, dtype: torch.dtype | None) -> None:
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    with mode(), autocast(dtype):
        first = model(image)
    with autocast(dtype):
        assert distance(assert_as_read_anew(model.train(), image), first) <= 1e-2
    with mode(), autocast(dtype):
        assert distance(model.eval()(image), first) == 0


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_files_are_models_of_their_own(method: str) -> None:
    model, image = tuned(method), images()
    expected, _ = results(model, image)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        copy.copy(model),
    ]
    for other in others:
        assert distance(results(other, image)[0], expected) == 0
    for other in others[:3]:
        in_place(other.blocks[MIDDLE])
        assert distance(assert_as_read_anew(other, image), expected) > 1e-3
        assert distance(results(model, image)[0], expected) == 0


def test_nothing_is_left_on_a_plain_model() -> None:
    model = families.build(AVERAGE)
    before = [set(vars(module)) for module in model.modules()]
    prompt_tune(model, VPTDeep(3, blocks=[2]))
    results(model.train(), images())
    assert type(model.blocks[0]) is Block and "_reading" in vars(model.blocks[0])
    remove_prompts(model)
    assert [set(vars(module)) for module in model.modules()] == before
    assert b"vpt_fast" not in pickle.dumps(model)


def test_a_used_model_is_freed_at_once() -> None:
    model = tuned(dtype=torch.float32)
    with autocast(torch.bfloat16):
        results(model, images(torch.float32))
    held = [weakref.ref(model.blocks[MIDDLE].attn.qkv.weight), weakref.ref(model.blocks[MIDDLE])]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_blocks_with_other_weights_missing_have_other_layouts() -> None:
    """LayerScale (D,) instead of a bias (D,): launches have other pointers."""
    model = tuned()
    model.blocks[0].attn.proj.bias = None
    model.blocks[1].ls1 = nn.Identity()
    results(model, images())
    layouts = {block._reading.known.layout for block in model.blocks}
    assert len(layouts) == 3


def test_layouts_are_bounded() -> None:
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    with torch.no_grad():
        for batch in range(1, 36):
            model(image[:1].expand(batch, -1, -1, -1))
    assert 0 < len(model.blocks[MIDDLE]._reading.known.steps) <= 32


def test_replicas_are_refused() -> None:
    model = tuned()
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        nn.Sequential(model)[0]._replicate_for_data_parallel()


def test_a_subclass_of_tensor_among_the_weights() -> None:
    model, image = tuned(), images()
    expected, _ = results(model, image)

    class Marked(Tensor):
        pass

    weight = model.blocks[MIDDLE].mlp.fc1.weight
    assert isinstance(model.blocks[MIDDLE]._reading, BlockReading)
    model.blocks[MIDDLE].mlp.fc1.weight = nn.Parameter(
        weight.detach().clone().as_subclass(Marked), requires_grad=False
    )
    assert distance(torch.Tensor(model(image).detach()), expected) <= 1e-10
    assert "_reading" not in vars(model.blocks[MIDDLE])


def test_threads() -> None:
    """Threads use one model; one of them changes the modes of a model of its own."""
    model, image = tuned(dtype=torch.float32), images(torch.float32)
    expected = {}
    for dtype in (None, torch.bfloat16):
        with torch.no_grad(), autocast(dtype):
            expected[dtype] = model(image)
    model = copy.deepcopy(model)
    errors: list[Any] = []

    def work(dtype: torch.dtype | None) -> None:
        try:
            for _ in range(10):
                with torch.no_grad(), autocast(dtype):
                    assert distance(model(image), expected[dtype]) <= 1e-6
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(d,)) for d in (None, torch.bfloat16) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
