"""Pruning and rewinding: masks from a finished run, values from before it.

"E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning" (ICCV 2023, arXiv 2307.13770),
section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast import E2VPT
from vpt_fast.adapter.files import read_adapter
from vpt_fast.methods import Method, from_dict
from vpt_fast.models.tuned import blocks_of
from vpt_fast.published.e2vpt import prune
from vpt_fast.train.data.images import Batch
from vpt_fast.train.run.tuned_model import adapter_folder


def check_rewind(run: Path, method: Method) -> None:
    """Raise ValueError unless a run was tuned with the same `E2VPT`, but for what it prunes.

    Args:
        run: Output folder of a run, or folder of an adapter.
        method: Method to train again with.
    """
    if not isinstance(method, E2VPT):
        raise ValueError(f"--rewind is for --method e2vpt, not {method.name}; leave it out")
    config, _ = read_adapter(adapter_folder(run))
    earlier = from_dict(config["method"])
    tokens, pieces = method.prune_tokens, method.prune_pieces
    alike = isinstance(earlier, E2VPT) and method == replace(
        earlier, prune_tokens=tokens, prune_pieces=pieces
    )
    if not alike:
        raise ValueError(
            f"--rewind {run} was tuned with {earlier}, not with {method}; give the same method and "
            "fields, only prune_tokens and prune_pieces may differ"
        )


def rewind(model: nn.Module, run: Path, batches: Iterable[Batch]) -> tuple[int, int]:
    """Drop prompts of a newly tuned model by what a finished run of the same method has learnt.

    The run's values are put into the model, masks are set by their importance, and all else gets
    its initial values back.

    Args:
        model: Model tuned with `E2VPT`, with its initial values, on its device.
        run: Output folder of the run, or folder of its adapter.
        batches: Loader of the training images.

    Returns:
        Numbers of tokens and of pieces that were pruned.

    Raises:
        ValueError: If the run's tensors do not fit the model.
    """
    tuned: Any = model
    _, tensors = read_adapter(adapter_folder(run))
    own = {**dict(tuned.named_parameters()), **tuned.added_tensors()}
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"--rewind {run}: its {name} does not fit this model and its classes")
    initial = {name: own[name].detach().clone() for name in tensors}
    method = tuned.tune_record.method
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        device = blocks_of(tuned)[0].attn.proj.weight.device
        found = prune(tuned, _pairs(batches, device), method.prune_tokens, method.prune_pieces)
        for name, values in initial.items():
            if not name.endswith("_mask"):
                own[name].copy_(values)
    return found


def _pairs(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        if len(batch.labels):
            yield batch.images.to(device), batch.labels.to(device)
