"""Resources of each GPU architecture: limits of a block and rates of a multiprocessor (SM).

Limits are those of the CUDA C++ Programming Guide's table of technical specifications by compute
capability; instruction rates those of its arithmetic throughput table (results per clock and SM);
dense tensor rates are those of the architectures' white papers (bf16 and fp16 with fp32
accumulation, FLOP per clock and SM; data-centre parts for 8.0, 9.0 and 10.0). They are published
rates: nothing here was timed.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULERS = 4
"""Warp schedulers of an SM, one instruction per clock each."""

WARP_SIZE = 32


@dataclass(frozen=True)
class Multiprocessor:
    """One NVIDIA architecture.

    Attributes:
        warps: Most resident warps per SM.
        blocks: Most resident blocks per SM.
        shared_sm: Bytes of shared memory per SM.
        shared_block: Most bytes of shared memory per block.
        registers: 32-bit registers per SM.
        tensor: Tensor-core FLOP in bf16 per clock and SM; TF32 runs at half of it.
        fp32: Additions, multiplications and fused multiply-adds per clock and SM.
        alu: Comparisons, selections, minima, and integer and logic results per clock and SM.
        mufu: Exponentials and reciprocals per clock and SM.
        mma: Prefix of the opcode that dense matrix products should compile to.
        memory: Bytes of device memory per clock and SM, at the clock that the published tensor peak
            implies: 2,039 GB/s and 312 TFLOPS over 108 SMs (A100 80 GB SXM), 3,352 GB/s and 989.4
            TFLOPS over 132 SMs (H100 SXM); None where it was not looked up.
    """

    warps: int
    blocks: int
    shared_sm: int
    shared_block: int
    tensor: int
    fp32: int
    mma: str
    registers: int = 65536
    alu: int = 64
    mufu: int = 16
    memory: float | None = None


KIB = 1024

MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * KIB, 163 * KIB, tensor=2048, fp32=64, mma="HMMA", memory=13.4),
    86: Multiprocessor(48, 16, 100 * KIB, 99 * KIB, tensor=1024, fp32=128, mma="HMMA"),
    89: Multiprocessor(48, 24, 100 * KIB, 99 * KIB, tensor=1024, fp32=128, mma="HMMA"),
    90: Multiprocessor(
        64, 32, 228 * KIB, 227 * KIB, tensor=4096, fp32=128, mma="HGMMA", memory=13.9
    ),
    100: Multiprocessor(64, 32, 228 * KIB, 227 * KIB, tensor=8192, fp32=128, mma="UTC"),
    120: Multiprocessor(48, 24, 100 * KIB, 99 * KIB, tensor=1024, fp32=128, mma="HMMA"),
}
"""Architectures by compute capability times 10: 80 is 8.0."""

AMD_SHARED_BLOCK = {"gfx942": 64 * KIB}
"""Most bytes of local data share per workgroup."""


def resident_blocks(sm: Multiprocessor, registers: int, shared: int, warps: int) -> int:
    """Return the number of blocks that fit on one SM together.

    Registers are allocated per warp in units of 256, a quarter of the file to each scheduler; each
    block's shared memory is rounded up to 128 bytes after adding the 1 KiB that the system reserves
    (compute capability 8.0 and later).

    Args:
        sm: Architecture.
        registers: 32-bit registers per thread.
        shared: Bytes of shared memory per block.
        warps: Warps per block.

    Returns:
        The number of blocks; 0 if one block does not fit.
    """
    by_warps = min(sm.blocks, sm.warps // warps)
    unit = 128
    by_shared = sm.shared_sm // (-(-(shared + KIB) // unit) * unit)
    per_warp = -(-max(registers, 1) * WARP_SIZE // 256) * 256
    by_registers = (sm.registers // SCHEDULERS // per_warp) * SCHEDULERS // warps
    return min(by_warps, by_shared, by_registers)
