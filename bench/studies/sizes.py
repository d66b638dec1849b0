"""Counts of the source: lines of each part, and files and functions that are too long.

    python -m bench.studies.sizes

Exit status 1 where a limit is exceeded. A line counts if it holds code: blank lines, comments and
docstrings do not. Files count with all of their lines. Functions have neither Triton's kernels nor
what a framework dictates among them: a command's options are its parameters, of which only the
body counts, and an operator's schema is flat.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES, PARAMETERS, FILES = 350, 80, 12, 15
TOPS = ("kernels", "vpt_fast", "bench", "examples", "tests")

OPTIONS = {
    "swin": (
        "kernels/window_attention", "vpt_fast/ops/window_attention", "vpt_fast/models/swin",
        "vpt_fast/reference/swin.py", "vpt_fast/analysis/swin_shares.py",
    ),
    "bank": (
        "vpt_fast/bank", "kernels/attention/ragged.py", "kernels/rowwise/grouped_heads.py",
        "vpt_fast/ops/attention/ragged.py", "vpt_fast/ops/attention/ragged_reference.py",
        "vpt_fast/ops/rowwise/grouped_heads.py",
    ),
    "eva": (
        "kernels/rowwise/rotation.py", "vpt_fast/ops/rowwise/rotation.py", "vpt_fast/models/eva",
        "vpt_fast/models/isotropic/rope_tables.py", "vpt_fast/export/baked_eva.py",
    ),
    "export": ("vpt_fast/export",),
    "hub": ("vpt_fast/adapter/hub",),
    "switching": ("vpt_fast/adapter/switching", "vpt_fast/models/changes/taken.py"),
    "interop": ("vpt_fast/models/interop",),
    "methods": (
        "vpt_fast/methods", "vpt_fast/modules/block_info.py", "vpt_fast/modules/prompt_module.py",
        "vpt_fast/modules/check_module.py", "vpt_fast/modules/initial_values.py",
        "vpt_fast/models/add_prompts.py", "vpt_fast/models/initialise.py",
        "vpt_fast/models/prompt_buffers.py",
        "vpt_fast/models/isotropic/prompts_apart.py", "vpt_fast/bank/task_modules.py",
        "vpt_fast/published",
    ),
}  # fmt: skip
"""Files and folders of each option."""

CORE = (
    "kernels", "vpt_fast/ops", "vpt_fast/modules", "vpt_fast/models/vit",
    "vpt_fast/models/isotropic", "vpt_fast/adapter", "vpt_fast/tune.py", "vpt_fast/checks.py",
)  # fmt: skip
"""Files and folders of the ViT core, without those of the options."""

SHARED = ("vpt_fast/models",)
"""What models of all families share: fusion, CUDA graphs, folding, records; without the others."""

LIMITS = {
    "core": 7_750,
    "shared": 2_000,
    "swin": 2_000,
    "eva": 2_000,
    "bank": 2_000,
    "export": 2_000,
    "hub": 2_000,
    "switching": 2_000,
    "interop": 2_000,
    "methods": 2_000,
}
"""Lines of code that each should have at most."""

ALLOWED = {"swin": 2_610}
"""What is longer, and must not grow: docs/architecture.md says why."""

_DICTATED = ("jit", "operator", "register_fake")
"""Decorators, by their last name, of functions whose parameters a framework dictates."""

_COMMANDS = (
    "vpt_fast/cli/train.py:train",
    "vpt_fast/cli/sweep.py:sweep",
    "examples/serve/__main__.py:serve",
)
_IMPLEMENTATIONS = (
    "kernels/window_attention/launches.py:window_attention_backward",
    "vpt_fast/ops/window_attention/reference.py:window_attention_backward",
)
"""Others: commands, whose parameters are their options, and what takes an operator's arguments."""


def code_lines(path: Path) -> int:
    """Return how many lines of a file hold code."""
    text = path.read_text(encoding="utf-8")
    found: set[int] = set()
    layout = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENDMARKER,
    }  # fmt: skip
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        # A string that is a statement by itself documents what stands beside it.
        if isinstance(node, ast.Expr) and _is_text(node.value):
            found.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(found)


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def files_of(*parts: str) -> set[Path]:
    """Return the Python files of some files and folders, named from the root.

    Raises:
        FileNotFoundError: One of them does not exist.
    """
    found: set[Path] = set()
    for part in parts:
        path = ROOT / part
        if not path.exists():
            raise FileNotFoundError(f"{part} is named in bench/studies/sizes.py and does not exist")
        found |= {path} if path.is_file() else set(path.rglob("*.py"))
    return found


def totals() -> dict[str, tuple[int, int]]:
    """Return lines of code and all lines of the core, of what models share, and of options."""
    options = {name: files_of(*parts) for name, parts in OPTIONS.items()}
    core = files_of(*CORE) - set().union(*options.values())
    shared = files_of(*SHARED) - core - set().union(*options.values())
    rooms = {"core": core, "shared": shared, **options}
    return {
        name: (
            sum(map(code_lines, files)),
            sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files),
        )
        for name, files in rooms.items()
    }


def too_long() -> Iterator[str]:
    """Yield a line for each folder, file and function over a limit; functions not in tests."""
    for path in sorted(files_of(*TOPS)):
        where, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > FILE_LINES:
            yield f"{where} has {lines} lines; split it ({FILE_LINES})"
        if where.parts[0] != "tests":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield from _too_long(f"{where}:{node.name}", node)
    for folder in sorted({path.parent for path in files_of(*TOPS)}):
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        if count > FILES:
            yield f"{folder.relative_to(ROOT)} has {count} files; make rooms of it ({FILES})"


def _too_long(where: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    names = {ast.unparse(d).split("(")[0].rpartition(".")[2] for d in node.decorator_list}
    first = node.body[0] if where in _COMMANDS else node
    lines = (node.end_lineno or node.lineno) - first.lineno + 1
    count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
    if "jit" not in names and lines > FUNCTION_LINES:
        yield f"{where} has {lines} lines; split it ({FUNCTION_LINES})"
    dictated = where in (*_COMMANDS, *_IMPLEMENTATIONS) or not names.isdisjoint(_DICTATED)
    if count > PARAMETERS and not dictated:
        yield f"{where} has {count} parameters; hand down a record ({PARAMETERS})"


def main() -> int:
    """Print the totals and what is too long; return the exit status."""
    wrong = list(too_long())
    for name, (code, lines) in totals().items():
        limit = LIMITS[name]
        allowed = ALLOWED.get(name, limit)
        print(f"{name:7} {code:6,} lines of code, at most {limit:,}  ({lines:,} with text)")
        if code > allowed:
            wrong.append(f"{name} has {code:,} lines of code; {allowed:,} are allowed")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
