"""Tuned models of any timm class: modes, records, state dicts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypeVar

from torch import Tensor, nn

from vpt_fast.methods import Method
from vpt_fast.models.changes.sharing import remember
from vpt_fast.models.fold import FoldRecord, unfold_before_loading
from vpt_fast.models.fusion.block_reading import forget
from vpt_fast.models.graphs.block_graphs import BlockGraphs
from vpt_fast.models.interop.replaced import not_wrapped
from vpt_fast.modules.baseline_layers import BottleneckAdapter
from vpt_fast.modules.experts import FeatureProjector
from vpt_fast.modules.prompt_module import PromptModule

SHARED = "prompt_shared"
"""Name of the module that the blocks of one width share, in their model or stage."""

UPDATE = "prompt_update"
"""Name of the module of a block that changes the prompt rows that leave it."""

ADDED = ("prompt_projection", "prompt_projector", SHARED, UPDATE, "head_hidden")
"""Modules that methods add to a model or its parts, beside the parameter `prompt_tokens`."""

_KINDS = (PromptModule, FeatureProjector, BottleneckAdapter)

AnyTuned = TypeVar("AnyTuned", bound="Tuned")


@dataclass
class TuneRecord:
    """What `prompt_tune` did to a model, and what `remove_prompts` restores.

    Attributes:
        method: Method of the model.
        memory: What blocks save for backward, one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
        requires_grad: Original flags of the parameters, by name.
        training: Original modes of the modules, by name.
        originals: Copies of original weights that are trained in place (the classifier's at
            least), by name, in host memory.
        fold: What `fold_backbone` did, or None.
        graphs: CUDA graphs of the blocks; None without `cuda_graphs`. Copies start without any.
        inputs: Image preprocessing of the adapter that was loaded, if any.
        initialised: What prompts were initialised from, {"images": number}, or None.
        multi_label: Whether the adapter that was loaded answers with several labels an image.
    """

    method: Method
    memory: str
    requires_grad: dict[str, bool]
    training: dict[str, bool]
    originals: dict[str, Tensor]
    fold: FoldRecord | None = None
    graphs: BlockGraphs | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    initialised: Mapping[str, int] | None = None
    multi_label: bool = False


class Tuned(nn.Module):
    """A timm model that `prompt_tune` has been applied to; mixed into its class."""

    plain_class: ClassVar[type[nn.Module]]
    tune_record: TuneRecord
    tune_adapters: Any

    def trained_modules(self) -> list[nn.Module]:
        """Return the modules that follow `train()`: those that the method added, and the head."""
        names = ("head_drop", "head", "head_dist")
        heads = [getattr(self, name) for name in names if hasattr(self, name)]
        return heads + not_wrapped([m for m in self.named_modules() if is_added(*m)])

    def train(self: AnyTuned, mode: bool = True) -> AnyTuned:
        """Set the mode of prompts, adapters and head; the backbone stays in eval mode."""
        super().train(False)
        self.training = mode
        for module in self.trained_modules():
            module.train(mode)
        return self

    def pools_prompts(self) -> bool:
        """Return whether the pooling reads the prompt rows that leave the last block."""
        return bool(getattr(self.tune_record.method, "pool_prompts", False))

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which calls this first."""
        raise ValueError(
            "a tuned model cannot be scripted; torch.jit.trace takes vpt_fast.bake(model), and "
            "torch.export.export takes both"
        )

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refuse nn.DataParallel, which calls this first on several GPUs."""
        raise ValueError(
            "a tuned model cannot be replicated by nn.DataParallel; use DistributedDataParallel, "
            "which is faster"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, and list it as tuned."""
        super().__setstate__(state)
        remember(self)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Convert all tensors, as `to`, `half`, `cuda` and their like do."""
        self._forget()
        super()._apply(*args, **kwargs)
        if "tune_adapters" in vars(self):
            self.tune_adapters.convert(*args, **kwargs)
        return self

    def _forget(self) -> None:
        """Drop all readings of the blocks' weights."""
        for block in blocks_of(self):
            forget(block)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict, with the originals of folded weights."""
        state = super().state_dict(*args, **kwargs)
        if self.tune_record.fold is not None:
            prefix = kwargs.get("prefix", "")
            for name, original in self.tune_record.fold.originals.items():
                key = f"{prefix}{name}"
                state[key] = original.to(state[key])
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict of a tuned model, or of a plain one.

        With `strict`, a plain backbone's checkpoint leaves what the method added unchanged, with a
        warning; without, those parameters are among the missing keys.
        """
        self._lists_missing = not strict
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            del self._lists_missing

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        unfold_before_loading(self)
        self._forget()  # loading overwrites or replaces weights
        added = {f"{prefix}{name}": value for name, value in self.added_tensors().items()}
        # PyTorch does not pass `strict` on to modules.
        lists = vars(self).get("_lists_missing", False)
        if added and not lists and added.keys().isdisjoint(state_dict):
            warnings.warn(
                f"this state dict has nothing of what {self.tune_record.method} added "
                f"({next(iter(added))}, {len(added)} in all): that stays as it is",
                stacklevel=2,
            )
            state_dict.update(added)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def added_tensors(self) -> dict[str, Tensor]:
        """Return the parameters that the method added, and the buffers in checkpoints, by name."""
        modules = self.named_modules(remove_duplicate=False)
        within = tuple(f"{name}." for name, part in modules if is_added(name, part))
        found: dict[str, Tensor] = {
            name: parameter
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if name == "prompt_tokens" or name.startswith(within)
        }
        every = self.named_buffers(remove_duplicate=False)
        buffers = {name: buffer for name, buffer in every if name.startswith(within)}
        if buffers:
            saved = self.state_dict().keys()
            found |= {name: buffer for name, buffer in buffers.items() if name in saved}
        return found


def is_added(name: str, part: nn.Module) -> bool:
    """Return whether a method added this part, of that name, of a model."""
    return isinstance(part, _KINDS) or name.rpartition(".")[2] in ADDED


def is_tuned(model: Any) -> bool:
    """Return whether `model` is tuned."""
    return isinstance(model, Tuned)


def is_disabled(model: Any) -> bool:
    """Return whether the adapters of `model` are disabled; not those of a copy of it."""
    return isinstance(model, nn.Module) and vars(model).get("tune_adapters") == id(model)


def blocks_of(model: Any) -> list[Any]:
    """Return the blocks of a timm model in order, those of all stages if there are stages."""
    if hasattr(model, "blocks"):
        return list(model.blocks)
    return [block for stage in model.layers for block in stage.blocks]


def reads_feature(blocks: Iterable[Any]) -> bool:
    """Return whether one of the blocks makes its prompts of an image feature."""
    prompts = [block._modules.get("prompt") for block in blocks]
    return any(prompt is not None and prompt.reads == "feature" for prompt in prompts)


def check_pooling(method: Method, global_pool: str) -> None:
    """Raise ValueError if `method` pools prompts and a head with `global_pool` reads no prompts."""
    if getattr(method, "pool_prompts", False) and global_pool in ("", "token", "prr"):
        raise ValueError(
            f"pool_prompts=True needs a head that pools tokens, but global_pool is "
            f"{global_pool!r}; use global_pool='avg' or pool_prompts=False"
        )
