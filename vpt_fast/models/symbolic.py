"""Models that torch.fx traces: what is not made of its proxies becomes one node of the graph."""

from __future__ import annotations

from operator import getitem
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from vpt_fast.modules.prompt_module import Made


def made_symbolically(prompt: Any, x: Proxy, feature: Any) -> Made:
    """Return proxies of a block's prompts; the graph calls the module's `made`.

    Args:
        prompt: Module of the prompts, in a model that is traced.
        x: Input of the block.
        feature: What the method's shared module made of the image, or None.
    """
    tracer: Any = x.tracer
    module = tracer.create_proxy("get_attr", tracer.path_of_module(prompt), (), {})
    both = tracer.create_proxy("call_function", made_of, (module, x, feature), {})
    rows, kv = (tracer.create_proxy("call_function", getitem, (both, i), {}) for i in (0, 1))
    return Made(rows if prompt.num_rows else None, kv if prompt.num_keys else None)


def made_of(prompt: Any, x: Tensor, feature: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return rows (B or 1, p, D) and keys and values (B or 1, n, 2, H, d) of a block's prompts."""
    found: Made = prompt.made(x, feature)
    return found.rows, found.kv


def called_symbolically(module: nn.Module, x: Proxy, **more: Any) -> Any:
    """Return a proxy of a module's output; the graph calls the module as a whole.

    Args:
        module: Module of a model that is traced.
        x: Its input.
        **more: Other arguments.
    """
    tracer: Any = x.tracer

    def node(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)

    # By the tracer, which may name nodes by the module that is called.
    return tracer.call_module(module, node, (x,), more)
