"""The reader of machine code, on listings written by hand."""

import pytest

from bench.machine_code.control_flow import find_loops
from bench.machine_code.figures import kernel_figures, launch_issue_cycles
from bench.machine_code.multiprocessor import MULTIPROCESSORS, resident_blocks
from bench.machine_code.offline import Binary
from bench.machine_code.sass import (
    Instruction,
    classify,
    copy_bytes,
    instruction_mix,
    mma_flop,
    parse,
)


def listing(*rows: str) -> str:
    """Format rows like nvdisasm; rows that end in a colon are labels, those with // comments."""
    text, address = ["\t.section\t.text.kernel", ".text.kernel:"], 0
    for row in rows:
        if row.endswith(":") or row.startswith("//"):
            text.append(row)
        else:
            text.append(f"        /*{address:04x}*/                   {row} ;")
            address += 16
    return "\n".join(text)


LOOP_OF_HOPPER = listing(
    '//## File "/a/kernel.py", line 10',
    "S2R R0, SR_TID.X",
    "@!P1 BRA `(.L_x_0)",
    ".L_x_1:",
    '//## File "/a/kernel.py", line 3 inlined at "/a/kernel.py", line 12',
    '//## File "/a/kernel.py", line 12',
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR28], RZ, !UPT",
    "MUFU.EX2 R1, R1",
    "LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64]",
    '//## File "/a/kernel.py", line 11',
    "@!P0 BRA `(.L_x_1)",
    ".L_x_0:",
    "STG.E.128 desc[UR6][R2.64], R4",
    "EXIT",
    ".L_x_2:",
    "BRA `(.L_x_2)",
    "NOP",
)


def loops_of(text: str) -> list[tuple[int, int]]:
    """Return (first index, number of instructions) of each loop."""
    return [(loop.header, len(loop.body)) for loop in find_loops(*parse(text))]


def test_parse_reads_guards_operands_labels_and_outermost_lines():
    instructions, labels = parse(LOOP_OF_HOPPER)
    assert len(instructions) == 10
    assert labels[".L_x_1"] == 2 and labels[".L_x_0"] == 6
    branch = instructions[5]
    assert (branch.opcode, branch.guard, branch.target) == ("BRA", "!P0", ".L_x_1")
    assert branch.address == 0x50
    assert [i.line for i in instructions[:3]] == [10, 10, 12]
    assert branch.line == 11


def test_parse_refuses_text_without_instructions():
    with pytest.raises(ValueError, match="nvdisasm -c"):
        parse("\t.section\t.text.kernel\n.L_x_1:\n")


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32.BF16", "HMMA"),
        ("HGMMA.64x128x16.F32", "HGMMA"),
        ("UTCHMMA", "UTCMMA"),
        ("LDGSTS.E.BYPASS.128", "LDGSTS"),
        ("LDGDEPBAR", "SYNC"),
        ("LDG.E.U16", "LDG"),
        ("LDL.LU", "LDL"),
        ("STL.64", "STL"),
        ("UTMALDG.2D", "TMA"),
        ("MUFU.EX2", "MUFU"),
        ("FFMA", "FP32"),
        ("FMNMX.NAN", "FCMP"),
        ("F2FP.BF16.F32.PACK_AB", "CONVERT"),
        ("IMAD.MOV.U32", "IMAD"),
        ("LOP3.LUT", "ALU"),
        ("UIADD3.64", "UNIFORM"),
        ("XYZZY.X", "OTHER"),
    ],
)
def test_classes(opcode, expected):
    assert classify(Instruction(0, opcode)) == expected


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16 * 8),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 * 2),
        ("FFMA", 0),
        ("UTCHMMA", None),
    ],
)
def test_mma_flop_of_eight_warps(opcode, expected):
    assert mma_flop(Instruction(0, opcode), warps=8) == expected


def test_mma_flop_refuses_unknown_shapes():
    with pytest.raises(ValueError, match="99999"):
        mma_flop(Instruction(0, "HMMA.99999.F32"), warps=4)


def test_copy_bytes():
    widths = {"LDGSTS.E.BYPASS.128": 16, "LDGSTS.E": 4, "LDG.E.U16": 2, "LDG.E.64": 8, "LDS.128": 0}
    assert {opcode: copy_bytes(Instruction(0, opcode)) for opcode in widths} == widths


def test_one_loop_and_its_padding():
    assert loops_of(LOOP_OF_HOPPER) == [(2, 4)]


def test_loop_that_is_left_through_a_call():
    text = listing(
        "@!P6 BRA `(.L_x_0)",
        ".L_x_1:",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P0 CALL.REL.NOINC `(.L_x_0)",
        "BRA `(.L_x_1)",
        ".L_x_0:",
        "EXIT",
    )
    assert loops_of(text) == [(1, 3)]


def test_nested_loops_share_no_own_instruction():
    text = listing(
        ".L_x_0:",
        "MOV R0, R1",
        ".L_x_1:",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P0 BRA `(.L_x_1)",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    )
    outer, inner = find_loops(*parse(text))
    assert (outer.body, outer.own, outer.parent) == ((0, 1, 2, 3), (0, 3), None)
    assert (inner.body, inner.own, inner.parent) == ((1, 2), (1, 2), 0)


def test_a_wait_at_the_end_of_the_program_belongs_to_the_loop_it_serves():
    """A jump back from code placed after the program is not a loop around the code between."""
    text = listing(
        "MOV R0, R1",
        ".L_x_0:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R1",
        "@!P0 BRA `(.L_x_2)",
        ".L_x_1:",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR28], R24",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_2:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R1",
        "@!P0 BRA `(.L_x_2)",
        "BRA `(.L_x_1)",
    )
    loop, wait = find_loops(*parse(text))
    assert loop.body == (1, 2, 3, 4, 6, 7, 8) and loop.own == (1, 2, 3, 4, 8)
    assert wait.body == (6, 7) and wait.parent == 0


def hopper_binary(**changes) -> Binary:
    fields = {
        "architecture": 90,
        "threads": 128,
        "registers": 168,
        "spill_bytes": 0,
        "shared": 32768,
        "listing": LOOP_OF_HOPPER,
    }
    return Binary(**{**fields, **changes})


def test_figures_of_a_loop():
    figures = kernel_figures("kernel", hopper_binary())
    (loop,) = figures.loops
    flop = 2 * 64 * 64 * 16
    assert (loop.line, loop.instructions, loop.flop) == (11, 4, flop)
    assert loop.cycles == {"tensor": flop / 4096, "mufu": 8, "fp32": 0, "alu": 0, "issue": 4}
    assert loop.issue_per_unit == 4 * 2**20 / flop
    assert (loop.wide_copy_bytes, loop.narrow_copy_bytes, loop.load_widths) == (2048, 0, ())
    assert figures.mix == instruction_mix(parse(LOOP_OF_HOPPER)[0])
    assert (figures.blocks_per_sm, figures.occupancy) == (3, 3 * 4 / 64)


def test_tf32_takes_twice_the_tensor_cycles():
    tf32 = LOOP_OF_HOPPER.replace("64x64x16.F32.BF16", "64x64x8.F32.TF32")
    loop = kernel_figures("kernel", hopper_binary(listing=tf32)).loops[0]
    assert (loop.flop, loop.cycles["tensor"]) == (2 * 64 * 64 * 8, 2 * 64 * 64 * 16 / 4096)


def test_issue_cycles_of_a_launch():
    figures = kernel_figures("kernel", hopper_binary())
    straight, body = 6, 4
    expected = (straight + 5 * body) * 4 / 4 * 3 / 2
    assert launch_issue_cycles(figures, (5,), programs=3, useful_flop=2 * 2**20) == expected
    with pytest.raises(ValueError, match=r"\(5, 1\) for 1 loops"):
        launch_issue_cycles(figures, (5, 1), programs=3, useful_flop=2**20)


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="unknown target 75"):
        kernel_figures("kernel", hopper_binary(architecture=75))
    with pytest.raises(ValueError, match="gfx000"):
        kernel_figures("kernel", hopper_binary(architecture="gfx000"))


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 4, 16),  # warps
        (255, 0, 8, 1),  # registers
        (32, 100 * 1024, 4, 1),  # shared memory
        (16, 0, 1, 32),  # blocks
        (32, 200 * 1024, 4, 0),
    ],
)
def test_resident_blocks_of_an_a100(registers, shared, warps, expected):
    assert resident_blocks(MULTIPROCESSORS[80], registers, shared, warps) == expected
