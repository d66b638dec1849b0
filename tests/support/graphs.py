"""Tuned models with graphs and without, whose steps are compared bit for bit."""

from __future__ import annotations

import copy

import timm
import torch
from torch import nn
from torch.nn import functional as F

from support.pictures import backbone
from support.tape import TapeCapture
from vpt_fast import VPTDeep, prompt_tune
from vpt_fast.models.graphs.block_graphs import BlockGraphs
from vpt_fast.models.graphs.capture import is_recording

LABELS = torch.tensor([0, 2])


def refuse_state_while_recording(monkeypatch):
    """Refuse to read the generator's state while a graph is recorded, as CUDA's does."""
    own = torch.get_rng_state

    def get_state():
        if is_recording():
            raise RuntimeError("Cannot call CUDAGeneratorImpl::get_state during graph capture")
        return own()

    monkeypatch.setattr(torch, "get_rng_state", get_state)


def vit():
    return backbone(depth=2)


def swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, num_classes=3, embed_dim=32, depths=(1, 1),
        num_heads=(2, 4), window_size=4,
    )  # fmt: skip


def pair(method=None, memory="speed", make=vit):
    """Return two equal tuned models, the second with graphs, and the capture of its graphs."""
    torch.manual_seed(0)
    eager = prompt_tune(make(), method or VPTDeep(2), memory).train()
    for parameter in eager.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    graphed = copy.deepcopy(eager)
    capture = TapeCapture()
    graphed.tune_record.graphs = BlockGraphs(lambda device: capture)
    return eager, graphed, capture


def images(seed=0, count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def step(model, seed=0, scale=1.0):
    torch.manual_seed(seed)
    logits = model(images(seed))
    (F.cross_entropy(logits, LABELS) * scale).backward()
    return logits.detach()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(eager, graphed):
    wanted, found = gradients(eager), gradients(graphed)
    assert found.keys() == wanted.keys() and found
    for name, grad in found.items():
        assert torch.equal(grad, wanted[name]), name
