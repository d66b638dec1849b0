"""`PromptBank`: one frozen backbone that answers for many tasks, mixed in one batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vpt_fast.bank.batch_index import index_batch
from vpt_fast.bank.memory import BankMemory, Resident, State
from vpt_fast.bank.read_task import Backbone, BankTask, TaskTensors, read_task
from vpt_fast.bank.shared_pass import features
from vpt_fast.bank.task_experts import TaskExperts
from vpt_fast.checks import check_model
from vpt_fast.methods.baselines import LinearProbe
from vpt_fast.modules.experts import check_grid
from vpt_fast.modules.hooks import has_hooks, has_own_forward
from vpt_fast.ops.backend import computing_dtype
from vpt_fast.ops.rowwise.grouped_heads import grouped_heads


class PromptBank:
    """Adapters of one frozen backbone, ready to answer for images of any of them.

    Prompt keys and values that do not depend on the image are computed once, when a task is added,
    and cached; for VAPT (arXiv 2501.18936) these are the ones of block 0, and the experts of the
    later blocks are computed per call, each image with the weights of its own task. All prompt keys
    and values lie in one buffer, where each image reads its own at their row offsets, and all heads
    lie in another. An image's logits do not depend on the other images and tasks of the batch,
    except for rounding.

    A bank may be called, and added to, from several threads at once. Its model must not be
    changed: cached keys and values belong to the weights that the model had when they were
    computed. The bank calls parts of the model and bypasses others; hooks on the model, its blocks
    and attentions are refused.

    Args:
        model: Plain timm VisionTransformer (or the distilled one) or Eva; frozen and put into eval
            mode.
            Its own head is not used. Move it to its device and dtype before; under autocast to
            another dtype the tasks of each batch are rounded in each call.
        memory_limit: Bytes of device memory that the tasks may take, heads included, the backbone
            and a call's activations excluded; None for no limit. Buffers that are full or too
            fragmented for the next task are replaced, and take up to twice their size meanwhile.
        spill: Whether to evict the least recently used tasks when memory is full, and to read them
            from their files again when they are asked for. Their adapters must neither move nor
            change.

    Raises:
        TypeError: If `model` is of another class, or an argument of a wrong type.
        ValueError: If `model` is tuned, or something in it cannot be honoured.
    """

    def __init__(
        self, model: nn.Module, memory_limit: int | None = None, spill: bool = False
    ) -> None:
        _check_arguments(model, memory_limit, spill)
        self._model: Any = model.eval().requires_grad_(False)
        self._check_model()
        self._backbone = Backbone(self._model)
        self._lock = threading.Lock()  # guards changes; calls hold it briefly
        with _plain_tensors():
            self._memory = BankMemory(self._backbone, memory_limit, spill)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a bank cannot be copied; make a new one and add its tasks' adapters")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were added."""
        return tuple(self._memory.state.tasks)

    @property
    def resident_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are in memory: all of them without `spill`."""
        state = self._memory.state
        return tuple(name for name in state.tasks if name in state.residents)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the bank takes for its tasks, heads included.

        Free rows that are reserved for the next tasks count too.
        """
        return self._memory.state.nbytes

    def task(self, name: str) -> BankTask:
        """Return the name, method, classes and inputs of a task.

        Raises:
            ValueError: If there is no such task.
        """
        return self._memory.state.find(name)

    def add(self, name: str, directory: str | os.PathLike[str]) -> BankTask:
        """Add the task of an adapter; running calls continue without it.

        Args:
            name: Name that is not in use yet.
            directory: Folder that `save_adapter` wrote, for this backbone; tuned with `LinearProbe`
                or any prompt method in all or the last blocks, but for those whose prompt rows live
                on, and CVPT.

        Returns:
            The task.

        Raises:
            FileNotFoundError: If there is no adapter.
            TypeError: If `name` is no string.
            ValueError: If the name is empty or in use; the adapter is damaged, has values that are
                not finite, is of another backbone or of a method that no bank holds; or it does not
                fit into `memory_limit`. The bank is unchanged then.
        """
        if not isinstance(name, str):
            raise TypeError(f"a task's name must be a string, got {name!r}")
        if not name:
            raise ValueError("a task's name must not be empty")
        self._check_new(name)
        task, tensors = self._read(name, Path(directory).absolute())
        with self._lock, _plain_tensors():
            self._check_new(name)
            self._memory.put(task, tensors, frozenset())
        return task

    def _check_new(self, name: str) -> None:
        if name in self._memory.state.tasks:
            raise ValueError(f"the bank has a task {name!r} already; remove it first")

    def _read(self, name: str, directory: Path) -> tuple[BankTask, TaskTensors]:
        with _plain_tensors():
            return read_task(self._backbone, name, directory)

    def remove(self, name: str) -> None:
        """Remove a task; its memory is reused once running calls have ended.

        Raises:
            ValueError: If there is no such task.
        """
        with self._lock:
            self._memory.state.find(name)
            self._memory.forget(name)

    @torch.no_grad()
    def __call__(self, images: Tensor, tasks: Iterable[str]) -> list[Tensor]:
        """Return the logits of images, each for a task of its own.

        Args:
            images: (B, channels, height, width), on the model's device, prepared as `inputs` of
                each image's task says.
            tasks: Names of B tasks, in any combination and order.

        Returns:
            Logits (num_classes,) of each image's task; views of one tensor.

        Raises:
            TypeError: If `tasks` is one string, or `images` no tensor.
            ValueError: If a task is unknown, the numbers of names and images differ, a task's
                experts were tuned for another image size, the tasks do not fit into memory
                together, an adapter has changed since its task was evicted, or the model is hooked
                or in training mode.
            FileNotFoundError: If the adapter of an evicted task is missing.
        """
        if isinstance(tasks, str):
            raise TypeError(f"tasks must name one task per image, got the string {tasks!r}")
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        names = list(tasks)
        if images.ndim != 4 or len(images) != len(names):
            raise ValueError(
                f"images {tuple(images.shape)} and {len(names)} tasks do not fit: images must be "
                "(B, channels, height, width), with B names"
            )
        self._check_model()
        if not names:
            return []
        state = self._state_with(names)
        residents = [state.residents[name] for name in names]
        self._check_grid(images, residents)
        rounded = computing_dtype(self._backbone.like)
        index = index_batch(state, residents, self._backbone.depth, rounded)
        pooled = features(self._model, images, index)
        flat = grouped_heads(
            pooled.to(index.head_weight.dtype), index.head_weight, index.head_bias,
            index.heads[0], index.heads[1], index.heads[2],
            sum(index.classes), max(index.classes),
        )  # fmt: skip
        return list(flat.split(index.classes))

    def _state_with(self, names: Sequence[str]) -> State:
        """Return a state in which all these tasks are in memory."""
        wanted = dict.fromkeys(names)
        # Keyed by object, which its entry keeps alive: another task may take the name meanwhile.
        loaded: dict[int, tuple[BankTask, TaskTensors]] = {}
        while True:
            with self._lock, _plain_tensors():
                state = self._memory.state
                tasks = [state.find(name) for name in wanted]
                missing = [task for task in tasks if task.name not in state.residents]
                if all(id(task) in loaded for task in missing):
                    for task in missing:
                        self._memory.put(*loaded[id(task)], frozenset(wanted))
                    self._memory.touch(wanted)
                    return self._memory.state
            # Files are read without the lock; the next round sees what others changed meanwhile.
            for task in missing:
                if id(task) not in loaded:
                    loaded[id(task)] = task, self._read_again(task)

    def _read_again(self, known: BankTask) -> TaskTensors:
        task, tensors = self._read(known.name, known.directory)
        if task != known:
            raise ValueError(
                f"the adapter of task {known.name!r} in {known.directory} has changed since it "
                "was added; remove the task and add it again"
            )
        return tensors

    def _check_model(self) -> None:
        """Raise ValueError in training mode, or where hooks would not be called."""
        model = self._model
        if any(module.training for module in model.modules()):
            raise ValueError("the bank's model is in training mode; call model.eval()")
        watched = {"": model, "blocks": model.blocks}
        for index, block in enumerate(model.blocks):
            watched |= {f"blocks.{index}": block, f"blocks.{index}.attn": block.attn}
        for name, module in watched.items():
            if has_hooks(module) or has_own_forward(module):
                raise ValueError(
                    f"{name or 'the model'} has a hook or a forward of its own, which a bank would "
                    "pass by; remove it, or put it on a part such as mlp, norm1 or qkv"
                )

    def _check_grid(self, images: Tensor, residents: Sequence[Resident]) -> None:
        grids = {
            r.experts.grid: r.task.name for r in residents if isinstance(r.experts, TaskExperts)
        }
        if not grids:
            return
        height, width = images.shape[-2:]
        grid = tuple(self._model.patch_embed.dynamic_feat_size((height, width)))
        for wanted, name in grids.items():
            check_grid(wanted, grid, f"an image of {height} x {width} pixels for task {name!r}")


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Create tensors that can be written to later, even under inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _check_arguments(model: Any, memory_limit: int | None, spill: bool) -> None:
    if check_model(model, LinearProbe()).in_stages:
        raise TypeError(
            f"a bank cannot hold tasks of a {type(model).__name__}: the prompts of its stages "
            "differ in width and stand in windows; use a timm VisionTransformer or Eva"
        )
    if not model.global_pool:
        raise ValueError(
            "global_pool is '', so that a head gives logits for every token; use a model that pools"
        )
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, (int, type(None))):
        raise TypeError(f"memory_limit must be a number of bytes or None, got {memory_limit!r}")
    if memory_limit is not None and memory_limit < 1:
        raise ValueError(f"memory_limit must be at least 1 byte, got {memory_limit}")
    if not isinstance(spill, bool):
        raise TypeError(f"spill must be True or False, got {spill!r}")
    if spill and memory_limit is None:
        raise ValueError("spill=True needs a memory_limit, beyond which tasks are spilled")
