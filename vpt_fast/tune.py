"""`prompt_tune` and `remove_prompts`: tune a timm model in place, and undo it exactly."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vpt_fast.checks import check_model
from vpt_fast.methods import Method, check_method
from vpt_fast.methods.baselines import AdapterTuning, Baseline, MLPHead
from vpt_fast.models.add_prompts import add_prompts
from vpt_fast.models.changes.all_or_nothing import all_or_nothing
from vpt_fast.models.changes.sharing import check_latest, check_own_blocks, remember
from vpt_fast.models.changes.taken import take_out
from vpt_fast.models.family import Family, family_of
from vpt_fast.models.fold import unfold_backbone
from vpt_fast.models.graphs.block_graphs import BlockGraphs
from vpt_fast.models.interop.wrappers import inner_model, unwrapped
from vpt_fast.models.tuned import TuneRecord, blocks_of, is_tuned
from vpt_fast.modules.baseline_layers import BottleneckAdapter, new_classifier, new_hidden_layers
from vpt_fast.ops.memory_modes import check_memory_mode

Model = TypeVar("Model", bound=nn.Module)


def classifiers_of(model: Any) -> list[nn.Module]:
    """Return the classifiers of a timm model: one, or two of a distilled model."""
    classifier = model.get_classifier()
    return list(classifier) if isinstance(classifier, tuple) else [classifier]


def trained_in_place(model: Any, method: Method, family: Family) -> dict[str, Tensor]:
    """Return what `method` trains in place, by name: the classifiers with their buffers, and what
    a baseline trains of the backbone."""
    heads = {
        id(tensor)
        for head in classifiers_of(model)
        for tensor in (*head.parameters(), *head.buffers())
    }
    depth = len(blocks_of(model))
    found = {name: buffer for name, buffer in model.named_buffers() if id(buffer) in heads}
    for name, parameter in model.named_parameters():
        own = isinstance(method, Baseline) and method.trains(
            family.name_as_block(model, name), depth
        )
        if own or id(parameter) in heads:
            found[name] = parameter
    return found


def prompt_tune(
    model: Model, method: Method, memory: str = "speed", cuda_graphs: bool = False
) -> Model:
    """Freeze a timm vision transformer and give it the prompts of `method`, in place.

    The prompts and the classifier are trained. The backbone's parameters require no gradients and
    its modules stay in eval mode under `model.train()`. The model computes the published
    formulation (Visual Prompt Tuning, arXiv 2203.12119, section 3.2; VAPT, arXiv 2501.18936,
    section 4), except for rows that are never read.

    Baselines train parameters of the backbone or modules of their own instead of prompts. There too
    the backbone stays in eval mode: its dropout and stochastic depth, which the papers set to 0,
    are off even where its weights are trained.

    The blocks of a SwinTransformer are numbered through all stages. Prompts have the width of their
    stage, no position bias and no mask. Live rows (VPT-Shallow, an unprompted block after a
    prompted one) are averaged over the windows and pass through patch merging as four equal
    neighbours. Images never depend on their batch mates, and prompt rows are pooled only with
    `pool_prompts=True`; the published program differs in both. VAPT is published for ViT only: here
    block 0 of the first stage has static prompts, each later block has experts for its own grid,
    and each stage has a feature projector. Attention is fused even where `attn.fused_attn` is
    False, timm's default for Swin. The attention module is called with whole images; with windows,
    prompts included, only where it or one of its parts carries a hook.

    Weights that are trained in place are first copied to host memory for `remove_prompts`: those of
    the classifier, and with `FullTuning()` those of the whole model.

    Args:
        model: Timm `VisionTransformer` of plain `Block`s with `Attention` (ViT, DeiT, DeiT III,
            MAE, CLIP, DINOv2, SigLIP and others), an `Eva` (DINOv3, EVA02, Perception Encoder and
            others with rotary position embedding, which does not rotate prompts), or a
            `SwinTransformer` (swin_*), where every window of an image reads the prompts.
        method: `VPTShallow(...)`, `VPTDeep(...)`, `VAPT(...)`, or a baseline: `LinearProbe()`,
            `MLPHead(...)`, `PartialTuning(...)`, `BiasTuning()`, `AdapterTuning(...)` or
            `FullTuning()`.
        memory: Memory mode, which decides what is saved for backward and what is recomputed:
            "speed", "balanced", "lean" or "minimal" save 10, 6, 3 or 1 rows of D channels per token
            and block (see `vpt_fast.ops.memory_modes`); a gated MLP (SwiGLU) saves both halves of
            its hidden layer in "speed". Blocks that cannot be fused (qk-norm, hooks inside, trained
            weights ...) save 1 in every mode but "speed". Bottleneck adapters save more on top.
        cuda_graphs: Whether to record the blocks, forward and backward, as CUDA graphs when they
            first run with a shape and a mode, and to replay these later. Where that is not possible
            the blocks run without graphs, after one warning with the reason. Without effect on the
            CPU.

    Returns:
        `model` itself.

    Raises:
        TypeError: If `model` is of another class, `method` is not a method, or `cuda_graphs` is no
            bool.
        ValueError: If something in the model cannot be honoured (named by attribute and value), the
            method does not fit it, it is tuned already, or it shares blocks with another tuned
            model. `model` is unchanged after any error.
    """
    method = check_method(method)
    check_memory_mode(memory)
    if not isinstance(cuda_graphs, bool):
        raise TypeError(f"cuda_graphs is {cuda_graphs!r}; use True or False")
    inner = inner_model(model, changes=True)
    apply_method(inner, method, check_model(inner, method), memory, cuda_graphs)
    remember(inner)
    return model


def apply_method(
    model: Model, method: Method, family: Family, memory: str = "speed", cuda_graphs: bool = False
) -> Model:
    """Tune a model that `check_model` has accepted; see `prompt_tune`.

    Args:
        model: Plain model.
        method: Method that fits it.
        family: Record that `check_model` returned.
        memory: Memory mode.
        cuda_graphs: Whether to record the blocks as CUDA graphs.
    """
    tuned: Any = model
    check_own_blocks(tuned, blocks_of(tuned), is_tuned)
    in_place = trained_in_place(tuned, method, family)
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
    return tuned


def _install(tuned: Any, family: Family, record: TuneRecord, in_place: Collection[str]) -> None:
    """Freeze a model except for the parameters in `in_place`, and add the method's modules."""
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(name in in_place)
    training = tuned.training
    tuned.__class__ = family.tuned
    tuned.tune_record = record
    if isinstance(record.method, Baseline):
        _add_layers(tuned, record.method)
    else:
        add_prompts(tuned, record.method, family)
    family.install(tuned)
    tuned.train(training)


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy in host memory; of a tensor on the meta device, a copy on the meta device."""
    found = tensor.detach()
    return found.clone() if found.is_meta else found.to("cpu", copy=True)


def _add_layers(model: Any, method: Baseline) -> None:
    if isinstance(method, AdapterTuning):
        for block in blocks_of(model):
            like = block.attn.proj.weight
            width = block.attn.proj.out_features
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


def remove_prompts(model: Model) -> Model:
    """Undo `prompt_tune`: restore classes, weights, requires_grad flags and modes, bit for bit.

    Weights that were trained in place are restored too, except for a classifier that was replaced
    by one of another shape. Parameters that were added to the model since keep their flags. A model
    that was tuned on the meta device keeps the values that it has been given since.

    Args:
        model: Tuned model.

    Returns:
        `model` itself.

    Raises:
        ValueError: If `model` is not tuned, or shares parameters or blocks with a model that was
            tuned after it. `model` stays tuned then.
    """
    tuned: Any = inner_model(model, changes=True)
    family = family_of(tuned)
    if not is_tuned(tuned) or family is None:
        raise ValueError(f"this {type(tuned).__name__} has no prompts to remove")
    check_own_blocks(tuned, blocks_of(tuned), is_tuned)
    check_latest(tuned, is_tuned)
    undo_method(tuned, family)
    return model


def undo_method(tuned: Any, family: Family) -> None:
    """Undo `apply_method`, and drop other adapters.

    Args:
        tuned: Tuned model.
        family: Record of its class.
    """
    with all_or_nothing(tuned):
        _uninstall(tuned, family)


def _uninstall(tuned: Any, family: Family) -> None:
    unfold_backbone(tuned)
    if "tune_adapters" in vars(tuned):
        tuned.tune_adapters.keep_first(tuned)
    record: TuneRecord = tuned.tune_record
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
    """Return names and parameters of all that requires a gradient, in the model's order.

    Names are the timm model's, inside a wrapper too.
    """
    named = unwrapped(model).named_parameters()
    return [(name, p) for name, p in named if p.requires_grad]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of trained scalars and of all scalars in the model's parameters."""
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for _, p in trainable_parameters(model)), total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the number of trained scalars, of all scalars, and the share in percent."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,} | all params: {total:,} | trainable: {share:.4f}%")
