"""Projections of timm's attention modules: q, k, v of tokens, and K_p, V_p of prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.models.interop.quantised import dequantised, is_plain_linear, linear_part
from vpt_fast.modules.hooks import has_hooks, has_own_forward
from vpt_fast.ops.rowwise.rotation import rotated


def is_normed(attn: Any) -> bool:
    """Return whether an attention normalises its queries or keys."""
    return not (_does_nothing(attn.q_norm) and _does_nothing(attn.k_norm))


def _does_nothing(norm: nn.Module) -> bool:
    return type(norm) is nn.Identity and not has_hooks(norm) and not has_own_forward(norm)


def computes_as_timms(attn: Any, head_dim: int) -> bool:
    """Return whether an attention's scale and heads are those of timm's forward.

    timm's fused attention ignores `scale`: PyTorch scales by 1 / sqrt(head_dim). A scale that
    `fold_backbone` set is equivalent to that.
    """
    own = vars(attn)
    if own.get("head_dim", head_dim) != head_dim:
        return False
    return not own["fused_attn"] or own["scale"] == own.get("folded_scale", head_dim**-0.5)


def check_attention(attn: Any, head_dim: int) -> None:
    """Raise ValueError if an attention has active dropout, or a scale that timm would ignore.

    Args:
        attn: timm's Attention or WindowAttention.
        head_dim: Channels of a head in the output of the qkv projection.
    """
    dropout = getattr(attn.attn_drop, "p", 0.0)
    if dropout and (attn.training or attn.attn_drop.training):
        raise ValueError(
            f"attention dropout {dropout} is active, but prompt attention has none; keep the "
            "frozen blocks in eval mode, as model.train() does"
        )
    if not computes_as_timms(attn, head_dim):
        raise ValueError(
            f"attention with scale {attn.scale} and {attn.num_heads} heads of {head_dim} channels "
            f"is not what timm's fused attention computes, which scales by {head_dim**-0.5:.6g}; "
            "put the scale into the weights of the queries, or set num_heads and head_dim back"
        )


def reads_plainly(linear: nn.Module) -> bool:
    """Return whether a projection is a plain Linear, whose rows can be used in part.

    Others, an adapter of low rank or a Linear with quantised weights, are called whole.
    """
    return is_plain_linear(linear) and not has_own_forward(linear)


def projections_of(attn: Any) -> list[Any]:
    """Return the projections of an attention's input: one to q, k and v, or three."""
    parts = attn._modules
    qkv = parts.get("qkv")
    return [qkv] if qkv is not None else [parts[name] for name in ("q_proj", "k_proj", "v_proj")]


def weights_of(attn: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight (A, D) and bias (A,) of the projections to queries, keys and values."""
    pairs = [(dequantised(linear.weight), linear.bias) for linear in projections_of(attn)]
    if len(pairs) > 1:
        return pairs
    bias = _packed_bias(attn)
    biases: Any = (None,) * 3 if bias is None else bias.chunk(3)
    return list(zip(pairs[0][0].chunk(3), biases, strict=True))


def _packed_bias(attn: Any) -> Tensor | None:
    """Return the bias (3 A,) of a packed projection that is a plain Linear."""
    added, own = _added_bias(attn), attn.qkv.bias
    return own if added is None else added


def _added_bias(attn: Any) -> Tensor | None:
    """Return the bias (3 A,) that timm's EvaAttention has in three parts; None without one."""
    if attn._parameters.get("q_bias") is None:
        return None
    return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def projected(attn: Any, x: Tensor, part: slice) -> Tensor:
    """Return columns `part` of the projection of x (..., D) to [q | k | v], past its hooks.

    Where there is a projection for each of them, `part` covers whole ones.
    """
    linears = projections_of(attn)
    qkv = linears[0]
    if len(linears) > 1:
        width = linears[0].out_features
        chosen = linears[(part.start or 0) // width : (part.stop or 3 * width) // width]
        return torch.cat([linear.forward(x) for linear in chosen], -1)
    if not (reads_plainly(qkv) or _bypasses(attn)):
        whole: Tensor = qkv.forward(x)
        added = _added_bias(attn)
        return (whole if added is None else whole + added)[..., part]
    return linear_part(x, qkv.weight, _packed_bias(attn), part)


def _bypasses(attn: Any) -> bool:
    """Return whether timm multiplies with the weight of `qkv`, past the module."""
    return attn._parameters.get("q_bias") is not None and not attn.qkv_bias_separate


def projected_queries(attn: Any, rows: Tensor, rope: Tensor | None) -> Tensor:
    """Return queries (B, M, H, d) of normalised rows (B, M, D), past the projection's hooks.

    They are normed, and those of the last rows rotated by the table `rope`, where there is one.
    """
    heads = (attn.num_heads, attn.head_dim)
    q = projected(attn, rows, slice(0, attn.num_heads * attn.head_dim)).unflatten(-1, heads)
    normed: Tensor = attn.q_norm(q)
    if rope is None:
        return normed
    return rotated(normed, rope, getattr(attn, "rotate_half", False)).to(rows.dtype)


def _packed(attn: Any, x: Tensor) -> Tensor:
    """Return the packed projection (B, N, 3 A) of x (B, N, D), with the hooks that timm calls."""
    if _bypasses(attn):
        return F.linear(x, attn.qkv.weight, _packed_bias(attn))
    qkv, bias = attn.qkv(x), _added_bias(attn)
    return qkv if bias is None else qkv + bias


def attention_tokens(
    attn: Any,
    x: Tensor,
    queries: Tensor | None = None,
    rope: Tensor | None = None,
    query_rope: Tensor | None = None,
    values: bool = True,
) -> list[Tensor]:
    """Return q, k, v of normalised tokens, packed as `vpt_fast.ops.attention` takes them.

    Args:
        attn: timm's Attention, EvaAttention or AttentionRope.
        x: Normalised tokens (B, N, D).
        queries: Normalised query rows (B, M, D); None takes those of x.
        rope: Table of the rotary position embedding of the last rows of x, or None.
        query_rope: That of the last rows of `queries`, or None.
        values: Whether v is needed.

    Returns:
        [qkv (B, N, 3, H, d)], [q (B, M, H, d), kv (B, N, 2, H, d)], or q, k and v apart; [q, k]
        without `values`.
    """
    heads, dim = attn.num_heads, attn.head_dim
    width, parts = heads * dim, 1 + values
    if attn._modules.get("qkv") is None:
        rows = x if queries is None else queries
        q, k = attn.q_proj(rows), attn.k_proj(x)
        tokens = [t.unflatten(-1, (heads, dim)) for t in (q, k, *([attn.v_proj(x)] * values))]
    elif queries is None:
        tokens = [_packed(attn, x).unflatten(-1, (3, heads, dim))]
    else:
        q = projected(attn, queries, slice(0, width)).unflatten(-1, (heads, dim))
        kv = projected(attn, x, slice(width, (1 + parts) * width)).unflatten(
            -1, (parts, heads, dim)
        )
        tokens = [q, kv]
    if values and len(tokens) < 3 and rope is None and not is_normed(attn):
        return tokens
    q, k, *v = _apart(tokens)
    normed = [attn.q_norm(q), attn.k_norm(k)]
    if rope is not None:  # as timm, in the dtype of the values
        half = attn.rotate_half
        tables = rope if queries is None else query_rope, rope
        normed = [
            rotated(t, table, half).to(k.dtype) for t, table in zip(normed, tables, strict=True)
        ]
    return [*normed, *v]


def _apart(tokens: list[Tensor]) -> list[Tensor]:
    """Return q, k and v (B, rows, H, d) apart."""
    return [part for t in tokens for part in (t.unbind(2) if t.ndim == 5 else (t,))]


def projected_kv(attn: Any, prompts: Tensor, head_dim: int) -> Tensor:
    """Return K_p, V_p = P W_k + b_k, P W_v + b_v of normalised prompts, before any k_norm.

    Args:
        attn: timm's Attention, EvaAttention, AttentionRope or WindowAttention.
        prompts: Normalised prompts P (B or 1, p, D).
        head_dim: Channels d of a head.

    Returns:
        Keys and values (B or 1, p, 2, H, d).
    """
    kv = projected(attn, prompts, slice(attn.num_heads * head_dim, None))
    return kv.unflatten(-1, (2, attn.num_heads, head_dim))


def prompt_keys_values(attn: Any, prompts: Tensor, values: bool = True) -> list[Tensor]:
    """Return K_p, V_p of normalised prompts, packed as `vpt_fast.ops.attention` takes them.

    Args:
        attn: timm's Attention, EvaAttention or AttentionRope.
        prompts: Normalised prompts (B or 1, p, D).
        values: Whether V_p is needed.

    Returns:
        [kv (B or 1, p, 2, H, d)], or k and v apart; [k] without `values`.
    """
    if not values:
        width = attn.num_heads * attn.head_dim
        k = projected(attn, prompts, slice(width, 2 * width))
        return [attn.k_norm.forward(k.unflatten(-1, (attn.num_heads, attn.head_dim)))]
    kv = projected_kv(attn, prompts, attn.head_dim)
    if _does_nothing(attn.k_norm):
        return [kv]
    k, v = kv.unbind(2)
    return [attn.k_norm.forward(k), v]


def packed_prompts(attn: Any, prompts: Tensor) -> Tensor:
    """Return K_p, V_p of normalised prompts as one tensor (B or 1, p, 2, H, d)."""
    kv = prompt_keys_values(attn, prompts)
    return kv[0] if len(kv) == 1 else torch.stack(kv, 2)


def projected_out(attn: Any, out: Tensor, rows: Tensor) -> Tensor:
    """Return an attention's output after its norm and gate, if it has them, and its projection.

    Args:
        attn: timm's attention.
        out: Weighted sums of values (B, M, H * d).
        rows: Normalised query rows (B, M, D), which a gate reads.
    """
    norm, gate = attn._modules.get("norm"), attn._modules.get("gate")
    out = out if norm is None else norm(out)
    if gate is not None:
        out = out * gate(rows).sigmoid()
    result: Tensor = attn.proj_drop(attn.proj(out))
    return result
