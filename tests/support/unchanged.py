"""Snapshots by value: a model after removal or a refusal, and equality of nested tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.formulations.plain import distance


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return what `remove_prompts` restores and a refusal leaves unchanged; weights are copied."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "flags": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "identities": [(name, id(p)) for name, p in model.named_parameters()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Assert that a model equals its snapshot, weights bit for bit."""
    after = snapshot(model)
    state, expected = after.pop("state"), dict(before)
    old = expected.pop("state")
    assert list(state) == list(old)
    for name in old:
        assert torch.equal(state[name], old[name]), f"{name} changed"
    for what, value in expected.items():
        assert after[what] == value, f"{what} changed"


def leaves(value: Any) -> list[Tensor]:
    """Return all tensors of nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [leaf for inner in values for leaf in leaves(inner)]


def assert_alike(found: Any, expected: Any) -> None:
    """Assert the same structure and equal tensors."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
    if not isinstance(expected, Tensor):
        assert len(found) == len(expected)
    for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
        assert distance(ours, theirs) <= 1e-10
