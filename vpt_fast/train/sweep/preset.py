"""Small sweep that every machine can run: the demo's digits, seven methods, five seeds."""

from __future__ import annotations

from pathlib import Path

import torch

from vpt_fast import VAPT, AdapterTuning, BiasTuning, FullTuning, LinearProbe, VPTDeep, VPTShallow
from vpt_fast.methods import Method
from vpt_fast.train.common.paper_settings import SEEDS
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.demo.task import NUM_PROMPTS
from vpt_fast.train.sweep.plan import SweepPlan, candidate
from vpt_fast.train.sweep.sweep import Candidate

EPOCHS = 10

_METHODS: tuple[Method, ...] = (
    LinearProbe(),
    BiasTuning(),
    AdapterTuning(),
    FullTuning(),
    VPTShallow(NUM_PROMPTS),
    VPTDeep(NUM_PROMPTS),
    VAPT(NUM_PROMPTS),
)
# Three learning rates each, chosen for short runs of a small model.
_LRS = {"sgd": (10.0, 2.5, 0.5), "adamw": (0.05, 0.02, 0.005)}


def demo_candidates(epochs: int = EPOCHS) -> tuple[Candidate, ...]:
    """Return the demo's methods, each with three learning rates."""
    # The first epoch of a warm-up has learning rate 0, so a single epoch must have no warm-up.
    recipe = Recipe(epochs=epochs, warmup_epochs=min(2, epochs - 1))
    return tuple(candidate(method, recipe, _LRS, (0.01,)) for method in _METHODS)


def demo_plan(
    output: Path, device: torch.device, seeds: tuple[int, ...] = SEEDS, epochs: int = EPOCHS
) -> SweepPlan:
    """Return the plan of the preset "demo"."""
    return SweepPlan(output, demo_candidates(epochs), seeds=seeds, device=device)
