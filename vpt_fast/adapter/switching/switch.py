"""Several adapters on one model: add, switch, name and delete them, or do without any."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vpt_fast.adapter.files import read_adapter
from vpt_fast.adapter.hub.names import local_folder
from vpt_fast.adapter.load import tuned_by
from vpt_fast.adapter.switching.aside import (
    Aside,
    copied,
    exchange,
    head_names,
    own_names,
    take_up,
)
from vpt_fast.adapter.switching.state import FIRST, Adapters, adapters_of
from vpt_fast.checks import check_model
from vpt_fast.methods import Method, check_method
from vpt_fast.models.family import family_of
from vpt_fast.models.fold import FoldRecord, fold_backbone, unfold_backbone
from vpt_fast.models.interop.wrappers import inner_model
from vpt_fast.models.tuned import blocks_of, is_disabled, is_tuned
from vpt_fast.tune import apply_method, classifiers_of, trained_in_place

Model = TypeVar("Model", bound=nn.Module)


def add_adapter(
    model: Model,
    name: str,
    source: Method | str | os.PathLike[str],
    *,
    num_classes: int | None = None,
) -> Model:
    """Add an adapter to a tuned model; the active one stays active.

    All adapters of a model share its frozen backbone. Each has prompts, classifiers and parameters
    of its own, the memory mode and the use of CUDA graphs that the active one has, and may be of
    another method and another number of classes. The model's own modules, `parameters()` and
    `state_dict()` are those of the base model and the active adapter.

    Args:
        model: Tuned model. The adapter of `prompt_tune` or `load_adapter` is named "default".
        name: Name of the new adapter.
        source: Method of a new adapter, whose classifier starts as the base model's; or the folder
            or Hub name of a saved one, as for `load_adapter`.
        num_classes: Number of classes of a new adapter, with a new classifier; None takes the base
            model's. A saved adapter has its own.

    Returns:
        `model` itself.

    Raises:
        ValueError: If `model` is not tuned, the name is taken, the method or the saved adapter does
            not fit, or `num_classes` is given beside a saved one. `model` is unchanged then.
        TypeError: If `source` is neither a method nor a name.
        FileNotFoundError: If there is no such adapter.
    """
    tuned: Any = _checked(model)
    adapters = adapters_of(tuned)
    _check_name(name)
    if name == adapters.active or name in adapters.others:
        raise ValueError(f"there is an adapter {name!r} already; choose another name")
    saved = isinstance(source, (str, os.PathLike))
    if saved and num_classes is not None:
        raise ValueError(f"num_classes is {num_classes}, but {source} has its own; leave it out")
    method = None if saved else check_method(source)
    record = tuned.tune_record
    family: Any = family_of(tuned)
    if method is None:
        folder = local_folder(source)  # type: ignore[arg-type]
        config, tensors = read_adapter(folder)
    with _base_model(tuned, adapters, family):
        copied(adapters.heads).put(tuned)
        if method is None:
            _set_classes(tuned, config["model"].get("args", {}).get("num_classes"))
            with _own_parameters(tuned, adapters, tensors):
                tuned_by(tuned, folder, config, tensors, record.memory, record.graphs is not None)
                adapters.others[name] = adapters.leave(tuned, family)
        else:
            _set_classes(tuned, num_classes)
            check_model(tuned, method)
            with _own_parameters(tuned, adapters, trained_in_place(tuned, method, family)):
                apply_method(tuned, method, family, record.memory, record.graphs is not None)
                adapters.others[name] = adapters.leave(tuned, family)
    return model


def set_adapter(model: Model, name: str) -> Model:
    """Make an adapter of a model the active one.

    Pointers are exchanged: nothing is copied, and what does not depend on the adapter (readings of
    the frozen weights, folded weights, recorded graphs of each adapter) stays. A compiled model is
    not compiled again where the adapters have one form. An optimizer keeps the parameters that it
    was given: those of one adapter.

    Args:
        model: Tuned model.
        name: Name of an adapter; the active one is left as it is.

    Returns:
        `model` itself.

    Raises:
        ValueError: If `model` is not tuned, has no such adapter, or its folded weights do not suit
            the adapter. `model` is unchanged then.
    """
    tuned: Any = _checked(model)
    adapters = adapters_of(tuned)
    _check_name(name)
    if name == adapters.active:
        return model
    if name not in adapters.others:
        raise ValueError(f"there is no adapter {name!r}; there are {', '.join(_names(adapters))}")
    if tuned.tune_record.fold is not None:
        _check_fold(tuned, adapters.others[name], name)
    adapters.switch(tuned, name)
    return model


def active_adapter(model: nn.Module) -> str:
    """Return the name of the active adapter of a tuned model.

    Raises:
        ValueError: If `model` is not tuned, or its adapters are disabled.
    """
    adapters: Adapters | None = vars(_checked(model, changes=False)).get("tune_adapters")
    return FIRST if adapters is None else adapters.active


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of all adapters of a tuned model, the active one first.

    Raises:
        ValueError: If `model` is not tuned, or its adapters are disabled.
    """
    adapters: Adapters | None = vars(_checked(model, changes=False)).get("tune_adapters")
    return [FIRST] if adapters is None else _names(adapters)


def delete_adapter(model: Model, name: str) -> Model:
    """Delete an adapter that is not active.

    Args:
        model: Tuned model.
        name: Name of the adapter; not "default", which goes with `remove_prompts`.

    Returns:
        `model` itself.

    Raises:
        ValueError: If `model` is not tuned, or the adapter is missing, active or the first one.
    """
    adapters = adapters_of(_checked(model))
    if name in (FIRST, adapters.active):
        which = "the first adapter" if name == FIRST else "active"
        cure = "remove_prompts deletes all" if name == FIRST else "call set_adapter first"
        raise ValueError(f"{name!r} is {which}; {cure}")
    if name not in adapters.others:
        raise ValueError(f"there is no adapter {name!r}; there are {', '.join(_names(adapters))}")
    del adapters.others[name]
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Return a context in which a tuned model is the base model, bit for bit.

    Classes, weights and classifiers are those before tuning; the backbone stays frozen. Folded
    weights are unfolded for this time.

    Args:
        model: Tuned model.

    Yields:
        `model` itself.

    Raises:
        ValueError: If `model` is not tuned, or its adapters are disabled already.
    """
    tuned: Any = _checked(model)
    with _base_model(tuned, adapters_of(tuned), family_of(tuned)):
        tuned.tune_adapters = id(tuned)  # see is_disabled
        yield model


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"the adapter's name is {name!r}; give it a text")


def _names(adapters: Adapters) -> list[str]:
    return [adapters.active, *adapters.others]


def _checked(model: Any, changes: bool = True) -> Any:
    """Return the tuned model of a wrapper, or the model; raise ValueError if it is not tuned."""
    tuned = inner_model(model, changes)
    if is_tuned(tuned):
        return tuned
    if is_disabled(tuned):
        raise ValueError("the adapters of this model are disabled; leave `with disabled(model)`")
    raise ValueError(f"this {type(tuned).__name__} is not tuned; call prompt_tune first")


@contextmanager
def _base_model(model: Any, adapters: Adapters, family: Any) -> Iterator[None]:
    """Return a context without an adapter; afterwards the active one is back, whatever happened."""
    fold, training, like = model.tune_record.fold, model.training, _like(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    before = like.device, like.dtype
    _unfolded(model)
    try:
        aside = adapters.leave(model, family)
        del model.tune_adapters
        flags += [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            yield
        finally:
            adapters.displaced = take_up(model, family, aside)
            model.tune_adapters = adapters
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            if model.training == training:
                for module, mode in modes:
                    module.training = mode
            else:
                model.train(model.training)
            _converted(model, adapters, before)
    finally:
        _folded_again(model, fold)


def _like(model: Any) -> Tensor:
    weight: Tensor = blocks_of(model)[0].attn.proj.weight
    return weight


def _unfolded(model: Any) -> None:
    with torch.inference_mode(False):
        unfold_backbone(model)


def _folded_again(model: Any, fold: FoldRecord | None) -> None:
    if fold is None:
        return
    try:
        with torch.inference_mode(False):
            fold_backbone(model, **asdict(fold.folds))
    except ValueError as error:
        warnings.warn(f"the backbone is not folded any more: {error}", stacklevel=4)


def _converted(model: Any, adapters: Adapters, before: tuple[torch.device, torch.dtype]) -> None:
    """Give all adapters the device and dtype that the base model was given meanwhile."""
    device, dtype = _like(model).device, _like(model).dtype
    if (device, dtype) == before:
        return

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    model._apply(convert)


@contextmanager
def _own_parameters(model: Any, adapters: Adapters, names: Iterable[str]) -> Iterator[None]:
    """Return a context in which a base model has copies of parameters that will be trained.

    `Adapters.leave` puts the base model's back; so does an error.
    """
    heads = head_names(model)
    known = dict(model.named_parameters())
    own = [name for name in names if name in known and not name.startswith(heads)]
    copies = {name: nn.Parameter(known[name].detach().clone(), False) for name in own}
    adapters.displaced = exchange(model, copies)
    try:
        yield
    finally:
        exchange(model, adapters.displaced)
        adapters.displaced = {}


def _set_classes(model: Any, count: int | None) -> None:
    """Give a base model a new classifier, if it has another number of classes."""
    if count is None or count == model.num_classes:
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"num_classes is {count!r}; give a number of at least 0")
    model.reset_classifier(count)
    like = _like(model)
    for head in classifiers_of(model):
        head.to(like.device, like.dtype)


def _check_fold(model: Any, aside: Aside, name: str) -> None:
    """Raise ValueError if weights that are folded for one adapter do not suit another."""
    prompts = [part.modules.get("prompt") for part in aside.taken]
    prompts += [block._modules.get("prompt") for block in blocks_of(model)]
    keys = any(getattr(prompt, "num_keys", 0) for prompt in prompts)
    if aside.parameters or own_names(model) or keys:
        raise ValueError(
            f"the backbone is folded, and adapter {name!r} or the active one trains a part of it, "
            "or has keys and values of its own; add and choose adapters first, and fold then"
        )
