"""VAPT's plain formulation: every step as in section 4 of the paper, nothing folded.

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv
2501.18936). Before block i >= 1 the block's own input is normalised and its patches become a map;
one kernel, shared by all channels, is convolved over the map; channels are dropped; a token-wise
projector mixes the rest into p rows; a feature projector refines them; and they are inserted after
the prefix tokens. timm's own, unmodified block runs on that sequence, and its prompt rows are
dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.formulations.plain import Plain, assert_same, distance, redraw_prompts, widen
from vpt_fast import VAPT, prompt_tune

ACTING = {"dropout": 0.3, "projector_dropout": 0.4, "channel_dropout": 0.3}
STILL = dict.fromkeys(ACTING, 0.0)
PROJECTOR = ("prompt_projector.down.weight", "prompt_projector.up.weight")


class PlainVAPT(Plain):
    """A plain timm model, which is frozen, and the prompt experts before its blocks.

    Attributes:
        model: timm model without `prompt_tune`.
        trained: Leaf tensors by name in the tuned model's state dict: experts, head, and
            parameters that `also` names.
        training: Whether dropout is active. Each block draws its channel mask, then its hidden
            mask; block 0 draws one mask per image.
    """

    def __init__(
        self,
        model: nn.Module,
        method: VAPT,
        state: dict[str, Tensor],
        also: tuple[str, ...] = (),
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.method = method
        self.training = False
        self.pool_prompts = False
        self.blocks = list(range(len(model.blocks)))
        self.trained: dict[str, Tensor] = {}
        for name in prompt_names(method, len(model.blocks)):
            self.trained[name] = state[name].detach().clone().requires_grad_()
        for name, parameter in self.model.named_parameters():
            if name.startswith(("head.", "head_dist.", *also)):
                with torch.no_grad():
                    parameter.copy_(state[name])
                self.trained[name] = parameter.requires_grad_()

    def prompt(self, index: int, batch: int, rows: Tensor | None = None) -> Tensor:
        """Return the prompts (batch, p, D) of block `index` for its input `rows` (batch, N, D)."""
        if index == 0:
            tokens = self.trained["blocks.0.prompt.tokens"].expand(batch, -1, -1)
            return F.dropout(tokens, self.method.dropout, self.training)
        assert rows is not None
        return self.feature_projector(self.token_mixing(index, rows))

    def token_mixing(self, index: int, rows: Tensor) -> Tensor:
        """Return the output (B, p, D) of block `index`'s token-wise projector."""
        own = {
            name.rpartition("prompt.")[2]: value
            for name, value in self.trained.items()
            if name.startswith(f"blocks.{index}.prompt.")
        }
        width, kernel = rows.shape[-1], self.method.kernel_size
        y = F.layer_norm(rows, (width,), own["norm.weight"], own["norm.bias"], 1e-5)
        y = y[:, self.model.num_prefix_tokens :]
        y = y.transpose(1, 2).unflatten(2, self.model.patch_embed.grid_size)
        y = F.conv2d(y, own["conv.weight"].expand(width, 1, kernel, kernel), groups=width)
        y = F.dropout2d(y, self.method.channel_dropout, self.training)
        y = F.linear(y.flatten(2), own["mix.weight"], own.get("mix.bias"))
        return y.transpose(1, 2)

    def feature_projector(self, g: Tensor) -> Tensor:
        """Apply the feature projector, which has a residual in the "code" variant."""
        down, up = (self.trained[name] for name in PROJECTOR)
        hidden = F.relu(F.linear(g, down))
        hidden = F.dropout(hidden, self.method.projector_dropout, self.training)
        out = F.linear(hidden, up)
        return g + out if self.method.variant == "code" else out

    def sequence(self, image: Tensor, attn_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield (B, prefix + prompts + patches, D) after each block, and set `self.live`."""
        model, prefix = self.model, self.model.num_prefix_tokens
        self.live = self.method.num_prompts
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
        for index, block in enumerate(model.blocks):
            prompt = self.prompt(index, len(x), x)
            x = torch.cat([x[:, :prefix], prompt, x[:, prefix:]], dim=1)
            x = block(x, attn_mask=widen(attn_mask, prefix, self.live))
            yield x
            x = torch.cat([x[:, :prefix], x[:, prefix + self.live :]], dim=1)


def prompt_names(method: VAPT, depth: int) -> list[str]:
    """Return the state dict names of the experts' tensors."""
    parts = ["norm.weight", "norm.bias", "conv.weight", "mix.weight", "mix.bias"]
    if method.variant == "paper":
        parts.remove("mix.bias")
    adaptive = [f"blocks.{i}.prompt.{part}" for i in range(1, depth) for part in parts]
    return ["blocks.0.prompt.tokens", *adaptive, *(PROJECTOR if adaptive else ())]


def vapt_pair(
    base: nn.Module,
    method: VAPT,
    also: tuple[str, ...] = (),
    redraw: bool = True,
    memory: str = "speed",
) -> tuple[nn.Module, PlainVAPT]:
    """Tune `base` in place; return it with its plain formulation (same experts, same head).

    Args:
        base: Plain timm model.
        method: Method to tune.
        also: Prefixes of the names of further parameters to train.
        redraw: Whether to redraw the experts' parameters, of order one.
        memory: Memory mode of the tuned model.
    """
    untouched = copy.deepcopy(base)
    tuned = prompt_tune(base, method, memory=memory)
    if redraw:
        redraw_prompts(tuned)
    for name, parameter in tuned.named_parameters():
        if name.startswith(also):
            parameter.requires_grad_(True)
    return tuned, PlainVAPT(untouched, method, tuned.state_dict(), also)


def seeded(function: Any, *inputs: Any, seed: int = 4) -> Any:
    """Call a function with a fixed seed, so that both sides draw the same masks."""
    torch.manual_seed(seed)
    return function(*inputs)


def weigh_down(*models: nn.Module) -> None:
    """Give every norm1 an eps of the size of the prompts' variance.

    With a small eps, norm1 cancels the length of a prompt. Where only that length depends on a
    parameter (in the "paper" variant: a 1 x 1 kernel, or a mixing weight of one position), the
    gradient is a difference of equal numbers, whose relative error means nothing.
    """
    for model in models:
        for block in model.blocks:
            block.norm1.eps = 100.0


def compare(tuned: nn.Module, plain: PlainVAPT, image: Tensor) -> None:
    """Assert equal outputs and gradients, without dropout and with it."""
    plain.training = False
    tuned.eval()
    expected = plain(image)
    assert_same(tuned, plain, tuned(image), expected)
    with torch.inference_mode():
        assert distance(tuned(image), expected) <= 1e-10
    plain.training = True
    tuned.train()
    trained = seeded(plain, image)
    assert_same(tuned, plain, seeded(tuned, image), trained)
    assert distance(trained, expected) > 1e-4, "no dropout acted"
