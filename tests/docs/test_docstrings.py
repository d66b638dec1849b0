"""One docstring dialect: Google style, an imperative first line, noun phrases for arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("kernels", "vpt_fast", "bench", "examples", "tests")

_VERBS = """
    Accumulate Add Admit Advance Allocate Answer Append Apply Ask Assert Attend Average Bake Build
    Cache Call Capture Cast Change Check Choose Clear Close Coarsen Collect Compare Compile
    Compute Configure Convert Copy Count Create Crop Cut Decide Decode Decorate Define Delay Delete
    Describe Divide Do Download Draw Drive Drop Embed Emit End Enter Erase Evaluate Evict Exchange
    Execute Exit Expand Export Extend Fill Find Fold Forget Format Free Freeze Give Group Halve
    Handle Hold Ignore Import Initialise Insert Install Iterate Join Keep Kill Launch Let Limit
    List Load Log Make Map Mark Measure Merge Mix Move Multiply Name Normalise Open Overload Pack
    Paint Parametrize Parse Patch Pickle Plan Plot Predict Prepare Pretrain Print Profile Project
    Put Queue Raise Randomise Read Recompute Record Redraw Reduce Refuse Register Release Remove
    Replace Replay Report Reset Resize Restore Restrict Resume Return Rewrite Rotate Round Run
    Save Say Seed Select Send Serve Set Show Shuffle Simulate Skip Sort Split Stack Stand Start
    Stop Store Strip Sum Summarize Swap Switch Take Tell Time Trace Train Try Tune Turn Undo
    Uninstall Unpack Update Upload Use Wait Warm Warn Watch Wrap Write Yield Zero
"""
VERBS = frozenset(_VERBS.split())
"""First words of functions' docstrings; a new verb is added here."""

_PROPERTIES = frozenset({"property", "cached_property", "setter"})
_SECTION = re.compile(r"^(?:Args|Attributes|Raises):\n((?: {4}.*\n?|\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*): *(\S+)", re.MULTILINE)


def _is_property(node: ast.AST) -> bool:
    names = {ast.unparse(d).rpartition(".")[2] for d in getattr(node, "decorator_list", [])}
    return not names.isdisjoint(_PROPERTIES)


def _is_lower_case_word(word: str) -> bool:
    """Return whether a description begins with a plain word in lower case, not with a name."""
    return re.fullmatch(r"[a-z]+[,;.]?", word) is not None and word not in ("timm", "norm")


def _faults(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        doc = ast.get_docstring(node)
        if doc is None:
            continue
        is_function = not isinstance(node, ast.ClassDef) and not _is_property(node)
        if is_function and not node.name.startswith("test_"):
            first = re.match(r"\w*", doc)
            if first is None or first.group() not in VERBS:
                yield f"{node.lineno} {node.name}: begin with a verb, not {doc.split()[0]!r}"
        for section in _SECTION.finditer(doc + "\n"):
            for name, word in _ENTRY.findall(section.group(1)):
                if _is_lower_case_word(word):
                    yield f"{node.lineno} {node.name}: {name}: begin with a capital, not {word!r}"


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_have_one_dialect(room: str) -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for fault in _faults(path.read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)


def test_the_dialect_is_checked() -> None:
    text = '''
def rows(x):
    """Rows of x.

    Args:
        x: of the head.
    """
'''
    assert [fault.split(":", 1)[1].strip() for fault in _faults(text)] == [
        "begin with a verb, not 'Rows'",
        "x: begin with a capital, not 'of'",
    ]
