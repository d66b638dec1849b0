"""The API page: without an entry and a docstring of every public name, the site is not built."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import pytest
from support.doc_pages import ROOT

import vpt_fast

pytest.importorskip("griffe", reason="griffe is not installed")
pytest.importorskip("mkdocs", reason="mkdocs is not installed")

PAGE = (ROOT / "docs" / "api.md").read_text()


@pytest.fixture(scope="module")
def site_hooks() -> ModuleType:
    """Load the site's hooks."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_lists_the_public_names(site_hooks: ModuleType) -> None:
    listed = {name.rpartition(".")[2] for name in site_hooks.listed_names(PAGE)}
    exported = {*vpt_fast.__all__, *importlib.import_module("vpt_fast.bank").__all__}
    assert exported <= listed
    for name in site_hooks.listed_names(PAGE):
        module, _, last = name.rpartition(".")
        assert getattr(importlib.import_module(module), last).__doc__, name


def test_the_page_has_no_faults(site_hooks: ModuleType) -> None:
    assert set(vpt_fast.__all__) <= {n.rpartition(".")[2] for n in site_hooks.public_names()}
    assert site_hooks.faults(PAGE) == []


def test_a_name_that_is_not_on_the_page_is_a_fault(site_hooks: ModuleType) -> None:
    without = PAGE.replace("::: vpt_fast.bake\n", "")
    assert site_hooks.faults(without) == ["vpt_fast.bake is public and not on the API page"]


def test_a_name_without_docstring_is_a_fault(
    site_hooks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = site_hooks._package()["bake"].final_target
    monkeypatch.setattr(found, "docstring", None)
    assert site_hooks.faults(PAGE) == ["vpt_fast.bake is public and has no docstring"]
