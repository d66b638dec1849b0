"""A whole run on a data set on disk: check everything, then tune a model and test it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from timm.utils import random_seed

from vpt_fast import prompt_tune, save_adapter
from vpt_fast.backbones import build as backbones
from vpt_fast.train.common.class_weights import with_class_weights
from vpt_fast.train.common.digest import digest
from vpt_fast.train.common.parallel import rank, world_size
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.image_loaders import Loading, folder_loader, set_data_config
from vpt_fast.train.data.images import SkippedImage
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.data.split import ImageSource
from vpt_fast.train.loop.checkpoint import FILE as CHECKPOINT
from vpt_fast.train.loop.epochs import check_patience, fit
from vpt_fast.train.loop.evaluate import Evaluation, TrainingError, evaluate
from vpt_fast.train.loop.fit_result import BEST, LAST, FitResult
from vpt_fast.train.loop.frozen_cast import FrozenCast
from vpt_fast.train.loop.initial_prompts import initial_prompts
from vpt_fast.train.loop.objective import check_labels
from vpt_fast.train.loop.prefix_cache import PrefixCache, SuffixModel, frozen_blocks
from vpt_fast.train.run.cards import write_cards
from vpt_fast.train.run.describe import Log, describe_run, describe_source
from vpt_fast.train.run.output import RUN, check_output
from vpt_fast.train.run.record import RunRecord, new_record, read_record, recording, write_record
from vpt_fast.train.run.resuming import check_resumed
from vpt_fast.train.run.rewind import rewind
from vpt_fast.train.run.settings import RunSettings


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run.

    Attributes:
        adapter: Folder of the selected adapter.
        fit: Epochs of the training.
        test: Evaluation on the test images, or None without them.
    """

    adapter: Path
    fit: FitResult
    test: Evaluation | None


def tune_on_folder(
    settings: RunSettings, *, progress: bool = True, log: Callable[[str], None] = print
) -> RunResult:
    """Tune a pretrained timm model on a data set on disk.

    With validation images the epoch that is best on them is selected, without them the last one;
    test images are evaluated once, with the selected epoch, unless Ctrl-C ended training.

    Args:
        settings: Data, model, method, recipe and options.
        progress: Whether to show bars on a terminal.
        log: Function that takes a line of text.

    Returns:
        The folder of the selected adapter and the metrics.

    Raises:
        FileExistsError: If the output folder is there and not empty, and holds no run or neither
            `settings.resume` nor `settings.overwrite` is on.
        FileNotFoundError: If images or the checkpoint are missing.
        ValueError, TypeError: If anything else cannot be used; nothing is written then.
        TrainingError: If training cannot continue. Adapters of finished epochs stay.
    """
    settings.check()
    output = settings.output
    if rank():
        log = _ignore
    else:
        check_output(settings)
    run = _prepare(settings, progress)
    if settings.resume and (output / CHECKPOINT).is_file():
        check_resumed(read_record(output), run.record)
    run.describe(log)
    if settings.overwrite and not rank():
        RUN.clear(output)
    output.mkdir(parents=True, exist_ok=True)
    was_empty = RUN.is_free(output)
    if not (settings.resume and (output / CHECKPOINT).is_file()):
        initial_prompts(run.net, run.loaders["train"], log)
        if settings.rewind is not None:
            tokens, pieces = rewind(run.net, settings.rewind, run.loaders["train"])
            log(f"pruned {tokens} prompts and {pieces} pieces of others, as {settings.rewind} says")
    skipped = run.cache_prefix(log)
    try:
        with recording(output, run.record):
            result = run.fit(log)
    except TrainingError:
        if was_empty and not (output / LAST).is_dir() and not rank():
            # No adapter to lose: the same command with another learning rate should run.
            shutil.rmtree(output, ignore_errors=True)
        raise
    result.skipped.update(dict(skipped))
    record = run.record.ended(result)
    if not rank():
        write_record(output, record)
    test = None
    if "test" in run.loaders and not result.interrupted:
        test = run.test()
        if not rank():
            write_record(output, record.tested(test))
    if not rank():
        write_cards(output, settings.directory.resolve().name, result, test)
    return RunResult(output / (BEST if (output / BEST).is_dir() else LAST), result, test)


@dataclass
class _PreparedRun:
    """A run whose model, images and record are ready.

    Attributes:
        settings: Settings of the run.
        source: Data set.
        net: Tuned model, on its device.
        first: Index of the first block that is trained or has prompts, if the input of that block
            is cached; else 0.
        loaders: Loaders of images by split.
        batches: Loaders that training uses, by split: "train" and, if there is one, "val".
        record: Record of the run as it begins.
        weights: Checkpoint file of the backbone, or None.
        model_args: Arguments of timm.create_model beside the name and the number of classes.
        progress: Whether to show bars on a terminal.
    """

    settings: RunSettings
    source: ImageSource
    net: Any
    first: int
    loaders: dict[str, Any]
    batches: dict[str, Any]
    record: RunRecord
    weights: Path | None
    model_args: dict[str, Any]
    progress: bool

    def describe(self, log: Log) -> None:
        """Log what the run is about to do."""
        settings = self.settings
        title = f"{settings.method.name} on {settings.model}, {settings.device}"
        describe_run(self.net, title, settings.recipe, self.loaders, log)
        describe_source(self.source, self.loaders, log)
        if self.source.multi_label:
            log("several labels an image: binary cross-entropy, and mAP in place of top-1")
        self.recipe(log)
        if settings.recipe.mixes and settings.augmentation.no_aug and settings.prefix_cache:
            log("mixup and cutmix change images in every step: nothing is computed once per image")
        if not settings.image_options.antialias:
            log(
                "resized without antialiasing, which the adapter does not record: eval "
                "--no-antialias"
            )

    def recipe(self, log: Log | None = None) -> Recipe:
        """Return the recipe with its class weights as numbers, which are logged."""
        source = self.source
        return with_class_weights(
            self.settings.recipe,
            source.splits["train"].labels,
            source.class_names,
            source.multi_label,
            log,
        )

    def cache_prefix(self, log: Log) -> list[SkippedImage]:
        """Replace the batches by ones of block inputs, if blocks before the first one are frozen.

        Returns:
            Images that cannot be decoded.
        """
        if not self.first:
            return []
        settings, recipe = self.settings, self.settings.recipe
        log(
            f"the first {self.first} of {len(self.net.blocks)} blocks are frozen: computed once "
            "per image"
        )
        cache = PrefixCache(
            self.net,
            self.first,
            amp_dtype=recipe.autocast_dtype,
            folder=settings.output,
            progress=self.progress,
        )
        with FrozenCast(self.net, recipe.autocast_dtype):
            for name, loader in self.batches.items():
                images = loader.dataset
                ordered = folder_loader(
                    images, recipe.batch_size, settings.device, settings.workers
                )
                self.batches[name] = cache.loader(ordered, len(images), loader)
        for item in cache.skipped:
            log(f"skipped an image that cannot be decoded: {item.reason}")
        return cache.skipped

    def fit(self, log: Log) -> FitResult:
        """Train, writing adapters and checkpoints to the output folder."""
        settings = self.settings
        save = partial(
            save_adapter,
            class_names=self.source.class_names,
            model_args=self.model_args,
            checkpoint=self.weights.name if self.weights else None,
            multi_label=self.source.multi_label,
            overwrite=True,
        )
        return fit(
            self.net,
            self.batches["train"],
            self.recipe(),
            val_batches=self.batches.get("val"),
            net=SuffixModel(self.net, self.first) if self.first else None,
            output=settings.output,
            save=save,
            progress=self.progress,
            description=settings.method.name,
            log=log,
            resume=settings.resume,
            cuda_graphs=settings.cuda_graphs,
        )

    def test(self) -> Evaluation:
        """Evaluate the model on the test images."""
        amp_dtype = self.settings.recipe.autocast_dtype
        with FrozenCast(self.net, amp_dtype):
            test = evaluate(
                self.net, self.loaders["test"], amp_dtype=amp_dtype, progress=self.progress
            )
        return replace(test, skipped=(*self.source.splits["test"].refused, *test.skipped))


def _prepare(settings: RunSettings, progress: bool) -> _PreparedRun:
    """Open the data, tune the model and make the loaders; write nothing."""
    recipe, device = settings.recipe, settings.device
    name, weights, model_args = backbones.resolve_name(
        settings.model, settings.checkpoint, settings.img_size
    )
    source = open_source(
        settings.directory,
        settings.data_format,
        val_fraction=settings.val_fraction,
        class_order=settings.class_order,
    )
    classes = len(source.class_names)
    _check_recipe(settings, source)
    if ":" not in name:
        # A model on the hub or in a folder is only known once it is there.
        backbones.tunable_on_meta(name, classes, settings.method, model_args)
    random_seed(recipe.seed)
    net: Any = backbones.create_backbone(
        name,
        classes,
        pretrained=settings.pretrained,
        checkpoint=weights,
        model_args=model_args,
    )
    digest_of_weights = digest(backbones.weights_without_head(net))
    init_head(net)
    prompt_tune(net, settings.method, settings.memory).to(device)
    config = set_data_config(net, settings.image_options)
    fixed = settings.augmentation.no_aug and not recipe.mixes
    cacheable = settings.prefix_cache and fixed and world_size() == 1
    first = frozen_blocks(net) if cacheable else 0
    cache = "stream" if first else settings.cache
    loading = Loading(config, settings.augmentation, device, settings.workers, cache)
    loaders: dict[str, Any] = {
        split: loading.loader(
            images,
            source.class_names,
            recipe.batch_size,
            training=split == "train",
            may_cache=split != "test",
            seed=recipe.seed,
        )
        for split, images in source.splits.items()
    }
    return _PreparedRun(
        settings,
        source,
        net,
        first,
        loaders,
        {split: loaders[split] for split in ("train", "val") if split in loaders},
        new_record(settings, source, net, settings.model_record(weights, digest_of_weights)),
        weights,
        model_args,
        progress,
    )


def _check_recipe(settings: RunSettings, source: ImageSource) -> None:
    """Raise ValueError, by name, if a recipe does not fit the data."""
    check_labels(settings.recipe, source.multi_label)
    check_patience(settings.recipe, "val" in source.splits)
    labels = source.splits["train"].labels
    with_class_weights(settings.recipe, labels, source.class_names, source.multi_label)
    if not source.multi_label:
        return
    if settings.rewind is not None:
        raise ValueError("--rewind is for images with one label each; leave it out")
    for name in ("val", "test"):
        if name in source.splits and not any(map(any, source.splits[name].labels)):
            raise ValueError(
                f"no image of {name} has a label, so its mAP is not defined; label some, or leave "
                f"{name} out"
            )


def _ignore(line: str) -> None:
    """Drop a line of text: process 0 alone logs."""
