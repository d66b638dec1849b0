"""Data-parallel training by several processes that torchrun starts.

Every process holds the model and takes its part of every batch. `batch_size` counts the images of a
step over all processes, so that a run does not change with their number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Sampler


def is_parallel() -> bool:
    """Return whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the number of this process; process 0 writes files and logs."""
    return dist.get_rank() if is_parallel() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_parallel() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it started this one.

    Args:
        device: Device to train on; "cuda" without an index takes the GPU of torchrun's LOCAL_RANK.

    Yields:
        The device of this process.

    Raises:
        ValueError: If there are more processes than GPUs on this machine.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} has no GPU of its own: PyTorch sees {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs, or use --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def distributed(model: nn.Module) -> nn.Module:
    """Return the model with gradients averaged over the processes, or itself with one process.

    Only gradients of trained parameters are communicated.
    """
    if not is_parallel():
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


class PartOfBatches(Sampler[list[int]]):
    """Sampler of this process's part of every batch; empty for fewer images than processes.

    Args:
        batches: Batches over all processes, equal and in the same order in each of them.
    """

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[rank() :: world_size()]

    def __len__(self) -> int:
        return len(self.batches)


def summed(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if is_parallel():
        dist.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """Return the values that all processes pass, in the order of their numbers."""
    if not is_parallel():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
