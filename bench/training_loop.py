"""What training costs beyond its steps: data, metrics, adapters and checkpoints.

    python -m bench.training_loop                    ViT-S/16, 1,000 images, batch 64
    python -m bench.training_loop --model vit_tiny_patch16_224 --rounds 5

1,000 image files, as many as a VTAB-1k set has, are tuned on as `vpt-fast train` does it: decoded
once, cropped and flipped anew in every epoch, with metrics.csv, TensorBoard, an adapter and a
checkpoint after each. The bare step is the same model, batch size and optimizer on one batch that
is there already. Both take turns, an epoch each; the ratio is what is measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from bench.facts import processor
from bench.turns import step
from vpt_fast import VPTDeep, prompt_tune, save_adapter
from vpt_fast.train.augmentation import Augmentation
from vpt_fast.train.image_loaders import Loading, set_data_config
from vpt_fast.train.image_options import ImageOptions
from vpt_fast.train.loop import fit
from vpt_fast.train.recipe import Recipe, init_head, make_optimizer
from vpt_fast.train.sources import open_source

_CLASSES = 10
_SIDE = 256


def write_images(folder: Path, count: int) -> None:
    """Seeded JPEG files of 256 x 256 pixels in train/<class>/."""
    rng = np.random.default_rng(0)
    for index in range(count):
        place = folder / "train" / f"class{index % _CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(place / f"{index}.jpg")


class Loop:
    """`fit` on a folder, one epoch after another, and steps on a batch that is there already.

    Args:
        folder: of `write_images`; the run is written beside it.
        model: timm's name.
        batch_size: images per step.
        prompts: of VPT-Deep.
    """

    def __init__(self, folder: Path, model: str, batch_size: int, prompts: int) -> None:
        self.output = folder / "run"
        self.output.mkdir()
        self.batch_size = batch_size
        source = open_source(folder)
        self.classes = source.class_names
        self.net = self._net(model, prompts)
        config = set_data_config(self.net, ImageOptions())
        loading = Loading(config, Augmentation(), torch.device("cpu"))
        self.batches = loading.loader(
            source.splits["train"], self.classes, batch_size, training=True
        )
        self.count = len(source.splits["train"])
        bare = self._net(model, prompts)
        batch = next(iter(self.batches))
        self._step = step(bare, batch.images, batch.labels)
        self._optimizer = make_optimizer(bare, Recipe(batch_size=batch_size))

    def _net(self, model: str, prompts: int) -> nn.Module:
        torch.manual_seed(0)
        net = timm.create_model(model, num_classes=_CLASSES)
        init_head(net)
        return prompt_tune(net, VPTDeep(prompts)).train()

    def epoch(self) -> float:
        """Images/s of an epoch as `vpt-fast train` runs it, with all that is written after it."""

        def save(net: nn.Module, directory: Path) -> None:
            save_adapter(net, directory, class_names=self.classes, overwrite=True)

        recipe = Recipe(epochs=1, batch_size=self.batch_size, schedule="step")
        start = time.perf_counter()
        fit(
            self.net, self.batches, recipe, output=self.output, save=save, progress=False,
            log=lambda line: None,
        )  # fmt: skip
        return self.count / (time.perf_counter() - start)

    def bare(self) -> float:
        """Images/s of as many whole steps as an epoch has images for."""
        steps = max(1, self.count // self.batch_size)
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
            self._optimizer.step()
        return steps * self.batch_size / (time.perf_counter() - start)


def measure(loop: Loop, rounds: int, say: Callable[[str], None] = print) -> float:
    """The median over rounds of the loop's images/s over the bare step's."""
    # Once each before: the first import of TensorBoard's writer, and memory.
    loop.epoch()
    ratios = []
    for index in range(rounds):
        pair = [loop.epoch, loop.bare] if index % 2 else [loop.bare, loop.epoch]
        found = {run.__name__: run() for run in pair}
        ratios.append(found["epoch"] / found["bare"])
        say(f"round {index + 1}: {ratios[-1]:.3f}")
    return float(np.median(ratios))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m bench.training_loop`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_loop", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="vit_small_patch16_224", help="vit_small_patch16_224")
    parser.add_argument("--images", type=int, default=1000, help="1000")
    parser.add_argument("--batch-size", type=int, default=64, help="64")
    parser.add_argument("--prompts", type=int, default=10, help="10")
    parser.add_argument("--rounds", type=int, default=3, help="3")
    options = parser.parse_args(arguments)
    if min(options.images, options.batch_size, options.rounds) < 1:
        parser.error("--images, --batch-size and --rounds must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        loop = Loop(Path(folder), options.model, options.batch_size, options.prompts)
        ratio = measure(loop, options.rounds)
    print(
        f"{options.model}, {options.images:,} images, batch {options.batch_size}, VPT-Deep with "
        f"{options.prompts} prompts, {processor()}, {torch.get_num_threads()} threads: the whole "
        f"loop trains {ratio:.3f} times as many images a second as the bare step (measured, median "
        f"of {options.rounds} rounds)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
