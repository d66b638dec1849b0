"""`prompt_tune` and `remove_prompts`: tune a timm model in place, and undo it exactly."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vpt_fast.checks import check_model
from vpt_fast.methods import VAPT, Method, VPTDeep, VPTShallow, check_method
from vpt_fast.methods.baselines import AdapterTuning, Baseline, MLPHead
from vpt_fast.models.all_or_nothing import all_or_nothing
from vpt_fast.models.family import Family, family_of
from vpt_fast.models.fold import unfold_backbone
from vpt_fast.models.graphs.block_graphs import BlockGraphs
from vpt_fast.models.sharing import check_latest, check_own_blocks, remember
from vpt_fast.models.tuned import TuneRecord, blocks_of, is_tuned, take_out
from vpt_fast.modules.baseline_layers import BottleneckAdapter, new_classifier, new_hidden_layers
from vpt_fast.modules.prompt_tokens import PromptTokens, init_bound, new_projection, new_tokens
from vpt_fast.ops.memory_modes import check_memory_mode

Model = TypeVar("Model", bound=nn.Module)


def _classifiers(model: Any) -> list[nn.Module]:
    classifier = model.get_classifier()
    return list(classifier) if isinstance(classifier, tuple) else [classifier]


def _head_tensors(model: Any) -> dict[str, Tensor]:
    """The classifier's parameters and buffers by their name in the model."""
    heads = {
        id(tensor)
        for head in _classifiers(model)
        for tensor in (*head.parameters(), *head.buffers())
    }
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if id(tensor) in heads}


def _in_place(model: Any, method: Method, family: Family) -> dict[str, Tensor]:
    """What `method` trains in place, by name: the classifier (its buffers too), and of the
    backbone what a baseline names."""
    tensors = _head_tensors(model)
    if isinstance(method, Baseline):
        depth = len(blocks_of(model))
        tensors |= {
            name: parameter
            for name, parameter in model.named_parameters()
            if method.trains(family.name_as_block(model, name), depth)
        }
    return tensors


def prompt_tune(
    model: Model, method: Method, memory: str = "speed", cuda_graphs: bool = False
) -> Model:
    """Freeze a timm vision transformer and give it the prompts of `method`, in place.

    The backbone's parameters stop requiring gradients and its modules stay in eval mode under
    `model.train()`; the prompts and the classifier are trained. What the model computes is the
    published formulation (Visual Prompt Tuning, arXiv 2203.12119, section 3.2; for VAPT, arXiv
    2501.18936, section 4), without its dead rows.

    Baselines train parameters of the backbone or modules of their own instead of prompts. The
    backbone stays in eval mode there too: its dropout and stochastic depth, which the papers set
    to 0, stay off even where its weights are trained.

    In a SwinTransformer blocks are counted on through all stages. Prompts have the width of their
    stage, neither position bias nor mask, and rows that live on (VPT-Shallow, an unprompted block
    after a prompted one) are averaged over the windows and pass through patch merging as four equal
    neighbours. Images never depend on their batch mates, and prompt rows are pooled with
    `pool_prompts=True` only; the published program differs in both. VAPT is published for ViT only:
    here block 0 of the first stage has static prompts, every later block experts of its own grid,
    and every stage a feature projector. Attention is fused whatever `attn.fused_attn` says, which
    timm leaves off for Swin, and its module is called with whole images in place of windows, unless
    somebody watches it or its parts: then with windows, and prompts in them.

    Weights that are trained in place are copied to host memory first, for `remove_prompts`: the
    classifier's, and with `FullTuning()` those of the whole model.

    Args:
        model: A timm `VisionTransformer` of plain `Block`s with `Attention`: ViT, DeiT, DeiT III,
            MAE, CLIP, DINOv2, SigLIP and their like; or a `SwinTransformer` (swin_*), where every
            window of an image reads the prompts.
        method: `VPTShallow(...)`, `VPTDeep(...)`, `VAPT(...)`, or a baseline: `LinearProbe()`,
            `MLPHead(...)`, `PartialTuning(...)`, `BiasTuning()`, `AdapterTuning(...)` or
            `FullTuning()`.
        memory: What is saved for backward and what is recomputed there: "speed", "balanced",
            "lean" or "minimal" save 10, 6, 3 or 1 rows of D channels per token and block (see
            `vpt_fast.ops.memory_modes`). Blocks that cannot be fused (qk-norm, SwiGLU, hooks
            inside, weights that are trained ...) save 1 in every mode but "speed". What a
            bottleneck adapter saves comes on top.
        cuda_graphs: Whether the blocks, forward and backward, are recorded as CUDA graphs when they
            first run with a shape and a mode, and replayed afterwards. Where that cannot be done
            they run as without, and a warning says why, once. On the CPU nothing changes.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is of another class, `method` is not a method, or `cuda_graphs` no bool.
        ValueError: Something in the model cannot be honoured (named by attribute and value), the
            method does not fit it, it is tuned already, or another tuned model has its blocks.
            Whatever is raised, nothing has been changed then.
    """
    method = check_method(method)
    check_memory_mode(memory)
    if not isinstance(cuda_graphs, bool):
        raise TypeError(f"cuda_graphs is {cuda_graphs!r}; use True or False")
    return apply_method(model, method, check_model(model, method), memory, cuda_graphs)


def apply_method(
    model: Model, method: Method, family: Family, memory: str = "speed", cuda_graphs: bool = False
) -> Model:
    """Do as `prompt_tune` does with a model that `check_model` has found to fit a method.

    Args:
        model, method, memory, cuda_graphs: Arguments of `prompt_tune`.
        family: What `check_model` returned.
    """
    tuned: Any = model
    check_own_blocks(tuned, blocks_of(tuned), is_tuned)
    in_place = _in_place(tuned, method, family)
    record = TuneRecord(
        method=method,
        memory=memory,
        requires_grad={name: p.requires_grad for name, p in tuned.named_parameters()},
        training={name: module.training for name, module in tuned.named_modules()},
        originals={name: host_copy(tensor) for name, tensor in in_place.items()},
        graphs=BlockGraphs() if cuda_graphs else None,
    )
    with all_or_nothing(tuned):
        _install(tuned, family, record, in_place)
    remember(tuned)
    return tuned


def _install(tuned: Any, family: Family, record: TuneRecord, in_place: Collection[str]) -> None:
    """Freeze a model but for the parameters named, and give it what the method adds."""
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(name in in_place)
    training = tuned.training
    tuned.__class__ = family.tuned
    tuned.tune_record = record
    if isinstance(record.method, Baseline):
        _add_layers(tuned, record.method)
    else:
        _add_prompts(tuned, record.method, family)
    family.install(tuned)
    tuned.train(training)


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory; of a tensor on the meta device, which has no values, one there."""
    found = tensor.detach()
    return found.clone() if found.is_meta else found.to("cpu", copy=True)


def _add_layers(model: Any, method: Baseline) -> None:
    if isinstance(method, AdapterTuning):
        for block in blocks_of(model):
            like = block.attn.qkv.weight
            width = block.attn.qkv.in_features
            block.adapter = BottleneckAdapter(width, width // method.reduction, like)
    if isinstance(method, MLPHead):
        head = model.get_classifier()
        width = head.in_features if method.hidden_dim is None else method.hidden_dim
        model.head_hidden = new_hidden_layers(
            head.in_features, width, method.num_layers - 1, head.weight
        )
        if width != head.in_features:
            _replace_head(model, new_classifier(width, head))


def _replace_head(model: Any, head: nn.Linear) -> None:
    if isinstance(model.head, nn.Linear):
        model.head = head
    else:
        model.head.fc = head


def _add_prompts(model: Any, method: VPTShallow | VPTDeep | VAPT, family: Family) -> None:
    blocks = blocks_of(model)
    prompted = method.prompted_blocks(len(blocks))
    if not prompted:
        return
    like = blocks[0].attn.qkv.weight
    patch_size, project_dim = model.patch_embed.patch_size, method.project_dim
    shared = isinstance(method, VPTDeep) and method.shared
    first = blocks[prompted[0]].attn.qkv.in_features
    if project_dim is not None:
        model.prompt_projection = new_projection(project_dim, first, like)
    if shared:
        width = first if project_dim is None else project_dim
        bound = init_bound(patch_size, width)
        model.prompt_tokens = new_tokens(method.num_prompts, width, bound, like)
    owner = model if shared or project_dim is not None else None
    if isinstance(method, VAPT):
        family.add_experts(model, method, prompted[1:])
        prompted = prompted[:1]
    for index in prompted:
        block = blocks[index]
        width = block.attn.qkv.in_features if project_dim is None else project_dim
        bound = init_bound(patch_size, width)
        tokens = None if shared else new_tokens(method.num_prompts, width, bound, like)
        block.prompt = PromptTokens(tokens, method.dropout, owner)


def remove_prompts(model: Model) -> Model:
    """Undo `prompt_tune`: the classes, weights, flags and modes from before, bit for bit.

    What was trained in place is put back too, the classifier unless it has been replaced by one of
    another shape.
    Parameters that were added to the model since keep their flags. Of a model that was tuned on the
    meta device there are no values from before: what it was filled with since stays.

    Returns:
        `model` itself.

    Raises:
        ValueError: `model` is not tuned, or a model that was tuned after it has some of its
            parameters or its blocks. Whatever is raised, it is tuned as before.
    """
    family = family_of(model)
    if not is_tuned(model) or family is None:
        raise ValueError(f"this {type(model).__name__} has no prompts to remove")
    tuned: Any = model
    check_own_blocks(tuned, blocks_of(tuned), is_tuned)
    check_latest(tuned, is_tuned)
    with all_or_nothing(tuned):
        _uninstall(tuned, family, tuned.tune_record)
    return tuned


def _uninstall(tuned: Any, family: Family, record: TuneRecord) -> None:
    unfold_backbone(tuned)
    hidden, head = tuned._modules.get("head_hidden"), tuned.get_classifier()
    if hidden is not None and isinstance(head, nn.Linear):
        width = hidden[0].in_features
        if head.in_features != width:
            _replace_head(tuned, new_classifier(width, head))
    take_out(tuned, family.plain_parts)
    del tuned.tune_record
    tuned.__class__ = family.plain
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(record.requires_grad.get(name, parameter.requires_grad))
    for name, module in tuned.named_modules():
        module.training = record.training.get(name, module.training)
    with torch.no_grad():
        for name, tensor in tuned.state_dict().items():
            before = record.originals.get(name)
            if before is not None and before.shape == tensor.shape and not before.is_meta:
                tensor.copy_(before)


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return name and parameter of everything that requires a gradient, in the model's order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many scalars are trained, and how many the model's parameters have in all."""
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for _, p in trainable_parameters(model)), total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many scalars are trained, how many there are, and the share in percent."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,} | all params: {total:,} | trainable: {share:.4f}%")
