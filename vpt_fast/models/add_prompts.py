"""Add the modules of a prompt method to the blocks of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vpt_fast.methods import VAPT, PromptMethod, modules_of, prompted_blocks
from vpt_fast.models.family import Family
from vpt_fast.models.interop.quantised import form_of
from vpt_fast.models.tuned import SHARED, blocks_of
from vpt_fast.modules.block_info import BlockInfo
from vpt_fast.modules.check_module import (
    check_feature,
    check_made,
    check_names,
    check_tensors,
    made_by,
)
from vpt_fast.modules.experts import PromptExperts
from vpt_fast.modules.prompt_module import PromptModule
from vpt_fast.modules.prompt_tokens import PromptTokens

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
            like=form_of(block.attn.proj.weight),
            owner=owner,
            model=model,
        )
        for index, (block, (owner, grid)) in enumerate(places)
    ]


def add_prompts(model: Any, method: PromptMethod, family: Family) -> None:
    """Give the blocks of a model their modules; see `new_prompts`.

    Raises:
        ValueError: The method needs blocks of one width, and the model has stages; or it combines
            what cannot be.
    """
    blocks, infos = blocks_of(model), block_infos(model, family)
    prompts, updates = new_prompts(infos, method), new_updates(infos, method)
    for index, module in prompts.items():
        blocks[index].prompt = module
        if family.in_stages and module.attends_apart:
            _refuse_stages(model, method)
        if updates and (module.num_keys or module.attends_apart):
            raise ValueError(
                f"method {method.name!r} updates prompt rows that live on, and its module of block "
                f"{index} has keys and values of its own, or attends apart; return rows alone"
            )
    for index, update in updates.items():
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
    new_update, prompted = modules_of(method).update, prompted_blocks(method, len(infos))
    if new_update is None or not prompted:
        return {}
    found = {}
    for info in infos[prompted[0] : -1]:
        if info.index + 1 not in prompted:
            with _drawing(info):
                made = made_by(new_update, method, info)
            _check_module(made, f"update of method {method.name!r}")
            found[info.index] = _converted(made, info.like, {})
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
    found: dict[int, PromptModule] = {}
    known: dict[int, tuple[Tensor, Tensor]] = {}
    prompted = [infos[index] for index in prompted_blocks(method, len(infos))]
    if isinstance(method, VAPT):
        # Experts draw their initial values first, so that a seed gives those of version 0.1.0.
        prompted = [*prompted[1:], *prompted[:1]]
    last = {id(info.owner): info for info in sorted(prompted, key=lambda info: info.index)}
    for info in prompted:
        if id(info.owner) in last:
            _add_shared(method, last.pop(id(info.owner)), known)
        with _drawing(info):
            module = made_by(modules_of(method).block, method, info)
        if not isinstance(module, PromptModule):
            raise TypeError(
                f"method {method.name!r} made a {type(module).__name__} for block {info.index}; "
                "derive it from vpt_fast.PromptModule"
            )
        if type(module) not in (PromptTokens, PromptExperts):
            _complete(module, method, info, known)
            if not module.num_rows + module.num_keys:
                if method.num_prompts:
                    raise ValueError(
                        f"{type(module).__name__} of method {method.name!r}, block {info.index}: "
                        "forward made no prompts"
                    )
                continue  # as asked
        found[info.index] = module
    return found


@contextlib.contextmanager
def _drawing(info: BlockInfo) -> Iterator[None]:
    """Return a context in which modules are made on a block's device.

    For the meta device they are made on the CPU: constructors may compute with values.
    """
    if info.like.is_meta:
        with torch.random.fork_rng([]), torch.device("cpu"):
            yield
    else:
        with torch.device(info.like.device):
            yield


def _check_module(module: Any, what: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{what} made a {type(module).__name__}; a torch.nn.Module is needed")


def _add_shared(
    method: PromptMethod, info: BlockInfo, known: dict[int, tuple[Tensor, Tensor]]
) -> None:
    new_shared = modules_of(method).shared
    if new_shared is not None:
        with _drawing(info):
            shared = made_by(new_shared, method, info)
        if shared is not None or isinstance(new_shared, type):
            # The functions of this package return None: what they add has names of its own.
            _check_module(shared, f"shared of method {method.name!r}")
            setattr(info.owner, SHARED, _converted(shared, info.like, known))


def _complete(
    module: PromptModule,
    method: PromptMethod,
    info: BlockInfo,
    known: dict[int, tuple[Tensor, Tensor]],
) -> None:
    """Give a new module its device, dtype and dropout, and try it once."""
    where = f"{type(module).__name__} of method {method.name!r}"
    check_names(module, where)
    check_tensors(module, info, where)
    _converted(module, info.like, known).eval()
    module.dropout = method.dropout
    shared: nn.Module | None = info.owner._modules.get(SHARED)
    # In a tuple, so that it does not become a submodule of every block.
    module._shared = (shared,)
    if module.reads == "feature" and shared is None:
        raise ValueError(
            f"{where} reads a feature, but no module makes one; pass shared=... to register_method"
        )
    device = info.like.device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(cuda):
        feature = None
        if module.reads == "feature" and shared is not None:
            feature = check_feature(shared.eval(), info, method.name)
        try:
            check_made(module, info, feature, method.name)
        except (RuntimeError, NotImplementedError):
            if not info.like.is_meta:
                raise
            # What depends on values cannot be tried without any.
            module.num_rows, module.num_keys = method.num_prompts, 0


def _converted(module: Made, like: Tensor, known: dict[int, tuple[Tensor, Tensor]]) -> Made:
    """Give the floating-point tensors of a new module the device and dtype of `like`.

    `nn.Module.to` does not take modules of fake tensors.

    Args:
        module: New module.
        like: Tensor with the device and dtype.
        known: Tensors that were converted before, and what they became: shared ones stay shared.

    Raises:
        ValueError: A tensor is complex, or is created when the module is first called.
    """

    def converted(tensor: Tensor) -> Tensor:
        if is_lazy(tensor) or tensor.is_complex():
            what = "is created when it is first called" if is_lazy(tensor) else "is complex"
            raise ValueError(
                f"a tensor of {type(module).__name__} {what}, which adapters cannot hold; create "
                "it in the constructor, and a complex one as two real ones"
            )
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        if (tensor.device, tensor.dtype) == (like.device, dtype):
            return tensor
        if id(tensor) not in known:
            found = tensor.detach().to(like.device, dtype)
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, tensor.requires_grad)
            known[id(tensor)] = tensor, found
        return known[id(tensor)][1]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = converted(tensor)  # type: ignore[assignment]
    return module
