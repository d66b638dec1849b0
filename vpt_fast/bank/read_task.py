"""From an adapter's files to the tensors of a bank's task, with all checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from timm.data import resolve_model_data_config
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor
from torch.nn.functional import linear

from vpt_fast.adapter.architecture import describe
from vpt_fast.adapter.checks import check_backbone
from vpt_fast.adapter.files import TENSORS_FILE, read_adapter
from vpt_fast.adapter.fingerprint import fingerprint
from vpt_fast.adapter.tensors import check_tensors, expected_tensors
from vpt_fast.bank.task_experts import ExpertTensors, TaskExperts
from vpt_fast.bank.task_modules import TaskModules, read_modules
from vpt_fast.checks import check_model
from vpt_fast.methods import (
    VAPT,
    Method,
    PromptMethod,
    VPTDeep,
    VPTShallow,
    from_dict,
    prompted_blocks,
)
from vpt_fast.methods.baselines import LinearProbe
from vpt_fast.models.isotropic.attention import all_keys_values
from vpt_fast.ops.backend import statistics_dtype
from vpt_fast.ops.experts.operator import fold_convolution


@dataclass(frozen=True)
class BankTask:
    """Task of a bank.

    Attributes:
        name: Name under which it was added.
        directory: Folder of its adapter.
        method: Method that it was tuned with.
        num_classes: Number of outputs of its head.
        class_names: Names of the classes, or None.
        inputs: How images are prepared for it: input_size (channels, height, width), mean, std,
            interpolation, crop_pct, crop_mode.
        nbytes: Bytes of device memory that it takes while it is in memory, head included.
        digest: SHA-256 of the adapter's tensors.
        multi_label: Whether an image may have several of the classes (sigmoid, not softmax).
    """

    name: str
    directory: Path
    method: Method
    num_classes: int
    class_names: tuple[str, ...] | None
    inputs: Mapping[str, Any]
    nbytes: int
    digest: str
    multi_label: bool = False


class TaskTensors(NamedTuple):
    """Tensors of a task in a bank, in the dtype of the model except for the experts."""

    blocks: Mapping[int, tuple[int, int]]  # first row and number of rows in prompt_kv, by block
    prompt_kv: Tensor  # (rows, 2, H, d), cached prompt keys and values, block by block
    head_weight: Tensor  # (classes, F)
    head_bias: Tensor  # (classes,)
    experts: TaskExperts | TaskModules | None


_Static = tuple[Tensor | None, Tensor | None]
"""Prompts (p, D) and keys and values (1, n, 2, H, d) of a block; one of them may be None."""


class Backbone:
    """Plain timm vision transformer, and what adapters are checked against.

    Args:
        model: VisionTransformer, VisionTransformerDistilled or Eva, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.depth, self.width = len(model.blocks), int(model.embed_dim)
        self.like: Tensor = model.blocks[0].attn.proj.weight
        self.heads = ("head", "head_dist") if _is_distilled(model) else ("head",)
        own = tuple(f"{head}." for head in self.heads)  # never used: every task has its own
        weights = {k: w for k, w in model.state_dict().items() if not k.startswith(own)}
        self.weights = fingerprint(weights)
        pool = {"global_pool": model.global_pool}
        self.dimensions = {"width": self.width, "depth": self.depth, "args": pool}
        self.architecture = describe(model)
        self.inputs: dict[str, Any] = resolve_model_data_config(model)
        self._added: dict[Method, dict[str, Tensor]] = {}

    @property
    def head_width(self) -> int:
        """Number F of features that a task's head reads; two heads' for a distilled model."""
        return self.width * len(self.heads)

    def added_tensors(self, method: Method) -> Mapping[str, Tensor]:
        """Return what a method adds to the model, by name, without values; made once a method.

        Raises:
            ValueError: If the method does not fit the model.
        """
        if method not in self._added:
            trained = expected_tensors(self.model, method, check_model(self.model, method))
            own = dict(self.model.named_parameters())
            self._added[method] = {k: t for k, t in trained.items() if k not in own}
        return self._added[method]


def _is_distilled(model: Any) -> bool:
    return isinstance(model, VisionTransformerDistilled)


def read_task(backbone: Backbone, name: str, directory: Path) -> tuple[BankTask, TaskTensors]:
    """Read and check an adapter, and compute what does not depend on the image.

    Args:
        backbone: Backbone that the adapter has to fit.
        name: Name of the task.
        directory: Folder of the adapter.

    Returns:
        The task, and its tensors on the model's device.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If it is damaged, of another backbone, or of a method that no bank holds.
    """
    config, tensors = read_adapter(directory)
    method = from_dict(config["method"])
    _check_method(method, backbone, directory)
    weights = {key: value for key, value in backbone.weights.items() if key not in tensors}
    check_backbone(backbone.dimensions, weights, backbone.architecture, config, directory)
    classes = _classes(tensors, directory)
    _check_tensors(backbone, method, classes, tensors, directory)
    inputs = _inputs(backbone, config["input"], directory)
    tensors = {key: t.to(backbone.like.device) for key, t in tensors.items()}
    with torch.autocast(backbone.like.device.type, enabled=False):
        static, experts = _prompts(backbone, method, tensors, directory)
        blocks, prompt_kv = _cached_prompt_kv(backbone, static)
        weight, bias = _head(backbone, tensors)
        found = TaskTensors(blocks, prompt_kv, weight, bias, experts)
    every = [prompt_kv, weight, bias, *(() if found.experts is None else found.experts.tensors)]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in every):
        _refuse(directory, f"in {backbone.like.dtype} not all of its values are finite")
    names = config["class_names"]
    if names is not None and len(names) != classes:
        raise ValueError(
            f"the adapter in {directory} is damaged: it names {len(names)} of {classes} classes"
        )
    task = BankTask(
        name, directory, method, classes, None if names is None else tuple(map(str, names)),
        inputs, sum(tensor.nbytes for tensor in every), config["tensors_sha256"],
        config.get("multi_label", False),
    )  # fmt: skip
    return task, found


def _inputs(backbone: Backbone, given: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    """Return the input configuration: the adapter's, completed by the model's."""
    inputs = {**backbone.inputs, **given}
    channels, *size = inputs["input_size"]
    model, side = backbone.model, tuple(backbone.model.patch_embed.img_size)
    if channels != model.in_chans:
        _refuse(directory, f"its images have {channels} channels, the model's {model.in_chans}")
    if tuple(size) != side and not model.dynamic_img_size:
        _refuse(directory, f"its images are {tuple(size)} pixels, the model takes {side}")
    return MappingProxyType(inputs)


def _refuse(directory: Path, why: str) -> NoReturn:
    raise ValueError(f"a bank cannot hold the adapter in {directory}: {why}")


def _check_method(method: Method, backbone: Backbone, directory: Path) -> None:
    depth = backbone.depth
    if type(method) is VPTShallow and method.num_prompts:
        _refuse(
            directory,
            "it was tuned with VPTShallow, whose prompt rows pass through the blocks as tokens, so "
            "that no keys and values of them can be computed once; tune with VPTDeep or VAPT",
        )
    if not isinstance(method, (PromptMethod, LinearProbe)):
        _refuse(
            directory,
            f"it was tuned with {type(method).__name__}, which changes the backbone or adds layers "
            "to it; all tasks of a bank share one backbone, use VPTDeep, VAPT or LinearProbe",
        )
    blocks = prompted_blocks(method, depth)
    if blocks and blocks != tuple(range(blocks[0], depth)):
        _refuse(
            directory,
            f"its prompts are in blocks {list(blocks)} of {depth}, and their rows live on as "
            "tokens in the blocks between or after them; tune the last blocks, or all",
        )
    if blocks and getattr(method, "pool_prompts", False):
        _refuse(
            directory,
            "pool_prompts=True, so that its prompt rows live on as tokens; tune with "
            "pool_prompts=False",
        )


def _classes(tensors: Mapping[str, Tensor], directory: Path) -> int:
    weight = tensors.get("head.weight")
    if weight is None or weight.ndim != 2 or not len(weight):
        _refuse(directory, f"{TENSORS_FILE} has no matrix head.weight with a row for each class")
    return len(weight)


def _check_tensors(
    backbone: Backbone,
    method: Method,
    classes: int,
    tensors: Mapping[str, Tensor],
    directory: Path,
) -> None:
    """Raise ValueError unless an adapter holds a head and what its method adds, nothing else."""
    like = backbone.like.new_empty(0, device="meta")
    weights = {f"{head}.weight": like.new_empty(classes, backbone.width) for head in backbone.heads}
    biases = {f"{head}.bias": like.new_empty(classes) for head in backbone.heads}
    try:
        added = backbone.added_tensors(method)
    except ValueError as error:
        _refuse(directory, str(error))
    needed = {**weights, **added}
    check_tensors(tensors, needed | biases, needed, directory / TENSORS_FILE)


def _prompts(
    backbone: Backbone, method: Method, tensors: Mapping[str, Tensor], directory: Path
) -> tuple[dict[int, _Static], TaskExperts | TaskModules | None]:
    """Return the static prompts of blocks, by index, and what makes those of the others."""
    if not isinstance(method, PromptMethod):
        return {}, None
    if type(method) in (VPTShallow, VPTDeep, VAPT):
        # Their modules are not needed, and without them a task is read a fifth faster.
        experts = _experts(backbone, method, tensors) if isinstance(method, VAPT) else None
        blocks = method.prompted_blocks(backbone.depth)[: 1 if isinstance(method, VAPT) else None]
        return {index: (_tokens(backbone, index, tensors), None) for index in blocks}, experts
    modules, shared = read_modules(backbone.model, method, tensors)
    if any(module.attends_apart for module in modules.values()):
        _refuse(
            directory,
            f"with method {method.name!r} tokens attend to the prompts apart, before the block; in "
            "a bank prompts are read beside the tokens",
        )
    static = {index: module.static() for index, module in modules.items() if module.is_static}
    others = {index: module for index, module in modules.items() if not module.is_static}
    return static, TaskModules(others, shared) if others else None


def _cached_prompt_kv(
    backbone: Backbone, static: Mapping[int, _Static]
) -> tuple[dict[int, tuple[int, int]], Tensor]:
    """Return keys and values of prompts that do not depend on the image, and each block's rows."""
    first = backbone.model.blocks[0].attn
    found, spans, rows = [backbone.like.new_empty(0, 2, first.num_heads, first.head_dim)], {}, 0
    for index, (tokens, kv) in static.items():
        tokens = None if tokens is None else tokens.unsqueeze(0)
        own = all_keys_values(backbone.model.blocks[index], tokens, kv, backbone.like.dtype)[0]
        spans[index] = rows, len(own)
        rows += len(own)
        found.append(own)
    return spans, torch.cat(found)


def _tokens(backbone: Backbone, index: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return VPT's prompts (p, D) of a block."""
    own = f"blocks.{index}.prompt.tokens"
    tokens = tensors["prompt_tokens" if own not in tensors else own].to(backbone.like.dtype)
    if "prompt_projection.weight" not in tensors:
        return tokens
    weight, bias = (tensors[f"prompt_projection.{k}"] for k in ("weight", "bias"))
    return linear(tokens, weight.to(tokens), bias.to(tokens))


def _head(backbone: Backbone, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the head; two averaged heads become one over both features side by side."""
    number = len(backbone.heads)
    weight = torch.cat([tensors[f"{head}.weight"] for head in backbone.heads], 1) / number
    biases = [tensors[f"{h}.bias"] for h in backbone.heads if f"{h}.bias" in tensors]
    bias = sum(biases, weight.new_zeros(len(weight))) / number
    return weight.to(backbone.like.dtype), bias.to(backbone.like.dtype)


def _experts(backbone: Backbone, method: VAPT, tensors: Mapping[str, Tensor]) -> TaskExperts | None:
    blocks = method.prompted_blocks(backbone.depth)[1:]
    if not blocks:
        return None
    dtype = backbone.like.dtype
    wide = statistics_dtype(dtype)
    height, width = backbone.model.patch_embed.grid_size
    found = []
    for index in blocks:
        part = f"blocks.{index}.prompt"
        # As in the tuned model: rounded to its dtype, then computed in fp32 at least.
        mix, conv = (tensors[f"{part}.{n}.weight"].to(dtype) for n in ("mix", "conv"))
        matrix, mixing_sum = fold_convolution(mix, conv, (height, width))
        bias = tensors.get(f"{part}.mix.bias", mixing_sum.new_zeros(len(mixing_sum)))
        affine = (tensors[f"{part}.norm.{k}"] for k in ("weight", "bias"))
        weight, norm_bias, bias = (t.to(dtype).to(wide) for t in (*affine, bias))
        found.append((matrix[:, : height * width], mixing_sum, weight, norm_bias, bias))
    blocks_tensors = (torch.stack(parts) for parts in zip(*found, strict=True))
    projector = (
        tensors[f"prompt_projector.{n}.weight"].to(dtype).to(wide)[None] for n in ("down", "up")
    )
    every = ExpertTensors(*blocks_tensors, *projector)
    return TaskExperts(every, (height, width), method.variant == "code")
