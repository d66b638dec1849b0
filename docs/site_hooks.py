"""MkDocs hooks: the API page is whole, and pictures of results come from `bench/results`.

A public name that the page lacks, or that has no docstring, fails the build.

A name is public where it is in the `__all__` of one of `PUBLIC_MODULES`; so are the methods of a
public class that do not begin with an underscore. Nothing is imported: griffe reads the source.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PUBLIC_MODULES = ("vpt_fast.public", "vpt_fast.bank", "vpt_fast.analysis")
PAGE = "api.md"

log = logging.getLogger("mkdocs.hooks.site_hooks")


@lru_cache(1)
def _package() -> griffe.Object | griffe.Alias:
    return griffe.load("vpt_fast", search_paths=[ROOT])


def public_names() -> list[str]:
    """Return the full names of everything that is public, each thing once.

    Raises:
        KeyError: A public module does not exist.
    """
    package = _package()
    names: dict[str, None] = {}
    for module in PUBLIC_MODULES:
        exports = package[module.partition(".")[2]].exports or ()
        home = module.removesuffix(".public")  # which `vpt_fast` itself hands on
        names.update({f"{home}.{name}": None for name in exports})
    short = [name.rpartition(".")[2] for name in names]
    return [name for i, name in enumerate(names) if short[i] not in short[:i]]


def _undocumented(name: str) -> Iterator[str]:
    found = _package()[name.partition(".")[2]]
    if not found.has_docstring:
        yield name
    if found.is_class:
        for member in found.members.values():
            if member.is_function and not member.name.startswith("_") and not member.has_docstring:
                yield f"{name}.{member.name}"


def undocumented(names: list[str]) -> list[str]:
    """Return those of `names`, and of their public methods, that have no docstring."""
    return [found for name in names for found in _undocumented(name)]


def listed_names(markdown: str) -> list[str]:
    """Return the names that a page asks mkdocstrings to document."""
    return re.findall(r"^::: (\S+)$", markdown, flags=re.MULTILINE)


def faults(markdown: str) -> list[str]:
    """Return one line for each name that the API page lacks or that has no docstring.

    Args:
        markdown: Text of the API page.
    """
    names, listed = public_names(), listed_names(markdown)
    short = {name.rpartition(".")[2] for name in listed}
    lacking = [name for name in names if name.rpartition(".")[2] not in short]
    found = [f"{name} is public and not on the API page" for name in lacking]
    return found + [f"{name} is public and has no docstring" for name in undocumented(names)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of `bench/results`, which pages show where they lie."""
    for path in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Warn about every fault of the API page; a strict build then fails."""
    if page.file.src_uri == PAGE:
        for fault in faults(markdown):
            log.warning(fault)
    return markdown.replace("../bench/results/", "results/")
