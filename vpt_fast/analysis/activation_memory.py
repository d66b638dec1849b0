"""What a training step keeps in memory: counted without running it, and its peak on a GPU.

Counted are the bytes that autograd keeps for the backward pass. On fake tensors, which have shapes
and dtypes but no values, that takes a fraction of a second for any batch size.
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
from vpt_fast.ops.memory_modes import MEMORY_MODES
from vpt_fast.reference.vit import check_compared, concatenated, require_gradient, without_prompts
from vpt_fast.tune import prompt_tune, remove_prompts

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EAGER = "eager"
PLAIN = "without prompts"
PROVIDERS = (EAGER, *MEMORY_MODES)
"""Who trains a model: eager PyTorch, or `prompt_tune(model, method, memory=...)` in a mode."""


@contextmanager
def provided(model: Any, method: Method, provider: str) -> Iterator[nn.Module]:
    """A plain model as `provider` trains it with `method`, inside a with statement.

    With 0 prompts the gradient still flows through every block from the method's first one on, for
    which that block's norm1 is trained; not for LinearProbe, which needs no gradient there.

    Args:
        model: a timm model that `prompt_tune` takes; afterwards it has its flags and modes back.
        method: what to train.
        provider: one of `PROVIDERS`, or `PLAIN`: timm's own model without prompts, with the
            gradient flowing through all of its blocks.

    Yields:
        A module that maps images to logits, in training mode.

    Raises:
        TypeError, ValueError: the model, the method or the provider is refused; so are baselines
            but LinearProbe, which have no prompts that providers could compute differently.
    """
    if provider not in (*PROVIDERS, PLAIN):
        known = ", ".join(map(repr, (*PROVIDERS, PLAIN)))
        raise ValueError(f"provider is {provider!r}; choose one of {known}")
    check_compared(method)
    check_model(model, method)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    first = _first_block(method)
    tuned = provider in MEMORY_MODES
    try:
        if provider == PLAIN:
            yield without_prompts(model)
        elif tuned:
            prompt_tune(model, method, memory=provider)
            if first is not None:
                require_gradient(model, first)
            yield model.train()
        elif first is not None:
            yield without_prompts(model, first)
        else:
            yield concatenated(model, method)
    finally:
        if tuned:
            remove_prompts(model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _first_block(method: Method) -> int | None:
    """The block that the gradient reaches down to where there are no prompts to carry it there."""
    if method.num_prompts or isinstance(method, Baseline):
        return None
    blocks = method.blocks if isinstance(method, VPTDeep) else None
    return min(blocks, default=0) if blocks is not None else 0


class _Handle:
    """What autograd holds in place of a tensor; alive as long as the graph that needs it."""

    def __init__(self, tensor: Tensor) -> None:
        # A node that saves its own output would be kept alive by it.
        self.tensor = tensor.detach()


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that autograd keeps for backward after the forward pass and the loss of one step.

    Every storage counts once and whole, however many tensors share it; those of the model's
    parameters and buffers do not count.

    Args:
        model: maps images to logits (B, classes).
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
    kept = {_key(handle.tensor): handle.tensor.untyped_storage().nbytes() for handle in handles}
    del loss  # with it goes the graph, which until here has held what backward needs
    return sum(count for key, count in kept.items() if key not in own)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class SavedBytes:
    """Counts the bytes kept for backward for any method, provider and batch size of one model.

    What is counted is the dataflow of the CPU on fake tensors, with the whole model in one dtype.

    Args:
        model: a plain timm model on any device, the meta device included; it is copied, without
            its values.
        input_size: channels, height and width of the images.
        dtype: of parameters, buffers and images.
    """

    def __init__(
        self, model: nn.Module, input_size: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        self._mode = FakeTensorMode()
        self._input_size = input_size
        self._dtype = dtype
        with self._mode:
            # deepcopy takes what it finds here for copies that it has made already.
            copies = {id(t): self._fake(t) for t in (*model.parameters(), *model.buffers())}
        self._model = copy.deepcopy(model, copies)

    def _fake(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        fake = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    def bytes_of(self, method: Method, provider: str, batch_size: int) -> int:
        """Bytes kept for backward by one training step.

        Args:
            method: what is trained; 0 prompts as `provided` has them.
            provider: one of `PROVIDERS`, or `PLAIN`.
            batch_size: images of the step.

        Raises:
            TypeError, ValueError: `prompt_tune` refuses the model or the method, or one of the
                arguments is out of range.
        """
        with self._mode, provided(self._model, method, provider) as model:
            return saved_bytes(
                model, *step_inputs(batch_size, self._input_size, self._dtype, "cpu")
            )


class MeasuredPeaks:
    """Measures the peak of a training step for any method, provider and batch size of one model.

    Args:
        model: a plain timm model; it is moved to the device and the dtype, in place.
        input_size: channels, height and width of the images.
        dtype: of parameters, buffers and images.
        device: a CUDA device.
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
        """`measured_peak` in bytes; arguments and errors as those of `SavedBytes.bytes_of`."""
        inputs = step_inputs(batch_size, self._input_size, self._dtype, self._device)
        with provided(self._model, method, provider) as model:
            return measured_peak(model, *inputs)


def step_inputs(
    batch_size: int,
    input_size: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Images (batch_size, *input_size) of zeros in `dtype`, and labels (batch_size,) in int64.

    Raises:
        ValueError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    images = torch.zeros(batch_size, *input_size, dtype=dtype, device=device)
    return images, torch.zeros(batch_size, dtype=torch.int64, device=device)


def measured_peak(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Peak bytes of a training step on a CUDA device: torch.cuda.max_memory_allocated.

    In it is all that PyTorch's allocator holds at the worst moment of a step (forward,
    cross-entropy, backward, SGD with momentum on what is trained): the weights, frozen ones too,
    images, everything kept for backward, temporary tensors, gradients and momentum. Not in it are
    the CUDA context, memory that the allocator reserves without using it, and what only a first
    step takes.

    Args:
        model: maps images to logits (B, classes); on the device, in training mode.
        images: (B, channels, height, width), on the device.
        labels: (B,) class indices, on the device.

    Raises:
        ValueError: the images are on no CUDA device.
        torch.OutOfMemoryError: the step does not fit.
    """
    device = images.device
    if device.type != "cuda":
        raise ValueError(f"images are on {device}; a peak can be measured on a CUDA device only")
    step = training_step(model, images, labels)
    step()  # compiles kernels, and makes momentum and the libraries' workspaces
    gc.collect()  # what earlier models left in reference cycles would count
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A whole step that leaves the weights as they are: SGD with momentum 0.9, learning rate 0.

    Arguments as those of `measured_peak`, on any device.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
