"""Check of a whole model on the device, against the published formulation in fp64."""

from __future__ import annotations

from dataclasses import dataclass

from bench.compare.cases import Case
from bench.compare.correctness import Truth
from bench.gpu.device import Device
from bench.gpu.outcome import Emit
from bench.providers.models import OURS


@dataclass(frozen=True)
class ModelCheck:
    """Check of the logits and every trained gradient of a model, without times.

    Attributes:
        case: Model and method; two images of it are run.
        seconds: Estimated seconds.
    """

    case: Case
    seconds: float = 5.0

    def __str__(self) -> str:
        return f"check {self.case}"

    def run(self, device: Device, emit: Emit) -> None:
        """Check the model and emit its row."""
        emit("running", (OURS,))
        check = Truth(self.case, device.name, whole=False).check(OURS)
        row = {
            "kind": "measured", "bench": "check", "model": str(self), "dtype": self.case.dtype,
            "method": self.case.method, "prompts": self.case.prompts, "provider": OURS,
            "error": f"{check.error:.2g}", "rounds": 0,
        }  # fmt: skip
        if not check.holds:
            note = f"{check.worst} is {check.error:.1e} from fp64, limit {check.limit:.1e}"
            row["note"] = f"wrong: {note}"
            emit("wrong", f"{self}: {note}")
        emit("row", row)
