"""Try a new module once, before a model is changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vpt_fast.modules.block_info import BlockInfo
from vpt_fast.modules.prompt_module import READS, PromptModule, Prompts

# A number that a module that holds for some number of images alone hardly holds for.
IMAGES = 3
_OVERRIDDEN = {
    "forward", "after_dropout", "initialise", "regulariser", "reads", "attends_apart", "extra_repr",
}  # fmt: skip
_OWN = {name for name in vars(PromptModule) if not name.startswith("__")} - _OVERRIDDEN
_SET = {"num_rows", "num_keys", "_shared"}
_ALIKE = {"initialize": "initialise", "regularizer": "regulariser"}


def made_by(maker: Callable[..., Any], method: Any, block: BlockInfo) -> Any:
    """Return what a method's class or function makes for a block.

    Raises:
        TypeError: If it does not take the settings and a `BlockInfo`.
    """
    where = f"method {method.name!r}: {getattr(maker, '__qualname__', maker)}"
    _check_takes(maker, (method, block), f"{where} is called with the settings and a BlockInfo")
    return maker(method, block)


def check_names(module: PromptModule, where: str) -> None:
    """Raise ValueError if a module uses names that the base class has for itself.

    Args:
        module: New module.
        where: Name of the module, for messages.
    """
    parts = {*module._modules, *module._parameters, *module._buffers} & {*dir(PromptModule)}
    classes = type(module).__mro__[: type(module).__mro__.index(PromptModule)]
    # Modules of this package may replace more than those of others.
    others = [cls for cls in classes if cls.__module__.split(".")[0] != __name__.split(".")[0]]
    names = {name for cls in others for name in vars(cls)}
    taken = sorted(parts | (vars(module).keys() & _OWN - _SET) | (names & _OWN))
    if taken:
        raise ValueError(f"{where}: {taken[0]!r} is a name of PromptModule's own; take another")
    for name, meant in _ALIKE.items():
        if name in names:
            raise ValueError(f"{where} has {name}, which nothing calls; the name is {meant}")


def check_tensors(module: nn.Module, block: BlockInfo, where: str) -> None:
    """Raise ValueError unless the tensors of a module are its own parameters and buffers.

    Args:
        module: New module.
        block: The block it is for.
        where: Name of the module, for messages.
    """
    frozen = {id(parameter) for parameter in block.model.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) in frozen:
            raise ValueError(f"{where}: {name} is a weight of the model, and would be trained")
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                raise ValueError(
                    f"{where}: {name} is a tensor, but no parameter and no buffer, which would not "
                    f"follow the model's device; use self.register_buffer({name!r}, ...)"
                )


def check_feature(shared: nn.Module, block: BlockInfo, method: str) -> Any:
    """Return what the shared module of a method makes of tokens (3, N, D) that are zero.

    Raises:
        TypeError: If it does not take them.
        ValueError: If it returns None, or changes its input.
    """
    x = block.like.new_zeros(IMAGES, block.num_tokens, block.width)
    where = f"shared of method {method!r}"
    feature = _called(shared, (x,), where, f"{where} is called with x (B, N, D)")
    if feature is None:
        raise ValueError(f"{where} returned None for an image")
    return feature


def check_made(module: PromptModule, block: BlockInfo, feature: Any, method: str) -> None:
    """Try a module once, in eval mode and without gradients, and set its `num_rows`, `num_keys`.

    Args:
        module: Module of a block.
        block: The block.
        feature: What the shared module returned for tokens (3, N, D), or None.
        method: Name of the method, for messages.

    Raises:
        TypeError: If it returns something else than a tensor or `Prompts`, or takes something else
            than what it reads.
        ValueError: If what it reads or a shape is wrong.
    """
    where = f"{type(module).__name__} of method {method!r}, block {block.index}"
    if module.reads not in READS:
        raise ValueError(f"{where}: reads is {module.reads!r}; use one of {', '.join(READS)}")
    x = block.like.new_zeros(IMAGES, block.num_tokens, block.width)
    inputs, what = {
        "nothing": ((), 'no argument; a forward of the block\'s input needs reads = "tokens"'),
        "tokens": ((x,), "x (B, N, D)"),
        "feature": ((feature,), "the feature"),
    }[module.reads]
    calls = f"{where}: reads is {module.reads!r}, so that forward is called with {what}"
    made = _called(module, inputs, where, calls)
    if not isinstance(made, Tensor | Prompts):
        raise TypeError(
            f"{where}: forward returned a {type(made).__name__}; return P or vpt_fast.Prompts"
        )
    rows, keys, values = (made, None, None) if isinstance(made, Tensor) else made
    if (keys is None) != (values is None):
        raise ValueError(f"{where}: keys and values are needed, or neither")
    if keys is not None and values is not None:
        for one, other, names in ((keys, values, "keys are"), (values, keys, "values are")):
            if one.shape[1:] == other.shape:
                raise ValueError(
                    f"{where}: {names} of each image and the other is not; expand one of them"
                )
    heads, width = (block.num_heads, block.head_dim), (block.width,)
    if rows is not None:
        _count(rows, width, f"{where}: rows", module, block)
        rows = module.after_dropout(rows)
        if not isinstance(rows, Tensor):
            raise TypeError(f"{where}: after_dropout returned a {type(rows).__name__}; return rows")
    count = {
        name: 0 if tensor is None else _count(tensor, last, f"{where}: {name}", module, block)
        for name, tensor, last in (
            ("rows of after_dropout", rows, width),
            ("keys", keys, heads),
            ("values", values, heads),
        )
    }
    if count["keys"] != count["values"]:
        raise ValueError(f"{where}: {count['keys']} keys, but {count['values']} values")
    module.num_rows, module.num_keys = count["rows of after_dropout"], count["keys"]


def _check_takes(function: Callable[..., Any], inputs: Sequence[Any], what: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function without one
        return
    try:
        signature.bind(*inputs)
    except TypeError as error:
        raise TypeError(f"{what}, and its arguments are {signature}: {error}") from None


def _called(module: nn.Module, inputs: Sequence[Any], where: str, what: str) -> Any:
    """Return what a module makes of tensors, which it must not change."""
    if type(module).forward is nn.Module.forward and "forward" not in vars(module):
        raise TypeError(f"{what}, and it has no forward")
    _check_takes(module.forward, inputs, what)
    tensors = [t for t in inputs if isinstance(t, Tensor) and not t.is_inference()]
    before = [tensor._version for tensor in tensors]
    made = module(*inputs)
    if [tensor._version for tensor in tensors] != before:
        raise ValueError(
            f"{where}: forward changes its input in place, which the block reads, too; compute "
            "with a copy"
        )
    return made


def _count(
    tensor: Tensor, last: tuple[int, ...], where: str, module: PromptModule, block: BlockInfo
) -> int:
    """Return the number of prompts in a tensor (p, *last) or (B, p, *last)."""
    if not tensor.is_floating_point():
        raise TypeError(f"{where} are of {tensor.dtype}; floating-point numbers are needed")
    if tensor.device != block.like.device:
        raise ValueError(
            f"{where} are on {tensor.device}, the model on {block.like.device}; compute them from "
            "parameters, buffers and what forward reads"
        )
    shape, letter = tuple(tensor.shape), "p" if len(last) == 1 else "n"
    images = tensor.ndim == len(last) + 2
    per_image = images and module.reads != "nothing" and shape[0] == IMAGES
    if shape[-len(last) :] != last or not (tensor.ndim == len(last) + 1 or per_image):
        named = ", ".join([letter, *map(str, last)])
        read = "" if module.reads == "nothing" else f" or (B, {named})"
        of = "" if module.reads == "nothing" else f" for {IMAGES} images"
        raise ValueError(f"{where} have shape {shape}{of}; ({named}){read} is needed")
    return shape[-len(last) - 1]
