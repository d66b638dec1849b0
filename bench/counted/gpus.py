"""GPUs by name with their published peaks, and the shares of the peaks that the model assumes.

Dense rates, without sparsity, at boost clock; memory bandwidth in 10^9 bytes per second. Sources:

- A100 80GB SXM: NVIDIA A100 Tensor Core GPU data sheet: 312 TFLOPS (bf16, fp32 accumulation), 19.5
  (fp32), 2,039 GB/s.
- H100 SXM: NVIDIA H100 Tensor Core GPU data sheet: 1,979 TFLOPS with sparsity, half of it without;
  67 (fp32), 3.35 TB/s.
- H200 SXM: NVIDIA H200 Tensor Core GPU data sheet: rates as H100 SXM, 4.8 TB/s.
- L4: NVIDIA L4 Tensor Core GPU data sheet: 242 TFLOPS with sparsity, half of it without; 30.3
  (fp32), 300 GB/s. Its 72 W do not sustain the boost clock in long products.
- RTX 4090: NVIDIA Ada GPU Architecture white paper, appendix A: 165.2 TFLOPS (bf16, fp32
  accumulation), 82.6 (fp32), 1,008 GB/s.

The share of the peak for attention is the best that public benchmarks of fused attention, forward
and backward, reach at head dimension 64 and 512 tokens: 29% on Hopper, 42% on Ampere
(FlashAttention-2); Ada, which uses Ampere's matrix instructions, is assumed to reach the latter.
The other efficiencies are assumptions, the same for every GPU, and not measured; a table that uses
them prints them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Gpu:
    """Published peaks of a GPU.

    Attributes:
        name: Short name.
        pattern: Regular expression that matches the device name in CUDA.
        tensor: Dense bf16 and fp16 products with fp32 accumulation, 10^12 FLOP per second.
        fp32: Products of fp32 operands without TF32, 10^12 FLOP per second.
        bandwidth: Bandwidth of device memory, 10^9 bytes per second.
        attention: Share of the peak rate that fused attention's products reach.
    """

    name: str
    pattern: str
    tensor: float
    fp32: float
    bandwidth: float
    attention: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", r"\bA100-SXM\d*-80GB\b", 312.0, 19.5, 2039.0, 0.42),
        Gpu("H100", r"\bH100\b(?! (PCIe|NVL))", 989.4, 66.9, 3350.0, 0.29),
        Gpu("H200", r"\bH200\b(?! NVL)", 989.4, 66.9, 4800.0, 0.29),
        Gpu("L4", r"\bL4\b", 121.0, 30.3, 300.0, 0.42),
        Gpu("RTX 4090", r"\bRTX 4090\b(?! Laptop| D)", 165.2, 82.6, 1008.0, 0.42),
    )
}
"""GPUs by name."""

DEFAULT = ("A100", "H100", "L4", "RTX 4090")


@dataclass(frozen=True)
class Assumptions:
    """What a modelled time assumes in addition to the peaks; not measured.

    Attributes:
        gemm: Share of the peak rate that matrix products reach.
        attention: Share of the peak rate that fused attention's products reach; the GPU's own if
            None.
        memory: Share of the published bandwidth.
        driver_us: Microseconds of the host per launch in the driver, for which 3 to 9 are reported;
            the time in Python and PyTorch is added to it (`bench.host`).
        replay_us: Microseconds of the host per replay of a CUDA graph.
        gap_us: Microseconds between two kernels, in a CUDA graph too.
    """

    gemm: float = 0.65
    attention: float | None = None
    memory: float = 0.80
    driver_us: float = 6.0
    replay_us: float = 20.0
    gap_us: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gemm", "attention", "memory"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; give a share in (0, 1]")
        for name in ("driver_us", "replay_us", "gap_us"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more microseconds")


ASSUMPTION_FIELDS = tuple(field.name for field in fields(Assumptions))


def gpu_of(device: str) -> Gpu | None:
    """Return the GPU that has this device name in CUDA, or None."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, device)), None)
