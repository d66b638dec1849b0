"""Recorded and replayed blocks: the same bits, and eager calls where a replay would be wrong.

The recordings are `support.tape`'s: operators that run again on the same tensors.
"""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from support.graphs import (
    LABELS,
    assert_same_gradients,
    gradients,
    images,
    pair,
    refuse_state_while_recording,
    step,
    swin,
    vit,
)
from support.tape import is_handed_out
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    PartialTuning,
    VPTDeep,
    VPTShallow,
    load_adapter,
    prompt_tune,
    remove_prompts,
    save_adapter,
)
from vpt_fast.models.graphs import block_graphs

METHODS = [
    VPTDeep(2, dropout=0.5),
    VPTDeep(2, shared=True, project_dim=8),
    VPTShallow(2),
    VAPT(2),
    LinearProbe(),
    PartialTuning(1),
    BiasTuning(),
    AdapterTuning(4),
    FullTuning(),
]


@pytest.fixture(autouse=True)
def no_state_while_recording(monkeypatch):
    refuse_state_while_recording(monkeypatch)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'dropout', '')}")
def test_three_steps_of_an_optimizer_have_the_same_bits(method):
    eager, graphed, capture = pair(method)
    for model in (eager, graphed):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for seed in range(3):
            optimizer.zero_grad(set_to_none=seed != 1)
            step(model, seed)
            optimizer.step()
    assert_same_gradients(eager, graphed)
    pieces = 1 if method.name == "linear" else 2
    assert (capture.recorded, capture.replayed) == (pieces, 3 * pieces)


@pytest.mark.parametrize("memory", ["balanced", "lean", "minimal", "grad_checkpointing"])
@pytest.mark.parametrize("make", [vit, swin])
def test_every_memory_mode_is_replayed(memory, make):
    checkpointing = memory == "grad_checkpointing"
    eager, graphed, capture = pair(memory="speed" if checkpointing else memory, make=make)
    for model in (eager, graphed):
        model.set_grad_checkpointing(checkpointing)
        for seed in range(2):
            step(model, seed)
    assert_same_gradients(eager, graphed)
    assert (capture.recorded, capture.replayed) == (2, 4)


def test_dropout_in_a_recomputed_block_is_refused_by_name():
    eager, graphed, capture = pair(VPTDeep(2, dropout=0.5), "minimal")
    with pytest.warns(UserWarning, match="dropout is drawn in a block that is computed again"):
        step(graphed)
    step(eager)
    assert_same_gradients(eager, graphed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned of once
        step(graphed, 1)
    assert capture.recorded == 0


def test_prompt_dropout_is_drawn_at_every_replay():
    _, graphed, _ = pair(VPTDeep(4, dropout=0.5))
    found = {float(graphed(images()).detach().sum()) for _ in range(4)}
    assert len(found) == 4


def test_gradients_of_several_batches_add_up_in_memory_of_their_own():
    eager, graphed, capture = pair(FullTuning())
    for model in (eager, graphed):
        for seed in range(3):
            step(model, seed)
    assert_same_gradients(eager, graphed)
    first = {name: grad.clone() for name, grad in gradients(graphed).items()}
    assert not any(is_handed_out(capture, grad) for grad in gradients(graphed).values())
    with torch.no_grad():
        held = graphed(images(1))
        value = held.clone()
        graphed(images(2))
    assert torch.equal(held, value)
    assert all(torch.equal(grad, first[name]) for name, grad in gradients(graphed).items())


def test_a_scaled_loss_under_autocast():
    eager, graphed, capture = pair()
    for model in (eager, graphed):
        for seed in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                step(model, seed, scale=2.0**10)
    assert_same_gradients(eager, graphed)
    assert capture.replayed == 4
    step(graphed, 3)
    assert capture.recorded == 4  # another precision, another recording


def test_a_recording_holds_the_casts_that_it_reads():
    _, graphed, capture = pair()
    with torch.autocast("cpu", torch.bfloat16):
        step(graphed)
    reading = graphed.blocks[0]._reading.known
    cast = reading.in_dtype(torch.bfloat16).qkv_weight
    step(graphed)  # an fp32 step does not use the cast
    assert cast.dtype == torch.bfloat16 and reading.held() is None
    held = [e._casts for e in graphed.tune_record.graphs._entries.values()]
    assert held[0][0][1].qkv_weight is cast
    with torch.autocast("cpu", torch.bfloat16):
        step(graphed)
    assert (capture.recorded, capture.replayed) == (4, 6)


def test_hooks_on_trained_parameters_run_once_a_step():
    eager, graphed, capture = pair()
    calls = []
    for model in (eager, graphed):
        tokens = model.blocks[0].prompt.tokens
        tokens.register_hook(lambda grad: calls.append(1) or 3 * grad)
        tokens.register_post_accumulate_grad_hook(lambda p: calls.append(2))
        step(model)
        step(model, 1)
    assert calls == [1, 2] * 4 and capture.replayed == 4
    assert_same_gradients(eager, graphed)


def test_below_distributed_data_parallel(tmp_path):
    eager, graphed, capture = pair()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(graphed)
        for seed in range(3):
            step(eager, seed)
            step(parallel, seed)
    finally:
        dist.destroy_process_group()
    assert_same_gradients(eager, graphed)
    assert capture.replayed == 6


def test_shapes_and_modes_are_recorded_apart():
    eager, graphed, capture = pair(VPTDeep(2, dropout=0.5))
    step(graphed)
    for count in (2, 3, 2, 3):
        with torch.no_grad():
            graphed(images(count=count))
    assert len(graphed.tune_record.graphs) == 3
    eager.eval(), graphed.eval()
    with torch.inference_mode():
        found = graphed(images())
        assert torch.allclose(found, eager(images()), atol=1e-6) and found.is_inference()
    with torch.no_grad():
        assert torch.allclose(graphed(images(1)), eager(images(1)), atol=1e-6)
    assert len(graphed.tune_record.graphs) == 4
    assert capture.recorded == 5


def test_recordings_are_bounded(monkeypatch):
    monkeypatch.setattr(block_graphs, "MOST_RECORDINGS", 2)
    _, graphed, _ = pair()
    with torch.no_grad():
        graphed(images(count=1)), graphed(images(count=2))
        with pytest.warns(UserWarning, match="2 recordings already"):
            graphed(images(count=3))
    assert len(graphed.tune_record.graphs) == 2


def test_two_forwards_before_a_backward_are_right():
    eager, graphed, capture = pair()
    for model in (eager, graphed):
        step(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first, second = model(images(1)), model(images(2))
            (F.cross_entropy(first, LABELS) + 2 * F.cross_entropy(second, LABELS)).backward()
    assert "before the backward pass of the one before it" in str(caught[0].message)
    assert_same_gradients(eager, graphed)
    model(images(3))  # without a backward pass
    before = capture.replayed
    step(graphed, 4)
    assert capture.replayed == before + 2


def test_backward_a_second_time_is_refused_by_name():
    _, graphed, _ = pair()
    loss = F.cross_entropy(graphed(images()), LABELS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cuda_graphs=False for retain_graph=True"):
        loss.backward()


def test_a_weight_written_between_forward_and_backward_is_noticed():
    _, graphed, _ = pair()
    step(graphed)
    loss = F.cross_entropy(graphed(images()), LABELS)
    with torch.no_grad():
        graphed.blocks[1].attn.proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="written between forward and backward"):
        loss.backward()


def test_copies_have_no_recordings_and_removal_drops_them(tmp_path):
    eager, graphed, capture = pair()
    step(graphed)
    twin = copy.deepcopy(graphed)
    assert len(twin.tune_record.graphs) == 0 and len(graphed.tune_record.graphs) == 1
    file = io.BytesIO()
    torch.save(graphed, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert len(loaded.tune_record.graphs) == 0
    assert torch.equal(loaded(images()), eager(images()))
    save_adapter(graphed, tmp_path / "adapter")
    plain = load_adapter(remove_prompts(graphed), tmp_path / "adapter")
    assert plain.tune_record.graphs is None
    assert torch.equal(plain.train()(images()), eager(images()))


def test_on_the_cpu_nothing_changes():
    eager = prompt_tune(vit(), VPTDeep(2)).train()
    torch.manual_seed(0)
    asked = prompt_tune(vit(), VPTDeep(2), cuda_graphs=True).train()
    asked.load_state_dict(eager.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(eager), step(asked)
    assert_same_gradients(eager, asked)
    assert len(asked.tune_record.graphs) == 0
