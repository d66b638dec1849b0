"""Memory of a training step: bytes saved for backward without running it, and the peak on a GPU.

The bytes that autograd saves for the backward pass are counted on fake tensors, which have shapes
and dtypes but no values; that takes a fraction of a second for any batch size.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from vpt_fast.checks import check_model
from vpt_fast.methods import Method, VPTDeep
from vpt_fast.methods.baselines import Baseline
from vpt_fast.models.tuned import blocks_of, is_tuned
from vpt_fast.ops.memory_modes import MEMORY_MODES
from vpt_fast.reference.vit import check_compared, concatenated, require_gradient, without_prompts
from vpt_fast.tune import prompt_tune, remove_prompts

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EAGER = "eager"
PLAIN = "without prompts"
PROVIDERS = (EAGER, *MEMORY_MODES)
"""Implementations: eager PyTorch, and `prompt_tune(model, method, memory=...)` in each mode."""


@contextmanager
def provided(model: Any, method: Method, provider: str) -> Iterator[nn.Module]:
    """Yield a plain model as `provider` trains it with `method`.

    With 0 prompts the gradient still flows through every block from the method's first one on,
    because that block's norm1 is trained; not for LinearProbe, which needs no gradient there.

    Args:
        model: timm model that `prompt_tune` takes; its flags and modes are restored afterwards.
        method: Method to train.
        provider: One of `PROVIDERS`, or `PLAIN`: timm's own model without prompts, with the
            gradient flowing through all of its blocks.

    Yields:
        A module that maps images to logits, in training mode.

    Raises:
        TypeError, ValueError: If the model, the method or the provider is refused. Baselines other
            than LinearProbe are: they have no prompts that providers could compute differently.
    """
    if provider not in (*PROVIDERS, PLAIN):
        known = ", ".join(map(repr, (*PROVIDERS, PLAIN)))
        raise ValueError(f"provider is {provider!r}; choose one of {known}")
    check_compared(method)
    check_model(model, method)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    first = _first_block(method, len(blocks_of(model)))
    try:
        if provider == PLAIN:
            yield without_prompts(model)
        elif provider in MEMORY_MODES:
            prompt_tune(model, method, memory=provider)
            if first is not None:
                require_gradient(model, first)
            yield model.train()
        elif first is not None:
            yield without_prompts(model, first)
        else:
            yield concatenated(model, method)
    finally:
        if is_tuned(model):
            remove_prompts(model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _first_block(method: Method, depth: int) -> int | None:
    """Return the lowest block with a gradient for a method with 0 prompts; None for others."""
    if isinstance(method, Baseline) or method.num_prompts or method.prompted_blocks(depth):
        return None
    blocks = method.blocks if isinstance(method, VPTDeep) else None
    return min(blocks, default=0) if blocks is not None else 0


class _Handle:
    """Stand-in for a tensor that autograd saves; alive as long as the graph that needs it."""

    def __init__(self, tensor: Tensor) -> None:
        # A node that saves its own output would be kept alive by it.
        self.tensor = tensor.detach()


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the bytes that autograd saves for backward in the forward pass and loss of a step.

    Every storage counts once and in full, however many tensors share it; those of the model's
    parameters and buffers do not count.

    Args:
        model: Module that maps images to logits (B, classes).
        images: (B, channels, height, width), real or fake.
        labels: (B,) class indices.
    """
    handles: weakref.WeakSet[_Handle] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Handle:
        handle = _Handle(tensor)
        handles.add(handle)
        return handle

    with saved_tensors_hooks(pack, lambda handle: handle.tensor):
        loss = F.cross_entropy(model(images), labels)
    own = {_key(t) for t in (*model.parameters(), *model.buffers())}
    saved = {_key(handle.tensor): handle.tensor.untyped_storage().nbytes() for handle in handles}
    del loss  # frees the graph, which has held the saved tensors until here
    return sum(count for key, count in saved.items() if key not in own)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class SavedBytes:
    """Counter of the bytes saved for backward for any method, provider and batch size of a model.

    The CPU's dataflow is counted on fake tensors, with the whole model in one dtype.

    Args:
        model: Plain timm model on any device, the meta device included; it is copied without its
            values.
        input_size: Channels, height and width of the images.
        dtype: Dtype of parameters, buffers and images.
    """

    def __init__(
        self, model: nn.Module, input_size: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        self._mode = FakeTensorMode()
        self._input_size = input_size
        self._dtype = dtype
        with self._mode:
            # deepcopy treats the tensors in this memo as copied.
            copies = {id(t): self._fake(t) for t in (*model.parameters(), *model.buffers())}
        self._model = copy.deepcopy(model, copies)

    def _fake(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        fake = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    def bytes_of(self, method: Method, provider: str, batch_size: int) -> int:
        """Return the bytes that a training step saves for backward.

        Args:
            method: Method to train; with 0 prompts as in `provided`.
            provider: One of `PROVIDERS`, or `PLAIN`.
            batch_size: Number of images of the step.

        Raises:
            TypeError, ValueError: If `prompt_tune` refuses the model or the method, or one of the
                arguments is out of range.
        """
        with self._mode, provided(self._model, method, provider) as model:
            return saved_bytes(
                model, *step_inputs(batch_size, self._input_size, self._dtype, "cpu")
            )


class MeasuredPeaks:
    """Meter of the peak memory of a step for any method, provider and batch size of a model.

    Args:
        model: Plain timm model; moved to the device and the dtype, in place.
        input_size: Channels, height and width of the images.
        dtype: Dtype of parameters, buffers and images.
        device: CUDA device.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model = model.to(device, dtype)
        self._input_size = input_size
        self._dtype = dtype
        self._device = device

    def bytes_of(self, method: Method, provider: str, batch_size: int) -> int:
        """Return `measured_peak` in bytes; arguments and errors as in `SavedBytes.bytes_of`."""
        inputs = step_inputs(batch_size, self._input_size, self._dtype, self._device)
        with provided(self._model, method, provider) as model:
            return measured_peak(model, *inputs)


def step_inputs(
    batch_size: int,
    input_size: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Return images (batch_size, *input_size) of zeros and labels (batch_size,) in int64.

    Raises:
        ValueError: If `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    images = torch.zeros(batch_size, *input_size, dtype=dtype, device=device)
    return images, torch.zeros(batch_size, dtype=torch.int64, device=device)


def measured_peak(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the peak bytes of a training step on a CUDA device: max_memory_allocated.

    The peak includes all that PyTorch's allocator holds during a step (forward, cross-entropy,
    backward, SGD with momentum on the trained parameters): the weights, frozen ones too, images,
    tensors saved for backward, temporary tensors, gradients and momentum. It excludes the CUDA
    context, memory that the allocator reserves without using it, and memory of the first step only.

    Args:
        model: Module that maps images to logits (B, classes); on the device, in training mode.
        images: (B, channels, height, width), on the device.
        labels: (B,) class indices, on the device.

    Raises:
        ValueError: If the images are on no CUDA device.
        torch.OutOfMemoryError: The step does not fit.
    """
    device = images.device
    if device.type != "cuda":
        raise ValueError(f"images are on {device}; a peak can be measured on a CUDA device only")
    step = training_step(model, images, labels)
    step()  # compiles kernels, and allocates momentum and the libraries' workspaces
    gc.collect()  # earlier models in reference cycles would count
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that takes a step of SGD with momentum 0.9 and learning rate 0.

    Arguments are those of `measured_peak`, on any device.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
