"""One step of training: a batch in parts, on one or several processes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vpt_fast.train.common.parallel import distributed, summed, world_size
from vpt_fast.train.common.recipe import Recipe, make_optimizer, make_scheduler
from vpt_fast.train.data.images import Batch
from vpt_fast.train.loop.evaluate import autocast, device_of
from vpt_fast.train.loop.graphed_step import StepGraphs, check_cuda_graphs


class TrainStep:
    """Takes batches, and changes what the model trains.

    Args:
        model: A tuned timm model, on its device.
        recipe: Optimizer, schedule, precision and number of parts.
        steps: Batches of an epoch.
        net: From what batches hold to logits; the model by default.
        cuda_graphs: Whether forward, loss and backward are replayed as a CUDA graph; None for a
            GPU and one process. On the CPU they are not.

    Raises:
        ValueError: If `cuda_graphs` is True with several processes.
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
        self.taken = 0
        graphed = cuda_graphs is not False and world_size() == 1 and self.device.type == "cuda"
        self.graphs = StepGraphs(self.net) if graphed else None

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def __call__(self, batch: Batch) -> Tensor | None:
        """Takes a step.

        Args:
            batch: This process's part of a batch; it may be empty.

        Returns:
            Sums over all processes (3,), fp64: of losses, of right answers, of images. None where
            no process has an image, and nothing was done.
        """
        everyone: Any = len(batch.labels)
        if world_size() > 1:
            everyone = summed(torch.full((), everyone, dtype=torch.float64, device=self.device))
            if not len(batch.labels):  # whoever has an image need not wait to know of one
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
                # The mean over the whole batch; processes are averaged, not added.
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
        """Adds the gradients of some images; returns the sums (3,) of `weight` of them."""
        with autocast(self.device, self.recipe.autocast_dtype):
            logits = self.net(images)
            loss = F.cross_entropy(logits, labels)
        # A thread of the GPU's own, PyTorch's default, has none of what this one's caches hold:
        # steps of our blocks, whose backward is Python, took 18% longer on an H200.
        with torch.autograd.set_multithreading_enabled(self.graphs is not None):
            self.scaler.scale(_times(loss, share)).backward()
        right = (logits.detach().argmax(1) == labels).double().mean()
        return weight * torch.stack([loss.detach().double(), right, torch.ones_like(right)])

    def _parts(self, batch: Batch) -> list[tuple[Tensor, Tensor, int]]:
        """Images, labels and number of images of each part of a batch, on the device."""
        if not len(batch.labels):
            # Other processes have images, and wait for this one's gradients, which are 0.
            vit: Any = self.model
            images = torch.zeros(1, vit.in_chans, *vit.patch_embed.img_size, device=self.device)
            return [(images, torch.zeros(1, dtype=torch.int64, device=self.device), 0)]
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        pieces = min(self.recipe.accumulation, len(labels))
        pairs = zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True)
        return [(some, theirs, len(theirs)) for some, theirs in pairs]

    def end_epoch(self, epoch: int) -> None:
        """Sets the learning rate after epoch number `epoch`, from 1, if it changes by epoch."""
        self.scheduler.step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, the trained weights left out."""
        return {
            "taken": self.taken,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned."""
        self.taken = state["taken"]
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])


def _times(loss: Tensor, share: float | Tensor) -> Tensor:
    """The loss times a number, which may be on its device."""
    if isinstance(share, Tensor):
        return loss * share.to(loss.dtype)
    return loss if share == 1 else loss * share
