"""Sweeps: selection, resumption after a kill, and sharing by several processes."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.processes import exit_codes, started

from vpt_fast import LinearProbe, VPTDeep
from vpt_fast.cli.common import make_method
from vpt_fast.methods import Method
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.loop.evaluate import TrainingError
from vpt_fast.train.sweep.sweep import Candidate, Outcome, Sweep

LRS, DECAYS, PROMPTS = (0.1, 1.0, 10.0), (0.0, 0.01), (1, 5)
DEEP = Candidate(VPTDeep(), Recipe(epochs=2), LRS, DECAYS, PROMPTS)
LINEAR = Candidate(LinearProbe(), Recipe(epochs=2), LRS, DECAYS, PROMPTS)
SEEDS = (1, 2, 3)


class FakeTask:
    """A task with known accuracies: best at lr 1, weight decay 0.01 and 5 prompts."""

    def __init__(self, log: Path | None = None, pause: float = 0.0) -> None:
        self.runs: list[tuple[Any, ...]] = []
        self._log, self._pause = log, pause

    def run(self, method: Method, recipe: Recipe, final: bool) -> Outcome:
        time.sleep(self._pause)
        key = (method.name, method.num_prompts, recipe.lr, recipe.weight_decay, recipe.seed, final)
        self.runs.append(key)
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{key}\n")
        if recipe.lr == 10.0:
            raise TrainingError("the loss is not finite")
        top1 = 90.0 - (recipe.lr != 1.0) - (recipe.weight_decay != 0.01) + method.num_prompts / 10
        return Outcome(top1 + final * recipe.seed, 1.0, 7, 8, 0.1)


def lines() -> tuple[list[str], Any]:
    messages: list[str] = []
    return messages, messages.append


def test_the_best_on_validation_is_trained_with_every_seed(tmp_path: Path) -> None:
    messages, log = lines()
    task = FakeTask()
    deep, linear = Sweep(tmp_path, task, SEEDS, log).run([DEEP, LINEAR])
    assert deep.values == {"lr": 1.0, "weight_decay": 0.01, "num_prompts": 5}
    assert linear.values == {"lr": 1.0, "weight_decay": 0.01}
    assert {seed: outcome.top1 for seed, outcome in deep.finals.items()} == {
        1: 91.5, 2: 92.5, 3: 93.5,
    }  # fmt: skip
    counts = Counter(task.runs)
    assert set(counts.values()) == {1}, "no run is repeated"
    assert sum(not final for *_, final in counts) == 3 * 2 * 2 + 3 * 2
    assert {seed for *_, seed, final in counts if not final} == {1}
    assert sum("not finite" in line for line in messages) == 2 * 2 + 2


def test_a_finished_sweep_runs_nothing_again(tmp_path: Path) -> None:
    first = Sweep(tmp_path, FakeTask(), SEEDS, lines()[1]).run([LINEAR])
    task = FakeTask()
    assert Sweep(tmp_path, task, SEEDS, lines()[1]).run([LINEAR]) == first
    assert task.runs == []


def test_equal_accuracies_are_ranked_by_their_loss(tmp_path: Path) -> None:
    class Equal(FakeTask):
        def run(self, method: Method, recipe: Recipe, final: bool) -> Outcome:
            return Outcome(50.0, abs((recipe.lr or 0) - 0.1), 1, 1, 0.1)

    (result,) = Sweep(tmp_path, Equal(), SEEDS, lines()[1]).run([LINEAR])
    assert result.values["lr"] == 0.1


def test_a_method_of_which_no_run_ends_is_an_error(tmp_path: Path) -> None:
    hopeless = Candidate(LinearProbe(), Recipe(epochs=2), (10.0,), (0.0,))
    with pytest.raises(TrainingError, match="no run of the selection of linear has ended"):
        Sweep(tmp_path, FakeTask(), SEEDS, lines()[1]).run([hopeless])


def test_other_settings_in_the_same_journal_are_refused(tmp_path: Path) -> None:
    Sweep(tmp_path, FakeTask(), SEEDS, lines()[1]).run([LINEAR])
    other = Candidate(LinearProbe(), Recipe(epochs=3), LRS, DECAYS)
    with pytest.raises(ValueError, match=r"recipe epochs: 2, now 3"):
        Sweep(tmp_path, FakeTask(), SEEDS, lines()[1]).run([other])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds is empty"):
        Sweep(tmp_path, FakeTask(), ())
    with pytest.raises(ValueError, match="linear is there twice"):
        Sweep(tmp_path, FakeTask()).run([LINEAR, LINEAR])
    with pytest.raises(ValueError, match="choose one of linear"):
        make_method("vpt", {})


def take_part(folder: Path, log: Path) -> None:
    results = Sweep(folder, FakeTask(log, pause=0.3), SEEDS, lambda line: None).run([LINEAR])
    assert results[0].values == {"lr": 1.0, "weight_decay": 0.01}


def test_killed_and_shared_by_two_processes(tmp_path: Path) -> None:
    """One process is killed in the middle; two others finish its sweep together."""
    log = tmp_path / "runs"
    log.touch()
    process = started(take_part, tmp_path, log)
    while len(log.read_text().splitlines()) < 3:
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    before = len(log.read_text().splitlines())
    others = [started(take_part, tmp_path, log) for _ in range(2)]
    assert exit_codes(others) == [0, 0]
    runs = Counter(log.read_text().splitlines())
    assert len(runs) == 3 * 2 + len(SEEDS), "every point and every seed was run"
    again = sum(runs.values()) - len(runs)
    # The killed process's run, and duplicates of two processes at the end of each of two grids.
    assert again <= 1 + 2 * 2 and before < len(runs)
