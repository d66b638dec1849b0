"""Pretrains the demo backbone on rendered letters and symbols.

    python -m examples.pretrain_demo --output demo_vit.safetensors

draws every batch anew (`glyphs.render`), so there is no data set to download and no image is seen
twice. The run is seeded: batches depend on the seed and the step alone, not on the number of
threads, and a run that was stopped continues from `OUTPUT.ckpt`, which is written after every
epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from examples.pretrain_demo.glyphs import CLASSES, HELD_OUT_FONTS
from examples.pretrain_demo.training import STEPS_PER_EPOCH, held_out_accuracy, pretrain


def main(
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("demo_vit.safetensors"),
    epochs: Annotated[int, typer.Option(help=f"Epochs of {STEPS_PER_EPOCH} steps.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate; AdamW: a tenth.")] = 0.02,
    weight_decay: Annotated[float, typer.Option(help="Muon's weight decay.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of weights and images.")] = 42,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, 1 or 2.")] = 2,
    resume: Annotated[bool, typer.Option(help="Go on from OUTPUT.ckpt.")] = True,
) -> None:
    """Train the demo backbone on rendered letters and symbols."""
    torch.set_num_threads(1)
    model = pretrain(output, epochs, batch_size, lr, weight_decay, seed, threads, resume)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, {len(CLASSES)} classes")
    print(f"held-out renderings: {held_out_accuracy(model):.4f}")
    print(f"held-out fonts:      {held_out_accuracy(model, fonts=HELD_OUT_FONTS):.4f}")


if __name__ == "__main__":
    typer.run(main)
