"""VAPT's plain formulation: every step as section 4 of the paper has it, nothing folded.

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv
2501.18936). Before block i >= 1 the block's own input is normalised, its patches become a map,
one kernel that all channels share is convolved over it, channels are dropped, a token-wise
projector mixes what is left into p rows, a feature projector refines them, and they join the
sequence after the prefix tokens. timm's own, unmodified block runs on that sequence, and its
prompt rows are dropped.
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
    """A plain timm model, which it freezes, and the prompt experts before its blocks.

    Attributes:
        model: timm model that `prompt_tune` never saw.
        trained: Name (in the tuned model's state dict) to leaf tensor: experts, head, and what
            `also` names.
        training: Whether the dropouts act. Each block draws its channels first, then the hidden
            layer; block 0 draws one mask per image.
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
        """The rows (batch, p, D) that join block `index`, whose input is `rows` (batch, N, D)."""
        if index == 0:
            tokens = self.trained["blocks.0.prompt.tokens"].expand(batch, -1, -1)
            return F.dropout(tokens, self.method.dropout, self.training)
        assert rows is not None
        return self.refined(self.mixed(index, rows))

    def mixed(self, index: int, rows: Tensor) -> Tensor:
        """What the token-wise projector of block `index` makes of its input, (B, p, D)."""
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

    def refined(self, mixed: Tensor) -> Tensor:
        """The feature projector, around which the "code" variant has a residual."""
        down, up = (self.trained[name] for name in PROJECTOR)
        hidden = F.relu(F.linear(mixed, down))
        hidden = F.dropout(hidden, self.method.projector_dropout, self.training)
        found = F.linear(hidden, up)
        return mixed + found if self.method.variant == "code" else found

    def sequence(self, image: Tensor, attn_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yields (B, prefix + prompts + patches, D) after each block, and sets `self.live`."""
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
    """State dict names of the prompt-side tensors."""
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
    """Tunes `base` in place and returns it with its plain twin (same experts, same head).

    Args:
        base: A timm model.
        method: What to tune.
        also: How the names of backbone parameters begin that are trained besides.
        redraw: Whether prompt-side parameters become of order one.
        memory: What the tuned model keeps for backward.
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
    """Calls with a seed of its own: the same masks in the same order on both sides."""
    torch.manual_seed(seed)
    return function(*inputs)


def weigh_down(*models: nn.Module) -> None:
    """Gives every norm1 an eps of the size of the prompts' variance.

    Without it norm1 undoes the length of a prompt. Where nothing but that length depends on a
    parameter (in the "paper" variant: a 1 x 1 kernel, or the weight of a mix of one position), the
    gradient is a difference of equal numbers, and there is no relative error to speak of.
    """
    for model in models:
        for block in model.blocks:
            block.norm1.eps = 100.0


def compare(tuned: nn.Module, plain: PlainVAPT, image: Tensor) -> None:
    """Asserts the same function and gradients, with the dropouts at rest and acting."""
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
