"""The check of every provider against fp64: a provider that fails it is not timed.

The ground truth is the published formulation of the same model in fp64, from the same weights
rounded to the case's dtype. An error is the norm of a difference over the norm of the truth, for
logits and for each trained gradient, without dropout, on two images (on copies of them that fill
the batch, if a provider is compiled for that batch size). A provider may have twice the error of
concatenation in eager PyTorch in the same dtype, plus a slack that depends on the dtype; the error
of concatenation itself may be at most `WORST`. The gradient of a single number, whose terms may
cancel almost entirely, is measured together with that of its layer's weight, or with those of the
same name in other blocks.

Without prompts, LayerNorms are trained, and their gradients are sums over all rows. PyTorch's CPU
kernel for 16-bit tensors accumulates them in 16 bits: over the 6,272 rows of two images in Swin's
first block it loses a third of the value or more. Those rows are summed again in fp64, since they
are what the provider computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.compare.cases import DTYPES, INFERENCE, Case
from bench.providers.models import (
    COMPILED,
    PUBLISHED,
    WITHOUT,
    base,
    gradients,
    provide,
    set_values,
    trained,
    values,
)
from vpt_fast.modules.experts import PromptExperts

SLACK = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 1e-2}
WORST = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
"""Errors of a correct step in eager PyTorch are far smaller."""

IMAGES = 2
_SHORT = (torch.float16, torch.bfloat16)

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """Result of checking a provider.

    Attributes:
        provider: Name of the provider.
        error: Largest relative error of logits and gradients.
        worst: Name of the result that has it.
        limit: Largest error allowed.
    """

    provider: str
    error: float
    worst: str
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the provider may be timed. NaN does not hold."""
        return self.error <= self.limit


def budget(eager: float, kind: str) -> float:
    """Return the largest error allowed where eager PyTorch has error `eager` in dtype `kind`."""
    return min(WORST[kind], 2 * eager + SLACK[kind])


def results(module: nn.Module, images: Tensor, labels: Tensor, train: bool) -> Results:
    """Return logits and, for a training step, the trained gradients; in fp64."""
    with norm_gradients(module) as resummed, torch.set_grad_enabled(train):
        logits = module(images.to(next(module.parameters()).dtype))
        if train:
            loss_dtype = torch.promote_types(logits.dtype, torch.float32)
            F.cross_entropy(logits.to(loss_dtype), labels).backward()
    found = {"logits": logits}
    if train:
        found |= gradients(module) | resummed
        for parameter in module.parameters():
            parameter.grad = None
    return {name: value.detach().double().cpu() for name, value in found.items()}


@contextmanager
def norm_gradients(module: nn.Module) -> Iterator[Results]:
    """Recompute in fp64 the gradients of LayerNorms that a CPU accumulates in 16 bits.

    Args:
        module: Module that runs forward and backward once inside the context.

    Yields:
        The gradients by parameter name, filled in during backward; empty on another device, in
        another dtype, and for a compiled module.
    """
    names = {id(parameter): name for name, (parameter, _) in trained(module).items()}
    found: Results = {}

    def forward(norm: nn.LayerNorm, inputs: tuple[Tensor], out: Tensor) -> None:
        normed = F.layer_norm(inputs[0].detach().double(), norm.normalized_shape, eps=norm.eps)

        def backward(grad: Tensor) -> None:
            rows = grad.double()
            for parameter, terms in ((norm.weight, rows * normed), (norm.bias, rows)):
                found[names[id(parameter)]] = terms.flatten(0, -2).sum(0)

        if out.requires_grad:
            out.register_hook(backward)

    experts = (part for part in module.modules() if isinstance(part, PromptExperts))
    never_called = {id(part) for expert in experts for part in expert.modules()}
    handles = [
        norm.register_forward_hook(forward)
        for norm in module.modules()
        if isinstance(norm, nn.LayerNorm) and id(norm) not in never_called
        and id(norm.weight) in names and id(norm.bias) in names
        and norm.weight.dtype in _SHORT and norm.weight.device.type == "cpu"
        and not hasattr(module, "_orig_mod")
    ]  # fmt: skip
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def largest_error(have: Results, want: Results) -> tuple[float, str]:
    """Return the largest relative error, and the name of the result that has it.

    Of a result that is 0, the error is absolute: of what comes before a weight that starts at 0.

    Raises:
        ValueError: If the names differ.
    """
    if set(have) != set(want):
        raise ValueError(f"results of {sorted(set(have) ^ set(want))} on one side only")
    have, want = _with_single_numbers(have), _with_single_numbers(want)
    errors = {
        name: float((have[name] - value).norm() / (value.norm() or 1))
        for name, value in want.items()
    }
    # NaN is the worst of all.
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[worst], worst


def _with_single_numbers(found: Results) -> Results:
    """Return the results with single numbers joined: biases to their layer's weight, then others.

    Others are those of the same name in several blocks.
    """
    joined = dict(found)
    for name, value in found.items():
        weight = name.removesuffix("bias") + "weight"
        if name.endswith(".bias") and value.numel() == 1 and weight in joined:
            joined[weight] = torch.cat([joined[weight].flatten(), joined.pop(name).flatten()])
    alone: dict[str, list[Tensor]] = {}
    for name in [name for name, value in joined.items() if value.numel() == 1]:
        alone.setdefault(re.sub(r"\d+", "*", name), []).append(joined.pop(name).flatten())
    return joined | {name: torch.cat(values) for name, values in alone.items()}


class Truth:
    """Ground truth of a case in fp64, and the error of eager PyTorch in the case's dtype.

    Args:
        case: Case to check; its dropout is ignored.
        device: Device that providers run on.
        whole: Whether to check at the case's batch size, on copies of two images, which changes
            neither the mean loss nor its gradients; by default if a provider is compiled.
    """

    def __init__(
        self, case: Case, device: torch.device | str = "cpu", whole: bool | None = None
    ) -> None:
        self.case = case
        self.device = torch.device(device)
        self.train = case.work != INFERENCE
        if whole is None:
            # A compiled provider is checked at the batch size that it is compiled for.
            whole = not set(COMPILED).isdisjoint(case.providers)
        count = case.batch if whole and case.batch % IMAGES else min(IMAGES, case.batch)
        self._count, self._copies = count, case.batch // count if whole else 1
        images, labels = case.inputs(count)
        rounded = images.to(DTYPES[case.dtype])
        self._inputs = rounded.to(self.device), labels.to(self.device)
        self._double = rounded.double().to(self.device), labels.to(self.device)
        exact = self._exact(PUBLISHED)
        self.values = values(exact)
        self._wanted = {PUBLISHED: results(exact, *self._double, self.train)}
        self._eager: float | None = None

    def _exact(self, name: str) -> nn.Module:
        dtype = DTYPES[self.case.dtype]
        module = provide(name, self.case.build().to(dtype), self.case.settings(0.0))
        module = module.double().to(self.device)
        set_values(module, {key: value.to(dtype) for key, value in values(module).items()})
        return module

    def _want(self, name: str) -> Mapping[str, Tensor]:
        key = WITHOUT if base(name) == WITHOUT else PUBLISHED
        if key not in self._wanted:
            self._wanted[key] = results(self._exact(key), *self._double, self.train)
        return self._wanted[key]

    def module(self, name: str, dropout: float | None = None) -> nn.Module:
        """Return a provider with the truth's parameter values, in the case's dtype and mode."""
        model = self.case.build().to(DTYPES[self.case.dtype]).to(self.device)
        module = provide(name, model, self.case.settings(dropout), self.case.memory)
        set_values(module, self.values)
        plain = not self.case.prompts or base(name) == WITHOUT
        return module if plain else module.train(self.train)

    def check(self, name: str, module: nn.Module | None = None) -> Check:
        """Compare a provider with the truth.

        Args:
            name: Name of the provider.
            module: Result of `module(name, 0.0)`, if it already exists.
        """
        limit = WORST[self.case.dtype]
        if name not in ("concat", WITHOUT):
            if self._eager is None:
                self._eager = self.check("concat").error
            limit = budget(self._eager, self.case.dtype)
        module = self.module(name, 0.0) if module is None else module
        images, labels = self._inputs
        copies = images.repeat(self._copies, 1, 1, 1), labels.repeat(self._copies)
        have = results(module, *copies, self.train)
        have["logits"] = have["logits"][: self._count]
        error, worst = largest_error(have, dict(self._want(name)))
        return Check(name, error, worst, limit)
