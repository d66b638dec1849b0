"""Groups of options in the help, in their order."""

from __future__ import annotations

DATA, BACKBONE, METHOD, OPTIMISATION = "Data", "Model", "Method", "Optimisation"
AUGMENTATION, SPEED, OUTPUT, OTHERS = "Augmentation", "Speed and memory", "Output", "Options"

GROUPS = ("Arguments", DATA, BACKBONE, METHOD, OPTIMISATION, AUGMENTATION, SPEED, OUTPUT, OTHERS)
