"""Training step: a batch in parts, on one or several processes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vpt_fast.models.initialise import regularisation, regularises
from vpt_fast.train.common.parallel import distributed, summed, world_size
from vpt_fast.train.common.recipe import Recipe, head_layers, make_optimizer, make_scheduler
from vpt_fast.train.data.images import Batch
from vpt_fast.train.loop.evaluate import autocast, device_of
from vpt_fast.train.loop.graphed_step import StepGraphs, check_cuda_graphs
from vpt_fast.train.loop.mixing import Mixing
from vpt_fast.train.loop.objective import Objective


class TrainStep:
    """Step that updates the trained parameters of a model from a batch.

    Args:
        model: Tuned timm model, on its device.
        recipe: Optimizer, schedule, precision, number of parts, loss and mixing of images.
        steps: Number of batches of an epoch.
        net: Module that maps what batches hold to logits; the model by default.
        cuda_graphs: Whether forward, loss and backward are replayed as a CUDA graph; None does so
            on a GPU with one process. On the CPU they never are.

    Raises:
        ValueError: If `cuda_graphs` is True with several processes, or the recipe has class weights
            that are not numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps: int,
        net: nn.Module | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        check_cuda_graphs(cuda_graphs)
        self.model, self.recipe = model, recipe
        self.net = distributed(model if net is None else net)
        self.device = device_of(model)
        self.optimizer = make_optimizer(model, recipe)
        self.scheduler = make_scheduler(self.optimizer, recipe, steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp_dtype == "float16")
        self.taken, self.regularised = 0, regularises(model)
        classes = head_layers(model)[0].out_features
        self.objective = Objective(recipe, classes, self.device)
        self.mixing = Mixing(recipe, classes) if recipe.mixes else None
        graphed = cuda_graphs is not False and world_size() == 1 and self.device.type == "cuda"
        self.graphs = StepGraphs(self.net) if graphed else None

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def __call__(self, batch: Batch) -> Tensor | None:
        """Take a step.

        Args:
            batch: Part of a batch that this process computes; it may be empty.

        Returns:
            Sums (3,) over all processes, fp64: losses, correct predictions (NaN with several labels
            an image) and images. None, and no step, where no process has an image.
        """
        everyone: Any = len(batch.labels)
        if world_size() > 1:
            everyone = summed(torch.full((), everyone, dtype=torch.float64, device=self.device))
            if not len(batch.labels):  # a process with an image need not wait for it
                everyone = int(everyone)
        if isinstance(everyone, int) and not everyone:
            return None
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        # Recorded steps add to gradients that stay where they are.
        self.optimizer.zero_grad(set_to_none=self.graphs is None)
        parts = self._parts(batch)
        for number, (images, labels, weight) in enumerate(parts, 1):
            with ExitStack() as stack:
                if number < len(parts) and isinstance(self.net, DistributedDataParallel):
                    stack.enter_context(self.net.no_sync())
                # The mean over the whole batch; gradients are averaged over processes, not added.
                share = weight * world_size() / everyone
                if self.graphs is None:
                    sums += self._part(images, labels, weight, share)
                else:
                    sums += self.graphs.run(self._part, images, labels, weight, share)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.taken += 1
        if self.recipe.schedule == "step":
            self.scheduler.step_update(self.taken)
        return summed(sums)

    def _part(self, images: Tensor, labels: Tensor, weight: int, share: float | Tensor) -> Tensor:
        """Add the gradients of some images; return loss, accuracy and 1, times `weight`."""
        with autocast(self.device, self.recipe.autocast_dtype):
            logits = self.net(images)
            loss = self.objective.loss(logits, labels)
        if self.regularised:
            loss = loss + regularisation(self.model)
        # By default PyTorch runs backward in a thread of the GPU's own, with cold caches: steps of
        # our blocks, whose backward is Python, took 18% longer on an H200.
        with torch.autograd.set_multithreading_enabled(self.graphs is not None):
            self.scaler.scale(_times(loss, share)).backward()
        right = self.objective.right(logits.detach(), labels)
        return weight * torch.stack([loss.detach().double(), right, torch.ones_like(right)])

    def _parts(self, batch: Batch) -> list[tuple[Tensor, Tensor, int]]:
        """Return images, labels and number of images of each part of a batch, on the device."""
        if not len(batch.labels):
            # Other processes have images and wait for this one's gradients, which are 0.
            vit: Any = self.model
            images = torch.zeros(1, vit.in_chans, *vit.patch_embed.img_size, device=self.device)
            labels = torch.zeros(1, dtype=torch.int64, device=self.device)
            return [(*self._mixed(images, labels), 0)]
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        images, labels = self._mixed(images, labels)
        pieces = min(self.recipe.accumulation, len(labels))
        pairs = zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True)
        return [(some, theirs, len(theirs)) for some, theirs in pairs]

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images, labels) if self.mixing is None else self.mixing(images, labels, self.taken)

    def end_epoch(self, epoch: int) -> None:
        """Set the learning rate after epoch number `epoch`, from 1, if it changes by epoch."""
        self.scheduler.step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next step depends on, without the trained weights."""
        return {
            "taken": self.taken,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.taken = state["taken"]
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])


def _times(loss: Tensor, share: float | Tensor) -> Tensor:
    """Return the loss times a number, which may be a tensor on its device."""
    if isinstance(share, Tensor):
        return loss * share.to(loss.dtype)
    return loss if share == 1 else loss * share
