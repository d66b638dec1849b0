"""Task of a sweep: one backbone and one data set that all runs share."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed
from torch import nn

from vpt_fast import count_parameters, prompt_tune, remove_prompts, save_adapter
from vpt_fast.methods import Method
from vpt_fast.models.initialise import initialises
from vpt_fast.models.tuned import is_tuned
from vpt_fast.train.common.class_weights import with_class_weights
from vpt_fast.train.common.curves import directory_size
from vpt_fast.train.common.ranking import names_of
from vpt_fast.train.common.recipe import Recipe, head_layers, init_head
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.evaluate import TrainingError, evaluate
from vpt_fast.train.loop.initial_prompts import initial_prompts
from vpt_fast.train.loop.prefix_cache import (
    Activations,
    PrefixCache,
    SuffixModel,
    activation_loader,
    frozen_blocks,
)
from vpt_fast.train.sweep.data import SweepData
from vpt_fast.train.sweep.sweep import Outcome

_EVAL_BATCH = 100


class SweepTask:
    """Runs that share a backbone and images.

    Each run begins with the original backbone, so that its outcome does not depend on earlier runs.
    The input of the first block that is trained or has prompts is computed once for all runs of the
    methods that begin there, if images are not augmented.

    Args:
        backbone: Plain timm model, on the device to train on; unchanged after each run.
        data: Images by part.
        progress: Whether to show bars on a terminal.
        adapters: Folder for the adapters of final runs, as <method>/seed-<seed>; None saves none.
        save_options: Arguments of `save_adapter` beside model and directory.
        memory: Memory mode, as `vpt_fast.prompt_tune` takes it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        data: SweepData,
        progress: bool = True,
        adapters: Path | None = None,
        save_options: Mapping[str, Any] | None = None,
        memory: str = "speed",
    ) -> None:
        self.backbone, self.data, self.progress = backbone, data, progress
        self.adapters, self.save_options = adapters, dict(save_options or {})
        self.memory = memory
        self._prefixes: dict[tuple[int, torch.dtype, str], Activations] = {}

    def run(self, method: Method, recipe: Recipe, final: bool) -> Outcome:
        """Train once; see `vpt_fast.train.sweep.sweep.Task.run`."""
        start, model = time.perf_counter(), self.backbone
        random_seed(recipe.seed)
        try:
            prompt_tune(model, method, self.memory)
            # After prompt_tune, which stores the head that it finds for remove_prompts.
            init_head(model)
            part = "both" if final else "train"
            if initialises(model):
                initial_prompts(model, self.data.batches(part, _EVAL_BATCH, recipe.seed))
            recipe = self._weighted(recipe, part)
            first = 0 if self.data.augmented or recipe.mixes else frozen_blocks(model)
            net = SuffixModel(model, first) if first else model
            result = fit(
                model,
                self._training(recipe, first, part),
                recipe,
                net=net,
                progress=self.progress,
                description=f"{method.name:<12}",
            )
            if result.interrupted:
                raise KeyboardInterrupt
            if final:
                net, images = model, self.data.batches("test", _EVAL_BATCH)
            elif first:
                activations = self._activations("val", recipe, first)
                images = activation_loader(activations, _EVAL_BATCH, shuffle=False)
            else:
                images = self.data.batches("val", _EVAL_BATCH)
            found = evaluate(net, images, amp_dtype=recipe.autocast_dtype, progress=False)
            trained, _ = count_parameters(model)
            size = self._save(method, recipe.seed, found.top1) if final else 0
        finally:
            if is_tuned(model):
                remove_prompts(model)
        if not torch.isfinite(torch.tensor(found.loss)):
            raise TrainingError(f"the loss is {found.loss} after training")
        seconds = time.perf_counter() - start
        return Outcome(found.top1, found.loss, trained, size, seconds)

    def _weighted(self, recipe: Recipe, part: str) -> Recipe:
        """Return the recipe with its class weights as numbers, of the part's labels."""
        if recipe.class_weights is None:
            return recipe
        names = names_of(None, head_layers(self.backbone)[0].out_features)
        return with_class_weights(recipe, self.data.labels(part), names)

    def _training(self, recipe: Recipe, first: int, part: str) -> Any:
        if not first:
            return self.data.batches(part, recipe.batch_size, recipe.seed)
        activations = self._activations(part, recipe, first)
        generator = torch.Generator().manual_seed(recipe.seed)
        return activation_loader(activations, recipe.batch_size, shuffle=True, generator=generator)

    def _activations(self, part: str, recipe: Recipe, first: int) -> Activations:
        """Return the inputs of block `first`, before which the backbone is frozen."""
        key = first, recipe.autocast_dtype, part
        if key not in self._prefixes:
            cache = PrefixCache(
                self.backbone, first, amp_dtype=recipe.autocast_dtype, progress=False
            )
            images = self.data.batches(part, _EVAL_BATCH)
            self._prefixes[key] = cache.activations(images, self.data.count(part))
        return self._prefixes[key]

    def _save(self, method: Method, seed: int, top1: float) -> int:
        """Save a final run's adapter, temporarily without a folder; return its bytes."""
        metrics = {"test top-1": top1}
        with tempfile.TemporaryDirectory() as folder:
            path = (self.adapters or Path(folder)) / method.name / f"seed-{seed}"
            save_adapter(self.backbone, path, overwrite=True, metrics=metrics, **self.save_options)
            return directory_size(path)
