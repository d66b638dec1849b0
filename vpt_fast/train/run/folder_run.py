"""A whole run on a folder of images: everything is checked, then a model is tuned and tested."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed
from torch import nn

from vpt_fast import count_parameters, prompt_tune, save_adapter
from vpt_fast.methods import Method
from vpt_fast.ops.memory_modes import check_memory_mode
from vpt_fast.train.backbones import build as backbones
from vpt_fast.train.common.digest import digest
from vpt_fast.train.common.parallel import rank, world_size
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_loaders import (
    Loading,
    check_loading,
    folder_loader,
    set_data_config,
)
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.data.memory_set import MemoryLoader
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.data.split import ImageSource, some
from vpt_fast.train.loop.checkpoint import FILE as CHECKPOINT
from vpt_fast.train.loop.epochs import BEST, LAST, FitResult, fit
from vpt_fast.train.loop.evaluate import Evaluation, TrainingError, evaluate
from vpt_fast.train.loop.frozen_cast import FrozenCast
from vpt_fast.train.loop.graphed_step import check_cuda_graphs
from vpt_fast.train.loop.prefix_cache import PrefixCache, SuffixModel, frozen_blocks
from vpt_fast.train.run.record import FILE as RECORD
from vpt_fast.train.run.record import (
    new_record,
    read_record,
    recording,
    write_record,
)
from vpt_fast.train.run.resuming import check_resumed


@dataclass(frozen=True)
class RunResult:
    """Where the kept adapter is, how training went, and the accuracy on test/ if there is one."""

    adapter: Path
    fit: FitResult
    test: Evaluation | None


def tune_on_folder(
    directory: Path,
    output: Path,
    model: str,
    method: Method,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    img_size: int | None = None,
    augmentation: Augmentation | None = None,
    memory: str = "speed",
    workers: int | None = None,
    device: torch.device | None = None,
    resume: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = print,
    data_format: str = "auto",
    image_options: ImageOptions | None = None,
    cache: str = "auto",
    prefix_cache: bool = True,
    cuda_graphs: bool | None = None,
) -> RunResult:
    """Tunes a pretrained timm model on a data set on disk.

    With validation images the epoch that is best on them is kept, without them the last one; test
    images are evaluated once, with the kept epoch, unless Ctrl-C ended training.

    Args:
        directory: Of class folders train/<class>/<image> and, where there are any, val/ and test/;
            or of another of `sources.FORMATS`.
        output: A new folder for the adapters best/ and last/, metrics.csv, run.json, tensorboard/
            and checkpoint.pt.
        model: Of timm, with or without a tag, or "vpt_fast_demo".
        method: What to tune.
        recipe: How to train.
        checkpoint: File with the backbone's weights.
        pretrained: Whether to download timm's weights instead.
        img_size: Side of the images in pixels; None takes the model's own.
        augmentation: Of the training images; None takes the defaults.
        memory: What blocks keep for backward, as vpt_fast.prompt_tune takes it.
        workers: Processes that load images; None takes 0 on the CPU and up to 4 on a GPU.
        device: Where to train; None takes the CPU.
        resume: Whether to go on in `output`, from the last epoch that ended there.
        progress: Whether to show bars on a terminal.
        log: Called with lines of text.
        data_format: One of `sources.FORMATS`; "auto" goes by the files in `directory`.
        image_options: How images are resized and normalised; None takes the model's own way.
        cache: One of `image_loaders.CACHES`. Test images are read once, and are never kept.
        prefix_cache: Whether what enters the first block that is trained or has prompts is computed
            once for each image, where that is not block 0 and images are not augmented.
        cuda_graphs: Whether forward, loss and backward are replayed as a CUDA graph; None for a
            GPU and one process. On the CPU they are not.

    Raises:
        FileExistsError: If `output` is there and not empty, and `resume` is off or it holds no run.
        FileNotFoundError: If images or the checkpoint are missing.
        ValueError, TypeError: If anything else cannot be used; nothing is written then.
        TrainingError: If training cannot go on. Adapters of finished epochs are kept.
    """
    device = device or torch.device("cpu")
    augmentation = augmentation or Augmentation()
    options = image_options or ImageOptions()
    check_memory_mode(memory)
    check_cuda_graphs(cuda_graphs)
    check_loading(workers, cache)
    if rank():
        log = _nothing
    else:
        _check_output(output, resume)
    was_empty = not _holds_something(output)
    name, weights, model_args = backbones.resolve_name(model, checkpoint, img_size)
    source = open_source(directory, data_format)
    class_names = source.class_names
    if ":" not in name:
        # A model on the hub or in a folder is only known once it is there.
        backbones.tunable_on_meta(name, len(class_names), method, model_args)
    random_seed(recipe.seed)
    net: Any = backbones.create_backbone(
        name,
        len(class_names),
        pretrained=pretrained,
        checkpoint=weights,
        model_args=model_args,
    )
    digest_of_weights = digest(backbones.weights_without_head(net))
    init_head(net)
    prompt_tune(net, method, memory).to(device)
    config = set_data_config(net, options)
    first = frozen_blocks(net) if prefix_cache and augmentation.no_aug and world_size() == 1 else 0
    loading = Loading(config, augmentation, device, workers, "stream" if first else cache)
    loaders: dict[str, Any] = {
        name: loading.loader(
            split,
            source.class_names,
            recipe.batch_size,
            training=name == "train",
            keep=name != "test",
            seed=recipe.seed,
        )
        for name, split in source.splits.items()
    }
    record = new_record(
        directory,
        source,
        net,
        {
            "name": model,
            "checkpoint": weights,
            "pretrained": pretrained,
            "img_size": img_size,
            "weights": digest_of_weights,
        },
        method,
        recipe,
        augmentation,
        options,
        {
            "memory": memory,
            "cache": cache,
            "prefix_cache": prefix_cache,
            "cuda_graphs": cuda_graphs,
            "workers": workers,
            "device": str(device),
            "processes": world_size(),
        },
    )
    if resume and (output / CHECKPOINT).is_file():
        check_resumed(read_record(output), record)
    _describe(net, f"{method.name} on {model}, {device}", recipe, loaders, log)
    _describe_source(source, loaders, log)
    if not options.antialias:
        log("resized without antialiasing, which the adapter does not record: eval --no-antialias")
    save = partial(
        save_adapter,
        class_names=class_names,
        model_args=model_args,
        checkpoint=weights.name if weights else None,
        overwrite=True,
    )
    output.mkdir(parents=True, exist_ok=True)
    batches = {name: loaders[name] for name in ("train", "val") if name in loaders}
    if first:
        log(f"the first {first} of {len(net.blocks)} blocks are frozen: computed once per image")
        kept = PrefixCache(
            net, first, amp_dtype=recipe.autocast_dtype, folder=output, progress=progress
        )
        with FrozenCast(net, recipe.autocast_dtype):
            for name, loader in batches.items():
                images = loader.dataset
                ordered = folder_loader(images, recipe.batch_size, device, workers)
                batches[name] = kept.loader(ordered, len(images), loader)
        for item in kept.skipped:
            log(f"skipped an image that cannot be decoded: {item.reason}")
    try:
        with recording(output, record):
            result = fit(
                net,
                batches["train"],
                recipe,
                val_batches=batches.get("val"),
                net=SuffixModel(net, first) if first else None,
                output=output,
                save=save,
                progress=progress,
                description=method.name,
                log=log,
                resume=resume,
                cuda_graphs=cuda_graphs,
            )
    except TrainingError:
        if was_empty and not (output / LAST).is_dir() and not rank():
            # Nothing worth keeping: the same command with another learning rate should run.
            shutil.rmtree(output, ignore_errors=True)
        raise
    if first:
        result.skipped.update(dict(kept.skipped))
    record = record.ended(result)
    if not rank():
        write_record(output, record)
    test = None
    if "test" in loaders and not result.interrupted:
        amp_dtype = recipe.autocast_dtype
        with FrozenCast(net, amp_dtype):
            test = evaluate(net, loaders["test"], amp_dtype=amp_dtype, progress=progress)
        test = replace(test, skipped=(*source.splits["test"].refused, *test.skipped))
        if not rank():
            write_record(output, record.tested(test))
    return RunResult(output / (BEST if (output / BEST).is_dir() else LAST), result, test)


def _nothing(line: str) -> None:
    """Process 0 talks for all."""


def _holds_something(folder: Path) -> bool:
    """Whether there is more than what a run that was killed as it began has left."""
    started = f".{RECORD}."
    return folder.is_dir() and any(not f.name.startswith(started) for f in folder.iterdir())


def _check_output(output: Path, resume: bool) -> None:
    if not output.exists() or (output.is_dir() and not _holds_something(output)):
        return
    if not resume:
        raise FileExistsError(
            f"the output folder {output} exists; choose another with --output, remove it, or go on "
            "in it with --resume"
        )
    if not (output / RECORD).is_file() and not (output / CHECKPOINT).is_file():
        raise FileExistsError(
            f"the output folder {output} holds other files and no run that could go on; choose "
            "another with --output"
        )


def _describe_source(
    source: ImageSource, loaders: Mapping[str, Any], log: Callable[[str], None]
) -> None:
    """What there is, what is missing, and where images are kept."""
    if "val" not in source.splits:
        what = "val/ folder" if source.format == "folders" else "val split"
        log(f"no {what}: the last epoch is kept, and nothing is selected")
    for name, loader in loaders.items():
        if isinstance(loader, MemoryLoader):
            where = f"{loader.nbytes / 2**20:,.0f} MiB on {loader.device}"
            log(f"{name}: images decoded once and kept, {where}")
        refused = source.splits[name].refused
        if refused:
            log(f"{name}: {len(refused)} entries left out: {some([r.reason for r in refused])}")
    for line in source.warnings:
        log(f"warning: {line}")


def _describe(
    net: nn.Module,
    title: str,
    recipe: Recipe,
    loaders: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    trained, total = count_parameters(net)
    counts = [f"{len(loader.dataset):,} {split}" for split, loader in loaders.items()]
    log(f"{title}: {trained:,} of {total:,} parameters are trained")
    log(f"images: {', '.join(counts)}; {len(loaders['train'].dataset.classes)} classes")
    log(
        f"{recipe.opt}, learning rate {recipe.base_lr:g} x {recipe.batch_size} / 256 = "
        f"{recipe.peak_lr:g}, weight decay {recipe.weight_decay:g}, {recipe.epochs} epochs "
        f"({recipe.warmup} of warm-up), {recipe.amp_dtype}, seed {recipe.seed}"
    )
