"""Models that are traced: by torch.fx, in whose graph what is not made of its proxies becomes one
node, and not by torch.jit."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from vpt_fast.models.tuned import reads_feature
from vpt_fast.modules.prompt_module import Made
from vpt_fast.ops.tracing import is_transformed


def runs_plainly(x: Any) -> bool:
    """Return whether a model has to be made of PyTorch's operators in this call.

    Args:
        x: Its input.

    Raises:
        ValueError: Under torch.jit.trace, whose sizes are tensors.
    """
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise ValueError(
            "a tuned model cannot be traced by torch.jit.trace; trace vpt_fast.bake(model), or "
            "call torch.export.export"
        )
    return is_transformed() or isinstance(x, Proxy)


def without_masks(x: Any, attn_mask: Any, is_causal: Any) -> tuple[Any, Any, Any]:
    """Return a model's arguments for fx's tracer, in whose graph masks are refused when it runs.

    Elsewhere the arguments are returned as they are.
    """
    if not isinstance(attn_mask, Proxy):
        return x, attn_mask, is_causal
    args = (x, attn_mask, is_causal)
    return x.tracer.create_proxy("call_function", refused_masks, args, {}), None, False


def refused_masks(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return x; raise ValueError if there is a mask, which fx's graph does not have."""
    if isinstance(x, Proxy):  # a graph that is traced again
        return without_masks(x, attn_mask, is_causal)[0]
    if attn_mask is not None or is_causal:
        raise ValueError(
            "a graph that torch.fx traced takes neither attn_mask nor is_causal=True; call the "
            "model that was traced"
        )
    return x


def made_symbolically(prompt: Any, x: Any, feature: Any) -> Made:
    """Return proxies of a block's prompts; the graph calls the module's `made`.

    Args:
        prompt: Module of the prompts, in a model that is traced.
        x: Input of the block, a proxy.
        feature: What the method's shared module made of the image, or None.
    """
    tracer: Any = x.tracer
    module = tracer.create_proxy("get_attr", tracer.path_of_module(prompt), (), {})
    both = tracer.create_proxy("call_function", made_of, (module, x, feature), {})
    rows, kv = (tracer.create_proxy("call_function", getitem, (both, i), {}) for i in (0, 1))
    return Made(rows if prompt.num_rows else None, kv if prompt.num_keys else None)


def made_of(prompt: Any, x: Tensor, feature: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return rows (B or 1, p, D) and keys and values (B or 1, n, 2, H, d) of a block's prompts."""
    if isinstance(x, Proxy):  # a graph that is traced again
        made = made_symbolically(prompt, x, feature)
        return made.rows, made.kv
    owner = vars(prompt).get("_owner", (None,))[0]
    blocks = () if owner is None else getattr(owner, "blocks", ())
    if blocks and all(block._modules.get("prompt") is not prompt for block in blocks):
        raise ValueError(
            "this graph was traced with an adapter that is not active now; call set_adapter, or "
            "trace the model again"
        )
    found: Made = prompt.made(x, feature)
    return found.rows, found.kv


def called_symbolically(module: nn.Module, x: Any, **more: Any) -> Any:
    """Return a proxy of a module's output; the graph calls the module as a whole.

    Args:
        module: Module of a model that is traced.
        x: Its input, a proxy.
        **more: Other arguments.
    """
    tracer: Any = x.tracer

    def node(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)

    # By the tracer, which may name nodes by the module that is called.
    return tracer.call_module(module, node, (x,), more)


def through_blocks_symbolically(stage: Any, x: Proxy) -> Any:
    """Return a proxy of the output of a tuned Swin's stage, in whose graph a block is one node.

    Raises:
        ValueError: If something passes from block to block beside the tokens.
    """
    passing = any(block.rows.entering or block.rows.leaving for block in stage.blocks)
    if passing or reads_feature(stage.blocks):
        raise ValueError(
            "torch.fx cannot trace a Swin whose prompt rows or features pass from block to block "
            "beside the tokens; use forward_intermediates, or hooks"
        )
    for block in stage.blocks:
        x = called_symbolically(block, x)
    return x
