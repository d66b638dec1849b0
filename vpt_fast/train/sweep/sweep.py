"""Sweep: a grid for each method, selection on validation, then final runs over seeds.

As in the papers for VTAB-1k (VPT, arXiv 2203.12119, appendix A): learning rate, weight decay and
number of prompts are chosen by the validation accuracy of a run on the training images; the choice
is trained on training and validation images together, once for each seed, and only then tested.

Every finished run is written to an Optuna journal at once (see `journal`): a sweep that was killed
continues from there, and several processes or machines that name the same file share the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.samplers import GridSampler
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from vpt_fast.methods import Method
from vpt_fast.train.common.differences import first_difference, plain
from vpt_fast.train.common.paper_settings import SEEDS, paper_batch_size
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.loop.evaluate import TrainingError
from vpt_fast.train.sweep.journal import CheckedJournal

JOURNAL = "sweep.journal"

_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_POLL = 2.0
"""Seconds between two checks for runs that other processes have finished."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    Attributes:
        top1: Accuracy in percent: on validation, or on test for a final run.
        loss: Mean loss on the same images.
        trained: Number of trained parameters.
        adapter_bytes: Size of a final run's adapter in bytes; 0 for others.
        seconds: Duration of the run.
    """

    top1: float
    loss: float
    trained: int
    adapter_bytes: int
    seconds: float


class Task(Protocol):
    """Data and a backbone that runs share."""

    def run(self, method: Method, recipe: Recipe, final: bool) -> Outcome:
        """Train once and return the outcome.

        Args:
            method: Method to tune with.
            recipe: Recipe of the run.
            final: Whether to train on training and validation images and evaluate on test; else
                training is on the training images and evaluation on validation.
        """
        ...


@dataclass(frozen=True)
class Candidate:
    """Method with its grid.

    Attributes:
        method: Method, whose number of prompts the grid replaces, if it has prompts.
        recipe: Recipe, whose learning rate and weight decay the grid replaces.
        lrs, weight_decays: Base learning rates and weight decays to choose from.
        prompts: Numbers of prompts to choose from; unused for methods without prompts.
        paper: One of `paper_settings.PAPERS`, whose batch size depends on the number of prompts;
            None leaves that of `recipe`.
    """

    method: Method
    recipe: Recipe
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    prompts: tuple[int, ...] = ()
    paper: str | None = None

    @property
    def has_prompts(self) -> bool:
        """Whether the method has a number of prompts."""
        return "num_prompts" in {field.name for field in fields(self.method)}

    def grid(self) -> dict[str, Sequence[Any]]:
        """Return the values to choose from by the names of Optuna's parameters."""
        grid: dict[str, Sequence[Any]] = {"lr": self.lrs, "weight_decay": self.weight_decays}
        if self.has_prompts and self.prompts:
            grid["num_prompts"] = self.prompts
        return grid

    def chosen(self, values: dict[str, Any], seed: int) -> tuple[Method, Recipe]:
        """Return method and recipe of a point of the grid."""
        recipe = replace(
            self.recipe, lr=values["lr"], weight_decay=values["weight_decay"], seed=seed
        )
        method: Any = self.method
        if "num_prompts" in values:
            method = replace(method, num_prompts=values["num_prompts"])
        if self.paper is not None:
            recipe = replace(recipe, batch_size=paper_batch_size(self.paper, method))
        return method, recipe


@dataclass(frozen=True)
class Result:
    """Result of a sweep for one method.

    Attributes:
        name: Name of the method.
        values: Chosen point of the grid.
        validation: Outcome of the chosen point on validation.
        finals: Outcomes of the final runs by seed.
    """

    name: str
    values: dict[str, Any]
    validation: Outcome
    finals: dict[int, Outcome]


class Sweep:
    """Sweep in a folder.

    Args:
        folder: Folder of the journal, created if it is missing.
        task: Data and backbone.
        seeds: Seeds of the final runs; the first one is also that of the selection.
        log: Function called with a line for every run of this process.
        identity: Settings of the task that must be equal in all processes and when a sweep is
            resumed, such as the model and the data, as JSON values.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        seeds: Sequence[int] = SEEDS,
        log: Callable[[str], None] = print,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if not seeds:
            raise ValueError("seeds is empty; give at least one, such as 42")
        folder.mkdir(parents=True, exist_ok=True)
        self.task, self.seeds, self.log = task, tuple(dict.fromkeys(seeds)), log
        self._identity = dict(identity or {})
        self._storage = JournalStorage(CheckedJournal(folder / JOURNAL, log))

    def run(self, candidates: Sequence[Candidate]) -> list[Result]:
        """Select and train every candidate; return when all processes have finished all runs.

        Raises:
            ValueError: If the journal has other settings, or two candidates have the same method.
            TrainingError: If no run of a method's selection has ended.
        """
        names = [candidate.method.name for candidate in candidates]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"method {name} is there twice; leave one out")
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # `log` has a line for each trial
        try:
            return [self._one(candidate) for candidate in candidates]
        finally:
            optuna.logging.set_verbosity(verbosity)

    def _one(self, candidate: Candidate) -> Result:
        name = candidate.method.name

        def selection(trial: optuna.Trial, values: dict[str, Any]) -> Outcome:
            return self.task.run(*candidate.chosen(values, self.seeds[0]), final=False)

        settings = {
            "method": asdict(candidate.method),
            "recipe": candidate.recipe.settings(),
            "paper": candidate.paper,
            **self._identity,
        }
        trials = self._all(f"{name}, selection", candidate.grid(), settings, selection)
        done = [trial for trial in trials if trial.value is not None]
        if not done:
            raise TrainingError(f"no run of the selection of {name} has ended; see the lines above")
        best = max(done, key=lambda trial: (trial.user_attrs["top1"], -trial.user_attrs["loss"]))
        values = dict(best.params)

        def final(trial: optuna.Trial, point: dict[str, Any]) -> Outcome:
            return self.task.run(*candidate.chosen(values, point["seed"]), final=True)

        finals = self._all(
            f"{name}, final", {"seed": self.seeds}, {**settings, "values": values}, final
        )
        return Result(
            name,
            values,
            _outcome(best),
            {t.params["seed"]: _outcome(t) for t in finals if t.value is not None},
        )

    def _all(
        self,
        name: str,
        grid: dict[str, Sequence[Any]],
        settings: dict[str, Any],
        run: Callable[[optuna.Trial, dict[str, Any]], Outcome],
    ) -> list[FrozenTrial]:
        """Run every point of a grid, here or in another process, and return a trial for each."""
        study = optuna.create_study(
            study_name=name,
            storage=self._storage,
            sampler=GridSampler(grid, seed=self.seeds[0]),
            direction="maximize",
            load_if_exists=True,
        )
        known = study.user_attrs.get("settings")
        mine = plain({**settings, "grid": grid})
        if known is None:
            study.set_user_attr("settings", mine)
        elif known != mine:
            what, before, now = first_difference(known, mine)
            raise ValueError(
                f"the journal has {name} with other settings ({what}: {before}, now {now}); "
                "choose another --output, or the options that it was started with"
            )

        def objective(trial: optuna.Trial) -> float:
            values = {key: trial.suggest_categorical(key, choices) for key, choices in grid.items()}
            words = ", ".join(f"{key} {value:g}" for key, value in values.items())
            try:
                found = run(trial, values)
            except TrainingError as error:
                trial.set_user_attr("error", str(error))
                self.log(f"{name}, {words}: {error}")
                raise optuna.TrialPruned from None
            for key, value in asdict(found).items():
                trial.set_user_attr(key, value)
            self.log(f"{name}, {words}: {found.top1:.2f}%, loss {found.loss:.3f}")
            return found.top1

        points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        if _has_damaged_trials(study, points):
            # The sampler counts every ended trial as done, even one whose outcome is damaged.
            for point in _missing(study, points):
                study.enqueue_trial(point)
        while missing := _missing(study, points):
            # GridSampler first hands out points that no process has begun, and at the end those
            # of processes that died.
            study.optimize(objective, n_trials=1)
            if len(_missing(study, points)) == len(missing):
                time.sleep(_POLL)
        done = _finished(study)
        return [done[_key(point)] for point in points]


def _finished(study: optuna.Study) -> dict[tuple[tuple[str, Any], ...], FrozenTrial]:
    """Return the first finished trial of each point; a failure counts, as it would fail again.

    A trial whose outcome was on a damaged line of the journal is not finished.
    """
    found: dict[tuple[tuple[str, Any], ...], FrozenTrial] = {}
    for trial in study.get_trials(states=_ENDED):
        if _is_complete(trial):
            found.setdefault(_key(trial.params), trial)
    return found


def _has_damaged_trials(study: optuna.Study, points: Sequence[dict[str, Any]]) -> bool:
    """Return whether the journal lacks the point or the outcome of an ended trial."""
    known = {_key(point) for point in points}
    return any(
        _key(trial.params) not in known or not _is_complete(trial)
        for trial in study.get_trials(states=_ENDED)
    )


def _is_complete(trial: FrozenTrial) -> bool:
    """Return whether an ended trial has failed, or has its complete outcome."""
    needed = {field.name for field in fields(Outcome)}
    return trial.state == TrialState.PRUNED or needed <= trial.user_attrs.keys()


def _key(point: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(point.items()))


def _missing(study: optuna.Study, points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    done = _finished(study)
    return [point for point in points if _key(point) not in done]


def _outcome(trial: FrozenTrial) -> Outcome:
    return Outcome(**{field.name: trial.user_attrs[field.name] for field in fields(Outcome)})
