"""The wheel in fresh environments, one for each row of `bench.matrix.rows`.

    python -m bench.matrix [ROW ...] [--tests] [--keep FOLDER]

Builds source distribution and wheel. For each row it makes an environment, installs the wheel with
its extra "train", and runs `bench/matrix/smoke.py` there; the environment is removed before the
next is made. With --tests a part of the suite, of the unpacked source distribution, runs too.
Results go to bench/results/versions.csv and from there to docs/versions.md. PyPI's torch with CUDA
needs 6 GB and some minutes for each row. The exit status is 1 where a row failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from bench.compare.facts import facts
from bench.matrix.environment import CommandError, build, install, interpreter, tested
from bench.matrix.page import Result, merge, write_page
from bench.matrix.rows import ROWS, Row

HERE = Path(__file__).parent

TESTS = (
    "tests/reference",
    "tests/adapter/test_earlier_versions.py",
    "tests/kernels/test_launch_plan.py",
)
"""Part of the suite that needs neither a second extra nor an executor of Triton kernels."""


def smoke(python: Path) -> dict[str, Any]:
    """Run the smoke program in an environment; return what it found.

    Raises:
        CommandError: If the program ends without a report.
    """
    words = [python, "-I", HERE / "smoke.py", HERE / "expected.json"]
    command = ["--command", python.parent / "vpt-fast"]
    done = subprocess.run(
        [str(word) for word in (*words, *command)], capture_output=True, text=True, check=False
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise CommandError(done.stderr[-2000:]) from error
    return found


def try_row(row: Row, folder: Path, wheel: Path, tree: Path, tests: Sequence[str]) -> Result:
    """Install and check a row; what fails is its note."""
    result = Result(**row._asdict(), checks="", tests="", note="")
    base = interpreter(row.python)
    if base is None:
        return result._replace(note=f"no interpreter of Python {row.python}")
    try:
        python = install(row, folder, base, wheel)
        found = smoke(python)
        installed = found["versions"]
        result = result._replace(
            **{name: installed[name] for name in row._fields},
            checks=f"{found['checks'] - len(found['failed'])} of {found['checks']}",
        )
        if found["failed"]:
            print(*found["failed"].values(), sep="\n", file=sys.stderr)
            return result._replace(note=f"failed: {', '.join(found['failed'])}")
        return result._replace(tests=tested(python, tree, tests) if tests else "")
    except CommandError as error:
        print(error, file=sys.stderr)
        return result._replace(note=str(error).splitlines()[-1] if str(error) else "failed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try rows, write what was found, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.matrix", description=__doc__)
    names = [row.name for row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(names)}")
    parser.add_argument("--tests", action="store_true", help="run a part of the suite too")
    parser.add_argument("--keep", type=Path, help="keep environments here, and take those from it")
    options = parser.parse_args(arguments)
    for name in options.rows:
        if name not in names:
            parser.error(f"{name} is no row; choose of {', '.join(names)}")
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        wheel, tree = build(Path(scratch))
        for row in ROWS:
            if options.rows and row.name not in options.rows:
                continue
            home = options.keep.absolute() if options.keep else Path(scratch)
            home.mkdir(parents=True, exist_ok=True)
            print(row.name, flush=True)
            result = try_row(row, home / row.name, wheel, tree, TESTS if options.tests else ())
            print(*result, sep="; ", flush=True)
            failed += bool(result.note)
            known = facts(gpu=False)
            about = {name: known[name] for name in ("device", "system", "commit")}
            merge(row, result, {**about, "date": date.today().isoformat()})
            if not options.keep:
                shutil.rmtree(home / row.name, ignore_errors=True)
    write_page()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
