"""A mixed batch of a bank gives the logits of every task alone."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters.banks import METHODS, VIT, alone, backbone, fill, images_of, relative, write
from support.formulations.families import FAMILIES
from torch import Tensor

from vpt_fast import (
    PromptBank,
    VPTDeep,
)
from vpt_fast.bank import shared_pass

_WHOLE = sorted(set(FAMILIES) - {"all_tokens"})
_OF_ONE_BATCH = 4


def _all(family: str) -> list[str]:
    """Return the methods that fit the family."""
    no_experts = family.startswith(("dynamic", "one_patch"))
    return [name for name in METHODS if not (no_experts and name.startswith("vapt"))]


def _few(family: str) -> list[str]:
    """Return some methods that fit the family; about a third of the families have each."""
    names, start = _all(family), _OF_ONE_BATCH * _WHOLE.index(family)
    return [names[(start + i) % len(names)] for i in range(_OF_ONE_BATCH)]


@pytest.mark.parametrize(
    ("family", "fused", "methods"),
    [
        *((family, False, _few(family)) for family in _WHOLE if family != VIT),
        (VIT, False, _all(VIT)),
        (VIT, True, _all(VIT)),
        ("dinov2", True, _few("dinov2")),
        *(
            pytest.param(family, fused, _all(family), marks=pytest.mark.full)
            for family, fused in [
                *((name, False) for name in _WHOLE if name != VIT),
                ("dinov2", True),
            ]
        ),
    ],
)
def test_a_mixed_batch_equals_every_task_alone(
    family: str,
    fused: bool,
    methods: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with the last block fused, as on a GPU."""
    if fused:
        monkeypatch.setattr(shared_pass, "uses_kernels", lambda x: True)
    model = backbone(family)
    bank = PromptBank(copy.deepcopy(model))
    adapters = fill(bank, model, tmp_path, methods)
    order = [*methods, methods[0], *reversed(methods)]
    images = images_of(family, len(order))
    got = bank(images, order)
    assert [len(g) for g in got] == [bank.task(n).num_classes for n in order]
    for name, adapter in adapters.items():
        where = [i for i, n in enumerate(order) if n == name]
        wanted = alone(model, adapter, images[where])
        ours = torch.stack([got[i] for i in where])
        assert relative(ours, wanted) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """No further from fp64 than each task alone in the same dtype, plus slack."""
    exact = backbone()
    model = copy.deepcopy(exact).to(dtype)
    bank = PromptBank(copy.deepcopy(model))
    names = ["deep", "vapt", "linear", "vapt_other", "shared"]
    adapters = fill(bank, model, tmp_path, names)
    images = images_of(VIT, 8 * len(names)).to(dtype)
    order = [name for name in names for _ in range(8)]
    got = bank(images, order)
    for name, adapter in adapters.items():
        where = [i for i, n in enumerate(order) if n == name]
        ours = torch.stack([got[i] for i in where]).double()
        theirs = alone(model, adapter, images[where]).double()
        # The exact result is of weights rounded to the dtype, as the bank's are.
        wanted = alone(copy.deepcopy(model).double(), adapter, images[where].double())
        error = (ours - wanted).norm() / wanted.norm()
        budget = (theirs - wanted).norm() / wanted.norm()
        assert error <= 1.3 * budget + 1e-7, name


def test_batch_mates_do_not_matter(tmp_path: Path) -> None:
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    names = ["deep", "vapt", "linear", "dropped", "vapt_other"]
    fill(bank, model, tmp_path, names)
    images = images_of(VIT, 1)
    others = images_of(VIT, 6)
    for name in names:
        one = bank(images, [name])[0]
        mixed = bank(torch.cat([others, images]), [*names, "deep", name])[-1]
        assert relative(mixed, one) < 1e-12


def test_a_thousand_tasks(tmp_path: Path) -> None:
    model = backbone("one_block")
    bank = PromptBank(copy.deepcopy(model))
    adapters = [write(model, VPTDeep(p), tmp_path / str(p), 2 + p, p) for p in range(1, 5)]
    for number in range(1000):
        bank.add(f"task {number}", adapters[number % 4])
    assert len(bank.tasks) == 1000
    exact = sum(bank.task(name).nbytes for name in bank.tasks)
    assert exact <= bank.nbytes <= 1.07 * exact
    order = [f"task {i}" for i in (999, 0, 500, 501, 502, 503, 7, 7)]
    images = images_of("one_block", len(order))
    got = bank(images, order)
    for image, name, logits in zip(images, order, got, strict=True):
        wanted = alone(model, adapters[int(name.split()[1]) % 4], image[None])[0]
        assert relative(logits, wanted) < 1e-12


def test_rows_of_removed_tasks_are_reused(tmp_path: Path) -> None:
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    adapter = write(model, VPTDeep(10), tmp_path / "a", 4)
    for name in "abcdefgh":
        bank.add(name, adapter)
    before = bank.nbytes
    for name in "bdf":
        bank.remove(name)
    assert bank.tasks == ("a", "c", "e", "g", "h")
    for name in "xyz":
        bank.add(name, adapter)
    assert bank.nbytes == before
    got = bank(images_of(VIT, 5), ["a", "x", "y", "z", "h"])
    for logits, wanted in zip(got, alone(model, adapter, images_of(VIT, 5)), strict=True):
        assert relative(logits, wanted) < 1e-12
    with pytest.raises(ValueError, match="no task 'b'; it has a, c, e"):
        bank(images_of(VIT, 1), ["b"])


def test_running_calls_keep_their_tasks(tmp_path: Path) -> None:
    """Tasks are removed and added from another thread during a call."""
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    first = write(model, VPTDeep(5), tmp_path / "first", 4, seed=1)
    second = write(model, VPTDeep(5), tmp_path / "second", 4, seed=2)
    bank.add("a", first)
    images = images_of(VIT, 2)
    wanted = alone(model, first, images)
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        reached.set()
        assert go_on.wait(20)

    handle = bank._model.blocks[1].mlp.register_forward_pre_hook(wait)
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(bank(images, ["a", "a"])))
    thread.start()
    assert reached.wait(20)
    bank.remove("a")
    for name in "bcde":
        bank.add(name, second)
    assert bank.tasks == ("b", "c", "d", "e")
    handle.remove()
    go_on.set()
    thread.join(20)
    assert relative(torch.stack(got), wanted) < 1e-12
    gc.collect()
    assert relative(torch.stack(bank(images, ["e", "b"])), alone(model, second, images)) < 1e-12


def test_many_threads(tmp_path: Path) -> None:
    model = backbone("one_block")
    bank = PromptBank(copy.deepcopy(model))
    adapters = [write(model, VPTDeep(p), tmp_path / str(p), 3, p) for p in (1, 2, 3)]
    bank.add("stays", adapters[0])
    images = images_of("one_block", 2)
    wanted = alone(model, adapters[0], images)
    stop = threading.Event()
    errors: list[BaseException | Tensor] = []
    calls = []

    def call() -> None:
        while not stop.is_set():
            try:
                got = torch.stack(bank(images, ["stays", "stays"]))
            except Exception as error:
                errors.append(error)
                return
            calls.append(got)
            if not relative(got, wanted) < 1e-12:
                errors.append(got)

    def change(own: int) -> None:
        try:
            for number in range(30):
                bank.add(f"{own} {number}", adapters[number % 3])
                if number % 3:
                    bank.remove(f"{own} {number - 1}")
        except Exception as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(2)]
    changers = [threading.Thread(target=change, args=(i,)) for i in range(2)]
    for thread in (*callers, *changers):
        thread.start()
    for thread in changers:
        thread.join(60)
    stop.set()
    for thread in callers:
        thread.join(60)
    assert not errors and calls
    assert len(bank.tasks) == 1 + 2 * 10
