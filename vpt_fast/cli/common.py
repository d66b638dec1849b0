"""Helpers that several commands of `vpt-fast` share: methods by name, errors as one line."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from vpt_fast.extras import MissingExtraError
from vpt_fast.methods import Method, find_method, method_names

if TYPE_CHECKING:
    from vpt_fast.train.data.images import SkippedImage


def fail(error: BaseException | str, code: int) -> NoReturn:
    """Print one line and end the command with status `code`."""
    typer.echo(f"vpt-fast: error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that a user can fix into one line and status 2, or 1 once training has begun."""
    try:
        yield
    except (ValueError, TypeError, OSError, MissingExtraError) as error:
        fail(error, 2)
    except RuntimeError as error:
        # Where one of these is raised, PyTorch has been imported.
        from torch import OutOfMemoryError

        from vpt_fast.train.loop.evaluate import TrainingError

        if isinstance(error, OutOfMemoryError):
            fail(f"{error}. Try a smaller --batch-size or --amp-dtype bfloat16", 1)
        if isinstance(error, TrainingError):
            fail(error, 1)
        raise


def given_options(context: typer.Context) -> list[str]:
    """Return the options that a command line sets, as the help spells them."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.opts[0].startswith("--")
        and getattr(context.get_parameter_source(parameter.name or ""), "name", "") == "COMMANDLINE"
    ]


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register methods; the working directory is searched, too.

    Raises:
        ValueError: If a module cannot be imported.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--import {name}: {error}; searched in {Path.cwd()} and Python's path"
            ) from error


def make_method(name: str, options: Mapping[str, Any], settings: Iterable[str] = ()) -> Method:
    """Return the method of that name with the options that are given.

    Args:
        name: Name of a method, as in `--method`, or "package.module:Class".
        options: Values by the names of the method's fields; None where an option is not given.
        settings: Other fields, as "name=value" with a value of JSON or Python, or a text.

    Raises:
        ValueError, TypeError: If there is no such method, it has no such option, or a value is
            out of range.
    """
    method = _named(name)
    known = {field.name for field in fields(method)}
    given = {option: value for option, value in options.items() if value is not None}
    unknown = sorted(given.keys() - known)
    if unknown:
        flags = ", ".join(f"--{option.replace('_', '-')}" for option in unknown)
        raise ValueError(f"--method {name} has no option {flags}; leave it out")
    made = method(**given, **_settings(name, known - given.keys(), settings))
    check_some_prompts([made.num_prompts] if "num_prompts" in known else [])
    return made


def _named(name: str) -> type[Method]:
    if ":" in name:
        import_modules(())
    elif name not in method_names():
        raise ValueError(
            f"--method is {name!r}; choose one of {', '.join(method_names())}, or for one of your "
            "own give package.module:Class, or its name and --import before the command"
        )
    return find_method(name)


def settings_of_each(names: Sequence[str], settings: Iterable[str]) -> list[list[str]]:
    """Return for each of several methods those settings, "name=value", that it has a field for.

    Raises:
        ValueError: If no method has a field of that name.
    """
    found: list[list[str]] = [[] for _ in names]
    known = [{field.name for field in fields(_named(name))} - {"num_prompts"} for name in names]
    for text in settings:
        having = [own for own, has in zip(found, known, strict=True) if text.split("=")[0] in has]
        if not having:
            raise ValueError(f"--set {text!r} sets no field of any of {', '.join(names)}")
        for own in having:
            own.append(text)
    return found


def _settings(method: str, known: Set[str], settings: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or name not in known - found.keys():
            raise ValueError(
                f"--set {text!r} sets no field of --method {method} that is not set already; give "
                f"name=value, with one of {', '.join(sorted(known - found.keys())) or 'none'}"
            )
        found[name] = _parsed(value)
    return found


def _parsed(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            value = parse(text)
            return tuple(value) if isinstance(value, list) else value
    return text


def check_some_prompts(counts: Iterable[int | None]) -> None:
    """Raise ValueError if a number of prompts is 0."""
    if 0 in counts:
        raise ValueError("--num-prompts 0 trains the head alone; --method linear is its name")


def block_indices(text: str | None) -> list[int] | None:
    """Return the indices that a text such as "9-11" or "0,6,9-11" lists; None for None.

    Raises:
        ValueError: If the text is not such a list.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--blocks is {text!r}; give indices such as 9-11 or 0,6")
        found += range(int(first), int(last or first) + 1)
    return found


def accuracy(split: str, result: Any) -> str:
    """Return a line with the accuracy (or mAP) and loss of an evaluation on a split."""
    rates = f"top-1 {result.top1:.2f}%, top-5 {result.top5:.2f}%"
    if result.mean_ap is not None:
        rates = f"mAP {result.mean_ap:.2f}%"
    return f"{split}: {result.images:,} images, {rates}, loss {result.loss:.4f}"


def report_skipped(skipped: tuple[SkippedImage, ...]) -> None:
    """End the command with status 1 if images are missing from its figures."""
    if skipped:
        fail(
            f"{len(skipped)} images are not in these figures: "
            f"{'; '.join(item.reason for item in skipped[:5])}"
            f"{'; ...' if len(skipped) > 5 else ''}. Repair or remove them",
            1,
        )
