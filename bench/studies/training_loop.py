"""What training costs in addition to its steps: data, metrics, adapters and checkpoints.

    python -m bench.studies.training_loop                    ViT-S/16, 1,000 images, batch 64
    python -m bench.studies.training_loop --model vit_tiny_patch16_224 --rounds 5

1,000 image files, the size of a VTAB-1k training set, go through an epoch as `vpt-fast train` runs
it: decoded once, cropped and flipped in every epoch (or not, with --no-aug), with metrics.csv,
TensorBoard, an adapter and a checkpoint at the end. Only the steps themselves are left out. The
bare step is the same model, batch size and optimizer on one batch that is already in memory. The
two are measured separately, in interleaved rounds, so that the noise of the large part does not
hide the small one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from bench.compare.facts import processor
from bench.compare.rounds import step
from vpt_fast import VPTDeep, prompt_tune, save_adapter
from vpt_fast.train.common.recipe import Recipe, init_head, make_optimizer
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_loaders import Loading, set_data_config
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.loop import epochs as loop
from vpt_fast.train.loop.step import TrainStep

_CLASSES = 10
_SIDE = 256


def write_images(folder: Path, count: int) -> None:
    """Write seeded JPEG files of 256 x 256 pixels to train/<class>/."""
    rng = np.random.default_rng(0)
    for index in range(count):
        target = folder / "train" / f"class{index % _CLASSES}"
        target.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(target / f"{index}.jpg")


class EpochTrial:
    """An epoch of `fit` without its steps, and steps on a batch that is already in memory.

    Args:
        folder: Folder written by `write_images`; the run is written to a subfolder.
        model: Model name in timm.
        batch_size: Images per step.
        prompts: Prompts per block of VPT-Deep.
        no_aug: Whether augmentation is off.
    """

    def __init__(
        self, folder: Path, model: str, batch_size: int, prompts: int, no_aug: bool = False
    ) -> None:
        self.output = folder / "run"
        self.output.mkdir()
        self.batch_size = batch_size
        source = open_source(folder)
        self.classes = source.class_names
        self.net = self._net(model, prompts)
        config = set_data_config(self.net, ImageOptions())
        loading = Loading(config, Augmentation(no_aug=no_aug), torch.device("cpu"))
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

    def overhead(self) -> float:
        """Return the seconds of an epoch as `vpt-fast train` runs it, without its steps."""

        def save(net: nn.Module, directory: Path) -> None:
            save_adapter(net, directory, class_names=self.classes, overwrite=True)

        recipe = Recipe(epochs=1, batch_size=self.batch_size, schedule="step")
        start = time.perf_counter()
        with mock.patch.object(loop, "TrainStep", _NoStep):
            loop.fit(
                self.net, self.batches, recipe, output=self.output, save=save, progress=False,
                log=lambda line: None,
            )  # fmt: skip
        return time.perf_counter() - start

    def step(self) -> float:
        """Return the seconds of a bare step."""
        start = time.perf_counter()
        self._step()
        self._optimizer.step()
        return time.perf_counter() - start


class _NoStep(TrainStep):
    def __call__(self, batch: Any) -> torch.Tensor:
        """Return a loss of 1 for every image, with none classified correctly."""
        return torch.tensor([1.0, 0.0, len(batch.labels)], dtype=torch.float64)


def measure(trial: EpochTrial, rounds: int) -> tuple[float, float]:
    """Return the seconds of an epoch without its steps, and of its steps.

    Both are medians over the rounds, after one round of warm-up.
    """
    pairs = [(trial.overhead(), trial.step()) for _ in range(rounds + 1)][1:]
    overhead, step_time = (float(np.median(values)) for values in zip(*pairs, strict=True))
    return overhead, step_time * trial.count / trial.batch_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m bench.studies.training_loop`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.training_loop", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="vit_small_patch16_224", help="default %(default)s")
    parser.add_argument("--images", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default %(default)s")
    parser.add_argument("--prompts", type=int, default=10, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--no-aug", action="store_true", help="only resize and crop the centre")
    options = parser.parse_args(arguments)
    if min(options.images, options.batch_size, options.rounds) < 1:
        parser.error("--images, --batch-size and --rounds must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        trial = EpochTrial(
            Path(folder), options.model, options.batch_size, options.prompts, options.no_aug
        )
        overhead, steps = measure(trial, options.rounds)
    augmented = ", no augmentation" if options.no_aug else ""
    print(
        f"{options.model}, {options.images:,} images{augmented}, "
        f"batch {options.batch_size}, VPT-Deep with {options.prompts} prompts, {processor()}, "
        f"{torch.get_num_threads()} threads: an epoch's steps take {steps:.1f} s, the rest of it "
        f"{overhead:.2f} s: {steps / (steps + overhead):.3f} of the bare step's images per second "
        f"(measured, medians of {options.rounds} rounds)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
