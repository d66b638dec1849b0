"""The plain formulation: torch.cat of prompt rows into timm's own, unmodified blocks.

This is the truth that the library is held to (Visual Prompt Tuning, ECCV 2022, section 3): before
a prompted block its prompts join the sequence after the prefix tokens, replacing those that are
there; they are ordinary rows from then on; what is left after the last block is dropped.
Nothing here is fast and nothing is shared with the library but the names of its tensors.
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
    """Stands where a block stood and returns what it is told to."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        return self.rows


class Plain:
    """A plain timm model, which it freezes, and the prompts that join its blocks.

    Attributes:
        model: timm model that `prompt_tune` never saw; its head is trained, the rest frozen.
        trained: Name (in the tuned model's state dict) to leaf tensor, prompts and head.
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
        """Rows (batch, p, D) that join block `index`: projected first, then dropped per image."""
        name = "prompt_tokens" if self.shared else f"blocks.{index}.prompt.tokens"
        rows = self.trained[name]
        if "prompt_projection.weight" in self.trained:
            weight, bias = (
                self.trained[f"prompt_projection.{part}"] for part in ("weight", "bias")
            )
            rows = rows @ weight.T + bias
        return F.dropout(rows.expand(batch, -1, -1), self.dropout, self.training)

    def sequence(self, image: Tensor, attn_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yields (B, prefix + prompts + patches, D) after each block, and sets `self.live`."""
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
        """Output (B, N, D) of every block, prompt rows removed."""
        prefix = self.model.num_prefix_tokens
        return [
            torch.cat([x[:, :prefix], x[:, prefix + self.live :]], dim=1)
            for x in self.sequence(image, attn_mask)
        ]

    def playback(self, image: Tensor, attn_mask: Tensor | None = None) -> nn.Module:
        """timm's own model around the block outputs: every method of it says what is expected.

        For this image only, and outside of autograd's reach through the blocks' inputs.
        """
        outputs = self.block_outputs(image, attn_mask)
        shell = copy.copy(self.model)
        shell._modules = dict(self.model._modules)
        shell.blocks = nn.Sequential(*[Playback(rows) for rows in outputs])
        return shell

    def features(self, image: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """What `forward_features` must return, (B, N, D)."""
        return self.model.norm(self.block_outputs(image, attn_mask)[-1])

    def __call__(self, image: Tensor, attn_mask: Tensor | None = None) -> Any:
        """What the tuned model must return."""
        if not self.pool_prompts:
            return self.model.forward_head(self.features(image, attn_mask))
        *_, rows = self.sequence(image, attn_mask)
        return self.model.forward_head(self.model.norm(rows))

    def narrowed(self, dtype: torch.dtype) -> Any:
        """A twin that computes in `dtype`, from the same numbers."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).to(dtype)
        owned = dict(twin.model.named_parameters())
        twin.trained = {
            name: owned[name] if name in owned else leaf.detach().to(dtype).requires_grad_()
            for name, leaf in self.trained.items()
        }
        return twin


def widen(mask: Tensor | None, prefix: int, live: int) -> Tensor | None:
    """An attention mask (..., N, N) for N tokens with `live` prompts, which everything may see
    and which see everything."""
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
    """State dict names of the prompt-side tensors."""
    if isinstance(method, LinearProbe):
        return []
    shared = getattr(method, "shared", False)
    names = ["prompt_tokens"] if shared else [f"blocks.{i}.prompt.tokens" for i in blocks]
    if method.project_dim is not None:
        names += ["prompt_projection.weight", "prompt_projection.bias"]
    return names


def redraw_prompts(model: nn.Module, seed: int = 7) -> None:
    """Prompt-side parameters of order one: as initialised they hardly move the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "prompt" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise / 4 if "projection" in name else noise)


def pair(base: nn.Module, method: Any, memory: str = "speed") -> tuple[nn.Module, Plain]:
    """Tunes `base` in place and returns it with its plain twin (same prompts, same head)."""
    untouched = copy.deepcopy(base)
    tuned = prompt_tune(base, method, memory=memory)
    assert tuned is base
    redraw_prompts(tuned)
    return tuned, Plain(untouched, method, tuned.state_dict())


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value (0 for empty tensors)."""
    assert found.shape == expected.shape, f"{tuple(found.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found - expected).abs().max() / scale)


def gradients(output: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed, curved loss of `output` (a tensor, or a tuple of them)."""
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
    """Gradients of everything in the tuned model that requires one, by name."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return gradients(output, trained)


def assert_same(
    model: nn.Module, plain: Plain, output: Any, expected: Any, tolerance: float = 1e-10
) -> None:
    """Asserts equal outputs, the same trained names and equal gradients of each of them."""
    found_parts = output if isinstance(output, tuple) else (output,)
    expected_parts = expected if isinstance(expected, tuple) else (expected,)
    for found, right in zip(found_parts, expected_parts, strict=True):
        assert distance(found, right) <= tolerance, f"output is off by {distance(found, right)}"
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
