"""The demo: linear probing, VPT-Shallow, VPT-Deep and VAPT on real handwritten digits.

    python -m vpt_fast.train.demo                             what `make demo` runs
    python -m vpt_fast.train.demo --seeds 42 44 82 100 800    mean and deviation over seeds
    python -m vpt_fast.train.demo --select                    how learning rates were chosen

The images are scikit-learn's `load_digits` (1,797 scans of 8 x 8 pixels), split as in VTAB-1k:
800 to train, 200 to validate, the other 797 to test, each digit in equal parts. The backbone is
the one that this package ships; it was pretrained on drawn letters and has never seen a digit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vpt_fast import count_parameters, load_adapter, save_adapter
from vpt_fast.backbones.demo_backbone import DEMO_ARGS, DEMO_CHECKPOINT, demo_backbone
from vpt_fast.extras import MissingExtraError, require_extra
from vpt_fast.train.common.curves import (
    ShownImages,
    directory_size,
    format_bytes,
    format_table,
    save_picture,
)
from vpt_fast.train.common.metrics import Epoch
from vpt_fast.train.demo.study import (
    LEARNING_RATES,
    WEIGHT_DECAYS,
    run_seeds,
    run_selection,
)
from vpt_fast.train.demo.task import (
    CLASS_NAMES,
    DEMO,
    SETTINGS,
    SPLIT_SEED,
    Digits,
    load_splits,
    recipe_of,
    test_loader,
    train_once,
)
from vpt_fast.train.loop.evaluate import Evaluation, TrainingError, evaluate, resolve_device
from vpt_fast.version import __version__

RESULTS_FILE = "demo.json"
PICTURE_FILE = "demo.png"
DIGIT_FILE = "digit.png"


def run_demo(output: Path, names: Sequence[str], epochs: int, seed: int, device: str) -> None:
    """Tune with each method, write adapters and the picture, and load an adapter again.

    Args:
        output: Folder that is new, empty or written by an earlier demo.
        names: Names of methods, keys of `SETTINGS`.
        epochs: Number of epochs.
        seed: Seed of every run.
        device: Name of the device, as `resolve_device` takes it.
    """
    start = time.perf_counter()
    where = resolve_device(device)
    _claim(output)
    digits = load_splits()
    print(
        f"Handwritten digits: {len(digits.train)} images to train, {len(digits.val)} to "
        f"validate, {len(digits.test)} to test.\nBackbone: pretrained on drawn letters, frozen. "
        f"{epochs} epochs on {_device_name(where)}.\n",
        flush=True,
    )
    rows, curves, tests = [], {}, {}
    for name in names:
        setting = SETTINGS[name]
        recipe = recipe_of(setting, epochs, seed)
        model, result = train_once(setting, recipe, digits, where, select=True)
        adapter = save_adapter(
            model,
            output / name,
            class_names=CLASS_NAMES,
            model_args=DEMO_ARGS,
            checkpoint=DEMO_CHECKPOINT.name,
            overwrite=True,
        )
        test = evaluate(model, test_loader(digits.test), progress=False)
        trained, _ = count_parameters(model)
        curves[setting.title], tests[name] = result.epochs, test
        rows.append(
            [
                setting.title,
                f"{trained:,}",
                f"{test.top1:.2f}%",
                f"{result.images_per_second:,.0f}",
                format_bytes(directory_size(adapter)),
            ]
        )
        print(f"{setting.title}: {test.top1:.2f}% of the test images right", flush=True)
    header = ["method", "trained parameters", "test accuracy", "images/s", "adapter size"]
    table = format_table(header, rows)
    print(f"\n{table}\n")
    best = names[-1]
    picture = output / PICTURE_FILE
    _draw(picture, curves, digits, tests, best)
    digit = output / DIGIT_FILE
    Image.fromarray((255 * digits.test_pixels[0]).round().astype(np.uint8)).save(digit)
    _load_back(output / best, digits, tests[best], where)
    _write_results(output, header, rows)
    print(f"Picture: {picture}\nA digit to try: {digit}")
    print(f"Adapters: {', '.join(str(output / name) for name in names)}")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


def _load_back(adapter: Path, digits: Digits, before: Evaluation, device: torch.device) -> None:
    model = load_adapter(demo_backbone(num_classes=len(CLASS_NAMES)), adapter).to(device)
    after = evaluate(model, test_loader(digits.test), progress=False)
    if after.top1 != before.top1 or not torch.equal(after.predictions, before.predictions):
        raise TrainingError(
            f"{adapter} on a fresh backbone: {after.top1:.2f}% on test, not {before.top1:.2f}%"
        )
    print(
        f"Loaded {adapter} onto a fresh backbone: {after.top1:.2f}% on test, "
        f"the same {len(after.predictions)} predictions."
    )


def _claim(output: Path) -> None:
    """Create an output folder, unless it holds something other than an earlier demo."""
    own = (output / RESULTS_FILE).is_file()
    if output.exists() and not own and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not of an earlier demo; choose another --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    _write_results(output, [], [])


def _write_results(output: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    results = [dict(zip(header, row, strict=True)) for row in rows]
    text = json.dumps({"vpt_fast": __version__, "results": results}, indent=2)
    (output / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "the CPU"


def _draw(
    path: Path,
    curves: dict[str, list[Epoch]],
    digits: Digits,
    tests: dict[str, Evaluation],
    name: str,
) -> None:
    """Draw a random sample of the test images, and some of the mistakes."""
    test = tests[name]
    wrong = (test.predictions != test.labels).nonzero().flatten()
    rng = torch.Generator().manual_seed(SPLIT_SEED)
    sample = torch.randperm(len(test.labels), generator=rng)[:32]
    title = SETTINGS[name].title

    def shown(indices: torch.Tensor, text: str) -> ShownImages:
        chosen = indices.numpy()
        return ShownImages(
            digits.test_pixels[chosen],
            test.labels[chosen].numpy(),
            test.predictions[chosen].numpy(),
            text,
        )

    groups = [shown(sample, f"{title} on {len(sample)} test images drawn at random")]
    if len(wrong):
        some = wrong[:8]
        groups.append(shown(some, f"{len(some)} of its {len(wrong)} mistakes"))
    save_picture(
        path,
        curves,
        groups,
        CLASS_NAMES,
        "Prompt tuning on handwritten digits",
        f"A frozen transformer that knows letters, {len(digits.train)} training images. Test: "
        + ", ".join(f"{SETTINGS[key].title} {test.top1:.1f}%" for key, test in tests.items()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vpt_fast.train.demo",
        description="Tunes a small pretrained vision transformer to handwritten digits.",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--seeds", type=int, nargs="+", help="only print accuracies over seeds")
    mode.add_argument("--select", action="store_true", help="choose learning rates again")
    parser.add_argument(
        "--lrs", type=float, nargs="+", default=LEARNING_RATES, help="of --select; the papers' 10"
    )
    parser.add_argument(
        "--weight-decays",
        type=float,
        nargs="+",
        default=WEIGHT_DECAYS,
        help="of --select; the papers' 4",
    )
    parser.add_argument("--methods", nargs="+", choices=list(SETTINGS), default=list(DEMO))
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="demo_output")
    parser.add_argument("--epochs", type=int, help="20; with --seeds 100, as in the papers")
    parser.add_argument("--seed", type=int, default=42, help="42")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    # For a model this small more threads gain little, and lose much where cores are shared; one
    # thread also gives the same figures on any number of cores.
    torch.set_num_threads(1)
    try:
        require_extra("reports")
        if options.seeds:
            run_seeds(options.methods, options.epochs or 100, options.seeds, options.device)
        elif options.select:
            run_selection(
                options.methods,
                options.epochs or 20,
                options.seed,
                options.device,
                options.lrs,
                options.weight_decays,
            )
        else:
            run_demo(
                options.output, options.methods, options.epochs or 20, options.seed, options.device
            )
    except (ValueError, OSError, TrainingError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0
