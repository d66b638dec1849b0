"""The plain formulation on Swin: prompt rows concatenated into every window of timm's own modules.

Visual Prompt Tuning (ECCV 2022, section 3): a prompted block inserts its prompts into every window
of their image; rows and columns of prompts have no position bias and no mask. Every window updates
its copy of the rows, the copies are averaged, and the average passes through the rest of the block.
Rows that are not replaced pass through patch merging as four equal neighbours. The formulation is
not written for speed and shares only the names of tensors with the library.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from support.formulations import families
from support.formulations.copies import Original
from support.formulations.plain import redraw_prompts
from vpt_fast import VAPT, VPTShallow, prompt_tune


@dataclass(frozen=True)
class Swin:
    """A small SwinTransformer and the size of its images.

    Attributes:
        arguments: Arguments of `timm.create_model`.
        image: Height and width of the images, in pixels.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    image: tuple[int, int] = (56, 56)

    @property
    def depth(self) -> int:
        return sum(self.arguments["depths"])


def _swin(
    image: tuple[int, int] = (56, 56), fed: tuple[int, int] | None = None, **more: Any
) -> Swin:
    arguments = {
        "img_size": image,
        "embed_dim": 32,
        "depths": (2, 2, 2),
        "num_heads": (2, 4, 4),
        "window_size": 7,
        "num_classes": families.CLASSES,
    }
    return Swin({**arguments, **more}, fed or image)


SWINS: dict[str, Swin] = {
    "window7": _swin(),  # grids of 14, 7 and 4 in windows of 7, 7 and 4
    "window4": _swin((64, 64), window_size=4),
    "padded": _swin((64, 56), window_size=5),
    "oblong_window": _swin((56, 64), window_size=(4, 7), embed_dim=48, num_heads=(3, 3, 6)),
    "oblong_image": _swin((40, 76), window_size=4),
    "odd_grids": _swin((44, 52), window_size=3),
    "dynamic": _swin((56, 56), (48, 68), window_size=4, dynamic_img_size=True),
    "always_partition": _swin((32, 32), window_size=7, always_partition=True),
    "no_bias": _swin((40, 40), window_size=4, qkv_bias=False),
    "head_dim": _swin((32, 32), window_size=4, head_dim=12),
    "max_pool": _swin((32, 48), window_size=4, global_pool="max"),
    "tiny": _swin((28, 36), window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2)),
    "one_stage": _swin((32, 32), window_size=4, depths=(3,), num_heads=(2,)),
}


@functools.cache
def _original(
    name: str, dtype: torch.dtype, seed: int, more: tuple[tuple[str, Any], ...]
) -> Original:
    arguments = {**SWINS[name].arguments, **dict(more)}
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **arguments)
    model = model.eval().to(dtype)
    families.randomise(model, seed)
    return Original(model)


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any) -> nn.Module:
    """Build a model with weights of order one, in eval mode."""
    model: nn.Module = _original(name, dtype, seed, tuple(more.items())).copy()
    return model


def images(name: str, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random images (batch, 3, height, width) of the model's size."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, *SWINS[name].image)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class PlainSwin:
    """A plain timm model, which is frozen, and prompts that are inserted into its windows.

    Attributes:
        model: timm model without `prompt_tune`.
        trained: Leaf tensors by name in the tuned model's state dict: prompts, head, and
            parameters that `also` names.
        training: Whether dropout is active.
    """

    def __init__(
        self, model: nn.Module, method: Any, state: dict[str, Tensor], also: str = "head."
    ) -> None:
        self.model: Any = model.requires_grad_(False).eval()
        self.method = method
        self.training = False
        self.positions = [
            (s, i) for s, x in enumerate(self.model.layers) for i in range(len(x.blocks))
        ]
        if isinstance(method, VPTShallow):
            self.prompted = [0]
        else:
            chosen = getattr(method, "blocks", None)
            self.prompted = list(range(len(self.positions)) if chosen is None else chosen)
        self.trained = {
            name: value.detach().clone().requires_grad_()
            for name, value in state.items()
            if "prompt" in name
        }
        for name, parameter in self.model.named_parameters():
            if name.startswith("head.") or also in name:
                with torch.no_grad():
                    parameter.copy_(state[name])
                self.trained[name] = parameter.requires_grad_()

    def prompt(self, number: int, x: Tensor) -> Tensor:
        """Return the prompts (B, p, D) of block `number`, whose input is x (B, H, W, D)."""
        stage, index = self.positions[number]
        name = f"layers.{stage}.blocks.{index}.prompt"
        if isinstance(self.method, VAPT) and number:
            return self.expert(name, f"layers.{stage}.prompt_projector", x)
        rows = self.trained.get(f"{name}.tokens", self.trained.get("prompt_tokens"))
        if "prompt_projection.weight" in self.trained:
            weight, bias = (self.trained[f"prompt_projection.{n}"] for n in ("weight", "bias"))
            rows = rows @ weight.T + bias
        return F.dropout(rows.expand(len(x), -1, -1), self.method.dropout, self.training)

    def expert(self, name: str, projector: str, x: Tensor) -> Tensor:
        """Return VAPT's prompts (B, p, D) from the block's own grid x (B, H, W, D)."""
        own = {n[len(name) + 1 :]: t for n, t in self.trained.items() if n.startswith(f"{name}.")}
        width, size = x.shape[-1], self.method.kernel_size
        y = F.layer_norm(x, (width,), own["norm.weight"], own["norm.bias"], 1e-5)
        y = y.permute(0, 3, 1, 2)
        y = F.conv2d(y, own["conv.weight"].expand(width, 1, size, size), groups=width)
        y = F.dropout2d(y, self.method.channel_dropout, self.training)
        g = F.linear(y.flatten(2), own["mix.weight"], own.get("mix.bias")).transpose(1, 2)
        down, up = (self.trained[f"{projector}.{part}.weight"] for part in ("down", "up"))
        hidden = F.dropout(F.relu(g @ down.T), self.method.projector_dropout, self.training)
        return g + hidden @ up.T if self.method.variant == "code" else hidden @ up.T

    def block(self, block: Any, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Apply timm's block to tokens (B, H, W, D) with prompt rows (B, p, D) in every window."""
        if rows is None:
            return block(x), None
        batch, height, width, _ = x.shape
        window, shift = block.window_size, block.shift_size
        y = block.norm1(torch.cat([rows, x.flatten(1, 2)], 1))
        normed, y = y[:, : rows.shape[1]], y[:, rows.shape[1] :].unflatten(1, (height, width))
        if any(shift):
            y = torch.roll(y, (-shift[0], -shift[1]), (1, 2))
        full = [-(-n // w) * w for n, w in zip((height, width), window, strict=True)]
        y = F.pad(y, (0, 0, 0, full[1] - width, 0, full[0] - height))
        mask = block.get_attn_mask(y)
        windows = window_partition(y, window).flatten(1, 2)
        number = len(windows) // batch
        normed = normed.repeat_interleave(number, 0)
        inner = next(m for m in block.attn.modules() if isinstance(m, WindowAttention))
        if own := "forward" not in vars(inner):  # so that hooks on the module run
            inner.forward = lambda y: self.attention(inner, y, rows.shape[1], mask, batch)
        out = block.attn(torch.cat([normed, windows], 1))
        if own:
            del inner.forward
        count = rows.shape[1]
        rows = rows + block.drop_path1(out[:, :count].unflatten(0, (batch, number)).mean(1))
        y = window_reverse(out[:, count:].unflatten(1, window).contiguous(), window, *full)
        y = y[:, :height, :width]
        if any(shift):
            y = torch.roll(y, shift, (1, 2))
        sequence = torch.cat([rows, (x + block.drop_path1(y)).flatten(1, 2)], 1)
        sequence = sequence + block.drop_path2(block.mlp(block.norm2(sequence)))
        return sequence[:, count:].unflatten(1, (height, width)), sequence[:, :count]

    def attention(
        self, attn: Any, x: Tensor, count: int, mask: Tensor | None, batch: int
    ) -> Tensor:
        """Apply attention to windows (w, p + area, D) whose first `count` rows are prompts."""
        heads = attn.num_heads
        q, k, v = attn.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        bias = attn._get_rel_pos_bias()
        if mask is not None:
            bias = bias + mask.repeat(batch, 1, 1).unsqueeze(1)
        bias = F.pad(bias, (count, 0, count, 0))
        if attn.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, bias)
        else:
            y = attn.attn_drop(attn.softmax(attn.scale * q @ k.transpose(-2, -1) + bias)) @ v
        return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))

    def stages(self, image: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Return tokens (B, H, W, D) and live prompt rows after every stage."""
        x, rows, number, outputs = self.model.patch_embed(image), None, 0, []
        for stage in self.model.layers:
            x = stage.downsample(x)
            live = rows is not None and number not in self.prompted
            if live and not isinstance(stage.downsample, nn.Identity):
                merge = stage.downsample
                rows = merge.reduction(merge.norm(torch.cat([rows] * 4, -1)))
            for block in stage.blocks:
                if number in self.prompted and self.method.num_prompts:
                    rows = self.prompt(number, x)
                x, rows = self.block(block, x, rows)
                number += 1
            outputs.append((x, rows))
        return outputs

    def __call__(self, image: Tensor) -> Tensor:
        """Return the expected output of the tuned model."""
        x, rows = self.stages(image)[-1]
        x = self.model.norm(x)
        if getattr(self.method, "pool_prompts", False) and rows is not None:
            x = torch.cat([self.model.norm(rows), x.flatten(1, 2)], 1).unsqueeze(1)
        return self.model.head(x)


def pair(
    base: nn.Module, method: Any, memory: str = "speed", also: str = "head."
) -> tuple[nn.Module, PlainSwin]:
    """Tune `base` in place; return it with its plain formulation (same prompts, same head).

    Args:
        base: Plain SwinTransformer.
        method: Method to tune.
        memory: Memory mode of the tuned model.
        also: Part of the names of further parameters to train.
    """
    untouched = copy.deepcopy(base)
    tuned = prompt_tune(base, method, memory=memory)
    redraw_prompts(tuned)
    for name, parameter in tuned.named_parameters():
        if also in name:
            parameter.requires_grad_(True)
    return tuned, PlainSwin(untouched, method, tuned.state_dict(), also)
