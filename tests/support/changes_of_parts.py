"""Edits of a model, one at a time: of every module and attribute that forward reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm import layers
from torch import Tensor, nn
from torch.nn.utils import parametrize

from support.changes import LowRank, Scaled, blocks_of, changed


class Mixing(nn.Module):
    """A wrapper that adds the mean over rows: no row may be left out before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.inner(x, *args, **kwargs)
        return y + 0.3 * y.mean(-2, keepdim=True)


class Sine(nn.Module):
    """A module type that the library does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.2 * x.sin() + 0.1 * x


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


@dataclass(frozen=True)
class Change:
    """An edit of a model.

    Attributes:
        name: Name of the module, and of the edit.
        make: Function that edits a model and may record calls in a list.
        plain: Function that edits the plain model, where it differs from `make`.
    """

    name: str
    make: Callable[[Any, list[str]], None]
    plain: Callable[[Any, list[str]], None] | None = None


def _at(path: str, change: Callable[[Any], Any]) -> Callable[[Any, list[str]], None]:
    def make(model: Any, _: list[str]) -> None:
        change(model.get_submodule(path))

    return make


def _put(path: str, make: Callable[[Any], nn.Module]) -> Callable[[Any, list[str]], None]:
    parent, _, leaf = path.rpartition(".")

    def put(model: Any, _: list[str]) -> None:
        owner = model.get_submodule(parent)
        module = make(getattr(owner, leaf))
        if isinstance(owner, nn.Sequential):
            owner[int(leaf)] = module
        else:
            setattr(owner, leaf, module)

    return put


def _halved(module: Any, inputs: Any, *outputs: Any) -> Any:
    return tuple(None if grad is None else 0.5 * grad for grad in inputs)


def _hooks(path: str) -> Iterator[Change]:
    def counted(register: str, hook: Callable[..., Any]) -> Callable[[Any, list[str]], None]:
        def make(model: Any, calls: list[str]) -> None:
            def call(*inputs: Any) -> Any:
                calls.append(path)
                return hook(*inputs)

            getattr(model.get_submodule(path), register)(call)

        return make

    after = counted("register_forward_hook", lambda m, args, out: changed(out))
    before = counted("register_forward_pre_hook", lambda m, args: (changed(args[0]), *args[1:]))
    yield Change(f"{path}: hook", after)
    yield Change(f"{path}: hook before", before)
    yield Change(f"{path}: look", counted("register_forward_hook", lambda *_: None))
    gradient = _at(path, lambda m: m.register_full_backward_hook(_halved))
    yield Change(f"{path}: hook on gradients", gradient)
    gradient = _at(path, lambda m: m.register_full_backward_pre_hook(lambda m, g: _halved(m, g)))
    yield Change(f"{path}: hook before gradients", gradient)


def _own_forward(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args, **more: changed(forward(*args, **more))


def _strict_forward(module: Any) -> None:
    """Give a module a forward that ignores all arguments but the first."""
    forward = module.forward
    module.forward = lambda x, mask=None, attn_mask=None, is_causal=False: changed(forward(x))


def _low_rank(linear: nn.Linear) -> nn.Module:
    torch.manual_seed(5)
    return LowRank(linear)


def _replaced(module: Any) -> None:
    for name, value in [*module.named_parameters(recurse=False)]:
        setattr(module, name, nn.Parameter(1.5 * value.detach(), value.requires_grad))


def _through_data(module: Any) -> None:
    for value in module.parameters(recurse=False):
        value.data = 1.5 * value.data


def _edited(module: Any) -> None:
    with torch.no_grad():
        for value in module.parameters(recurse=False):
            value.mul_(1.5)


def _trained(flag: bool) -> Callable[[Any], None]:
    return lambda module: module.requires_grad_(flag)


def _subclass(module: Any) -> None:
    kind = type(module)
    name = f"Other{kind.__name__}"
    own = {"forward": lambda self, *args, **more: 1.5 * kind.forward(self, *args, **more)}
    module.__class__ = type(name, (kind,), own)


def _of_module(path: str, module: nn.Module) -> Iterator[Change]:
    """Yield the edits of any module, and those of its type."""
    yield from _hooks(path)
    yield Change(f"{path}: own forward", _at(path, _own_forward))
    yield Change(f"{path}: strict forward", _at(path, _strict_forward))
    yield Change(f"{path}: wrapped", _put(path, lambda m: nn.Sequential(m, Sine())))
    yield Change(f"{path}: subclass", _at(path, _subclass))
    yield Change(f"{path}: mixing", _put(path, Mixing))
    yield Change(f"{path}: training", _at(path, lambda m: setattr(m, "training", True)))
    if [*module.parameters(recurse=False)]:
        yield Change(f"{path}: replaced parameters", _at(path, _replaced))
        yield Change(f"{path}: parameters through data", _at(path, _through_data))
        yield Change(f"{path}: edited parameters", _at(path, _edited))
        yield Change(f"{path}: trained", _at(path, _trained(True)))
        yield Change(f"{path}: frozen", _at(path, _trained(False)))
        rounded = _at(path, lambda m: m.float().double())
        yield Change(f"{path}: float", _at(path, lambda m: m.float()), rounded)
    if type(module) is nn.Linear:
        yield Change(f"{path}: low rank", _put(path, _low_rank))
        yield Change(f"{path}: scaled", _at(path, lambda m: setattr(m, "__class__", Scaled)))
        yield Change(f"{path}: parametrized", _at(path, _parametrized))
        yield Change(f"{path}: no bias", _at(path, lambda m: setattr(m, "bias", None)))
    if "norm" in path.rpartition(".")[2]:
        yield Change(f"{path}: identity", _put(path, lambda m: nn.Identity()))
        yield Change(f"{path}: RMS", _put(path, _rms_norm))
        if hasattr(module, "eps"):
            yield Change(f"{path}: eps", _at(path, lambda m: setattr(m, "eps", 0.3)))
    if path.endswith("act"):
        for name, kind in {"relu": nn.ReLU, "sine": Sine, "silu": nn.SiLU}.items():
            yield Change(f"{path}: {name}", _put(path, lambda m, kind=kind: kind()))
        yield Change(f"{path}: tanh", _put(path, lambda m: nn.GELU(approximate="tanh")))
    if hasattr(module, "gamma"):
        yield Change(f"{path}: in place", _at(path, lambda m: setattr(m, "inplace", True)))


def _parametrized(linear: Any) -> None:
    parametrize.register_parametrization(linear, "weight", Doubled())


def _rms_norm(norm: Any) -> nn.Module:
    weight = getattr(norm, "weight", None)
    width = 1 if weight is None else len(weight)
    rms = layers.RmsNorm(width).double()
    with torch.no_grad():
        rms.weight.copy_(torch.linspace(0.5, 1.5, width))
    return rms.requires_grad_(False)


def _of_attention(path: str) -> Iterator[Change]:
    for name, value in {
        "scale": 0.9, "num_heads": 4, "head_dim": 4, "fused_attn": False, "fused_attn on": True,
    }.items():  # fmt: skip
        attribute = name.split()[0]
        yield Change(
            f"{path}: {name}",
            _at(path, lambda m, a=attribute, v=value: hasattr(m, a) and setattr(m, a, v)),
        )


def _own_method(name: str) -> Change:
    def make(model: Any, _: list[str]) -> None:
        method = getattr(model, name)
        setattr(model, name, lambda *args, **more: changed(method(*args, **more)))

    return Change(f"model: own {name}", make)


def _shared(part: str) -> Change:
    def make(model: Any, _: list[str]) -> None:
        first, second = blocks_of(model)[:2]
        parent, _, leaf = part.rpartition(".")
        setattr(second.get_submodule(parent), leaf, first.get_submodule(part))

    return Change(f"both blocks: one {part}", make)


def _of_model(model: Any) -> Iterator[Change]:
    for part in ("norm1", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "norm2", "attn"):
        if part in dict(blocks_of(model)[0].named_modules()):
            yield _shared(part)
    if not hasattr(model, "blocks"):
        return
    for name in ("_pos_embed", "pool", "forward_head"):
        yield _own_method(name)
    for name, value in {
        "global_pool": "token", "global_pool avg": "avg", "global_pool max": "max",
        "pool_include_prefix": True, "num_prefix_tokens": 0, "no_embed_class": True,
    }.items():  # fmt: skip
        attribute = name.split()[0]
        yield Change(f"model: {name}", lambda m, _, a=attribute, v=value: setattr(m, a, v))
    for name in ("cls_token", "reg_token", "pos_embed", "dist_token"):
        if getattr(model, name, None) is None:
            continue
        for how, value in {"trained": True, "frozen": False}.items():
            yield Change(
                f"model: {name} {how}",
                lambda m, _, n=name, v=value: getattr(m, n).requires_grad_(v),
            )
        yield Change(f"model: {name} edited", lambda m, _, n=name: _edit(m, n))
        yield Change(f"model: {name} replaced", lambda m, _, n=name: _replace(m, n))
    yield Change("model: one block", lambda m, _: setattr(m, "blocks", m.blocks[:1]))
    yield Change("model: headless", lambda m, _: setattr(m, "head", nn.Identity()))
    yield Change("model: another head", lambda m, _: setattr(m, "head", _head(m)))


def _edit(model: Any, name: str) -> None:
    with torch.no_grad():
        getattr(model, name).mul_(1.5)


def _replace(model: Any, name: str) -> None:
    setattr(model, name, nn.Parameter(1.5 * getattr(model, name).detach(), False))


def _head(model: Any) -> nn.Linear:
    torch.manual_seed(8)
    return nn.Linear(model.embed_dim, 3, dtype=torch.float64)


def _skipped(path: str) -> bool:
    """Return whether a module is not edited: a container, a block, or a part of attention pooling.

    The plain formulation does not call containers, and hooks of a tuned block see no prompt rows.
    """
    last = path.rpartition(".")[2]
    return (
        not path or path.startswith("attn_pool") or last in ("blocks", "layers") or last.isdigit()
    )


def changes_of(model: Any) -> list[Change]:
    """Return all edits of a model with such modules."""
    found: list[Change] = []
    for path, module in model.named_modules():
        if _skipped(path) or (".mlp." not in path and path.startswith("head.")):
            continue
        found += _of_module(path, module)
        if path.endswith("attn"):
            found += _of_attention(path)
    return [*found, *_of_model(model)]
