"""The plain formulation: torch.cat of prompt rows into timm's own, unmodified blocks.

Visual Prompt Tuning (ECCV 2022, section 3): before a prompted block, prompts are inserted after the
prefix tokens and replace earlier prompts; they are ordinary rows in the following blocks, and are
dropped after the last one. The tests compare the library with this formulation, which is not
written for speed and shares only the names of tensors with the library.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast import LinearProbe, VPTDeep, VPTShallow, prompt_tune


class Playback(nn.Module):
    """Stand-in for a block that returns given rows."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        return self.rows


class Plain:
    """A plain timm model, which is frozen, and prompts that are inserted before its blocks.

    Attributes:
        model: timm model without `prompt_tune`; its head is trained, the rest frozen.
        trained: Leaf tensors by name in the tuned model's state dict: prompts and head.
        blocks: Indices of the prompted blocks.
    """

    def __init__(self, model: nn.Module, method: Any, state: dict[str, Tensor]) -> None:
        self.model = model.requires_grad_(False).eval()
        self.dropout = getattr(method, "dropout", 0.0)
        self.pool_prompts = getattr(method, "pool_prompts", False)
        self.shared = getattr(method, "shared", False)
        self.training = False
        if isinstance(method, LinearProbe):
            self.blocks: list[int] = []
        elif isinstance(method, VPTShallow):
            self.blocks = [0]
        else:
            chosen = range(len(model.blocks)) if method.blocks is None else method.blocks
            self.blocks = sorted(chosen)
        self.trained: dict[str, Tensor] = {}
        for name in prompt_names(method, self.blocks):
            self.trained[name] = state[name].detach().clone().requires_grad_()
        for name, parameter in self.model.named_parameters():
            if name.startswith(("head.", "head_dist.")):
                with torch.no_grad():
                    parameter.copy_(state[name])
                self.trained[name] = parameter.requires_grad_()

    def prompt(self, index: int, batch: int) -> Tensor:
        """Return the prompts (batch, p, D) of block `index`: projected, then dropout per image."""
        name = "prompt_tokens" if self.shared else f"blocks.{index}.prompt.tokens"
        rows = self.trained[name]
        if "prompt_projection.weight" in self.trained:
            weight, bias = (
                self.trained[f"prompt_projection.{part}"] for part in ("weight", "bias")
            )
            rows = rows @ weight.T + bias
        return F.dropout(rows.expand(batch, -1, -1), self.dropout, self.training)

    def sequence(self, image: Tensor, attn_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield (B, prefix + prompts + patches, D) after each block, and set `self.live`."""
        model, prefix = self.model, self.model.num_prefix_tokens
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
        self.live = 0
        for index, block in enumerate(model.blocks):
            if index in self.blocks:
                prompt = self.prompt(index, len(x))
                x = torch.cat([x[:, :prefix], prompt, x[:, prefix + self.live :]], dim=1)
                self.live = prompt.shape[1]
            x = block(x, attn_mask=widen(attn_mask, prefix, self.live))
            yield x

    def block_outputs(self, image: Tensor, attn_mask: Tensor | None = None) -> list[Tensor]:
        """Return the output (B, N, D) of every block, without prompt rows."""
        prefix = self.model.num_prefix_tokens
        return [
            torch.cat([x[:, :prefix], x[:, prefix + self.live :]], dim=1)
            for x in self.sequence(image, attn_mask)
        ]

    def playback(self, image: Tensor, attn_mask: Tensor | None = None) -> nn.Module:
        """Return timm's own model with blocks that return this image's outputs.

        Every method of it returns what the tuned model's must, for this image only. Gradients do
        not flow through the inputs of its blocks.
        """
        outputs = self.block_outputs(image, attn_mask)
        shell = copy.copy(self.model)
        shell._modules = dict(self.model._modules)
        shell.blocks = nn.Sequential(*[Playback(rows) for rows in outputs])
        return shell

    def features(self, image: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return the expected result of `forward_features`, (B, N, D)."""
        return self.model.norm(self.block_outputs(image, attn_mask)[-1])

    def __call__(self, image: Tensor, attn_mask: Tensor | None = None) -> Any:
        """Return the expected output of the tuned model."""
        if not self.pool_prompts:
            return self.model.forward_head(self.features(image, attn_mask))
        *_, rows = self.sequence(image, attn_mask)
        return self.model.forward_head(self.model.norm(rows))

    def narrowed(self, dtype: torch.dtype) -> Any:
        """Return a copy in `dtype` with the same values, rounded to it."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).to(dtype)
        owned = dict(twin.model.named_parameters())
        twin.trained = {
            name: owned[name] if name in owned else leaf.detach().to(dtype).requires_grad_()
            for name, leaf in self.trained.items()
        }
        return twin


def widen(mask: Tensor | None, prefix: int, live: int) -> Tensor | None:
    """Return an attention mask (..., N, N) extended by rows and columns of `live` prompts.

    Every token attends to the prompts, and the prompts attend to every token.
    """
    if mask is None or live == 0:
        return mask
    wide = torch.zeros(
        *mask.shape[:-2], mask.shape[-2] + live, mask.shape[-1] + live, dtype=mask.dtype
    )
    if mask.dtype == torch.bool:
        wide[...] = True
    token = [i for i in range(wide.shape[-1]) if not prefix <= i < prefix + live]
    rows, columns = torch.meshgrid(torch.tensor(token), torch.tensor(token), indexing="ij")
    wide[..., rows, columns] = mask
    return wide


def prompt_names(method: Any, blocks: list[int]) -> list[str]:
    """Return the state dict names of the prompts' tensors."""
    if isinstance(method, LinearProbe):
        return []
    shared = getattr(method, "shared", False)
    names = ["prompt_tokens"] if shared else [f"blocks.{i}.prompt.tokens" for i in blocks]
    if method.project_dim is not None:
        names += ["prompt_projection.weight", "prompt_projection.bias"]
    return names


def redraw_prompts(model: nn.Module, seed: int = 7) -> None:
    """Draw the prompts' parameters anew, of order one; initialised ones hardly move the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "prompt" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise / 4 if "projection" in name else noise)


def pair(base: nn.Module, method: Any, memory: str = "speed") -> tuple[nn.Module, Plain]:
    """Tune `base` in place; return it with its plain formulation (same prompts, same head)."""
    untouched = copy.deepcopy(base)
    tuned = prompt_tune(base, method, memory=memory)
    assert tuned is base
    redraw_prompts(tuned)
    return tuned, Plain(untouched, method, tuned.state_dict())


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value (0 if empty)."""
    assert found.shape == expected.shape, f"{tuple(found.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found - expected).abs().max() / scale)


def gradients(output: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients of a fixed, nonlinear loss of `output`, a tensor or a tuple of tensors."""
    generator = torch.Generator().manual_seed(11)
    loss = torch.zeros((), dtype=torch.float64)
    for part in output if isinstance(output, tuple) else (output,):
        weight = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        loss = loss + (weight.to(part.device) * part.double().tanh()).sum().cpu()
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    missing = [n for n, value in zip(parameters, values, strict=True) if value is None]
    assert not missing, f"no gradient for {missing}"
    return dict(zip(parameters, values, strict=True))


def tuned_gradients(model: nn.Module, output: Any) -> dict[str, Tensor]:
    """Return the gradients of the tuned model's trained parameters, by name."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return gradients(output, trained)


def assert_same(
    model: nn.Module, plain: Plain, output: Any, expected: Any, tolerance: float = 1e-10
) -> None:
    """Assert equal outputs, the same trained names and equal gradients."""
    found_parts = output if isinstance(output, tuple) else (output,)
    expected_parts = expected if isinstance(expected, tuple) else (expected,)
    for found, want in zip(found_parts, expected_parts, strict=True):
        assert distance(found, want) <= tolerance, f"output is off by {distance(found, want)}"
    ours, theirs = tuned_gradients(model, output), gradients(expected, plain.trained)
    assert set(ours) == set(theirs)
    errors = {name: distance(ours[name], theirs[name]) for name in theirs}
    assert max(errors.values()) <= tolerance, f"gradients are off: {errors}"


VARIANTS: dict[str, Any] = {
    "linear": lambda depth: LinearProbe(),
    "shallow": lambda depth: VPTShallow(3),
    "shallow_projected": lambda depth: VPTShallow(3, project_dim=6),
    "deep": lambda depth: VPTDeep(3),
    "deep_one": lambda depth: VPTDeep(1),
    "deep_many": lambda depth: VPTDeep(20),
    "first": lambda depth: VPTDeep(3, blocks=range(max(1, depth // 2))),
    "last": lambda depth: VPTDeep(3, blocks=range(depth // 2, depth)),
    "gaps": lambda depth: VPTDeep(3, blocks=[*range(0, depth, 2)]),
    "gap_then_last": lambda depth: VPTDeep(3, blocks=sorted({0, depth - 1})),
    "middle_only": lambda depth: VPTDeep(3, blocks=[depth // 2]),
    "last_only": lambda depth: VPTDeep(3, blocks=[depth - 1]),
    "shared": lambda depth: VPTDeep(3, shared=True),
    "projected": lambda depth: VPTDeep(3, project_dim=6),
    "projected_shared_gaps": lambda depth: VPTDeep(
        3, project_dim=6, shared=True, blocks=[*range(0, depth, 2)]
    ),
}
