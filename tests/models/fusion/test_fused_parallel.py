"""Two processes of DistributedDataParallel on halves of a batch train as one process does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.formulations import families
from support.formulations.families import AVERAGE
from support.formulations.plain import distance, redraw_prompts
from support.processes import in_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vpt_fast import VAPT, VPTDeep, VPTShallow, prompt_tune

STILL = {"dropout": 0.0, "projector_dropout": 0.0, "channel_dropout": 0.0}
METHODS: dict[str, Any] = {
    "shallow": (VPTShallow(3), "balanced"),
    "deep": (VPTDeep(3, shared=True, project_dim=6), "minimal"),
    "code": (VAPT(3, **STILL), "lean"),
}
BATCH, STEPS = 4, 2


def tuned(method: str) -> nn.Module:
    how, memory = METHODS[method]
    model = prompt_tune(families.build(AVERAGE, depth=2), how, memory=memory).train()
    redraw_prompts(model)
    return model


def train(model: nn.Module, image: Tensor) -> None:
    """Train with SGD on a loss that is a mean over the images."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        optimiser.zero_grad()
        model(image).tanh().sum(1).mean().backward()
        optimiser.step()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        image = families.images(AVERAGE, batch=BATCH).chunk(2)[rank]
        for method in METHODS:
            model = tuned(method)
            train(DistributedDataParallel(model), image)
            torch.save(model.state_dict(), Path(folder) / f"{method}{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without distributed")
def test_two_processes_are_one(tmp_path: Path) -> None:
    in_ranks(worker, tmp_path)
    for method in METHODS:
        one, before = tuned(method), tuned(method).state_dict()
        train(one, families.images(AVERAGE, batch=BATCH))
        for rank in (0, 1):
            data = io.BytesIO((tmp_path / f"{method}{rank}.pt").read_bytes())
            state = torch.load(data)
            for name, parameter in one.named_parameters():
                assert distance(state[name], parameter) <= 1e-10, f"{method}: {name}"
                changed = not torch.equal(state[name], before[name])
                assert changed == parameter.requires_grad, f"{method}: {name}"
