"""Methods by name, with the modules that they train, and their JSON form for adapters."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

from vpt_fast.methods.baselines import (
    AdapterTuning,
    Baseline,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
)
from vpt_fast.methods.fields import as_json, check_values, constructor_fields
from vpt_fast.methods.prompt_method import PromptMethod
from vpt_fast.methods.prompts import VAPT, VPTDeep, VPTShallow

Method = Baseline | PromptMethod

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        LinearProbe,
        VPTShallow,
        VPTDeep,
        VAPT,
        MLPHead,
        PartialTuning,
        BiasTuning,
        AdapterTuning,
        FullTuning,
    )
}
"""Methods that are known in this process, by name."""

PUBLISHED = ("bpt", "cvpt", "dvpt", "e2vpt", "gate-vpt", "vfpt")
"""Names of the methods of other papers, whose package is imported when one of them is asked for."""

NAMES = (*METHODS, *PUBLISHED)
"""Names of all methods that come with this package."""

ENTRY_POINTS = "vpt_fast.methods"
"""Group of entry points, name = "package.module:Class", by which installed packages add methods."""

_OURS = tuple(METHODS.values())
_PACKAGE = __name__.partition(".")[0]
_DEFINED_IN, _DISTRIBUTION = "defined_in", "distribution"
_RESERVED = ("name", _DEFINED_IN, _DISTRIBUTION)
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

Maker = TypeVar("Maker", bound=Callable[..., Any])


class Modules(NamedTuple):
    """What a method trains.

    Attributes:
        block: Function of the method and a block's `BlockInfo` that returns the module of the
            block.
        shared: Function of both, of one of the prompted blocks, that returns a module which all
            blocks of one width share; or None.
        update: Function of both that returns a module which changes the prompt rows that leave the
            block; or None.
    """

    block: Callable[..., Any]
    shared: Callable[..., Any] | None
    update: Callable[..., Any] | None


_MODULES: dict[type[Method], Modules] = {}


def register_method(
    name: str,
    settings: type[PromptMethod],
    shared: Callable[..., Any] | None = None,
    update: Callable[..., Any] | None = None,
) -> Callable[[Maker], Maker]:
    """Decorate the module of a prompt method, a `vpt_fast.PromptModule`: register both by name.

    Args:
        name: Name of the method in adapters and on the command line: small letters, digits and
            single hyphens.
        settings: Frozen dataclass that derives from `vpt_fast.PromptMethod`.
        shared: nn.Module that all blocks of one width share, called like the decorated class; or
            None.
        update: nn.Module of each block that prompt rows leave, called like the decorated class. Its
            `forward(left, entered)` gets the prompt rows (B, p, D) of the block's output and of its
            input, and returns those that enter the next block; or None.

    Returns:
        Decorator of a class, or of a function, that is called with the settings and a
        `vpt_fast.BlockInfo` for every prompted block.

    Raises:
        TypeError: If `settings` is no such class, or one of its fields has a name that adapters
            reserve.
        ValueError: If the name is not valid, or another method has it.
    """
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"{name!r} is no name of a method; use small letters, digits and hyphens")
    _check_settings(settings)
    before = METHODS.get(name)
    if before is None and name in PUBLISHED and not _is_ours(settings):
        before = find_method(name)
    if before is not None and _path(before) != _path(settings):
        raise ValueError(f"{_path(before)} is registered as {name!r} already; choose another name")

    def decorate(maker: Maker) -> Maker:
        own = vars(settings).get("name", name)
        if own != name:
            raise ValueError(f"{settings.__name__} is registered as {own!r} already")
        known = _MODULES.get(settings)
        if known is not None and _path(known.block) != _path(maker):
            raise ValueError(
                f"{settings.__name__} is registered with {_path(known.block)} already; derive "
                "settings of your own from it"
            )
        settings.name = name
        METHODS[name] = settings
        _MODULES[settings] = Modules(maker, shared, update)
        return maker

    return decorate


def _check_settings(settings: Any) -> None:
    good = isinstance(settings, type) and issubclass(settings, PromptMethod)
    if not good or "__dataclass_params__" not in vars(settings):
        raise TypeError(
            f"settings is {settings!r}; a frozen dataclass that derives from PromptMethod is needed"
        )
    for field in fields(settings):
        if field.name in _RESERVED:
            raise TypeError(f"{settings.__name__}.{field.name}: adapters reserve this name")


def modules_of(method: PromptMethod) -> Modules:
    """Return what a method trains, which `check_method` accepted."""
    return _MODULES[type(method)]


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == _PACKAGE


def _path(cls: Any) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def check_method(method: Any) -> Method:
    """Return `method`, or raise TypeError if it is not an instance of a registered dataclass."""
    if type(method) in METHODS.values():
        if type(method) not in _OURS:
            if isinstance(method, PromptMethod):
                PromptMethod.__post_init__(method)  # which a class of one's own may have left out
            check_values(method)
        return method
    if isinstance(method, PromptMethod):
        raise TypeError(
            f"{type(method).__name__} is not registered; decorate the module that it trains with "
            f"@register_method(name, {type(method).__name__})"
        )
    if method in METHODS.values():
        raise TypeError(f"method is the class {method.__name__}; give an instance of it")
    known = ", ".join(f"{cls.__name__}()" for cls in METHODS.values() if not _origin(cls))
    raise TypeError(f"method must be one of {known}, or of a registered class; got {method!r}")


def _as_field(value: Any) -> Any:
    return tuple(map(_as_field, value)) if isinstance(value, list) else value


def find_method(name: str) -> type[Method]:
    """Return a method's class by its name, or by its address.

    A name that is not known in this process is looked up among the entry points of installed
    packages.

    Args:
        name: Registered name, or "package.module:Class", which is imported.

    Raises:
        ValueError: If there is no such method, or it cannot be imported.
    """
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"method {name!r} cannot be imported: {error}") from error
        return _registered(found, name)
    if name in PUBLISHED:
        importlib.import_module(f"{_PACKAGE}.published")
    if name not in METHODS:
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
            try:
                return _registered(point.load(), point.value)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"method {name!r} cannot be imported: {error}") from error
        raise ValueError(f"unknown method {name!r}; known: {', '.join(method_names())}")
    return METHODS[name]


def _registered(found: Any, where: str) -> type[Method]:
    for settings, modules in _MODULES.items():
        if modules.block is found:
            raise ValueError(
                f"{where} is a module; give the class of its settings, {_path(settings)}"
            )
    if found not in METHODS.values():
        raise ValueError(f"{where} is no registered method; see vpt_fast.register_method")
    return found


def method_names() -> list[str]:
    """Return the names of all methods, those of installed packages included."""
    installed = importlib.metadata.entry_points(group=ENTRY_POINTS).names
    return list(dict.fromkeys((*NAMES, *METHODS, *sorted(installed))))


def to_dict(method: Method) -> dict[str, Any]:
    """Return a method's name and fields as JSON values, and where it is defined if not here."""
    values = {f.name: as_json(getattr(method, f.name)) for f in constructor_fields(type(method))}
    return {"name": method.name, **values, **_origin(type(method))}


def _origin(cls: type) -> dict[str, str]:
    """Return the address of a class, and the installed distribution, if another package has it."""
    if _is_ours(cls):
        return {}
    found = {_DEFINED_IN: _path(cls)}
    package = cls.__module__.partition(".")[0]
    for name in importlib.metadata.packages_distributions().get(package, ())[:1]:
        found[_DISTRIBUTION] = f"{name} {importlib.metadata.version(name)}"
    return found


def from_dict(values: Mapping[str, Any]) -> Method:
    """Return the method that `to_dict` wrote. Nothing is imported that `values` name.

    Raises:
        ValueError: If the name or a field is not known, or a value is of the wrong type or out of
            range.
    """
    values = dict(values)
    name = values.pop("name", None)
    origin, distribution = (values.pop(key, None) for key in (_DEFINED_IN, _DISTRIBUTION))
    if not isinstance(name, str) or ":" in name:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(method_names())}")
    try:
        cls = find_method(name)
    except ValueError as error:
        if origin is None:
            raise
        module = str(origin).partition(":")[0]
        if module == "__main__":
            raise ValueError(
                f"method {name!r} is not known here: a script or a notebook defined it. Run its "
                "definition first; in a module of its own it can be imported by name"
            ) from error
        install = f"install {distribution} and " if distribution else ""
        raise ValueError(
            f"method {name!r} is not known here, {origin} defines it: {install}import {module} "
            f"first (on the command line: vpt-fast --import {module} ...)"
        ) from error
    unknown = sorted(set(values) - {f.name for f in constructor_fields(cls)})
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}; was it written by a newer version?")
    try:
        return cls(**{key: _as_field(value) for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
