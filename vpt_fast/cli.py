"""`vpt-fast`: tune a timm vision transformer on a folder of images, evaluate it, predict with it,
and look at what its prompts do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from torch import nn
from tqdm import tqdm

from vpt_fast import load_adapter
from vpt_fast.adapter import read_config
from vpt_fast.methods import METHODS, Method
from vpt_fast.train import backbone as backbones
from vpt_fast.train import data
from vpt_fast.train.evaluate import TrainingError, autocast, evaluate, resolve_device
from vpt_fast.train.loop import BEST, LAST
from vpt_fast.train.recipe import AMP_DTYPES, DEFAULT_LR, OPTIMIZERS, Recipe, head_layers
from vpt_fast.train.run import Augmentation, folder_loader, tune_on_folder

app = typer.Typer(
    name="vpt-fast",
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CHECKPOINT_HELP = "File with the backbone's weights (.safetensors, or what torch.save wrote)."
DEVICE_HELP = "auto, cpu, cuda or cuda:<index>; auto takes a GPU if there is one."
WORKERS_HELP = "Processes that load images; by default 0 on the CPU and up to 4 with a GPU."
AMP_HELP = f"Type that torch.autocast computes in: {', '.join(AMP_DTYPES)}."

Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
AmpDtype = Annotated[str, typer.Option(help=AMP_HELP)]
Workers = Annotated[int | None, typer.Option("--workers", "-j", help=WORKERS_HELP)]
Checkpoint = Annotated[Path | None, typer.Option(metavar="FILE", help=CHECKPOINT_HELP)]
Adapter = Annotated[
    Path,
    typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or the output folder of a run."),
]


def _fail(error: BaseException | str, code: int) -> NoReturn:
    typer.echo(f"vpt-fast: error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        _fail(error, 2)
    except TrainingError as error:
        _fail(error, 1)
    except torch.OutOfMemoryError as error:
        _fail(f"{error}. Try a smaller --batch-size or --amp-dtype bfloat16", 1)


def _make_method(name: str, options: Mapping[str, Any]) -> Method:
    if name not in METHODS:
        raise ValueError(f"--method is {name!r}; choose one of {', '.join(METHODS)}")
    given = {option: value for option, value in options.items() if value is not None}
    unknown = sorted(given.keys() - {field.name for field in fields(METHODS[name])})
    if unknown:
        flags = ", ".join(f"--{option.replace('_', '-')}" for option in unknown)
        raise ValueError(f"--method {name} has no option {flags}; leave it out")
    return METHODS[name](**given)


@app.command()
def train(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with train/<class>/<image>, and if you have them val/ and test/. With "
            "val/ the epoch that is best on it is kept, without it the last one; test/ is "
            "evaluated once, with the kept epoch.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="timm's name of a vision transformer, with or without a tag; or vpt_fast_demo, "
            "the small one for 32 x 32 pixels that comes with this package."
        ),
    ] = "vit_base_patch16_224.orig_in21k",
    checkpoint: Checkpoint = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Download timm's weights of the model.")
    ] = False,
    img_size: Annotated[
        int | None, typer.Option(min=1, help="Image size in pixels; by default the model's.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "vpt-deep",
    num_prompts: Annotated[
        int | None, typer.Option(help="Prompts (of each block); by default 10.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Prompt dropout, in [0, 1); by default 0.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 100,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images per step.")] = 64,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Base learning rate as in the papers: multiplied by batch size / 256. By default "
            + ", ".join(f"{value:g} ({name})" for name, value in DEFAULT_LR.items())
            + "; worth choosing on val/."
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(help="For all that is trained but the head's bias.")
    ] = 1e-4,
    opt: Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}.")] = "sgd",
    warmup_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of linear warm-up from 0; by default a tenth of --epochs."),
    ] = None,
    scale: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOW HIGH", help="Part of the area that random crops keep."),
    ] = (0.7, 1.0),
    hflip: Annotated[float, typer.Option(help="Probability of a horizontal flip.")] = 0.5,
    no_aug: Annotated[
        bool, typer.Option("--no-aug", help="No augmentation: resize and crop the centre.")
    ] = False,
    amp_dtype: AmpDtype = "float32",
    seed: Annotated[
        int, typer.Option(help="Of initial values, order, augmentation and dropout.")
    ] = 42,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="New folder for the adapters best/ and last/, metrics.csv and tensorboard/; by "
            "default output/<DIR's name>-<method>.",
        ),
    ] = None,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Tunes a pretrained model on a folder of images.

    Ctrl-C ends training early and leaves a usable adapter.
    """
    with _one_line_errors():
        result = tune_on_folder(
            directory,
            output or Path("output") / f"{directory.resolve().name}-{method}",
            model,
            _make_method(method, {"num_prompts": num_prompts, "dropout": dropout}),
            Recipe(epochs, batch_size, lr, weight_decay, opt, 0.9, warmup_epochs, amp_dtype, seed),
            checkpoint=checkpoint,
            pretrained=pretrained,
            img_size=img_size,
            augmentation=Augmentation(scale, hflip, no_aug),
            workers=workers,
            device=resolve_device(device),
            log=tqdm.write,
        )
        rows, adapter = result.fit.epochs, result.adapter
        if result.fit.interrupted:
            typer.echo(f"interrupted after {len(rows)} of {epochs} epochs; adapter: {adapter}")
            raise typer.Exit(130)
        kept = next(row for row in rows if row.epoch == result.fit.kept)
        score = "" if kept.val_top1 is None else f", {kept.val_top1:.2f}% on val"
        typer.echo(f"kept epoch {kept.epoch}{score}")
        if result.test is not None:
            typer.echo(_accuracy("test", result.test))
        typer.echo(f"adapter: {adapter}")
        if result.fit.skipped:
            count = len(result.fit.skipped)
            typer.echo(f"images skipped in training, as they cannot be decoded: {count}", err=True)
        if result.test is not None:
            _report_skipped(result.test.skipped)


def _accuracy(split: str, result: Any) -> str:
    return (
        f"{split}: {result.images:,} images, top-1 {result.top1:.2f}%, "
        f"top-5 {result.top5:.2f}%, loss {result.loss:.4f}"
    )


def _report_skipped(skipped: tuple[data.SkippedImage, ...]) -> None:
    if skipped:
        _fail(
            f"{len(skipped)} images are not in these figures: "
            f"{'; '.join(item.reason for item in skipped[:5])}"
            f"{'; ...' if len(skipped) > 5 else ''}. Repair or remove them",
            1,
        )


def _adapter_folder(path: Path) -> Path:
    candidates = (path, path / BEST, path / LAST)
    return next((c for c in candidates if (c / "adapter_config.json").is_file()), path)


@dataclass(frozen=True)
class _Loaded:
    """A tuned model in eval mode, its input configuration and its class names, if it has any."""

    net: nn.Module
    inputs: dict[str, Any]
    num_classes: int
    class_names: list[str] | None


def _load(adapter: Path, checkpoint: Path | None, device: torch.device) -> _Loaded:
    folder = _adapter_folder(adapter)
    config = read_config(folder)
    net = load_adapter(backbones.backbone_of_adapter(config, checkpoint), folder)
    inputs = {**backbones.data_config_of(net), **config["input"]}
    num_classes = head_layers(net)[0].out_features
    return _Loaded(net.to(device).eval(), inputs, num_classes, config["class_names"])


@app.command(name="eval")
def evaluate_adapter(
    adapter: Adapter,
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder with test/<class>/<image> (or val/, or class folders)."
        ),
    ],
    checkpoint: Checkpoint = None,
    split: Annotated[
        str | None, typer.Option(help="test, val or train; by default test, else val.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 64,
    amp_dtype: AmpDtype = "float32",
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Evaluates an adapter on a folder of images."""
    with _one_line_errors():
        where = resolve_device(device)
        dtype = Recipe(amp_dtype=amp_dtype).autocast_dtype
        name, folder = _eval_folder(directory, split)
        loaded = _load(adapter, checkpoint, where)
        images = data.ImageFolders(
            folder,
            data.eval_transform(loaded.inputs),
            loaded.class_names,
            loaded.inputs["input_size"][0],
        )
        if len(images.classes) != loaded.num_classes:
            raise ValueError(
                f"{folder} has {len(images.classes)} class folders, but the adapter has "
                f"{loaded.num_classes} classes and no names of them"
            )
        result = evaluate(
            loaded.net, folder_loader(images, batch_size, where, workers), amp_dtype=dtype
        )
        typer.echo(_accuracy(name, result))
        _report_skipped(result.skipped)


def _eval_folder(directory: Path, split: str | None) -> tuple[str, Path]:
    if split is not None:
        if split not in data.SPLITS:
            raise ValueError(f"--split is {split!r}; choose one of {', '.join(data.SPLITS)}")
        return split, data.require_split(directory, split)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no data folder {directory}")
    for name in ("test", "val"):
        folder = data.find_split(directory, name)
        if folder is not None:
            return name, folder
    if data.find_split(directory, "train") is not None:
        raise FileNotFoundError(f"{directory} has no test/ or val/; --split train takes train/")
    return directory.name, directory


@app.command()
def predict(
    adapter: Adapter,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    checkpoint: Checkpoint = None,
    topk: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    amp_dtype: AmpDtype = "float32",
    device: Device = "auto",
) -> None:
    """Prints the most probable classes of images, one line per image."""
    with _one_line_errors():
        where = resolve_device(device)
        dtype = Recipe(amp_dtype=amp_dtype).autocast_dtype
        loaded = _load(adapter, checkpoint, where)
        names = loaded.class_names or [str(i) for i in range(loaded.num_classes)]
        transform = data.eval_transform(loaded.inputs)
        failed = []
        for path in images:
            try:
                image = data.load_image(path, loaded.inputs["input_size"][0])
            except ValueError as error:
                failed.append(str(error))
                continue
            with torch.no_grad(), autocast(where, dtype):
                logits = loaded.net(transform(image)[None].to(where))
            probabilities, classes = logits[0].float().softmax(dim=0).topk(min(topk, len(names)))
            found = zip(classes.tolist(), probabilities.tolist(), strict=True)
            typer.echo(f"{path}: " + ", ".join(f"{names[i]} {100 * p:.2f}%" for i, p in found))
        if failed:
            _fail("; ".join(failed), 1)


@app.command(name="inspect")
def inspect_adapter(
    adapter: Adapter,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for attention.csv, mixing.csv and the pictures: new, empty or of an "
            "earlier inspect, whose files are replaced.",
        ),
    ],
    checkpoint: Checkpoint = None,
    device: Device = "auto",
) -> None:
    """Shows what prompts do: the attention that each one gets, and the patches that VAPT mixes."""
    # matplotlib takes long to import, and the other commands do not draw.
    from vpt_fast.inspection_report import check_output, inspect_images

    with _one_line_errors():
        where = resolve_device(device)
        check_output(output)
        loaded = _load(adapter, checkpoint, where)
        failed = inspect_images(loaded.net, loaded.inputs, images, output, typer.echo)
        if failed:
            _fail("; ".join(failed), 1)


def main() -> None:
    """Entry point of the `vpt-fast` command."""
    app(prog_name="vpt-fast")


if __name__ == "__main__":
    main()
