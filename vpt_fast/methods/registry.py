"""Methods by name and their JSON form, for adapters and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from vpt_fast.methods.baselines import (
    AdapterTuning,
    Baseline,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
)
from vpt_fast.methods.prompts import VAPT, VPTDeep, VPTShallow

Method = Baseline | VPTShallow | VPTDeep | VAPT

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


def check_method(method: Any) -> Method:
    """Return `method`, or raise TypeError if it is not one of the methods' dataclasses."""
    if type(method) not in METHODS.values():
        known = ", ".join(f"{cls.__name__}()" for cls in METHODS.values())
        raise TypeError(f"method must be one of {known}; got {method!r}")
    return method


def to_dict(method: Method) -> dict[str, Any]:
    """Return a method's name and fields as JSON values."""
    values = asdict(method)
    if values.get("blocks") is not None:
        values["blocks"] = list(values["blocks"])
    return {"name": method.name, **values}


def from_dict(values: Mapping[str, Any]) -> Method:
    """Return the method that `to_dict` wrote.

    Raises:
        ValueError: If the name or a field is not known, or a value is of the wrong type or out of
            range.
    """
    values = dict(values)
    name = values.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    cls = METHODS[name]
    unknown = sorted(set(values) - {f.name for f in fields(cls)})
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}; was it written by a newer version?")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
