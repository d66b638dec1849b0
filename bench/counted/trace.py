"""What a training step launches, and what each launch reads, writes and computes, counted.

    with traced() as ops:
        F.cross_entropy(model(images), labels).backward()

Nothing is run on a GPU, and tensors may be fake: a step of any batch size takes seconds. The rules:

- Every PyTorch operator that is neither a view nor an allocation is one launch. It reads its
  arguments and writes its results once each; in place, it does both with the same memory.
- An expanded dimension (stride 0) counts once, and so does an argument that is given twice.
- A matrix product with a bias vector is one launch (the bias is added in its epilogue); one that
  adds a matrix copies it first. The gradient of a slice is zeros and a copy.
- Fused attention is FlashAttention-2 (arXiv 2307.08691): one launch forward, three backward, of
  which only the arguments and results count, not the fp32 sums of dQ between them. Products: two
  forward, five backward, 2 M N d FLOP each per head.
- Operators of vpt_fast go through the launchers of the kernels; a launch is recorded instead of
  made, with what `bench.counted.declared` declares. Values are therefore meaningless.
- Only matrix products have FLOP: multiplications and additions.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.counted.declared import declared, product_flop
from vpt_fast.kernels.runtime.launch import Launch
from vpt_fast.ops.tracing import PLAIN

KINDS = ("gemm", "attention", "elementwise")
"""Matrix products; attention; everything else, that is, passes over memory."""

_NO_LAUNCH = ("empty", "new_empty", "detach", "_unsafe_view", "alias", "lift_fresh")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_ATTENTION = "_scaled_dot_product_"
_OVERWRITES = ("copy_", "fill_", "zero_", "uniform_", "normal_", "bernoulli_")
_OUR_ATTENTION = (
    "forward", "dq", "delta", "token_dkdv", "shared_prompt_dkdv", "prompt_dkdv",
    "window_forward", "window_forward_tiled", "window_backward", "window_backward_dbias",
    "window_dq", "window_delta", "window_dkdv", "window_dbias",
    "ragged_forward",
)  # fmt: skip
_OUR_PRODUCTS = ("mix", "mix_backward", "weight_gradient", "grouped_heads")


@dataclass(frozen=True)
class Region:
    """Memory that a launch accesses.

    Attributes:
        storage: Identifies the allocation; unique within a trace.
        layout: Offset and (stride, size) of the dimensions, merged where they are contiguous.
        nbytes: Distinct bytes accessed.
        whole: Bytes of the allocation.
    """

    storage: int
    layout: tuple[Any, ...]
    nbytes: int
    whole: int


@dataclass(frozen=True)
class Op:
    """One PyTorch operator, or one launch of a Triton kernel.

    Attributes:
        name: Name of the operator or kernel.
        kind: One of `KINDS`.
        reads: Memory that it reads.
        writes: Memory that it writes.
        flop: Multiplications and additions of its matrix products.
        launches: Number of kernels.
        ours: Whether it is a Triton kernel of vpt_fast.
        fp32: Whether its products have fp32 operands, which tensor cores do not take.
    """

    name: str
    kind: str
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]
    flop: int = 0
    launches: int = 1
    ours: bool = False
    fp32: bool = False

    @property
    def bytes_read(self) -> int:
        """Distinct bytes read."""
        return distinct_bytes(self.reads)

    @property
    def bytes_written(self) -> int:
        """Distinct bytes written."""
        return distinct_bytes(self.writes)

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


def distinct_bytes(regions: Iterable[Region]) -> int:
    """Return the bytes of regions, equal ones once, and at most those of each allocation."""
    found: dict[int, dict[tuple[Any, ...], Region]] = {}
    for region in regions:
        found.setdefault(region.storage, {})[region.layout] = region
    return sum(
        min(sum(r.nbytes for r in parts.values()), max(r.whole for r in parts.values()))
        for parts in found.values()
    )


def counts(ops: Iterable[Op]) -> Counter[str]:
    """Return launches by name."""
    found: Counter[str] = Counter()
    for op in ops:
        found[op.name] += op.launches
    return found


def _layout(tensor: Tensor) -> tuple[tuple[Any, ...], int]:
    """Return offset and merged (stride, size) of a tensor, and its distinct bytes."""
    if tensor.numel() == 0:
        return (), 0
    dims = sorted(
        ((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and s > 0),
        reverse=True,
    )
    merged: list[tuple[int, int]] = []
    for stride, size in dims:
        if merged and merged[-1][0] == stride * size:
            merged[-1] = stride, merged[-1][1] * size
        else:
            merged.append((stride, size))
    nbytes = math.prod(size for _, size in merged) * tensor.element_size()
    return (tensor.storage_offset(), tensor.element_size(), *merged), nbytes


class _Storages:
    """Identifiers of allocations; reused memory gets a new one."""

    def __init__(self) -> None:
        self._names: dict[int, int] = {}
        self._next = 0

    def name(self, tensor: Tensor, fresh: bool = False) -> int:
        key = tensor.untyped_storage()._cdata
        if fresh or key not in self._names:
            self._names[key] = self._next
            self._next += 1
        return self._names[key]

    def regions(self, tensors: Iterable[Tensor]) -> tuple[Region, ...]:
        found = []
        for tensor in tensors:
            layout, nbytes = _layout(tensor)
            if nbytes:
                whole = tensor.untyped_storage().nbytes()
                found.append(Region(self.name(tensor), layout, nbytes, whole))
        return tuple(found)


def regions_of(tensors: Iterable[Tensor]) -> tuple[Region, ...]:
    """Return the memory of tensors that exist at the same time, without empty ones."""
    return _Storages().regions(tensors)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _attention_flop(name: str, args: Sequence[Any]) -> int:
    """Return the FLOP of fused attention over (B, H, rows, d)."""
    backward = "backward" in name
    q, k = args[1:3] if backward else args[:2]
    return (10 if backward else 4) * math.prod(q.shape) * k.shape[-2]


def _in_fp32(tensors: Sequence[Tensor]) -> bool:
    return bool(tensors) and tensors[0].dtype == torch.float32


class Trace(TorchDispatchMode):
    """Records PyTorch operators and launches of vpt_fast while it is active.

    Attributes:
        ops: Recorded operators, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self._storages = _Storages()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "vpt_fast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        given = _tensors((args, kwargs))
        held = {t.untyped_storage()._cdata for t in given}
        result = func(*args, **kwargs)
        new = [t for t in _tensors(result) if t.untyped_storage()._cdata not in held]
        for tensor in new:
            self._storages.name(tensor, fresh=True)
        name = func.overloadpacket.__name__
        if _tensors(result) and not func.is_view and not name.startswith(_NO_LAUNCH):
            self._record(func, name, args, kwargs, given, new, result)
        return result

    def _record(
        self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor],
        new: list[Tensor], result: Any,
    ) -> None:  # fmt: skip
        arguments = func._schema.arguments
        named = [*zip(arguments, args, strict=False)]
        named += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        changed, unread = [], set()
        for argument, value in named:
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed += _tensors(value)
                if argument.is_out or name in _OVERWRITES:
                    unread |= {id(t) for t in _tensors(value)}
        reads = self._storages.regions(t for t in given if id(t) not in unread)
        writes = self._storages.regions([*new, *changed])
        if not writes:
            return
        if name in ("slice_backward", "select_backward"):
            self.ops.append(Op(name, "elementwise", (), writes))
            (grad,), (whole,) = reads, writes
            part = Region(whole.storage, (name, *grad.layout), grad.nbytes, whole.whole)
            self.ops.append(Op(name, "elementwise", reads, (part,)))
        elif name.startswith(_ATTENTION):
            launches = 3 if "backward" in name else 1
            flop = _attention_flop(name, args)
            self.ops.append(
                Op(name, "attention", reads, writes, flop, launches, fp32=_in_fp32(given))
            )
        elif name in _PRODUCTS:
            if name in ("addmm", "baddbmm") and args[0].ndim >= 2:
                added = self._storages.regions([args[0]])
                self.ops.append(Op("copy_", "elementwise", added, writes))
                reads = (*self._storages.regions(args[1:3]), *writes)
            flop = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            self.ops.append(Op(name, "gemm", reads, writes, flop, fp32=_in_fp32(given)))
        else:
            self.ops.append(Op(name, "elementwise", reads, writes))

    def record_launch(self, launch: Launch) -> None:
        """Record a launch as it is declared."""
        kind = "elementwise"
        if launch.name in _OUR_ATTENTION:
            kind = "attention"
        elif launch.name in _OUR_PRODUCTS:
            kind = "gemm"
        touched = declared(launch)
        first = next(t for t in launch.arguments.values() if isinstance(t, Tensor))
        self.ops.append(
            Op(
                launch.name,
                kind,
                self._storages.regions(touched.loads),
                self._storages.regions(touched.stores),
                product_flop(launch),
                ours=True,
                fp32=_in_fp32([first]),
            )
        )


@contextlib.contextmanager
def traced() -> Iterator[list[Op]]:
    """Record what runs inside as it would run on a GPU; the list grows as it does.

    Tensors on the CPU, fake or real, stand in for those of a GPU. Fake ones have no addresses: they
    count as aligned, and as parts of one allocation if they share a storage.
    """
    trace = Trace()
    ours = [module for name, module in sys.modules.items() if name.startswith("vpt_fast.")]
    # Count what runs without tracing, and treat fake tensors as plain ones.
    stand_ins = {
        "uses_kernels": lambda *_: True,
        "is_traced": lambda _: False,
        "PLAIN": (*PLAIN, FakeTensor),
        "_address": lambda tensor: tensor.data_ptr(),
    }
    storage_pointer = torch.UntypedStorage.data_ptr

    def pointer(storage: Any) -> int:
        return storage_pointer(storage) if storage.device.type != "meta" else storage._cdata

    def record(launch: Launch) -> None:
        trace.record_launch(launch)

    with contextlib.ExitStack() as stack:
        for module in ours:
            for name in stand_ins.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, stand_ins[name]))
        stack.enter_context(mock.patch.object(Launch, "run", record))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", lambda _: 0, create=True))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "data_ptr", pointer))
        stack.enter_context(trace)
        yield trace.ops
