"""Equations of published prompt methods on concatenated prompts, from plain tensors.

Nothing here calls a method's own module: prompts, keys and values are written out from the trained
tensors' names. Prompts join timm's own blocks as rows, keys and values what timm hands to PyTorch's
attention.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from support.formulations.any_method import more_keys
from support.formulations.isotropic import first_input, through
from support.formulations.plain import Plain, redraw_prompts
from vpt_fast import BPT, CVPT, DVPT, E2VPT, VFPT, GateVPT, prompt_tune

METHODS: dict[str, Any] = {
    "e2vpt": E2VPT(4, num_keys=3, pieces=2),
    "e2vpt dropped": E2VPT(4, 0.3, num_keys=2, pieces=4),
    "vfpt": VFPT(5, fourier_share=0.5),
    "vfpt whole": VFPT(4, fourier_share=1.0),
    "vfpt dropped": VFPT(5, 0.3, fourier_share=0.7),
    "vfpt none": VFPT(3, fourier_share=0.0),
    "bpt": BPT(4, rank=3),
    "dvpt": DVPT(3, hidden_dim=4),
    "dvpt feature": DVPT(3, 0.2, hidden_dim=4, source="feature"),
    "cvpt": CVPT(4),
    "cvpt one": CVPT(1),
    "cvpt dropped": CVPT(3, 0.3),
    "gate": GateVPT(3),
    "gate dropped": GateVPT(3, 0.3),
}


class PlainPublished(Plain):
    """See `Plain`."""

    def __init__(self, model: Any, method: Any, tuned: Any) -> None:
        self.model, self.method = model.requires_grad_(False).eval(), method
        self.pool_prompts, self.training = False, False
        state, names = tuned.state_dict(), {n for n, p in tuned.named_parameters()}
        self.trained: dict[str, Tensor] = {}
        self.constant = {n: t.clone() for n, t in state.items() if "_mask" in n}
        for name in names:
            if "prompt" in name:
                self.trained[name] = state[name].detach().clone().requires_grad_()
        for name, parameter in self.model.named_parameters():
            if name.startswith(("head.", "head_dist.")):
                parameter.data.copy_(state[name])
                self.trained[name] = parameter.requires_grad_()

    def _own(self, index: int, name: str) -> Tensor:
        return self.trained[f"blocks.{index}.prompt.{name}"]

    def _dropped(self, rows: Tensor) -> Tensor:
        return F.dropout(rows, self.method.dropout, self.training)

    def made(self, index: int, x: Tensor, first: Tensor) -> tuple[Tensor, Any]:
        """Return rows (B, p, D) of a block's input x, and keys and values (B, n, H, d) or None.

        `first` is the input of the first block.
        """
        batch, prefix = len(x), self.model.num_prefix_tokens
        if isinstance(self.method, BPT):
            rows = self._own(index, "a") @ self._own(index, "b")
            return self._dropped(rows.expand(batch, -1, -1)), None
        tokens, kv = self._own(index, "tokens"), None
        if isinstance(self.method, DVPT):
            patches = (x if self.method.source == "tokens" else first)[:, prefix:]
            u = patches.mean(1)
            centred = u - u.mean(-1, keepdim=True)
            u = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            hidden = F.gelu(u @ self._own(index, "down.weight").T + self._own(index, "down.bias"))
            shift = hidden @ self._own(index, "up.weight").T
            return self._dropped(tokens[None] + shift[:, None]), None
        if isinstance(self.method, E2VPT):
            count = self.method.pieces
            masks = [self.constant[f"prompt_shared.{k}_mask"] for k in ("token", "piece")]
            pieces = [
                piece * masks[0][:, None] * masks[1][:, i, None]
                for i, piece in enumerate(tokens.chunk(count, -1))
            ]
            rows = self._dropped(torch.cat(pieces, -1).expand(batch, -1, -1))
            pair = [self._own(index, k).expand(batch, -1, -1, -1) for k in ("keys", "values")]
            kv = self._dropped(torch.stack(pair, 2)).unbind(2)
            return rows, kv
        rows = self._dropped(tokens.expand(batch, -1, -1))
        if isinstance(self.method, VFPT):
            count = math.floor(self.method.fourier_share * self.method.num_prompts)
            if count:
                # Along the channels, then along the prompts.
                first_rows = torch.fft.fft(torch.fft.fft(rows[:, :count], dim=-1), dim=-2).real
                rows = torch.cat([first_rows, rows[:, count:]], 1)
        return rows, kv

    def cross(self, index: int, block: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        """Return CVPT's x + attention(norm1(x); K_p, V_p), one image and head at a time."""
        attn, (rows, _) = block.attn, self.made(index, x, x)
        heads, width = attn.num_heads, attn.proj.in_features
        if attn._modules.get("qkv") is None:
            maps = [attn.q_proj, attn.k_proj, attn.v_proj]
            parts = [(m.weight, m.bias) for m in maps]
        else:
            bias = attn.qkv.bias
            if getattr(attn, "q_bias", None) is not None:
                bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            biases = [None] * 3 if bias is None else bias.split(width)
            parts = list(zip(attn.qkv.weight.split(width), biases, strict=True))
        inputs = (block.norm1(x), block.norm1(rows), block.norm1(rows))
        q, k, v = (
            F.linear(t, *part).unflatten(-1, (heads, -1)).transpose(1, 2)
            for t, part in zip(inputs, parts, strict=True)
        )
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            count = attn.num_prefix_tokens
            turned = apply_rot_embed_cat(q[:, :, count:], rope, half=attn.rotate_half)
            q = torch.cat([q[:, :, :count], turned.to(q.dtype)], 2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        norm, gate = attn._modules.get("norm"), attn._modules.get("gate")
        out = out if norm is None else norm(out)
        if gate is not None:
            out = out * gate(inputs[0]).sigmoid()
        out = attn.proj(out)
        if isinstance(getattr(block, "ls1", None), nn.Module):
            out = block.ls1(out)
        if getattr(block, "gamma_1", None) is not None:
            out = block.gamma_1 * out
        return x + out

    def sequence(self, image: Tensor, attn_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield (B, prefix + prompts + patches, D) after each block, and set `self.live`."""
        model, prefix = self.model, self.model.num_prefix_tokens
        x, tables = first_input(model, image)
        first, self.live = x, 0
        gated = isinstance(self.method, GateVPT)
        for index, (block, rope) in enumerate(zip(model.blocks, tables, strict=True)):
            kv = None
            if isinstance(self.method, CVPT):
                x = self.cross(index, block, x, rope)
            elif not gated or index == 0:
                tokens = torch.cat([x[:, :prefix], x[:, prefix + self.live :]], dim=1)
                rows, kv = self.made(index, tokens, first)
                x = torch.cat([tokens[:, :prefix], rows, tokens[:, prefix:]], dim=1)
                self.live = rows.shape[1]
            entered = x[:, prefix : prefix + self.live]
            with more_keys(kv):
                x = through(block, x, rope, self.live)
            if gated and index + 1 < len(model.blocks):
                g = self.trained[f"blocks.{index}.prompt_update.gate"].sigmoid()
                rows = g * x[:, prefix : prefix + self.live] + (1 - g) * entered
                x = torch.cat([x[:, :prefix], rows, x[:, prefix + self.live :]], 1)
            yield x


def pair(base: Any, method: Any, memory: str = "speed") -> tuple[Any, PlainPublished]:
    """Tune `base` in place; return it with its plain formulation (same prompts, same head)."""
    untouched = copy.deepcopy(base)
    tuned: Any = prompt_tune(base, method, memory=memory)
    redraw_prompts(tuned)
    if isinstance(method, E2VPT):
        tuned.prompt_shared.token_mask[1] = 0
        tuned.prompt_shared.piece_mask[0, 1] = 0
    return tuned, PlainPublished(untouched, method, tuned)
