"""The GPU benchmark's command, run on the CPU, and what it would measure on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compare import correctness
from bench.compare.cases import DINOV3_BASE, OTHERS, SWIN, Case
from bench.compare.collect import read
from bench.gpu.device import CpuDevice
from bench.gpu.jobs.cases import (
    DTYPES,
    Plan,
    correctness_jobs,
    estimated_seconds,
    first_jobs,
    timed_jobs,
)
from bench.gpu.jobs.job import CeilingsJob, KernelCheck
from bench.gpu.jobs.measure import measure
from bench.gpu.jobs.models import ModelCheck
from bench.gpu.jobs.steps import StepCheck
from bench.gpu.run import main
from bench.gpu.stages import STAGES
from bench.providers.attention import AttentionCase
from bench.providers.bank_attention import BANK_PROVIDERS, ONE_BY_ONE
from bench.providers.models import COMPILED, CUDNN, EAGER, OURS, PUBLISHED, WITHOUT, provide
from vpt_fast.ops.memory_modes import MEMORY_MODES

SMALL = Case(model="test_vit", batch=2, prompts=3, image_size=32, dtype="bfloat16")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread, which is faster for tiny tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for subprocesses
    yield
    torch.set_num_threads(before)


def results(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*_trial.csv")
    return read(path)


def of(rows: list[dict[str, str]], **wanted: str) -> list[dict[str, str]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


@pytest.mark.usefixtures("prepared_processes")
def test_every_stage_runs(tmp_path: Path, capsys: Any) -> None:
    assert main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    rows, printed = results(tmp_path), capsys.readouterr().out
    steps = of(rows, bench="step", method="vpt-deep", dropout="0.0", memory="speed")
    assert {row["prompts"] for row in steps} == {"3", "5"}
    for bench in ("step", "inference", "attention"):
        assert {row["provider"] for row in of(rows, bench=bench)} >= set(EAGER) - {PUBLISHED}
    for bench, names in (("attention", BANK_PROVIDERS), ("inference", [ONE_BY_ONE])):
        many = of(rows, bench=f"{bench} of many tasks")
        assert {row["provider"] for row in many} == {*names, OURS}
    assert {row["memory"] for row in of(rows, bench="step", provider=OURS)} == set(MEMORY_MODES)
    assert {row["method"] for row in of(rows, bench="step")} == {"vpt-deep", "vapt"}
    assert of(rows, bench="step", dropout="0.1") and of(rows, bench="experts")
    checks = of(rows, bench="check")
    assert {row["dtype"] for row in checks if "test_vit-vapt" in row["model"]} == set(DTYPES)
    assert "one step by parallel" in {row["model"].split(",")[0] for row in checks}
    for row in rows:
        assert row["kind"] == "measured" and row["error"] and not row["note"], row
        assert (row["bench"] == "check") == (row["p50_ms"] == ""), row
        assert not row["peak_mib"] and not row["graph_p50_ms"] and not row["cuda"]
        assert float(row["tflops_ceiling"]) > 0 and not row["tflops"]
    for stage in STAGES:
        assert f"== {stage}, " in printed
    for line in (
        "1 kernels compiled for sm_90", "1 passed, 0 failed, exit status 0", " x aten::",
        "launched step-test_vit-vapt", "2 candidates in tiles.csv",
    ):  # fmt: skip
        assert line in printed, line
    assert "WRONG" not in printed and "Skipped" not in printed
    # A run writes eight files at most.
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"gpu.log", "profile.csv", "tiles.csv", "trace.json.gz"} and len(names) <= 8
    assert (tmp_path / "gpu.log").read_text() == printed


QUICK = ["--device", "cpu", "--stage", "times", "--cases", "quick", "--prompts", "3"]


def test_a_wrong_provider_is_caught_and_not_timed(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(name: str, model: Any, method: Any, memory: str = "speed") -> Any:
        module = provide(name, model, method, memory)
        if name == OURS:
            module.get_parameter("blocks.2.prompt.tokens").register_hook(lambda g: 1.5 * g)
        return module

    monkeypatch.setattr(correctness, "provide", wrong)
    assert main([*QUICK, "--providers", "concat", OURS, "--output", str(tmp_path)]) == 1
    rows = of(results(tmp_path), bench="step")
    (ours,), (theirs,) = of(rows, provider=OURS), of(rows, provider="concat")
    assert ours["p50_ms"] == "" and ours["note"].startswith("wrong: blocks.2.prompt.tokens is ")
    assert float(ours["error"]) == pytest.approx(0.5, rel=0.1)
    assert theirs["p50_ms"] and not theirs["ratio_p50"] and not theirs["note"]
    assert "WRONG:\n  step-test_vit-vpt-deep-p3-b2-bfloat16, vpt_fast: " in capsys.readouterr().out


@pytest.mark.full
def test_a_compiled_step_is_checked() -> None:
    outcome = measure(StepCheck(SMALL, "compile"), CpuDevice())
    # bf16 against fp64: an error that is not 0 and within `budget`.
    assert not outcome.wrong and 1e-4 < float(outcome.rows[0]["error"]) < 5e-2


@pytest.mark.full
def test_compiled_providers_come_last(tmp_path: Path, capsys: Any) -> None:
    names = ["concat", *COMPILED, OURS]
    arguments = [*QUICK, "--minutes", "30", "--providers", *names, "--output", str(tmp_path)]
    assert main(arguments) == 0
    timed = [row["provider"] for row in of(results(tmp_path), bench="step") if row["p50_ms"]]
    assert timed[:2] == ["concat", OURS]
    assert sorted(timed[2::2]) == sorted(COMPILED) and set(timed[3::2]) == {OURS}
    assert "s to compile and check, not counted" in capsys.readouterr().out


def test_with_no_time_nothing_is_measured(tmp_path: Path, capsys: Any) -> None:
    assert main([*QUICK, "--minutes", "0.01", "--output", str(tmp_path)]) == 1
    assert "skipped, " in capsys.readouterr().out and not list(tmp_path.glob("*.csv"))


def test_without_a_gpu_it_is_refused(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    printed = capsys.readouterr()
    assert "no CUDA GPU here" in printed.err and "--device cpu" in printed.err and not printed.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--minutes", "0"], "0 is not greater than 0"),
        (["--batch", "-2"], "-2 is not greater than 0"),
        (["--prompts", "-1"], "-1 is not greater than 0"),
        (["--providers", "ours"], "invalid choice: 'ours'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--stage", "last"], "invalid choice: 'last'"),
        (["--count", "nowhere.csv"], "--count: "),
    ],
)
def test_wrong_arguments(arguments: list[str], complaint: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert complaint in capsys.readouterr().err


def test_first_times_come_first_and_most_compilers_last() -> None:
    ceilings, step, attention = first_jobs(Plan())
    assert isinstance(ceilings, CeilingsJob) and isinstance(attention, AttentionCase)
    assert (
        isinstance(step, Case)
        and str(step) == "step-vit_base_patch16_224-vpt-deep-p50-b64-bfloat16"
    )
    assert {"concat", "concat_cudnn", OURS} <= set(step.providers)  # type: ignore[union-attr]
    timed = timed_jobs(Plan())
    compiled = [bool(set(COMPILED) & set(getattr(s, "providers", ()))) for s in timed]
    # The two most important compilers come after three comparisons, all others at the end.
    assert compiled[:5] == [False] * 3 + [True] * 2 and sum(compiled) == 9
    assert compiled[5:] == sorted(compiled[5:])
    alone = [s.providers for s, found in zip(timed, compiled, strict=True) if found][:4]
    assert alone == [
        (name, OURS) for name in
        ("keys_concat_compiled", "concat_compiled", f"{OURS}_compiled", f"{WITHOUT}_compiled")
    ]  # fmt: skip
    assert timed[0] == step
    assert {*CUDNN, "keys_concat", OURS} <= set(timed[0].providers)  # type: ignore[union-attr]
    assert all(estimated_seconds(s) > 0 for s in timed)


def test_all_requested_cases_are_timed() -> None:
    cases = [s for s in timed_jobs(Plan()) if isinstance(s, Case)]
    steps = [c for c in cases if c.work == "step" and c.batch == 64 and c.dropout == 0]
    base = [c for c in steps if c.model == "vit_base_patch16_224"]
    assert {c.prompts for c in base if c.method == "vpt-deep"} == {0, 10, 50, 100, 200}
    assert {c.prompts for c in base if c.method == "vapt"} == {10, 50}
    assert {(c.method, c.prompts) for c in base} >= {(name, 50) for name in OTHERS}
    assert {c.memory for c in base} == set(MEMORY_MODES)
    assert {c.prompts for c in steps if c.model == SWIN} == {10, 50}
    assert any(c.model == "vit_small_patch16_224" for c in steps)
    assert {1, 16} <= {c.batch for c in cases}
    assert {c.prompts for c in cases if c.work == "inference"} == {50, 200}
    assert all(c.dtype == "bfloat16" for c in cases)


def test_checks_on_a_gpu() -> None:
    jobs = correctness_jobs(Plan())
    models = [s.case for s in jobs if isinstance(s, ModelCheck)]
    vits = [f"vit_{size}_patch16_224" for size in ("small", "base")] + [DINOV3_BASE]
    wanted = {(m, "vpt-deep", 50) for m in (*vits, SWIN)} | {(m, "vapt", 10) for m in vits}
    others = {("vit_small_patch16_224", name, 10, "bfloat16") for name in OTHERS}
    assert {(c.model, c.method, c.prompts, c.dtype) for c in models} == others | {
        (*case, dtype) for case in wanted for dtype in DTYPES
    }
    checks = [s for s in jobs if isinstance(s, KernelCheck)]
    attention = [c.case for c in checks if isinstance(c.case, AttentionCase)]
    assert {case.head_dim for case in attention} == {32, 64, 80, 128}
    assert {c.dtype for c in checks} == set(DTYPES)


def test_a_custom_plan() -> None:
    plan = Plan("vit_tiny_patch16_224", 2, (7,), (OURS,), full=False)
    (step,) = timed_jobs(plan)
    assert step == dataclasses.replace(
        plan.step, prompts=7, providers=(OURS,), model="vit_tiny_patch16_224", batch=2
    )
    alone = [s for s in timed_jobs(Plan(providers=(OURS,))) if isinstance(s, Case)]
    assert alone and all(case.providers == (OURS,) for case in alone)
