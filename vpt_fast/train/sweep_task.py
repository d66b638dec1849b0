"""What a sweep trains: one backbone and one data set, used for run after run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

from vpt_fast import count_parameters, prompt_tune, remove_prompts, save_adapter
from vpt_fast.methods import Method
from vpt_fast.models import is_tuned
from vpt_fast.train.data import make_loader
from vpt_fast.train.evaluate import TrainingError, evaluate
from vpt_fast.train.loop import fit
from vpt_fast.train.recipe import Recipe, init_head
from vpt_fast.train.report import directory_size
from vpt_fast.train.sweep import Outcome

_EVAL_BATCH = 100


class DatasetTask:
    """Runs on data sets in memory; the backbone is the same object in all of them.

    A run begins with the backbone as it was given, so that its outcome does not depend on the runs
    before it.

    Args:
        backbone: a plain timm model, on the device to train on; it is left as it was.
        train, val, test: of (image, label).
        progress: whether to show bars on a terminal.
    """

    def __init__(
        self,
        backbone: nn.Module,
        train: Dataset,
        val: Dataset,
        test: Dataset,
        progress: bool = True,
    ) -> None:
        self.backbone, self.progress = backbone, progress
        self.train, self.val, self.test = train, val, test

    def run(self, method: Method, recipe: Recipe, final: bool) -> Outcome:
        """As `vpt_fast.train.sweep.Task.run`."""
        start, model = time.perf_counter(), self.backbone
        random_seed(recipe.seed)
        both: Any = ConcatDataset([self.train, self.val])
        batches = make_loader(
            both if final else self.train, recipe.batch_size, shuffle=True, seed=recipe.seed
        )
        try:
            prompt_tune(model, method)
            # After prompt_tune, which keeps the head that it finds for remove_prompts.
            init_head(model)
            result = fit(
                model, batches, recipe, progress=self.progress, description=f"{method.name:<12}"
            )
            if result.interrupted:
                raise KeyboardInterrupt
            found = evaluate(
                model,
                make_loader(self.test if final else self.val, _EVAL_BATCH),
                amp_dtype=recipe.autocast_dtype,
                progress=False,
            )
            trained, _ = count_parameters(model)
            with tempfile.TemporaryDirectory() as folder:
                size = directory_size(save_adapter(model, Path(folder) / "adapter"))
        finally:
            if is_tuned(model):
                remove_prompts(model)
        if not torch.isfinite(torch.tensor(found.loss)):
            raise TrainingError(f"the loss is {found.loss} after training")
        seconds = time.perf_counter() - start
        return Outcome(found.top1, found.loss, trained, size, seconds)
