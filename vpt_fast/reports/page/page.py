"""Self-contained HTML page about training runs: curves, mistakes, use of prompt experts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vpt_fast.adapter.atomic import atomic_file
from vpt_fast.methods.baselines import Baseline
from vpt_fast.reports.equal_maps import TOLERANCE
from vpt_fast.reports.page.classes import (
    MAX_SHOWN,
    class_rows,
    count_confusions,
    frequent_confusions,
    label_rows,
    shown_matrix,
)
from vpt_fast.reports.page.evaluation import EvaluatedRun, EvaluationOptions, evaluate_run
from vpt_fast.reports.page.experts import SEED, ExpertUse, expert_use
from vpt_fast.reports.page.mistakes import worst_mistakes
from vpt_fast.reports.page.plots import (
    Curve,
    Line,
    expert_map,
    learning_curves,
    line_of,
    sweep_plot,
)
from vpt_fast.reports.page.runs import RunFolder, read_runs
from vpt_fast.reports.page.sweep import is_sweep, read_sweep
from vpt_fast.reports.page.text import (
    describe_method,
    describe_recipe,
    differences,
    settings_of,
    test_accuracy,
)
from vpt_fast.train.common.curves import format_bytes
from vpt_fast.train.common.output_folder import Output
from vpt_fast.train.common.ranking import percent
from vpt_fast.train.common.style import named_folder, percentage
from vpt_fast.train.data.images import SkippedImage
from vpt_fast.train.loop.evaluate import TrainingError
from vpt_fast.train.sweep.report import LEGEND
from vpt_fast.version import __version__

GENERATOR = "vpt-fast report"
_MARK = f'<meta name="generator" content="{GENERATOR}'
_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class RunSection:
    """Section of a run on the page.

    Attributes:
        run: Content of the run's folder.
        line: Line style of the run in all plots.
        found: Numbers of its evaluation; None if it could not be evaluated.
        parts: Values for the template from the evaluation: matrix, classes, confusions, mistakes,
            experts.
        notes: Sentences about missing or notable things.
    """

    run: RunFolder
    line: Line
    found: dict[str, Any] | None
    parts: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class WrittenPage:
    """Path of the page, and the images that are missing from its figures."""

    path: Path
    skipped: tuple[SkippedImage, ...]


def write_page(
    folders: Sequence[Path],
    output: Path,
    options: EvaluationOptions | None = None,
    log: Callable[[str], None] = print,
    overwrite: bool = False,
) -> WrittenPage:
    """Write a page about runs and sweeps; each run that has its data is evaluated once.

    Args:
        folders: Output folders of `vpt-fast train` and of sweeps.
        output: File to write, new.
        options: Options of the evaluation.
        log: Function called with lines of text.
        overwrite: Whether a page of an earlier call may be replaced.

    Raises:
        FileExistsError: If `output` exists.
        FileNotFoundError: If a folder is missing, or is neither a run's nor a sweep's.
        ValueError: If there are no folders, or a sweep's table is damaged.
    """
    options = options or EvaluationOptions()
    if not folders:
        raise ValueError("there are no runs to report on; give at least one output folder")
    PAGE.check(output, overwrite)
    sweeps = [read_sweep(folder) for folder in dict.fromkeys(folders) if is_sweep(folder)]
    runs = read_runs([folder for folder in folders if not is_sweep(folder)])
    skipped: list[SkippedImage] = []
    sections = [_section(run, i, options, skipped, log) for i, run in enumerate(runs)]
    curves = [
        Curve(s.run.epochs, s.line, s.run.kept.epoch if s.run.kept else None) for s in sections
    ]
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    html = (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            sections=sections,
            title=page_title([(f.path, f.name) for f in runs] + [(f.path, f.name) for f in sweeps]),
            sweeps=sweeps,
            sweep_plots=[
                sweep_plot(sweep.accuracies, f"sweep-{i}") if sweep.accuracies else None
                for i, sweep in enumerate(sweeps)
            ],
            sweep_legend=LEGEND,
            curves=learning_curves(curves),
            differences=differences([(s.run, s.found) for s in sections]),
            max_shown=MAX_SHOWN,
            seed=SEED,
            tolerance=TOLERANCE,
            generator=f"{GENERATOR}, vpt_fast {__version__}",
            versions=f"vpt_fast {__version__}, timm {timm.__version__}, torch {torch.__version__}",
            today=date.today().isoformat(),
            script=Markup(script),
            script_hash=digest,
        )
    )
    _write(output, html)
    log(f"written to {output}: {format_bytes(output.stat().st_size)}")
    return WrittenPage(output, tuple(skipped))


def _is_page(output: Path) -> bool:
    with output.open(encoding="utf-8", errors="replace") as file:
        return _MARK in file.read(2000)


PAGE = Output("report", _is_page)


def page_title(folders: Sequence[tuple[Path, str]]) -> str:
    """Return the names of runs and sweeps and where they lie; of many the first three.

    Args:
        folders: Folder and unique name of each.
    """
    if len(folders) == 1:
        return named_folder(folders[0][0])
    names = [name for _, name in folders]
    shown = ", ".join(names[:3])
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    parents = {path.resolve().parent for path, _ in folders}
    where = f" in {parents.pop().name}" if len(parents) == 1 else ""
    return f"{shown}{rest}{where}"


def _section(
    run: RunFolder,
    index: int,
    options: EvaluationOptions,
    skipped: list[SkippedImage],
    log: Callable[[str], None],
) -> RunSection:
    notes = list(run.notes)
    if run.adapter is None:
        log(f"{run.name}: not evaluated: there is no adapter")
        return RunSection(run, line_of(index), None, {}, notes)
    try:
        evaluated = evaluate_run(run, options)
    except (ValueError, TypeError, OSError, TrainingError) as error:
        reason = " ".join(str(error).split())
        notes.append(
            f"Not evaluated, so there is nothing about its mistakes and prompts: {reason}."
        )
        log(f"{run.name}: not evaluated: {reason}")
        return RunSection(run, line_of(index), None, {}, notes)
    result = evaluated.evaluation
    missing = (*evaluated.split.refused, *result.skipped)
    skipped += [item for item in missing if item not in skipped]
    metric = "top-1" if result.mean_ap is None else "mAP"
    score = f"{metric} {result.score:.2f}%"
    log(f"{run.name}: {evaluated.split_name}, {result.images:,} images, {score}")
    found = {
        "split": evaluated.split_name,
        "directory": str(evaluated.directory),
        "amp_dtype": evaluated.amp_dtype,
        "entries": len(evaluated.split),
        **result.figures,
        "skipped": [item.reason for item in missing],
        "names": hashlib.sha256(
            "\n".join(evaluated.name(row) for row in range(result.images)).encode(
                "utf-8", "surrogateescape"
            )
        ).hexdigest(),
    }
    parts = _labels(evaluated) if evaluated.tuned.multi_label else _classes(evaluated)
    parts |= _experts(evaluated, options, f"experts-{index}")
    return RunSection(run, line_of(index), found, parts, notes)


def _classes(run: EvaluatedRun) -> dict[str, Any]:
    names = run.images.classes
    labels = run.evaluation.labels.numpy()
    predictions = run.evaluation.predictions.numpy()
    counts = count_confusions(labels, predictions, len(names))
    return {
        "matrix": shown_matrix(counts, names),
        "classes": class_rows(labels, predictions, counts, names),
        "confusions": frequent_confusions(counts, names),
        "mistakes": worst_mistakes(run),
        "labels": None,
    }


def _labels(run: EvaluatedRun) -> dict[str, Any]:
    """Return the part for images with several labels, which have no confusions of one class."""
    rows = label_rows(run.probabilities, run.evaluation.labels, run.images.classes)
    return {"labels": rows}


def _experts(run: EvaluatedRun, options: EvaluationOptions, name: str) -> dict[str, Any]:
    net: Any = run.tuned.net
    method = net.tune_record.method
    if isinstance(method, Baseline):
        reason = f"Method {method.name} has no prompts, so there are no prompt experts to look at."
        return {"experts": None, "no_experts": reason}
    try:
        use: ExpertUse = expert_use(run, options)
    except (ValueError, TypeError) as error:
        return {"experts": None, "no_experts": f"Not available: {error}."}
    return {"experts": use, "expert_map": expert_map(use, name), "no_experts": ""}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vpt_fast", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "method": describe_method,
        "probability": percent,
        "recipe": describe_recipe,
        "settings": settings_of,
        "test": test_accuracy,
        "percentage": percentage,
    }
    return environment


def _asset(name: str) -> str:
    return (Path(__file__).parents[2] / "assets" / name).read_text(encoding="utf-8")


def _write(output: Path, html: str) -> None:
    """Write the page atomically; bytes of file names that are not UTF-8 become question marks."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output, "w", encoding="utf-8", errors="replace") as file:
        file.write(html)
