"""VPT's modules: prompt tokens of a block, and what the blocks of a model share.

"Visual Prompt Tuning" (ECCV 2022, arXiv 2203.12119), section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.methods import VAPT, VPTDeep, VPTShallow, register_method
from vpt_fast.modules.block_info import BlockInfo, FrozenWeights
from vpt_fast.modules.initial_values import INITIAL_VALUES, UNIFORM
from vpt_fast.modules.prompt_module import PromptModule


def new_projection(project_dim: int, width: int, like: Tensor) -> nn.Linear:
    """Return a Linear (project_dim -> width), weight kaiming-normal over fan-out, bias 0."""
    projection = nn.Linear(project_dim, width, device=like.device, dtype=like.dtype)
    nn.init.kaiming_normal_(projection.weight, a=0, mode="fan_out")
    nn.init.zeros_(projection.bias)
    return projection


def add_shared_prompts(method: VPTShallow | VPTDeep, block: BlockInfo) -> None:
    """Add `prompt_projection` and `prompt_tokens` to a model, where the method has them.

    Args:
        method: Settings of the method.
        block: A prompted block.
    """
    if method.project_dim is not None:
        block.model.prompt_projection = new_projection(method.project_dim, block.width, block.like)
    if method.shared:
        block.model.prompt_tokens = _new_tokens(method, block)


def _new_tokens(method: VPTShallow | VPTDeep | VAPT, block: BlockInfo) -> nn.Parameter:
    return block.new_parameter(method.num_prompts, method.project_dim or block.width)


@register_method("vpt-shallow", VPTShallow, add_shared_prompts)
@register_method("vpt-deep", VPTDeep, add_shared_prompts)
class PromptTokens(PromptModule):
    """Static prompts of one block.

    Args:
        method: Settings of the method.
        block: The block.

    Attributes:
        tokens: Parameter (p, D) or (p, project_dim); None if the block uses the model's
            `prompt_tokens`.
    """

    def __init__(self, method: VPTShallow | VPTDeep | VAPT, block: BlockInfo) -> None:
        super().__init__()
        tokens = None if method.shared else _new_tokens(method, block)
        self.register_parameter("tokens", tokens)
        self.dropout, self.num_rows = method.dropout, method.num_prompts
        self.init: str = getattr(method, "init", UNIFORM)
        self.prefix = block.num_prefix_tokens
        # In a tuple, so that the model does not become a submodule of its own prompts.
        shares = method.shared or method.project_dim is not None
        self._owner = (block.model if shares else None,)

    def forward(self) -> Tensor:
        """Return the prompts (p, D) before prompt dropout."""
        owner: Any = self._owner[0]
        tokens: Any = self._parameters["tokens"]
        if owner is None:
            return tokens
        if tokens is None:
            tokens = owner.prompt_tokens
        projection = owner._modules.get("prompt_projection")
        return tokens if projection is None else projection(tokens)

    @property
    def initialises(self) -> bool:
        """Whether the prompts start from images."""
        return self.init != UNIFORM

    @torch.no_grad()
    def initialise(self, inputs: Tensor, weights: FrozenWeights) -> None:
        """Set the prompts as the method's `init` says; arguments as of `PromptModule`."""
        tokens: Any = self.tokens
        if self.initialises:
            patches = inputs[:, self.prefix :].flatten(0, 1)
            tokens.copy_(INITIAL_VALUES[self.init](tokens, patches, weights))

    def static(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the prompts (p, D), and None; a block with hooks inside does not call this."""
        if type(self) is not PromptTokens:
            return super().static()
        return self.forward() if self._owner[0] is not None else self._parameters["tokens"], None
