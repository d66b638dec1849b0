"""Pretrains the demo backbone on rendered letters and symbols.

    python -m examples.pretrain_demo --output demo_vit.safetensors

draws every batch anew (`glyphs.render`), so there is no data set to download and no image is seen
twice. The run is seeded: batches depend on the seed and the step alone, not on the number of
threads, and a run that was stopped goes on from `OUTPUT.ckpt`, which is written after every epoch.
"""

from __future__ import annotations

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import timm
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm import tqdm

from examples.pretrain_demo.glyphs import CLASSES, FONTS, HELD_OUT_FONTS, glyph_bank, render
from examples.pretrain_demo.muon import Muon
from vpt_fast.train.backbones.demo_backbone import DEMO_ARGS, DEMO_MEAN, DEMO_MODEL, DEMO_STD

STEPS_PER_EPOCH = 250
"""Steps between two checkpoints."""

RAMP_STEPS = 500
"""Steps in which the augmentation grows from 0.3 to its full strength."""

LABEL_SMOOTHING = 0.2
"""Share of the target spread over all classes.

It ties [CLS] closely to the pretraining classes: what only other classes need is left in the
patch tokens, where a linear probe cannot reach it and prompts can.
"""

COOLDOWN = 0.3
"""Last part of the run, in which the learning rate falls to zero."""

_SHARDS = 2
_EVALUATION_SEED = 1_000_003


def normalise(images: Tensor) -> Tensor:
    """Maps images (B, 3, H, W) in [0, 1] to what the demo backbone takes, same shape and dtype."""
    return (images - images.new_tensor(DEMO_MEAN)[:, None, None]) / images.new_tensor(DEMO_STD)[
        :, None, None
    ]


@torch.no_grad()
def held_out_accuracy(
    model: nn.Module, images: int = 6000, fonts: tuple[str, ...] = FONTS
) -> float:
    """Measures the accuracy on fresh renderings at full strength.

    Args:
        model: a classifier of `CLASSES` for normalised (B, 3, 32, 32) images.
        images: how many to render; the same ones at every call.
        fonts: fonts to draw from, those of pretraining or `HELD_OUT_FONTS`.

    Returns:
        The fraction classified correctly, in [0, 1].
    """
    was_training = model.training
    model.eval()
    rng = torch.Generator().manual_seed(_EVALUATION_SEED)
    bank = glyph_bank(fonts)
    correct = done = 0
    while done < images:
        batch, labels = render(min(500, images - done), rng, bank)
        correct += int((model(normalise(batch)).argmax(1) == labels).sum())
        done += len(labels)
    model.train(was_training)
    return correct / images


def initialise(model: nn.Module) -> None:
    """Draws the initial weights of the transformer's blocks, in place.

    timm's standard deviation of 0.02 suits widths near 1000; at width 128 it leaves the blocks
    almost linear for hundreds of steps. Weights get 1 / sqrt(fan in) instead, what writes to the
    residual stream is divided by sqrt(2 * depth), and embeddings are comparable to the patches'.
    """
    blocks = model.get_submodule("blocks")
    branches = 2 * sum(1 for _ in blocks.children())
    for name, layer in blocks.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
            if name.endswith(("attn.proj", "mlp.fc2")):
                layer.weight.data.mul_(branches**-0.5)
    for name in ("pos_embed", "cls_token"):
        nn.init.trunc_normal_(model.get_parameter(name), std=0.3)


class _Shard:
    """One half of every batch: its own images and its own copy of the gradients.

    Two threads with a shard each lose nothing to synchronisation inside the layers, which on two
    cores shared with other work costs several times the arithmetic.
    """

    def __init__(self, model: nn.Module, batch: int, shared: bool) -> None:
        self.model = copy.deepcopy(model) if shared else model
        if shared:
            for own, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
                own.data = parameter.data
        self.batch = batch
        self.rng = torch.Generator()

    def step(self, strength: float) -> tuple[float, float]:
        """Adds up gradients of one half batch; returns its loss and accuracy."""
        images, labels = render(self.batch, self.rng, glyph_bank(FONTS), strength)
        logits = self.model(normalise(images))
        loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        for parameter in self.model.parameters():
            parameter.grad = None
        (loss / _SHARDS).backward()
        return float(loss.detach()), float((logits.argmax(1) == labels).float().mean())


def learning_rate(step: int, steps: int) -> float:
    """Returns the learning rate of a step relative to its peak.

    100 steps of linear warm-up, constant, then a linear fall to zero over the last `COOLDOWN` of
    the run: the length of a run may still be changed while it is on the constant part.
    """
    warm_up = min(1.0, (step + 1) / 100)
    return min(warm_up, (steps - step) / max(1.0, COOLDOWN * steps))


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weight matrices of the blocks, which Muon trains."""
    return [p for p in model.get_submodule("blocks").parameters() if p.ndim == 2]


def pretrain(
    output: str | Path,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.02,
    weight_decay: float = 0.05,
    seed: int = 42,
    threads: int = 2,
    resume: bool = True,
) -> nn.Module:
    """Trains the demo backbone and writes it in fp16.

    Muon for the matrices of the blocks and AdamW for the rest, with the schedule of
    `learning_rate`; cross entropy with label smoothing; gradients clipped to norm 1. The
    augmentation starts weak (`RAMP_STEPS`), which brings a small transformer off its initial
    plateau sooner.

    Args:
        output: safetensors file to write. `OUTPUT.ckpt` beside it holds the state of an
            unfinished run and is removed at the end.
        epochs: epochs of `STEPS_PER_EPOCH` steps.
        batch_size: images per step.
        lr: peak learning rate of Muon; AdamW's is a tenth of it.
        weight_decay: of Muon; AdamW's is 0.01.
        seed: of the initial weights and of all images.
        threads: CPU threads, 1 or 2; the result does not depend on it.
        resume: go on from `OUTPUT.ckpt` if it is there.

    Returns:
        The trained model with its pretraining head.

    Raises:
        ValueError: `epochs` below 1, an odd `batch_size`, or a checkpoint of other settings.
        RuntimeError: the loss is no longer finite.
    """
    if epochs < 1 or batch_size < _SHARDS or batch_size % _SHARDS:
        raise ValueError(
            f"epochs must be at least 1 and batch_size a multiple of {_SHARDS}, "
            f"not {epochs}, {batch_size}"
        )
    output = Path(output)
    partial = output.with_name(output.name + ".ckpt")
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(DEMO_MODEL, num_classes=len(CLASSES), **DEMO_ARGS)
    initialise(model)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(_matrices(model), lr=lr, weight_decay=weight_decay),
        create_optimizer_v2(
            [p for p in model.parameters() if all(p is not m for m in _matrices(model))],
            opt="adamw",
            lr=lr / 10,
            weight_decay=0.01,
            betas=(0.9, 0.98),
        ),
    ]
    steps = epochs * STEPS_PER_EPOCH
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
        for optimizer in optimizers
    ]
    settings = [batch_size, lr, weight_decay, seed]
    first = 0
    if resume and partial.is_file():
        state = torch.load(partial, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{partial} belongs to a run with (batch size, lr, weight decay, seed) "
                f"{state['settings']}, not {settings}; delete it or pass --no-resume"
            )
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        first = state["epoch"]
    output.parent.mkdir(parents=True, exist_ok=True)
    glyph_bank(FONTS)
    model.train()
    shards = [_Shard(model, batch_size // _SHARDS, shared=i > 0) for i in range(_SHARDS)]
    parameters = [list(shard.model.parameters()) for shard in shards]
    pool = ThreadPoolExecutor(
        min(threads, _SHARDS), initializer=torch.set_num_threads, initargs=(1,)
    )
    for epoch in range(first, epochs):
        for number, shard in enumerate(shards):
            shard.rng.manual_seed((seed * 100_003 + epoch) * _SHARDS + number)
        total = correct = 0.0
        started = time.perf_counter()
        with tqdm(range(STEPS_PER_EPOCH), desc=f"epoch {epoch + 1}/{epochs}", mininterval=2) as bar:
            for index in bar:
                step = epoch * STEPS_PER_EPOCH + index
                strength = min(1.0, 0.3 + 0.7 * step / RAMP_STEPS)
                results = list(pool.map(lambda shard, s=strength: shard.step(s), shards))
                with torch.no_grad():
                    for group in zip(*parameters, strict=True):
                        for other in group[1:]:
                            group[0].grad += other.grad
                nn.utils.clip_grad_norm_(parameters[0], 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                for scheduler in schedulers:
                    scheduler.step()
                total += sum(loss for loss, _ in results) / _SHARDS
                correct += sum(accuracy for _, accuracy in results) / _SHARDS
                if not math.isfinite(total):
                    raise RuntimeError(f"the loss is not finite at step {step}; lower --lr ({lr})")
                if index % 20 == 19:
                    bar.set_postfix(
                        loss=f"{total / (index + 1):.3f}", acc=f"{correct / (index + 1):.3f}"
                    )
        rate = STEPS_PER_EPOCH * batch_size / (time.perf_counter() - started)
        accuracy = held_out_accuracy(model, 2000)
        tqdm.write(
            f"epoch {epoch + 1}/{epochs}  loss {total / STEPS_PER_EPOCH:.3f}  "
            f"train {correct / STEPS_PER_EPOCH:.3f}  held-out {accuracy:.3f}  {rate:.0f} images/s"
        )
        unfinished = partial.with_name(partial.name + ".tmp")
        torch.save(
            {
                "settings": settings,
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "schedulers": [scheduler.state_dict() for scheduler in schedulers],
            },
            unfinished,
        )
        unfinished.replace(partial)
    pool.shutdown()
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, output)
    partial.unlink(missing_ok=True)
    return model


def main(
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("demo_vit.safetensors"),
    epochs: Annotated[int, typer.Option(help=f"Epochs of {STEPS_PER_EPOCH} steps.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate; AdamW: a tenth.")] = 0.02,
    weight_decay: Annotated[float, typer.Option(help="Muon's weight decay.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of weights and images.")] = 42,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, 1 or 2.")] = 2,
    resume: Annotated[bool, typer.Option(help="Go on from OUTPUT.ckpt.")] = True,
) -> None:
    """Pretrain the demo backbone on rendered letters and symbols."""
    torch.set_num_threads(1)
    model = pretrain(output, epochs, batch_size, lr, weight_decay, seed, threads, resume)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, {len(CLASSES)} classes")
    print(f"held-out renderings: {held_out_accuracy(model):.4f}")
    print(f"held-out fonts:      {held_out_accuracy(model, fonts=HELD_OUT_FONTS):.4f}")


if __name__ == "__main__":
    typer.run(main)
