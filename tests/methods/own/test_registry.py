"""Methods by name: registering, finding, and their form in adapters."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters.adapter_editing import rewrite_config
from support.formulations import families, plain_swin
from torch import Tensor, nn

import vpt_fast
from vpt_fast import (
    E2VPT,
    LinearProbe,
    PromptMethod,
    PromptModule,
    VPTDeep,
    load_adapter,
    prompt_tune,
    register_method,
    save_adapter,
)
from vpt_fast.methods import METHODS, find_method, from_dict, method_names, registry, to_dict

SOURCE = """
from dataclasses import dataclass

import vpt_fast


@dataclass(frozen=True)
class Scaled(vpt_fast.PromptMethod):
    scale: float = 2.0
    sizes: tuple[int, ...] = (1, 2)


@vpt_fast.register_method("scaled", Scaled)
class ScaledPrompts(vpt_fast.PromptModule):
    def __init__(self, method, block):
        super().__init__()
        self.scale = method.scale
        self.tokens = block.new_parameter(method.num_prompts, block.width)

    def forward(self):
        return self.scale * self.tokens


class Other:
    pass
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Forget what a test registers."""
    methods, modules = dict(METHODS), dict(registry._MODULES)
    yield
    for now, before in ((METHODS, methods), (registry._MODULES, modules)):
        now.clear()
        now.update(before)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write a module that registers a method, in a folder that is searched."""
    (tmp_path / "scaled_prompts.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "scaled_prompts"
    sys.modules.pop("scaled_prompts", None)


def _module(settings: Any = PromptMethod) -> type[PromptModule]:
    class Tokens(PromptModule):
        def __init__(self, method: Any, block: Any) -> None:
            super().__init__()
            self.tokens = block.new_parameter(method.num_prompts, block.width)

        def forward(self) -> Tensor:
            return self.tokens

    return Tokens


def _settings(**fields: Any) -> Any:
    kinds = {name: type(value) for name, value in fields.items()}
    body = {"__annotations__": kinds, **fields}
    return dataclass(frozen=True)(type("Own", (PromptMethod,), body))


def test_what_cannot_be_registered() -> None:
    own = _settings()
    for name in ("", "Own", "two words", "-x", "a--b", "a:b", 3):
        with pytest.raises(ValueError, match="is no name of a method; use small letters"):
            register_method(name, own)  # type: ignore[arg-type]
    for settings in (nn.Linear, "own", VPTDeep(3), type("Plain", (PromptMethod,), {})):
        with pytest.raises(TypeError, match="a frozen dataclass that derives from PromptMethod"):
            register_method("own", settings)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Own.distribution: adapters reserve this name"):
        register_method("own", _settings(distribution=""))
    with pytest.raises(ValueError, match="VPTDeep is registered as 'vpt-deep' already"):
        register_method("vpt-deep", own)
    register_method("own", own)(_module())
    with pytest.raises(ValueError, match="Own is registered as 'own' already"):
        register_method("other", own)(_module())
    with pytest.raises(ValueError, match="registered with .*Tokens already; derive settings of"):
        register_method("own", own)(type("Other", (PromptModule,), {}))
    with pytest.raises(ValueError, match="VPTDeep is registered with .*:PromptTokens already"):
        register_method("vpt-deep", VPTDeep)(_module())
    assert find_method("vpt-deep") is VPTDeep and find_method("own") is own
    with pytest.raises(Exception, match="non-frozen dataclass from a frozen"):
        dataclass(type("Thawed", (PromptMethod,), {}))


def test_running_a_cell_again_replaces_a_method() -> None:
    first, second = _settings(), _settings()
    for settings in (first, second):
        register_method("own", settings)(_module())
    prompt_tune(families.build("vit"), second(2))
    with pytest.raises(TypeError, match="Own is not registered; decorate the module"):
        prompt_tune(families.build("vit"), first(2))


@pytest.mark.parametrize(
    "value", [[1], {1: 2}, float("nan"), torch.zeros(1), object(), (1, [2]), b"x"]
)
def test_fields_that_no_adapter_can_hold(value: Any) -> None:
    @dataclass(frozen=True)
    class Own(PromptMethod):
        extra: Any = field(default_factory=lambda: value)

    register_method("own", Own)(_module())
    base = families.build("vit")
    with pytest.raises(TypeError, match="Own.extra is .*, which no adapter can hold; use a num"):
        prompt_tune(base, Own())
    assert type(base).__module__.startswith("timm")


def test_fields_have_their_types() -> None:
    @dataclass(frozen=True)
    class Own(PromptMethod):
        rank: int = 1
        scale: float = 1.0
        name_of: str | None = None
        scales: tuple[float, ...] = ()
        pair: tuple[int, str] = (1, "x")
        steps: int = field(init=False, default=3)

    register_method("own", Own)(_module())
    for fields, why in (
        ({"rank": "4"}, "rank must be int, got '4'"),
        ({"rank": True}, "rank must be int, got True"),
        ({"rank": None}, "rank must be int, got None"),
        ({"name_of": 3}, r"name_of must be str \| None, got 3"),
        ({"scales": "1.0,0.5"}, r"scales must be tuple\[float, ...\], got '1.0,0.5'"),
        ({"scales": (1.0, "x")}, r"scales must be tuple\[float, ...\], got \(1.0, 'x'\)"),
        ({"pair": (1, "x", 2)}, r"pair must be tuple\[int, str\], got"),
    ):
        with pytest.raises(TypeError, match=why):
            prompt_tune(families.build("vit"), Own(**fields))  # type: ignore[arg-type]
    tuned = prompt_tune(
        families.build("vit"), Own(rank=2, scale=2, name_of="x", scales=(1, 0.5), pair=(2, "y"))
    )
    written = to_dict(tuned.tune_record.method)  # type: ignore[union-attr, arg-type]
    assert "steps" not in written and written["scales"] == [1, 0.5]
    assert from_dict(json.loads(json.dumps(written))) == tuned.tune_record.method  # type: ignore[union-attr]


def test_what_is_no_instance() -> None:
    with pytest.raises(TypeError, match="method is the class VPTDeep; give an instance of it"):
        prompt_tune(families.build("vit"), VPTDeep)  # type: ignore[arg-type]
    with pytest.raises(TypeError) as refused:
        prompt_tune(families.build("vit"), "vpt-deep")  # type: ignore[arg-type]
    assert "VPTDeep()" in str(refused.value) and "AnyMethod" not in str(refused.value)


@pytest.mark.parametrize(
    "blocks", [(-1,), (1, 0), (0, 0), (4,), (0.0,), "0", None, 1, ("0",), (True, 2.5)]
)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_prompted_blocks_are_indices(blocks: Any, family: str) -> None:
    own = _settings()
    own.prompted_blocks = lambda self, depth: blocks
    register_method("own", own)(_module())
    base = families.build("vit") if family == "vit" else plain_swin.build("tiny")
    with pytest.raises(ValueError, match=r"prompted_blocks\(\d\) is .*indices from 0 to \d in"):
        prompt_tune(base, own(2))
    assert not hasattr(base, "tune_record")


def test_find_method(module: str) -> None:
    assert find_method("vpt-deep") is VPTDeep and find_method("linear") is LinearProbe
    with pytest.raises(ValueError, match="unknown method 'scaled'; known: linear, .*vfpt"):
        find_method("scaled")
    cls = find_method(f"{module}:Scaled")
    assert find_method("scaled") is cls and "scaled" in method_names()
    for where, why in (
        (f"{module}:Other", "is no registered method; see"),
        (f"{module}:ScaledPrompts", "is a module; give the class of its settings, .*:Scaled"),
        (f"{module}:Nothing", "cannot be imported: module .* has no attribute 'Nothing'"),
        ("no_such_module:X", "cannot be imported: No module named"),
        (":X", "cannot be imported: Empty module name"),
    ):
        with pytest.raises(ValueError, match=why):
            find_method(where)


def test_entry_points_of_installed_packages(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "scaled_prompts-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scaled-prompts\nVersion: 1.2\n")
    (info / "top_level.txt").write_text("scaled_prompts\n")
    (info / "entry_points.txt").write_text(
        f"[vpt_fast.methods]\nscaled = {module}:Scaled\nbroken = no_such_module:X\n"
    )
    assert {"scaled", "broken"} <= set(method_names()) and module not in sys.modules
    method = from_dict({"name": "scaled", "num_prompts": 2})
    assert module in sys.modules and type(method).__name__ == "Scaled"
    written = to_dict(method)
    assert written == {
        "name": "scaled", "num_prompts": 2, "dropout": 0.0, "scale": 2.0, "sizes": [1, 2],
        "defined_in": "scaled_prompts:Scaled", "distribution": "scaled-prompts 1.2",
    }  # fmt: skip
    assert from_dict(json.loads(json.dumps(written))) == method
    with pytest.raises(ValueError, match="method 'broken' cannot be imported: No module named"):
        find_method("broken")
    assert importlib.metadata.version("scaled-prompts") == "1.2"


def test_methods_of_this_package_say_nothing_of_their_origin() -> None:
    assert to_dict(E2VPT(3)) == {
        "name": "e2vpt", "num_prompts": 3, "dropout": 0.0, "num_keys": 5, "pieces": 8,
        "prune_tokens": 0.2, "prune_pieces": 0.2,
    }  # fmt: skip
    assert from_dict(to_dict(VPTDeep(3, blocks=[1, 0]))) == VPTDeep(3, blocks=(0, 1))


def test_an_adapter_of_an_unknown_method(module: str, tmp_path: Path) -> None:
    """It is refused with name, class and package, and nothing is imported."""
    cls: Any = find_method(f"{module}:Scaled")
    tuned = prompt_tune(families.build("vit"), cls(3, scale=0.5)).eval()
    save_adapter(tuned, tmp_path / "adapter")
    image = families.images("vit")
    loaded = load_adapter(families.build("vit"), tmp_path / "adapter").eval()
    assert torch.equal(loaded(image), tuned(image))
    del METHODS["scaled"], sys.modules[module]
    base = families.build("vit")
    with pytest.raises(ValueError) as refused:
        load_adapter(base, tmp_path / "adapter")
    assert str(refused.value) == (
        "method 'scaled' is not known here, scaled_prompts:Scaled defines it: import "
        "scaled_prompts first (on the command line: vpt-fast --import scaled_prompts ...)"
    )
    assert module not in sys.modules and not hasattr(base, "tune_record")

    def edit(config: dict[str, Any]) -> None:
        config["method"]["distribution"] = "scaled-prompts 1.2"
        config["method"]["defined_in"] = "os:system"

    rewrite_config(tmp_path / "adapter", edit)
    with pytest.raises(ValueError, match="os:system defines it: install scaled-prompts 1.2 and"):
        load_adapter(base, tmp_path / "adapter")
    rewrite_config(tmp_path / "adapter", lambda c: c["method"].update(defined_in="__main__:Scaled"))
    with pytest.raises(ValueError, match="'scaled' is not known here: a script or a notebook"):
        load_adapter(base, tmp_path / "adapter")
    rewrite_config(tmp_path / "adapter", lambda c: c["method"].update(name=f"{module}:Scaled"))
    with pytest.raises(ValueError, match="unknown method 'scaled_prompts:Scaled'"):
        load_adapter(base, tmp_path / "adapter")
    assert module not in sys.modules and vpt_fast.__version__
