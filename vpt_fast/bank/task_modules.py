"""The modules of any prompt method in a bank, where prompts depend on the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.methods import PromptMethod
from vpt_fast.models.add_prompts import block_infos, new_prompts
from vpt_fast.models.family import family_of
from vpt_fast.models.isotropic.attention import all_keys_values
from vpt_fast.models.tuned import SHARED
from vpt_fast.modules.prompt_module import PromptModule


@dataclass(frozen=True, eq=False)
class TaskModules:
    """Modules of a task whose prompts depend on the image.

    Attributes:
        blocks: Module of each block by its index, in eval mode.
        shared: Module that they share, or None.
    """

    blocks: Mapping[int, PromptModule]
    shared: nn.Module | None

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        parts = [*self.blocks.values(), *([] if self.shared is None else [self.shared])]
        return [t for part in parts for t in (*part.parameters(), *part.buffers())]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class ModuleGroup:
    """Images of a task whose prompts its modules make.

    Attributes:
        members: Indices of the images in the batch, on the host.
        images: The same indices (n,), on the device.
        task: Modules of the task.
        whole: Whether the group is the whole batch, in its order.
    """

    members: tuple[int, ...]
    images: Tensor
    task: TaskModules
    whole: bool

    def count(self, block: int) -> int:
        """Return the number of keys that each image gets in a block."""
        module = self.task.blocks.get(block)
        return 0 if module is None else module.num_rows + module.num_keys

    def feature(self, x: Tensor) -> Any:
        """Return what the shared module makes of the first block's input for the whole batch."""
        reads = any(module.reads == "feature" for module in self.task.blocks.values())
        return self.task.shared(self._own(x)) if reads and self.task.shared is not None else None

    def kv(self, block: Any, index: int, x: Tensor, feature: Any, dtype: torch.dtype) -> Tensor:
        """Return keys and values (n * count, 2, H, d) of the group's images.

        Args:
            block: Timm block.
            index: Its index.
            x: Input of the block for the whole batch, (B, N, D).
            feature: What `feature` returned.
            dtype: Dtype of the normalised prompts.
        """
        rows, kv = self.task.blocks[index].made(self._own(x), feature)
        kv = all_keys_values(block, rows, kv, dtype)
        return kv.expand(len(self.members), *[-1] * 4).flatten(0, 1)

    def _own(self, x: Tensor) -> Tensor:
        return x if self.whole else x.index_select(0, self.images)


def read_modules(
    model: Any, method: PromptMethod, tensors: Mapping[str, Tensor]
) -> tuple[dict[int, PromptModule], nn.Module | None]:
    """Return a method's modules with the values of an adapter, and what they share.

    Args:
        model: Plain timm model of one width, which stays as it is.
        method: Method that fits it.
        tensors: Tensors of the adapter by name, on the model's device.
    """
    owner, family = nn.Module(), family_of(model)
    infos = [
        replace(info, owner=owner, model=owner)
        for info in block_infos(model, family)  # type: ignore[arg-type]
    ]
    device = infos[0].like.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = new_prompts(infos, method)
    shared: nn.Module | None = owner._modules.get(SHARED)
    parts: dict[str, nn.Module] = {f"blocks.{i}.prompt": m for i, m in found.items()}
    for where, part in {**parts, **dict(owner.named_children())}.items():
        prefix = f"{where}."
        own = {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}
        part.load_state_dict(own)
        part.eval().requires_grad_(False)
    for name, parameter in owner._parameters.items():
        if parameter is not None:
            parameter.requires_grad_(False).copy_(tensors[name])
    return found, shared
