"""The timm model inside a wrapper, torch.compile's, parallel training's or Hugging Face's; and
what PEFT and others put into it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from vpt_fast.models.family import family_of
from vpt_fast.models.interop.quantised import dequantised


def inner_model(model: Any, changes: bool = False) -> Any:
    """Return the timm model that a wrapper holds; any other model itself.

    The wrappers are `torch.compile`'s, `DataParallel`, `DistributedDataParallel` and transformers'
    `TimmWrapper...`. `fully_shard` changes the class of a model in place: it is the model.

    Args:
        model: Model or wrapper.
        changes: Whether parameters or classes will be changed, which some wrappers do not see.

    Raises:
        ValueError: If `changes` and the wrapper does not see them, with the way; or a module that
            is no wrapper holds such a model, with its name.
        TypeError: If `changes` and it is no module.
    """
    if changes and not isinstance(model, nn.Module):
        raise TypeError(f"the model is {model!r}; pass what timm.create_model returns")
    inner = unwrapped(model, changes)
    if changes:
        check_unwrapped(inner)
    if inner is model and family_of(model) is None and isinstance(model, nn.Module):
        for name, part in model.named_modules():
            if name and family_of(part) is not None:
                raise ValueError(
                    f"this {type(model).__name__} holds a timm model; pass its .{name}"
                )
    own = vars(inner).get("forward") if isinstance(inner, nn.Module) else None
    if own is not None and getattr(own, "__func__", None) is type(inner).forward:
        # accelerate's unwrap_model leaves the class's forward on the instance.
        del inner.forward
    return inner


def unwrapped(model: Any, changes: bool = False) -> Any:
    """Return what wrappers hold, of whatever kind; arguments as of `inner_model`."""
    while (held := _held(model)) is not None:
        if changes and isinstance(model, DistributedDataParallel):
            raise ValueError(
                "a DistributedDataParallel keeps to the parameters that it was given; pass its "
                ".module, and wrap that again"
            )
        model = held
    return model


def is_sharded(model: nn.Module) -> bool:
    """Return whether `fully_shard` has been applied to a model or to a part of it."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its shards, and of a quantised one the values.

    Every process has to ask for it.
    """
    return dequantised(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def _held(model: Any) -> nn.Module | None:
    if isinstance(model, nn.Module):
        for name in ("_orig_mod", *(("module",) if isinstance(model, _PARALLEL) else ())):
            if name in model._modules:
                return model._modules[name]
        if type(model).__name__.startswith("TimmWrapper"):
            return model._modules.get("timm_model")
    return None


_PARALLEL = (DataParallel, DistributedDataParallel)


def check_unwrapped(model: Any) -> None:
    """Raise ValueError if a model is sharded, or accelerate has replaced its forward."""
    if not isinstance(model, nn.Module) or family_of(model) is None:
        return
    if is_sharded(model):
        raise ValueError(
            f"this {type(model).__name__} is sharded by fully_shard; do this before fully_shard, "
            "or save its adapter and load that on a whole model"
        )
    if "_original_forward" in vars(model):
        raise ValueError(
            f"accelerate has replaced the forward of this {type(model).__name__}; pass "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )


def check_own_modules(model: Any, blocks: Iterable[nn.Module]) -> None:
    """Raise ValueError if a tuned model holds modules that `load_adapter` could not find again.

    Args:
        model: Tuned model. A classifier of another class is not looked at.
        blocks: Its blocks.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{name} is PEFT's {type(module).__name__}, which an adapter cannot hold: save it "
                "with PEFT, and the adapter of copy.deepcopy(peft_model).unload()"
            )
    known = model.tune_record.requires_grad.keys() | model.added_tensors().keys()
    inside = {id(p) for block in blocks for p in block.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside and name not in known:
            raise ValueError(
                f"{name} was put into a block after tuning, and an adapter cannot hold it: put the "
                "Linear from before back into a copy of the model, and save that"
            )
