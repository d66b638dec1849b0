"""Parses the output of nvdisasm: instructions, labels, instruction classes, matrix FLOP.

    instructions, labels = parse(text)           # nvdisasm -gi -c kernel.cubin

Source of the opcodes: NVIDIA's "CUDA Binary Utilities", instruction set reference.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:\{\s*)?"
    r"(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_LABEL = re.compile(r"^(?P<name>[.$]?[\w.$]+):\s*$")
_SOURCE = re.compile(r'^\s*//## File "(?P<file>[^"]*)", line (?P<line>\d+)')
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")

CLASSES: tuple[tuple[str, str], ...] = (
    ("HGMMA", r"[HIQ]GMMA"),
    ("UTCMMA", r"UTC\w*MMA"),
    ("HMMA", r"[HIBQOD]MMA"),
    ("LDGSTS", r"LDGSTS"),
    ("TMA", r"UTMA\w+|UBLKCP\w*|UBLKPF"),
    ("LDG", r"LDG|LD"),
    ("STG", r"STG|ST"),
    ("ATOM", r"RED|REDG|ATOM|ATOMG|ATOMS|REDUX"),
    ("LDSM", r"LDSM"),
    ("STSM", r"STSM"),
    ("LDS", r"LDS"),
    ("STS", r"STS"),
    ("LDL", r"LDL"),
    ("STL", r"STL"),
    ("TMEM", r"LDTM|STTM|UTCCP|UTCATOMSWS|UTCSHIFT"),
    ("MUFU", r"MUFU"),
    ("SHFL", r"SHFL"),
    ("FP32", r"FADD2?|FMUL2?|FFMA2?|FFMA32I|FSWZADD"),
    ("FCMP", r"FMNMX3?|FSEL|FSETP?|FCHK"),
    ("HALF", r"H(?:ADD|MUL|FMA|MNMX|SET|SETP)2\w*"),
    ("CONVERT", r"F2FP?|F2I|I2FP?|FRND|F2IP"),
    (
        "SYNC",
        r"BAR|SYNCS|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|ERRBAR|CCTL|UTCBAR|ACQBULK"
        r"|ARRIVES|NANOSLEEP|UCGABAR_\w+|UTMACMDFLUSH|WARPGROUPSET|USETMAXREG|ELECT",
    ),
    ("BRANCH", r"BRA|BRX|BRXU|JMP|JMX|BSSY|BSYNC|BREAK|EXIT|RET|CALL|BMOV|NOP|YIELD|BPT|KILL"),
    ("UNIFORM", r"(?:U[A-Z]\w*|R2UR|S2UR|CS2UR|LDCU)"),
    ("IMAD", r"IMAD|IDP|IMUL"),
    (
        "ALU",
        r"IADD\w*|LEA|LOP\w*|SHF|SHL|SHR|ISETP?|IABS|I?MNMX\w*|VIADD\w*|VIMNMX\w*|PRMT|SEL|PLOP\w*"
        r"|BMSK|SGXT|P2R|R2P|BREV|FLO|LOP3|VABSDIFF\w*",
    ),
    ("MOVE", r"MOV|CS2R|S2R|LDC|VOTE\w*|POPC|MATCH"),
)
"""Class, and pattern of the opcode's first part; the first match wins."""

_CLASSES = tuple((name, re.compile(pattern)) for name, pattern in CLASSES)

_HMMA_SHAPE = {
    "16816": (16, 8, 16),
    "16832": (16, 8, 32),
    "1688": (16, 8, 8),
    "1684": (16, 8, 4),
    "884": (8, 8, 4),
}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: Offset in the program, bytes.
        opcode: Opcode with its modifiers, such as "LDGSTS.E.BYPASS.128".
        operands: Text after the opcode.
        guard: Predicate ("P0", "!UP1"), or None if it always executes.
        line: Line of the kernel's own source file, the outermost if inlined; None if unknown.
    """

    address: int
    opcode: str
    operands: str = ""
    guard: str | None = None
    line: int | None = None

    @property
    def family(self) -> str:
        """Opcode without modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def conditional(self) -> bool:
        """Whether control may also continue after a branch."""
        return self.guard is not None or ".DIV" in self.opcode or ", " in self.operands

    @property
    def target(self) -> str | None:
        """Label that a branch names, or None."""
        found = _TARGET.search(self.operands)
        return found["label"] if found else None


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of a listing in order, and the index that follows each label.

    Args:
        text: Output of `nvdisasm -c`, with `-gi` for source lines.

    Returns:
        (instructions, labels).

    Raises:
        ValueError: If the text holds no instruction.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line: int | None = None
    for row in text.splitlines():
        if found := _INSTRUCTION.match(row):
            operands = found["operands"].strip()
            address = int(found["address"], 16)
            instructions.append(
                Instruction(address, found["opcode"], operands, found["guard"], line)
            )
        elif found := _SOURCE.match(row):
            line = int(found["line"])  # of a chain of inlined calls the last row is the outermost
        elif found := _LABEL.match(row):
            labels[found["name"]] = len(instructions)
    if not instructions:
        raise ValueError("no instruction in the text: pass what `nvdisasm -c` printed")
    return instructions, labels


def classify(instruction: Instruction) -> str:
    """Return the class of an instruction: a name of `CLASSES`, or "OTHER"."""
    family = instruction.family
    for name, pattern in _CLASSES:
        if pattern.fullmatch(family):
            return name
    return "OTHER"


def instruction_mix(instructions: Iterable[Instruction]) -> Counter[str]:
    """Return the number of instructions of each class."""
    return Counter(classify(instruction) for instruction in instructions)


def is_mma(instruction: Instruction) -> bool:
    """Return whether it is a matrix instruction."""
    return classify(instruction) in ("HMMA", "HGMMA", "UTCMMA")


def mma_flop(instruction: Instruction, warps: int) -> int | None:
    """Return the FLOP that one block issues when each of its warps issues an instruction once.

    A warp issues HMMA by itself, four warps issue one HGMMA together.

    Args:
        instruction: Any instruction.
        warps: Warps per block.

    Returns:
        FLOP, 0 for other instructions; None for a tensor-memory instruction, whose shape is in a
        register and not in the text.

    Raises:
        ValueError: If the shape of a matrix instruction is unknown.
    """
    if not is_mma(instruction):
        return 0
    family, _, modifiers = instruction.opcode.partition(".")
    if family.startswith("UTC"):
        return None
    shape = modifiers.split(".", 1)[0]
    if family.endswith("GMMA"):
        return 2 * math.prod(int(size) for size in shape.split("x")) * warps // 4
    if shape not in _HMMA_SHAPE:
        known = ", ".join(_HMMA_SHAPE)
        raise ValueError(f"matrix shape {shape!r} of {instruction.opcode} is not among {known}")
    return 2 * math.prod(_HMMA_SHAPE[shape]) * warps


def copy_bytes(instruction: Instruction) -> int:
    """Return the bytes that one thread moves with a global load or asynchronous copy; else 0."""
    return 0 if classify(instruction) == "STG" else access_bytes(instruction)


def access_bytes(instruction: Instruction) -> int:
    """Return the bytes that one thread moves to or from global memory; 0 for other instructions."""
    if classify(instruction) not in ("LDG", "LDGSTS", "STG"):
        return 0
    parts = instruction.opcode.split(".")
    for width, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("U8", 1), ("S8", 1)):
        if width in parts:
            return size
    return 2 if "S16" in parts else 4
