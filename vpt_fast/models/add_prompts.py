"""Add the modules of a prompt method to the blocks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from vpt_fast.methods import VAPT, PromptMethod, modules_of
from vpt_fast.models.family import Family
from vpt_fast.models.tuned import SHARED, blocks_of
from vpt_fast.modules.block_info import BlockInfo
from vpt_fast.modules.prompt_module import PromptModule, check_made

Made = TypeVar("Made", bound=nn.Module)


def block_infos(model: Any, family: Family) -> list[BlockInfo]:
    """Return how the modules of prompt methods see each block of a model."""
    blocks = blocks_of(model)
    places = zip(blocks, family.places(model), strict=True)
    return [
        BlockInfo(
            index=index,
            depth=len(blocks),
            width=block.attn.proj.out_features,
            num_heads=block.attn.num_heads,
            head_dim=block.attn.proj.in_features // block.attn.num_heads,
            grid=(int(grid[0]), int(grid[1])),
            num_prefix_tokens=getattr(owner, "num_prefix_tokens", 0),
            patch_size=model.patch_embed.patch_size,
            like=block.attn.proj.weight,
            owner=owner,
            model=model,
        )
        for index, (block, (owner, grid)) in enumerate(places)
    ]


def add_prompts(model: Any, method: PromptMethod, family: Family) -> None:
    """Give the blocks of a model their modules; see `new_prompts`.

    Raises:
        ValueError: The method needs blocks of one width, and the model has stages.
    """
    blocks, infos = blocks_of(model), block_infos(model, family)
    for index, module in new_prompts(infos, method).items():
        blocks[index].prompt = module
        if family.in_stages and module.attends_apart:
            _refuse_stages(model, method)
    for index, update in new_updates(infos, method).items():
        blocks[index].prompt_update = update
        if family.in_stages:
            _refuse_stages(model, method)


def _refuse_stages(model: Any, method: PromptMethod) -> NoReturn:
    raise ValueError(
        f"method {method.name!r} needs attention of whole images, and a {type(model).__name__} has "
        "it in windows; use a timm VisionTransformer or Eva"
    )


def new_updates(infos: Sequence[BlockInfo], method: PromptMethod) -> dict[int, nn.Module]:
    """Return the module of each block that changes the prompt rows that leave it, by index.

    Prompt rows leave every block from the first prompted one to the last but one.
    """
    new_update, prompted = modules_of(method).update, method.prompted_blocks(len(infos))
    if new_update is None or not prompted:
        return {}
    found = {}
    for info in infos[prompted[0] : -1]:
        if info.index + 1 not in prompted:
            with torch.device(info.like.device):
                found[info.index] = _converted(new_update(method, info), info.like)
    return found


def new_prompts(infos: Sequence[BlockInfo], method: PromptMethod) -> dict[int, PromptModule]:
    """Return the module of each prompted block by index; what they share is added to its owner.

    Args:
        infos: All blocks of a model.
        method: Method that fits the model.

    Raises:
        TypeError: If a module is no `PromptModule`, or returns something else than prompts.
        ValueError: If prompts have a wrong shape.
    """
    found = {}
    prompted = [infos[index] for index in method.prompted_blocks(len(infos))]
    if isinstance(method, VAPT):
        # Experts draw their initial values first, so that a seed gives those of version 0.1.0.
        prompted = [*prompted[1:], *prompted[:1]]
    last = {id(info.owner): info for info in sorted(prompted, key=lambda info: info.index)}
    for info in prompted:
        if id(info.owner) in last:
            _add_shared(method, last.pop(id(info.owner)))
        with torch.device(info.like.device):
            module = modules_of(method).block(method, info)
        if not isinstance(module, PromptModule):
            raise TypeError(
                f"method {method.name!r} made a {type(module).__name__} for block {info.index}; "
                "derive it from vpt_fast.PromptModule"
            )
        if not module.num_rows:
            _complete(module, method, info)
        found[info.index] = module
    return found


def _add_shared(method: PromptMethod, info: BlockInfo) -> None:
    new_shared = modules_of(method).shared
    if new_shared is not None:
        with torch.device(info.like.device):
            shared = new_shared(method, info)
        if shared is not None:  # the methods of this package have names of their own
            setattr(info.owner, SHARED, _converted(shared, info.like))


def _complete(module: PromptModule, method: PromptMethod, info: BlockInfo) -> None:
    """Give a new module its device, dtype and dropout, and try it once."""
    _converted(module, info.like).eval()
    module.dropout = vars(module).get("dropout", method.dropout)
    shared: nn.Module | None = info.owner._modules.get(SHARED)
    # In a tuple, so that it does not become a submodule of every block.
    module._shared = (shared,)
    if module.reads == "feature" and shared is None:
        raise ValueError(
            f"{type(module).__name__} of method {method.name!r} reads a feature, but no module "
            "makes one; pass shared=... to register_method"
        )
    device = info.like.device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(cuda):
        feature = None
        if module.reads == "feature" and shared is not None:
            feature = shared.eval()(info.like.new_zeros(2, info.num_tokens, info.width))
        check_made(module, info, feature, method.name)


def _converted(module: Made, like: Tensor) -> Made:
    """Give the floating-point tensors of a new module the device and dtype of `like`.

    `nn.Module.to` does not take modules of fake tensors.
    """
    known: dict[int, Tensor] = {}

    def converted(tensor: Tensor) -> Tensor:
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        if (tensor.device, tensor.dtype) == (like.device, dtype):
            return tensor
        found = known.get(id(tensor))
        if found is None:
            found = tensor.detach().to(like.device, dtype)
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, tensor.requires_grad)
            known[id(tensor)] = found
        return found

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = converted(tensor)  # type: ignore[assignment]
    return module
