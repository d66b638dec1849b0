"""The launch table: every supported key has an entry, and shapes only narrow its tiles."""

import ast
import itertools

import pytest
import torch
from triton.runtime.jit import JITFunction

from bench.machine_code.offline import compile_kernel
from bench.machine_code.problems.attention import AttentionProblem, attention_plan, launch_target
from bench.tiles.table_file import TABLE_FILE, table_text
from vpt_fast.kernels.attention import tiles as launch_tiles
from vpt_fast.kernels.attention.launch_table import MEASURED, TABLE
from vpt_fast.kernels.attention.tiles import ARCHITECTURES, DTYPE_NAMES, HEAD_DIMS, KERNELS, look_up
from vpt_fast.kernels.runtime.launch import Target

DTYPES = tuple(DTYPE_NAMES)
TARGETS = (80, 86, 89, 90, 100, 120, "gfx942")
SIXTEEN_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}

CORE = {("forward", 64, "bf16", 86), ("dkdv", 128, "fp16", 120), ("dq", 32, "bf16", 89)}
"""16-bit entries that are compiled by default: kernel, head dimension, dtype, target."""

SPILL_BYTES = {("dkdv", 128, 120): 8}
"""Least spilled bytes where every candidate spills, by kernel, head dimension and target."""


def one_choice(choice: tuple[int, int, int, int]) -> dict:
    """Return a table with the same choice in every entry."""
    return {
        (kernel, head_dim, dtype, architecture): choice
        for kernel, head_dim, dtype in itertools.product(KERNELS, HEAD_DIMS, ARCHITECTURES)
        for architecture in ARCHITECTURES[dtype]
    }


def numbered_table() -> dict:
    """Return a table with a different choice in every entry."""
    return {key: (16, 16, 1, number) for number, key in enumerate(one_choice((0, 0, 0, 0)))}


def test_the_table_is_data_as_the_tool_writes_it():
    text = TABLE_FILE.read_text(encoding="utf-8")
    assert text == table_text(TABLE, MEASURED), (
        "edited by hand: run python -m bench.tiles.tune --write"
    )
    assert not [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]


def test_the_table_has_every_entry_and_every_entry_can_be_launched():
    assert set(one_choice((0, 0, 0, 0))) <= set(TABLE)
    for key, (rows, step, warps, stages) in TABLE.items():
        assert rows in (16, 32, 64, 128, 256) and step in (16, 32, 64, 128), key
        assert warps in (1, 2, 4, 8), key
        assert stages >= (1 if key[2] == "fp32" else 2), key


@pytest.mark.parametrize("capability", [75, 80, 86, 87, 88, 89, 90, 95, 100, 103, 110, 120, 121])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_head_dimension_dtype_and_gpu_resolves(kernel, capability):
    for head_dim, dtype in itertools.product(range(1, 129), DTYPES):
        for target in (Target(capability), Target(0, hip=True)):
            assert look_up(TABLE, kernel, head_dim, dtype, target) in TABLE.values()


@pytest.mark.parametrize(
    ("target", "architecture"),
    [
        (Target(75), 80),
        (Target(80), 80),
        (Target(86), 89),
        (Target(87), 80),
        (Target(88), 80),
        (Target(89), 89),
        (Target(90), 90),
        (Target(99), 90),
        (Target(100), 100),
        (Target(103), 100),
        (Target(120), 120),
        (Target(121), 120),
        (Target(0, hip=True), "gfx942"),
    ],
)
def test_other_architectures_take_the_nearest_lower_one(target, architecture):
    table = numbered_table()
    found = look_up(table, "dq", 64, torch.float16, target)
    assert found == table["dq", 64, "fp16", architecture]


def test_an_entry_of_its_own_comes_before_a_fallback():
    table = {**numbered_table(), ("dq", 64, "fp16", 86): (64, 64, 4, 2)}
    assert look_up(table, "dq", 64, torch.float16, Target(86)) == (64, 64, 4, 2)
    found = look_up(table, "dq", 64, torch.bfloat16, Target(86))
    assert found == table["dq", 64, "bf16", 89]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_fp32_takes_one_entry_on_every_nvidia_gpu(capability):
    table = numbered_table()
    found = look_up(table, "dq", 64, torch.float32, Target(capability))
    assert found == table["dq", 64, "fp32", 80]
    hip = look_up(table, "dq", 64, torch.float32, Target(0, hip=True))
    assert hip == table["dq", 64, "fp32", "gfx942"]


@pytest.mark.parametrize(
    ("head_dim", "entry"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (80, 128), (128, 128)]
)
def test_a_head_dimension_takes_the_smallest_entry_that_holds_it(head_dim, entry):
    table = numbered_table()
    found = look_up(table, "forward", head_dim, torch.bfloat16, Target(90))
    assert found == table["forward", entry, "bf16", 90]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "backward"}, "no tiles for kernel 'backward': use one of forward"),
        ({"head_dim": 129}, "no tiles for head dimension 129: use 1 to 128"),
        ({"head_dim": 0}, "no tiles for head dimension 0"),
        ({"dtype": torch.float64}, "no tiles for torch.float64: use one of torch.bfloat16"),
        ({"table": {}}, "the table has no dq for 64 channels"),
    ],
)
def test_keys_without_an_entry_are_refused(changes, message):
    given = {"table": TABLE, "kernel": "dq", "head_dim": 64, "dtype": torch.bfloat16, **changes}
    with pytest.raises(ValueError, match=message):
        look_up(target=Target(80), **given)


@pytest.mark.parametrize(
    ("choice", "count", "rows", "warps"),
    [
        ((128, 64, 4, 2), 1000, 128, 4),
        ((128, 64, 4, 2), 65, 128, 4),
        ((128, 64, 4, 2), 64, 64, 4),
        ((128, 64, 4, 2), 32, 32, 2),
        ((128, 64, 4, 2), 1, 16, 1),
        ((128, 64, 8, 2), 64, 64, 4),
        ((128, 64, 8, 2), 5, 16, 1),
        ((64, 64, 2, 2), 17, 32, 2),
        ((32, 32, 4, 2), 32, 32, 4),
        ((32, 32, 4, 2), 3, 16, 2),
    ],
)
def test_a_tile_has_no_more_rows_than_it_needs(choice, count, rows, warps):
    given = (64, torch.bfloat16, Target(80))
    table = one_choice(choice)
    found = [
        launch_tiles.query_tiles("forward", *given, count, 197, 50, table),
        launch_tiles.query_tiles("dq", *given, count, 197, 50, table),
        launch_tiles.dkdv_tiles(*given, 197, count, table),
        launch_tiles.shared_prompt_tiles(*given, count, table),
    ]
    assert {(t.rows, t.num_warps, t.num_stages) for t in found} == {(rows, warps, choice[3])}


def test_a_warp_takes_fewer_rows_of_two_wide_accumulators():
    """One warp with 16 rows of 128 channels of both dk and dv would spill."""
    table, target = one_choice((64, 64, 4, 2)), Target(90)
    for head_dim, warps in ((64, 1), (80, 2), (128, 2)):
        given = (head_dim, torch.bfloat16, target)
        assert launch_tiles.shared_prompt_tiles(*given, 10, table).num_warps == warps
        assert launch_tiles.dkdv_tiles(*given, 197, 10, table).num_warps == warps
        assert launch_tiles.query_tiles("forward", *given, 1, 197, 10, table).num_warps == 1


def test_the_rest_of_both_spans_takes_one_narrow_tile_of_its_size():
    given, table = (64, torch.bfloat16, Target(90)), one_choice((128, 64, 4, 2))
    for kernel in ("forward", "dq"):
        tiles = [
            launch_tiles.query_tiles(kernel, *given, 197, 197, p, table)
            for p in (0, 10, 11, 12, 50, 64)
        ]
        tails = [t.tail for t in tiles]
        assert tails == [16, 16, 16, 32, 64, 16]
    tails = [launch_tiles.dkdv_tiles(*given, m, 197, table).tail for m in (192, 197, 209, 255)]
    assert tails == [16, 16, 32, 64]


def test_few_shared_prompts_step_over_fewer_queries():
    given, table = (64, torch.bfloat16, Target(90)), one_choice((64, 64, 4, 2))
    steps = [launch_tiles.shared_prompt_tiles(*given, p, table).step for p in (10, 32, 33, 50)]
    assert steps == [32, 32, 64, 64]
    assert launch_tiles.shared_prompt_tiles(*given, 10, one_choice((64, 16, 4, 2))).step == 16


@pytest.mark.parametrize("target", TARGETS)
def test_the_batch_changes_no_tile_and_nothing_is_tuned_at_run_time(target):
    def tiles(batch: int) -> dict:
        problem = AttentionProblem(197, 50, batch=batch)
        plan = attention_plan(problem, launch_target(target))
        launches = [*plan["forward"], *plan["backward"]]
        assert all(type(launch.kernel) is JITFunction for launch in launches)
        return {
            launch.name.removeprefix("shared_"): (
                {n: v for n, v in launch.constexprs.items() if n.startswith("BLOCK")},
                launch.num_warps,
                launch.num_stages,
            )
            for launch in launches
            if "prompt" not in launch.name or batch > 1
        }

    many = tiles(64)
    assert tiles(2) == many
    assert tiles(1) == {name: many[name] for name in ("forward", "dq", "token_dkdv")}


def test_a_plan_takes_another_table():
    table = one_choice((32, 16, 2, 3))
    plan = attention_plan(AttentionProblem(197, 50), Target(90), table=table)
    for launch in (*plan["forward"], *plan["backward"]):
        rows, step = (
            ("BLOCK_N", "BLOCK_M") if launch.name.endswith("dkdv") else ("BLOCK_M", "BLOCK_N")
        )
        assert (launch.constexprs[rows], launch.constexprs[step]) == (32, 16)
        assert (launch.num_warps, launch.num_stages) == (2, 3)


@pytest.mark.parametrize(
    ("kernel", "head_dim", "dtype", "target"),
    [
        pytest.param(*case, marks=() if case in CORE else pytest.mark.full)
        for case in itertools.product(KERNELS, HEAD_DIMS, SIXTEEN_BIT, TARGETS)
    ],
)
def test_16_bit_entries_spill_nothing_where_a_candidate_does_not(kernel, head_dim, dtype, target):
    plan = attention_plan(
        AttentionProblem(197, 50, head_dim, SIXTEEN_BIT[dtype]), launch_target(target)
    )
    launches = {launch.name: launch for launch in (*plan["forward"], *plan["backward"])}
    name = "token_dkdv" if kernel == "dkdv" else kernel
    most = SPILL_BYTES.get((kernel, head_dim, target), 0)
    assert compile_kernel(launches[name], target).spill_bytes <= most
