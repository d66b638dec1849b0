"""Pages of the documentation: their sizes, and the files, functions and links that they name."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest
from support.doc_pages import NAMES, PAGES, ROOT, anchors, blocks, links, prose

PATH = re.compile(
    r"(?<![\w/.<-])((?:kernels|vpt_fast|bench|tests|examples|docs)/[\w./-]*\w/?)(?::([\w.]+\w))?"
)
MODULE = re.compile(r"(?<![\w./:-])((?:vpt_fast|bench|examples|kernels)(?:\.\w+)+)(?![\w/*-])")
PRIVATE = re.compile(r"(?:^|[\s`\"'(=:])/\w+/\w|\s#\d+\b")

every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@every_page
def test_a_page_is_short(page: Path) -> None:
    most = 150 if page.name == "README.md" and page.parent == ROOT else 200
    assert len(page.read_text().splitlines()) <= most


@every_page
def test_prose_is_wrapped_and_about_the_project_only(page: Path) -> None:
    for line in prose(page.read_text()).splitlines():
        assert len(line) <= 104 or line.startswith("|"), line
        assert not PRIVATE.search(line), line


@every_page
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    text = _without_links(page)
    for path, function in PATH.findall(text):
        if "<" in text[text.index(path) + len(path) :][:1]:
            continue
        assert (ROOT / path).exists(), f"{page.name}: {path}"
        if function:
            assert function in _definitions(path), f"{page.name}: {path}:{function}"


@every_page
def test_methods_that_a_page_names_exist(page: Path) -> None:
    for name, member in re.findall(r"`([A-Z]\w+)\.(\w+)`", page.read_text()):
        if name in _classes():
            assert member in _classes()[name], f"{page.name}: {name}.{member}"


@every_page
def test_modules_that_a_page_names_exist(page: Path) -> None:
    for name in MODULE.findall(_without_links(page)):
        assert _exists(name), f"{page.name}: {name}"


@every_page
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in links(page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text()), target


def test_every_equation_has_its_function() -> None:
    """Checked in tables whose head announces functions."""
    rows, named = 0, 0
    inside = False
    for line in (ROOT / "docs" / "methods" / "index.md").read_text().splitlines():
        if not line.startswith("|"):
            inside = False
        elif re.search(r"computed by|\| where|reference and operator", line):
            inside = True
        elif inside and not line.startswith("|---"):
            rows += 1
            named += bool([1 for _, function in PATH.findall(line) if function])
            assert PATH.search(line) or "the same" in line, line
    assert rows > 40 and named >= rows - 3


def test_the_readme_is_what_a_newcomer_needs() -> None:
    text = (ROOT / "README.md").read_text()
    (python,) = blocks(text, "python")
    assert len([line for line in python.splitlines() if line]) <= 12
    assert [len(block.splitlines()) for block in blocks(text, "sh")] == [2, 4]
    assert text.count("](docs/images/") == 1 and "H200" in text and "Not measured" in text


def _without_links(page: Path) -> str:
    """Return the text of a page without targets of links, which have a test of their own."""
    return re.sub(r"\]\([^)]*\)", "]", page.read_text())


@lru_cache
def _definitions(path: str) -> set[str]:
    """Return the names of functions, classes and methods of a file."""
    names: set[str] = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            names |= {f"{node.name}.{member.name}" for member in members}
    return names


@lru_cache
def _classes() -> dict[str, set[str]]:
    """Return the names in the body of every class of the package."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "vpt_fast").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                inside = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.Name)]
                names = {n.name if isinstance(n, ast.FunctionDef) else n.id for n in inside}
                found.setdefault(node.name, set()).update(names)
    return found


@lru_cache
def _names(path: Path) -> set[str]:
    """Return all names that a file defines, imports or uses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


def _exists(name: str) -> bool:
    """Return whether a dotted name is a module or a name in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        found = path.with_suffix(".py") if path.with_suffix(".py").is_file() else None
        if found is None and path.is_dir():
            # The package itself has the names of its module `public`.
            found = path / ("__init__.py" if count > 1 or parts[0] != "vpt_fast" else "public.py")
        if found is not None and found.is_file():
            return count == len(parts) or parts[count] in _names(found)
    return False
