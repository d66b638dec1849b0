"""Initial values of prompts from data, and what methods add to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.models.attention_inputs import weights_of
from vpt_fast.models.family import family_of
from vpt_fast.models.tuned import SHARED, UPDATE, blocks_of, is_tuned
from vpt_fast.modules.block_info import FrozenWeights
from vpt_fast.modules.prompt_module import PromptModule
from vpt_fast.ops.frozen import versions_of


def initialise(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set initial values of prompts from images, before training: `PromptModule.initialise`.

    The images pass through the frozen model without prompts, block by block. The inputs of one
    block are in memory at a time, for all images (ViT-B/16, fp32: 0.6 MB an image). Adapters record
    the number of images.

    Args:
        model: Model that `prompt_tune` tuned, with a method whose modules have an `initialise`; for
            any other nothing is done.
        batches: Images (B, channels, height, width), as the model takes them; each batch is moved
            to its device and dtype.

    Returns:
        The number of images that were used.

    Raises:
        TypeError: If a batch is no tensor.
        ValueError: If `model` is not tuned or is folded, there is no image and the method needs
            some, or its `initialise` replaces tensors, changes frozen weights or sets values that
            are not finite.
    """
    family = family_of(model)
    if not is_tuned(model) or family is None:
        raise ValueError(f"this {type(model).__name__} is not tuned; call prompt_tune first")
    if not initialises(model):
        return 0
    tuned: Any = model
    if tuned.tune_record.fold is not None:
        raise ValueError("initialise the prompts before fold_backbone: it changes the weights")
    if isinstance(batches, Tensor):
        batches = [batches]
    blocks, like = blocks_of(tuned), blocks_of(tuned)[0].attn.proj.weight
    with torch.no_grad():
        images = []
        for batch in batches:
            if not isinstance(batch, Tensor):
                raise TypeError(
                    f"batches hold a {type(batch).__name__}; give tensors of images, without labels"
                )
            images.append(batch.to(like.device, like.dtype))
        count = sum(map(len, images))
        if not count:
            raise ValueError(f"{tuned.tune_record.method} is initialised from images: give some")
        for block, inputs in zip(blocks, family.plain_inputs(tuned, images), strict=True):
            prompt = block._modules.get("prompt")
            if prompt is not None:
                _initialise(prompt, block, torch.cat(inputs))
    tuned.tune_record.initialised = {"images": count}
    return count


def _initialise(prompt: PromptModule, block: Any, inputs: Tensor) -> None:
    """Call a module's `initialise`, and check what it did."""
    where = f"{type(prompt).__name__}.initialise"
    own = {id(part) for part in prompt.modules()}
    parts = [part for part in block.modules() if id(part) not in own]
    frozen = [t for part in parts for t in (*part._parameters.values(), *part._buffers.values())]
    frozen = [t for t in frozen if t is not None and not t.is_inference()]
    before, versions = dict(_tensors_of(prompt)), versions_of(frozen)
    shapes = {name: tensor.shape for name, tensor in before.items()}
    prompt.initialise(inputs, _frozen_weights(block))
    if versions_of(frozen) != versions:
        raise ValueError(f"{where} changed frozen weights of the model; create it again")
    after = dict(_tensors_of(prompt))
    for name in before.keys() | after.keys():
        now = after.get(name)
        if now is not before.get(name) or now is None or now.shape != shapes[name]:
            raise ValueError(
                f"{where} replaced {name}; write into the tensor, as self.{name}.copy_(...)"
            )
        if now.is_floating_point() and not bool(now.isfinite().all()):
            raise ValueError(f"{where} set values of {name} that are not finite")


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def initialises(model: Any) -> bool:
    """Return whether the method of a tuned model is initialised from images."""
    return any(m.initialises for m in model.modules() if isinstance(m, PromptModule))


def _frozen_weights(block: Any) -> FrozenWeights:
    q, k, v = weights_of(block.attn)
    return FrozenWeights(block.norm1, q, k, v, (block.attn.proj.weight, block.attn.proj.bias))


def regularisation(model: nn.Module) -> Tensor:
    """Return the sum of what the modules of a method add to the loss, a scalar; 0 if nothing.

    The training loop of this package adds it to the loss; own loops do so themselves.

    Args:
        model: Model that `prompt_tune` tuned.

    Raises:
        ValueError: If a module returns more than one number.
    """
    found = []
    for module in _regularised(model):
        term = module.regulariser()
        if term is not None:
            term = torch.as_tensor(term)
            if term.numel() != 1:
                raise ValueError(
                    f"regulariser of {type(module).__name__} returned a tensor of shape "
                    f"{tuple(term.shape)}; return a scalar"
                )
            found.append(term.reshape(()))
    return torch.stack(found).sum() if found else next(model.parameters()).new_zeros(())


def regularises(model: nn.Module) -> bool:
    """Return whether a method adds something to the loss."""
    return any(
        getattr(type(module), "regulariser", None) is not PromptModule.regulariser
        for module in _regularised(model)
    )


def _regularised(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for part in map(module._modules.get, (SHARED, UPDATE)):
            if hasattr(part, "regulariser"):
                yield part
        if isinstance(module, PromptModule):
            yield module
