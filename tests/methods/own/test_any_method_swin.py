"""Prompt methods of every form on Swin, against prompts in every window of timm's own modules."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.formulations import plain_swin
from support.formulations.any_method import KINDS, AnyMethod
from support.formulations.plain import assert_same, redraw_prompts
from support.formulations.plain_swin import PlainSwin
from support.formulations.plain_vapt import seeded
from torch import Tensor

from vpt_fast import Prompts, prompt_tune
from vpt_fast.models.tuned import blocks_of
from vpt_fast.ops.memory_modes import MEMORY_MODES


class PlainAny(PlainSwin):
    """See `PlainSwin`; `modules` are copies of the tuned model's."""

    def __init__(self, model: Any, method: AnyMethod, tuned: Any) -> None:
        super().__init__(model, method, tuned.state_dict())
        copied = copy.deepcopy(tuned)
        every = dict(copied.named_parameters())
        reads = method.kind.startswith("feature")
        for name, parameter in every.items():
            if "prompt" in name:
                self.trained.pop(name, None)
                if ".prompt." in name or reads:
                    self.trained[name] = parameter.requires_grad_()
        self.trained = {name: t for name, t in self.trained.items() if "mixing" not in name}
        self.modules = [block.prompt for block in blocks_of(copied)]
        self.shared = [stage._modules.get("prompt_shared") for stage in copied.layers]
        self.prompted = [*method.prompted_blocks(len(self.positions))]
        self.kv: Any = None

    def prompt(self, number: int, x: Tensor) -> Tensor:
        """Return the rows (B, p, D) of a block, and keep its keys and values in `self.kv`."""
        module, rows = self.modules[number], x.flatten(1, 2)
        stage, index = self.positions[number]
        if index == 0:
            self.feature = self.shared[stage](rows)
        inputs = {"nothing": (), "tokens": (rows,), "feature": (self.feature,)}[module.reads]
        made = module.forward(*inputs)
        own, keys, values = made if isinstance(made, Prompts) else (made, None, None)
        batch, drop = len(x), self.method.dropout
        if own is None:
            own = rows[:, :0]
        else:
            own = F.dropout(
                own if own.ndim == 3 else own.expand(batch, -1, -1), drop, self.training
            )
            own = module.after_dropout(own)
        self.kv = None
        if keys is not None:
            pair = [t if t.ndim == 4 else t.expand(batch, -1, -1, -1) for t in (keys, values)]
            self.kv = F.dropout(torch.stack(pair, 2), drop, self.training).unbind(2)
        return own

    def block(self, block: Any, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Any]:
        """Apply timm's block with prompt rows, and keys and values of this block alone."""
        found = super().block(block, x, rows)
        self.kv = None
        return found

    def attention(self, attn: Any, x: Tensor, count: int, mask: Any, batch: int) -> Tensor:
        """Apply attention to windows, which also read the keys and values."""
        with self._more_keys(len(x) // batch):
            return super().attention(attn, x, count, mask, batch)

    @contextlib.contextmanager
    def _more_keys(self, windows: int) -> Iterator[None]:
        attention, kv = F.scaled_dot_product_attention, self.kv

        def with_more(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            more = [t.transpose(1, 2).repeat_interleave(windows, 0) for t in kv]
            k, v = (torch.cat([own, t], 2) for own, t in zip(more, (k, v), strict=True))
            return attention(q, k, v, F.pad(bias, (more[0].shape[2], 0)))

        if kv is not None:
            F.scaled_dot_product_attention = with_more
        try:
            yield
        finally:
            F.scaled_dot_product_attention = attention


def built() -> tuple[Any, Any]:
    base: Any = plain_swin.build("tiny")
    for stage in base.layers:
        for block in stage.blocks:
            block.attn.fused_attn = True
    return base, plain_swin.images("tiny")


@pytest.mark.covering
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("blocks", [None, (0, 2), (0, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_formulation(kind: str, blocks: Any, memory: str, dropout: float) -> None:
    if kind.startswith("feature") and blocks == (0, 2):
        blocks = None  # a stage's feature is computed where its first block is prompted
    base, image = built()
    untouched, method = copy.deepcopy(base), AnyMethod(3, dropout, kind=kind, blocks=blocks)
    tuned: Any = prompt_tune(base, method, memory)
    redraw_prompts(tuned)
    for name, parameter in tuned.named_parameters():
        if "prompt_shared" in name and not kind.startswith("feature"):
            parameter.requires_grad_(False)
    plain = PlainAny(untouched, method, tuned)
    tuned.train()
    plain.training = True
    expected, output = seeded(plain, image), seeded(tuned, image)
    assert_same(tuned, plain, output, expected)


def test_windows_one_by_one_are_refused_for_keys_and_values() -> None:
    base, image = built()
    tuned: Any = prompt_tune(base, AnyMethod(2, kind="kv"))
    tuned.layers[0].blocks[1].attn.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="runs window by window, which keys and values of prompts"):
        tuned(image)
