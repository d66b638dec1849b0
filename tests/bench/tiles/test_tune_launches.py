"""The choice of the launch table: its rules, measured times, and the file that is written."""

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tiles import times, tune
from bench.tiles.candidates import (
    Score,
    candidates,
    choose,
    current,
    launch_of,
    report_of,
    score,
    summary,
)
from bench.tiles.table_file import read_table, table_text, write_table
from vpt_fast.kernels.attention.launch_table import MEASURED, TABLE
from vpt_fast.kernels.attention.tiles import ARCHITECTURES, HEAD_DIMS, KERNELS

A, B, C = (128, 64, 4, 2), (64, 64, 4, 2), (128, 128, 8, 2)
KEY = ("dkdv", 32, "bf16", 80)
NAME = ["--kernel", "dkdv", "--head-dim", "32", "--dtype", "bf16", "--target", "sm_80"]


def figures(choice, **changes) -> Score:
    """Return the score of a candidate within all limits."""
    usual = {"registers": 128, "occupancy": 0.25, "issue_cycles": 500.0}
    return Score(choice, **{**usual, **changes})


def write_csv(path: Path, *rows: tuple, columns=times.COLUMNS) -> list[str]:
    """Write a file of times, and return the arguments that name it."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return ["--times", str(path)]


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ([figures(B, issue_cycles=515.0)], "more issue cycles"),
        ([figures(B, issue_cycles=400.0, spill_bytes=4)], "spills"),
        ([figures(B, issue_cycles=400.0, broken=("resident warps",))], "breaks a limit"),
        ([figures(B, issue_cycles=400.0, reason="shared memory")], "cannot run"),
        ([figures(B, occupancy=0.125)], "the same cycles, fewer warps"),
        ([figures(B, issue_cycles=495.0, registers=255)], "a tie, more registers"),
        ([figures(B, spill_bytes=4), figures(C, spill_bytes=64)], "both spill"),
    ],
)
def test_the_best_candidate_is_chosen(others, why):
    assert choose([*others, figures(A)]).choice == A, why
    assert choose([figures(A), *others]).choice == A, why


def test_within_two_percent_occupancy_decides_and_beyond_it_cycles_do():
    crowded = figures(B, issue_cycles=509.0, occupancy=0.5)
    assert choose([figures(A), crowded]).choice == B
    assert choose([figures(A), figures(B, issue_cycles=511.0, occupancy=0.5)]).choice == A


def test_where_all_spill_the_least_spilled_is_chosen_and_then_the_cheapest():
    spilling = [figures(A, spill_bytes=64, issue_cycles=1.0), figures(B, spill_bytes=8)]
    assert choose(spilling).choice == B
    assert choose([*spilling, figures(C, spill_bytes=8, issue_cycles=400.0)]).choice == C


def test_without_issue_cycles_the_largest_tile_that_does_not_spill_is_chosen():
    small, few, most = (figures(c, issue_cycles=None) for c in ((64, 32, 4, 2), (64, 64, 2, 2), B))
    spills = figures(B, issue_cycles=None, spill_bytes=4)
    assert choose([small, few, most]).choice == B
    assert choose([small, few, spills]).choice == (64, 64, 2, 2)


def test_no_candidate_that_can_run_is_an_error():
    with pytest.raises(ValueError, match="300000 B of shared memory.*try smaller tiles"):
        choose([figures(A, reason="300000 B of shared memory")])


def test_one_stage_is_refused_before_it_is_compiled():
    assert score(KEY, (64, 64, 4, 1)).reason == "1 pipeline stage"


def test_compiled_candidates_differ():
    shape = ((197, 50),)
    key = ("dkdv", 64, "bf16", 80)
    good, spilling = score(key, (128, 32, 4, 2), shape), score(key, (128, 64, 4, 2), shape)
    assert not good.reason and good.spill_bytes == 0 and 200 < good.issue_cycles < 500
    assert spilling.spill_bytes > 0
    assert choose([spilling, good]) is good


def test_shared_memory_that_one_shape_lacks_rules_a_candidate_out():
    choice = (128, 32, 4, 2)
    fits = report_of(("dkdv", 64, "bf16", 80), (197, 50), choice)
    binary = dataclasses.replace(fits.figures.binary, shared=163 * 1024 + 1)
    lacks = dataclasses.replace(fits, figures=dataclasses.replace(fits.figures, binary=binary))
    assert summary(choice, [fits, lacks]).reason == "166913 B of shared memory"
    assert not summary(choice, [fits]).reason


def test_figures_are_summed_up_over_the_shapes():
    key, choice = ("dkdv", 64, "bf16", 80), (128, 32, 4, 2)
    parts = [score(key, choice, (shape,)) for shape in ((197, 50), (577, 50))]
    whole = score(key, choice, ((197, 50), (577, 50)))
    assert whole.issue_cycles == pytest.approx(sum(p.issue_cycles for p in parts) / 2)
    assert whole.registers == max(p.registers for p in parts)
    assert whole.occupancy == min(p.occupancy for p in parts)


def test_fp32_has_issue_cycles_and_amd_has_none():
    shape = ((197, 50),)
    assert score(("dkdv", 32, "fp32", 80), (32, 32, 4, 2), shape).issue_cycles > 0
    amd = score(("dkdv", 32, "bf16", "gfx942"), (64, 32, 4, 2), shape)
    assert amd.issue_cycles is None and not amd.reason and amd.registers > 0


def test_candidates_can_be_launched_as_they_are():
    for kernel in KERNELS:
        for head_dim, dtype, architecture in (
            (32, "fp16", 90),
            (128, "fp32", 80),
            (64, "bf16", 100),
        ):
            key = (kernel, head_dim, dtype, architecture)
            choices = candidates(key)
            assert len(set(choices)) == len(choices) >= 3
            for rows, step, warps, stages in choices:
                _, launch = launch_of(key, (577, 200), (rows, step, warps, stages))
                sizes = {launch.constexprs["BLOCK_M"], launch.constexprs["BLOCK_N"]}
                assert sizes == {rows, step}
                assert (launch.num_warps, launch.num_stages) == (warps, stages)
    assert {stages for *_, stages in candidates(KEY, (2, 3))} == {2, 3}


def test_a_static_choice_is_printed_and_written(monkeypatch, tmp_path, capsys):
    path = tmp_path / "table.py"
    monkeypatch.setattr(tune, "candidates", lambda key: [current(key)])
    assert tune.main([*NAME, "--write", str(path)]) == 0
    text = capsys.readouterr().out
    assert "dkdv, 32 channels, bf16, 80" in text and "chosen, in the table now" in text
    assert "0 of 1 entries change" in text
    assert read_table(path) == (TABLE, MEASURED)


def test_a_better_candidate_replaces_the_tables_own(monkeypatch, tmp_path, capsys):
    path, worse = tmp_path / "table.py", (32, 16, 4, 2)
    better = TABLE[KEY]
    for module in ("bench.tiles.candidates", "bench.tiles.tune"):
        monkeypatch.setattr(f"{module}.TABLE", {**TABLE, KEY: worse})
    monkeypatch.setattr(tune, "candidates", lambda key: [better])
    tune.main([*NAME, "--write", str(path)])
    text = capsys.readouterr().out
    assert "issue cycles (modelled)" in text and "1 of 1 entries change" in text
    assert read_table(path)[0] == TABLE


def test_measured_times_override_figures_and_are_saved(monkeypatch, tmp_path, capsys):
    slow, fast = TABLE[KEY], (64, 128, 8, 3)
    other = ("forward", 64, "fp16", 90)
    rows = [(*KEY, *slow, 0.5), (*KEY, *fast, 0.6), (*KEY, *fast, 0.4), (*other, *B, 1.0)]
    arguments = write_csv(tmp_path / "times.csv", *rows)
    path = tmp_path / "table.py"
    assert tune.main([*NAME, *arguments, "--write", str(path)]) == 0
    text = capsys.readouterr().out
    assert "0.4000 ms, measured  chosen" in text and "0.5000 ms, measured  in the table now" in text
    assert "forward" not in text, "only what was asked for"
    table, measured = read_table(path)
    assert table == {**TABLE, KEY: fast} and set(measured) == {*MEASURED, KEY}

    monkeypatch.setattr(tune, "MEASURED", (KEY,))
    tune.main(NAME)
    assert "left alone" in capsys.readouterr().out


def test_the_file_that_is_written_is_formatted_and_equal(tmp_path):
    path, measured = tmp_path / "table.py", (("dq", 64, "bf16", 120), ("forward", 32, "fp16", 90))
    table = {**TABLE, measured[0]: (64, 32, 4, 3)}
    write_table(path, table, measured[::-1])
    assert read_table(path) == (table, measured[::-1])
    settings = Path(__file__).parents[3] / "pyproject.toml"
    command = [sys.executable, "-m", "ruff", "format", "--check", "--config", settings, path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.raises(ValueError, match="not in the table"):
        table_text(TABLE, [("dq", 64, "bf16", 86)])


def test_measured_times_can_be_read_again(tmp_path):
    """With invented times, since real ones need a GPU."""
    path, seen = tmp_path / "times.csv", []

    def time(launch) -> float:
        seen.append(launch)
        if launch.constexprs["BLOCK_M"] == 128:
            raise RuntimeError("out of shared memory")
        return 10.0 / launch.constexprs["BLOCK_N"] / launch.num_warps

    times.write_times(path, times.measure([KEY, (*KEY[:3], 90)], "meta", time))
    found = times.read_times(path)
    assert set(found) == {KEY}, "one GPU has one architecture"
    assert {launch.name for launch in seen} == {"token_dkdv"}
    assert {choice[3] for choice in found[KEY]} == {2, 3, 4}
    assert not [choice for choice in found[KEY] if choice[1] == 128]
    assert times.best_of(found[KEY]) == (128, 32, 8, 2)
    with pytest.raises(FileExistsError):
        times.write_times(path, [])


def test_of_equal_times_the_fewest_stages():
    assert times.best_of({(64, 64, 4, 4): 1.0, (64, 64, 4, 3): 1.019, A: 1.5}) == (64, 64, 4, 3)
    assert times.best_of({(64, 64, 4, 4): 1.0, (64, 64, 4, 3): 1.021, A: 1.5}) == (64, 64, 4, 4)
    assert times.best_of({(64, 64, 4, 3): 1.01, (64, 32, 4, 3): 1.0}) == (64, 32, 4, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ("backward", 64, "bf16", 90, *A, 1.0),
            "line 2: 'backward' is unknown: use one of forward",
        ),
        (("dq", 80, "bf16", 90, *A, 1.0), "line 2: 80 is unknown: use one of 32, 64, 128"),
        (("dq", 64, "fp64", 90, *A, 1.0), "'fp64' is unknown"),
        (("dq", 64, "bf16", 90, 96, 64, 4, 2, 1.0), "rows is 96: it must be a power of two"),
        (("dq", 64, "bf16", 90, 64, 64, 4, 0, 1.0), "num_stages is 0"),
        (("dq", 64, "bf16", 90, *A, -1.0), "milliseconds is -1.0: it must be positive"),
        (("dq", 64, "bf16", 90, *A, "soon"), "line 2: could not convert"),
        (("dq", 64, "bf16", 90, 64), "line 2"),
        (("dq", 64, "bf16", 90, *A, 1.0), "no time of the kernels that were asked for"),
    ],
)
def test_wrong_times_are_refused(row, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tune.main([*NAME, *write_csv(tmp_path / "times.csv", row)])
    assert message in capsys.readouterr().err


def test_times_without_a_column_or_a_file_are_refused(tmp_path, capsys):
    columns = times.COLUMNS[:-1]
    for arguments, message in (
        (write_csv(tmp_path / "times.csv", columns=columns), "no column milliseconds"),
        (["--times", str(tmp_path / "none.csv")], "No such file"),
    ):
        with pytest.raises(SystemExit):
            tune.main([*NAME, *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_75"], "unknown target 'sm_75': use 80"),
        (["--head-dim", "48"], "invalid choice: 48"),
        (["--kernel", "token_dkdv"], "invalid choice: 'token_dkdv'"),
        (["--dtype", "bfloat16"], "invalid choice: 'bfloat16'"),
        (["--measure", "x.csv", "--write"], "--measure only measures"),
        (["--measure", "x.csv"], "--measure needs a GPU, and PyTorch sees none here"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_all_entries_are_chosen_by_default(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(tune, "choose_statically", lambda key: asked.append(key) or TABLE[key])
    assert tune.main([]) == 0
    pairs = sum(map(len, ARCHITECTURES.values()))
    left = len(KERNELS) * len(HEAD_DIMS) * pairs
    assert len(asked) == left - len(MEASURED) and set(asked) == set(TABLE) - set(MEASURED)
    assert f"0 of {left} entries change" in capsys.readouterr().out
