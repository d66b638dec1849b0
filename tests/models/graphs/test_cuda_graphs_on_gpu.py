"""CUDA graphs on a GPU: replayed blocks and steps against eager ones."""

from __future__ import annotations

import copy

import pytest
import torch
from support.pictures import backbone
from torch.nn import functional as F

from vpt_fast import VAPT, AdapterTuning, VPTDeep, prompt_tune
from vpt_fast.models.graphs.block_graphs import BlockGraphs
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.images import Batch
from vpt_fast.train.loop.graphed_step import StepGraphs
from vpt_fast.train.loop.step import TrainStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHODS = [VPTDeep(2), VPTDeep(2, dropout=0.5), VAPT(2), AdapterTuning(4)]


def pair(method, memory="speed"):
    torch.manual_seed(0)
    eager = prompt_tune(backbone(depth=3).cuda(), method, memory).train()
    return eager, copy.deepcopy(eager)


def batch(seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return images.cuda(), torch.arange(count).remainder(3).cuda()


def assert_close(eager, graphed):
    for (name, one), other in zip(eager.named_parameters(), graphed.parameters(), strict=True):
        for wanted, found in ((one, other), (one.grad, other.grad)):
            if wanted is not None:
                torch.testing.assert_close(
                    found, wanted, rtol=2e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'dropout', '')}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks(method, dtype):
    eager, graphed = pair(method)
    graphed.tune_record.graphs = BlockGraphs()
    for model in (eager, graphed):
        for seed in range(4):
            torch.manual_seed(seed)
            images, labels = batch(seed)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
    assert_close(eager, graphed)
    assert len(graphed.tune_record.graphs) == 1


@pytest.mark.parametrize("memory", ["balanced", "lean", "minimal"])
def test_memory_modes(memory):
    eager, graphed = pair(VPTDeep(2), memory)
    graphed.tune_record.graphs = BlockGraphs()
    for model in (eager, graphed):
        for seed in range(3):
            images, labels = batch(seed)
            F.cross_entropy(model(images), labels).backward()
    assert_close(eager, graphed)
    assert len(graphed.tune_record.graphs) == 1


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'dropout', '')}")
@pytest.mark.parametrize("amp_dtype", ["float32", "bfloat16", "float16"])
def test_steps(method, amp_dtype):
    recipe = Recipe(batch_size=8, lr=0.1, warmup_epochs=0, amp_dtype=amp_dtype, accumulation=2)
    steps = [TrainStep(model, recipe, 4) for model in pair(method)]
    steps[0].graphs = None
    assert isinstance(steps[1].graphs, StepGraphs)
    sums = []
    for step in steps:
        for seed in range(5):
            torch.manual_seed(seed)
            images, labels = batch(seed, 8)
            sums.append(step(Batch(images, labels, [])).clone())
    assert_close(steps[0].model, steps[1].model)
    torch.testing.assert_close(torch.stack(sums[:5]), torch.stack(sums[5:]), rtol=1e-2, atol=1e-2)
    assert len(steps[1].graphs) == 1
