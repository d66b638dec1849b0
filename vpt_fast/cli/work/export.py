"""Work of `vpt-fast export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
import typer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vpt_fast.adapter.atomic import atomic_file
from vpt_fast.export import bake
from vpt_fast.methods import to_dict
from vpt_fast.train.common.output_folder import Output
from vpt_fast.train.common.recipe import AMP_DTYPES
from vpt_fast.train.loop.evaluate import resolve_device
from vpt_fast.train.run.tuned_model import TunedModel, load_tuned

SUFFIX = ".pt2"
TASK_FILE = "task.json"


def export(
    adapter: Path, output: Path, checkpoint: Path | None, dtype: str, overwrite: bool, device: str
) -> None:
    """Write an adapter and its backbone as one program; the arguments are the command's."""
    if output.suffix != SUFFIX:
        raise ValueError(f"--output is {output}; its name must end in {SUFFIX}")
    PROGRAM.check(output, overwrite)
    if dtype not in AMP_DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; choose one of {', '.join(AMP_DTYPES)}")
    where = resolve_device(device)
    loaded = load_tuned(adapter, checkpoint, where)
    baked = bake(loaded.net).to(AMP_DTYPES[dtype])
    images = torch.randn(3, *loaded.inputs["input_size"], device=where)
    program = export_program(baked, images.to(AMP_DTYPES[dtype]))
    off = _difference(loaded.net, program, images, AMP_DTYPES[dtype])
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output, "wb") as file:
        torch.export.save(program, file, extra_files={TASK_FILE: _task(loaded, dtype)})
    size = ", ".join(map(str, loaded.inputs["input_size"]))
    typer.echo(
        f"{output}: {output.stat().st_size / 1e6:,.1f} MB, images (batch, {size}) in {dtype} "
        f"on {where.type} -> logits (batch, {loaded.num_classes}); on random images at most "
        f"{off:.1e} of the largest logit from the adapter's own in float32; it holds the "
        "backbone's weights, whose licence holds for it"
    )
    typer.echo(
        f'load it: extra = {{"{TASK_FILE}": ""}}; program = torch.export.load('
        f"{str(output)!r}, extra_files=extra).module(); logits = program(images)"
    )


def _is_program(path: Path) -> bool:
    if not is_zipfile(path):
        return False
    with ZipFile(path) as file:
        return any(name.rpartition("/")[2] == TASK_FILE for name in file.namelist())


PROGRAM = Output("export", _is_program)


def export_program(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Export a model for any number of images of one size.

    Args:
        model: Module that maps images (B, channels, height, width) to logits.
        images: At least two example images, in the model's dtype and on its device.
    """
    return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))


@torch.no_grad()
def _difference(
    model: nn.Module, program: ExportedProgram, images: Tensor, dtype: torch.dtype
) -> float:
    """Return the largest difference of the logits, relative to the largest logit of `model`.

    Raises:
        ValueError: If the program's logits are not finite.
    """
    found, wanted = program.module()(images.to(dtype)), model(images)
    if not found.isfinite().all():
        raise ValueError(
            f"logits in {str(dtype).removeprefix('torch.')} are not finite; use --dtype bfloat16 "
            "or float32"
        )
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def _task(loaded: TunedModel, dtype: str) -> str:
    net: Any = loaded.net
    task = {
        "class_names": loaded.class_names,
        "multi_label": loaded.multi_label,
        "input": {**loaded.inputs, "dtype": dtype},
        "method": to_dict(net.tune_record.method),
        "torch": torch.__version__,
    }
    return json.dumps(task, indent=2) + "\n"
