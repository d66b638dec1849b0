"""Prompt methods of other papers, through the interface that is open to any method.

They are written from the papers' equations, and registered when this package is imported.
"""

from vpt_fast.published.bpt import BPT
from vpt_fast.published.cvpt import CVPT
from vpt_fast.published.dvpt import DVPT
from vpt_fast.published.e2vpt import E2VPT
from vpt_fast.published.gate_vpt import GateVPT
from vpt_fast.published.vfpt import VFPT

__all__ = ["BPT", "CVPT", "DVPT", "E2VPT", "VFPT", "GateVPT"]
