"""What a run is told: data, model, method, recipe and everything that changes how it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vpt_fast.methods import Method
from vpt_fast.ops.memory_modes import check_memory_mode
from vpt_fast.train.common.parallel import world_size
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_loaders import check_loading
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.loop.graphed_step import check_cuda_graphs
from vpt_fast.train.run.rewind import check_rewind


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run on a data set on disk.

    Attributes:
        directory: Folder with train/<class>/<image> and, where there are any, val/ and test/; or a
            data set in another one of `names.FORMATS`, a folder or a CSV file.
        output: New folder for the adapters best/ and last/, metrics.csv, run.json, tensorboard/ and
            checkpoint.pt.
        model: timm's name of the model, with or without a tag, or "vpt_fast_demo".
        method: Method to tune with.
        recipe: Optimizer, schedule, precision and seed.
        checkpoint: File with the backbone's weights.
        pretrained: Whether to download timm's weights instead.
        img_size: Side of the images in pixels; None takes the model's own.
        augmentation: Random changes to training images.
        image_options: How images are resized and normalised.
        data_format: Format of `directory`, one of `names.FORMATS`; "auto" detects it.
        val_fraction: Part of the training images that are split off for validation, or None.
        class_order: How classes are sorted, one of `names.CLASS_ORDERS`; None takes the
            data set's own order, or "strings".
        memory: Memory mode, as `vpt_fast.prompt_tune` takes it.
        cache: Where decoded training and validation images live, one of `image_loaders.CACHES`.
            Test images are read once and never cached.
        prefix_cache: Whether the input of the first block that is trained or has prompts is
            computed once for each image, where that is not block 0 and images are neither augmented
            nor mixed.
        cuda_graphs: Whether forward, loss and backward are replayed as a CUDA graph; None does so
            on a GPU with one process. On the CPU they never are.
        workers: Number of processes that load images; None takes 0 on the CPU, up to 4 on a GPU.
        device: Device to train on.
        overwrite: Whether an earlier run in `output` is replaced.
        resume: Whether to continue in `output` after the last epoch that ended there.
        rewind: Finished run of `E2VPT` whose prompts are pruned, to train the others again from
            their initial values; or None.
    """

    directory: Path
    output: Path
    model: str
    method: Method
    recipe: Recipe
    checkpoint: Path | None = None
    pretrained: bool = False
    img_size: int | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    image_options: ImageOptions = field(default_factory=ImageOptions)
    data_format: str = "auto"
    val_fraction: float | None = None
    class_order: str | None = None
    memory: str = "speed"
    cache: str = "auto"
    prefix_cache: bool = True
    cuda_graphs: bool | None = None
    workers: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    overwrite: bool = False
    resume: bool = False
    rewind: Path | None = None

    def check(self) -> None:
        """Check what no other part checks before training begins.

        Raises:
            ValueError: If `memory`, `cache`, `workers`, `cuda_graphs` or `rewind` cannot be used.
            FileNotFoundError: If there is no adapter in `rewind`.
        """
        check_memory_mode(self.memory)
        check_cuda_graphs(self.cuda_graphs)
        check_loading(self.workers, self.cache)
        if self.rewind is not None:
            check_rewind(self.rewind, self.method)

    def model_record(self, weights: Path | None, digest: str) -> dict[str, Any]:
        """Return what run.json says of the model.

        Args:
            weights: Checkpoint file that the backbone was loaded from, or None.
            digest: Checksum of the backbone's weights without the head.
        """
        return {
            "name": self.model,
            "checkpoint": weights,
            "pretrained": self.pretrained,
            "img_size": self.img_size,
            "weights": digest,
        }

    def options_record(self) -> dict[str, Any]:
        """Return what run.json says of the options that have no section of their own."""
        return {
            "memory": self.memory,
            "cache": self.cache,
            "prefix_cache": self.prefix_cache,
            "cuda_graphs": self.cuda_graphs,
            "workers": self.workers,
            "device": str(self.device),
            "rewind": None if self.rewind is None else str(self.rewind),
            "processes": world_size(),
        }
