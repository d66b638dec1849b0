"""Compiles a Triton kernel without a GPU, exactly as a launch on the GPU would.

    binary = compile_kernel(launch, 90)          # cubin, machine code, registers, shared memory

Arguments are specialised by Triton's own launcher code (divisibility by 16, integers equal to 1),
so the machine code is that of the real launch. That code is internal to Triton, and present in 3.6
and 3.8: no public function compiles a launch without a driver.

    variant(launch, 90)                          # what Triton distinguishes compiled kernels by
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vpt_fast.kernels.runtime.launch import Launch

Architecture = int | str
"""Compute capability of an NVIDIA GPU times 10 (90), or the name of an AMD one ("gfx942")."""


@dataclass(frozen=True)
class Binary:
    """Output of the compiler for a launch.

    Attributes:
        architecture: Architecture it was compiled for.
        threads: Threads per block.
        registers: Registers per thread.
        spill_bytes: Bytes per thread that registers spill to (stack and local memory).
        shared: Bytes of shared memory per block.
        listing: Machine code, as nvdisasm -gi -c or the AMD assembler prints it.
    """

    architecture: Architecture
    threads: int
    registers: int
    spill_bytes: int
    shared: int
    listing: str


def gpu_target(architecture: Architecture) -> GPUTarget:
    """Return Triton's description of an architecture."""
    if isinstance(architecture, int):
        return GPUTarget("cuda", architecture, 32)
    return GPUTarget("hip", architecture, 64)


@functools.cache
def _binder(kernel: JITFunction, target: GPUTarget) -> tuple[Any, Any]:
    """Return a target's compiler, and the function that specialises a kernel's arguments for it."""
    backend = make_backend(target)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialise(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """Return the source and options that Triton's launcher would compile for these arguments."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"kernel is a {type(kernel).__name__}, not a compiled Triton function: pass the "
            "function under @triton.jit, in a process where TRITON_INTERPRET is not set"
        )
    backend, bind = _binder(kernel, target)
    values = {**launch.arguments, **launch.constexprs}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bound, specialization, extra = bind(**values, **options)
    packed = kernel._pack_args(backend, options, bound, specialization, extra)
    parsed, signature, constexprs, attributes = packed
    return ASTSource(kernel, signature, constexprs, attributes), dict(parsed.__dict__)


def variant(launch: Launch, architecture: Architecture) -> tuple[Any, ...]:
    """Return what Triton distinguishes compiled kernels by; equal variants share their code.

    Args:
        launch: Launch; its tensors may be on the "meta" device.
        architecture: As for `compile_kernel`.

    Returns:
        The kernel, types, compile-time values, alignments and options, as strings.

    Raises:
        TypeError: As for `compile_kernel`.
    """
    source, options = specialise(launch, gpu_target(architecture))
    parts = (source.signature, source.constants, source.attrs, options)
    return (launch.kernel.__name__, *(repr(sorted(part.items(), key=repr)) for part in parts))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout


def compile_kernel(launch: Launch, architecture: Architecture) -> Binary:
    """Compile one launch without a GPU.

    Args:
        launch: Launch to compile; its tensors may be on the "meta" device.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".

    Returns:
        Machine code and the resources that the compiler reports.

    Raises:
        TypeError: If the kernel is not a compiled Triton function.
        RuntimeError: If a tool of the compiler fails.
    """
    target = gpu_target(architecture)
    source, options = specialise(launch, target)
    kernel = triton.compile(source, target=target, options=options)
    shared = kernel.metadata.shared
    if isinstance(architecture, str):
        listing = kernel.asm["amdgcn"]
        threads = kernel.metadata.num_warps * 64
        return Binary(architecture, threads, *_amd_resources(listing), shared, listing)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        listing = _run(knobs.nvidia.nvdisasm.path, "-ndf", "-gi", "-c", str(cubin))
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    threads = int(re.findall(r"\.reqntid\s+(\d+)", kernel.asm["ptx"])[0])
    spilled = used["STACK"] + used["LOCAL"]
    return Binary(architecture, threads, used["REG"], spilled, shared, listing)


def _amd_resources(listing: str) -> tuple[int, int]:
    """Return (vector registers, spilled bytes) per lane, from the code object's metadata."""
    found = {
        name: int(n)
        for name, n in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", listing
        )
    }
    return found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
