"""The papers' baselines on timm's own model, independent of the library.

The trained parameters follow from the modules that own them, not from the library.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.formulations.plain import distance, gradients, tuned_gradients
from vpt_fast import (
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
    prompt_tune,
)

BASELINES: dict[str, Any] = {
    "linear": LinearProbe(),
    "full": FullTuning(),
    "partial": PartialTuning(1),
    "partial-2": PartialTuning(2),
    "bias": BiasTuning(),
    "adapter": AdapterTuning(4),
    "mlp-head": MLPHead(),
    "mlp-wide": MLPHead(2, hidden_dim=17),
}


def _owned(model: Any, method: Any) -> list[nn.Module]:
    """Return the modules of the backbone whose parameters are all trained."""
    if isinstance(method, FullTuning):
        return [model]
    if isinstance(method, PartialTuning):
        after = [m for m in (model.norm, model.attn_pool, model.fc_norm) if m is not None]
        return [*list(model.blocks)[-method.num_blocks :], *after]
    return []


class PlainBaseline:
    """A plain timm model with the parameters of a tuned one, and a baseline's added layers.

    Attributes:
        model: timm's model in eval mode; trained parameters require a gradient.
        trained: Leaf tensors by name in the tuned model.
    """

    def __init__(self, model: nn.Module, method: Any, state: dict[str, Tensor]) -> None:
        self.model: Any = model.requires_grad_(False).eval()
        self.method = method
        heads = self.model.get_classifier()
        owners = [*(heads if isinstance(heads, tuple) else [heads]), *_owned(self.model, method)]
        chosen = {id(p) for module in owners for p in module.parameters()}
        if isinstance(method, BiasTuning):
            for module in self.model.modules():
                for name in ("bias", "q_bias", "v_bias"):
                    bias = getattr(module, name, None)
                    if isinstance(bias, nn.Parameter):
                        chosen.add(id(bias))
        self.trained: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in chosen:
                parameter.data = state[name].detach().clone()
                self.trained[name] = parameter.requires_grad_()
        for name, value in state.items():
            if "adapter" in name or "head_hidden" in name:
                self.trained[name] = value.detach().clone().requires_grad_()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.trained[f"{name}.weight"], self.trained[f"{name}.bias"])

    def features(self, image: Tensor, **attention: Any) -> Tensor:
        """Return the expected result of `forward_features`, (B, N, D)."""
        model, attention = self.model, {"attn_mask": None, "is_causal": False, **attention}
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
        for index, block in enumerate(model.blocks):
            if not isinstance(self.method, AdapterTuning):
                x = block(x, **attention)
                continue
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **attention)))
            h = block.ls2(block.mlp(block.norm2(x)))
            name = f"blocks.{index}.adapter"
            h = h + self._linear(f"{name}.up", F.gelu(self._linear(f"{name}.down", h)))
            x = x + block.drop_path2(h)
        return model.norm(x)

    def __call__(self, image: Tensor, **attention: Any) -> Any:
        """Return logits (B, classes)."""
        x = self.features(image, **attention)
        if not isinstance(self.method, MLPHead):
            return self.model.forward_head(x)
        x = self.model.forward_head(x, pre_logits=True)
        if isinstance(self.model.head, nn.Identity):
            return x
        for layer in range(self.method.num_layers - 1):
            x = self._linear(f"head_hidden.{2 * layer}", x).relu()
        return self.model.head(x)


def assert_same(model: nn.Module, plain: PlainBaseline, output: Any, expected: Any) -> None:
    """Assert equal logits, the same trained names and equal gradients, to 1e-10."""
    assert distance(output, expected) <= 1e-10
    ours, theirs = tuned_gradients(model, output), gradients(expected, plain.trained)
    assert set(ours) == set(theirs)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, right in theirs.items():
        if name.endswith("k_norm.bias"):
            # It adds the same to all scores of a query: its gradient is 0 up to rounding.
            assert ours[name].abs().max() <= 1e-12 * largest
            assert right.abs().max() <= 1e-12 * largest
        else:
            assert distance(ours[name], right) <= 1e-10, name


def redraw_added(model: nn.Module, seed: int = 7) -> None:
    """Draw a method's added layers anew, of order one: adapters are initialised to the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "adapter" in name or "head_hidden" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise / max(1, parameter.shape[-1]) ** 0.5)


def baseline_pair(base: nn.Module, method: Any, memory: str = "speed") -> tuple[Any, PlainBaseline]:
    """Tune `base` in place; return it with its plain formulation of the same parameters."""
    untouched = copy.deepcopy(base)
    tuned = prompt_tune(base, method, memory=memory)
    redraw_added(tuned)
    return tuned, PlainBaseline(untouched, method, tuned.state_dict())
