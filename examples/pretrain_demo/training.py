"""Pretraining of the demo backbone: data-parallel shards, optimizers, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm import tqdm

from examples.pretrain_demo.glyphs import CLASSES, FONTS, glyph_bank, render
from examples.pretrain_demo.muon import Muon
from vpt_fast.backbones.demo_backbone import DEMO_ARGS, DEMO_MEAN, DEMO_MODEL, DEMO_STD

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
    """Return images (B, 3, H, W) in [0, 1] as the demo backbone takes them, in the same dtype."""
    return (images - images.new_tensor(DEMO_MEAN)[:, None, None]) / images.new_tensor(DEMO_STD)[
        :, None, None
    ]


@torch.no_grad()
def held_out_accuracy(
    model: nn.Module, images: int = 6000, fonts: tuple[str, ...] = FONTS
) -> float:
    """Return the accuracy on fresh renderings at full strength.

    Args:
        model: Classifier of `CLASSES` for normalised (B, 3, 32, 32) images.
        images: Number of images to render; the same ones at every call.
        fonts: Fonts to draw from, those of pretraining or `HELD_OUT_FONTS`.

    Returns:
        Fraction of images that are classified correctly, in [0, 1].
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
    """Draw the initial weights of the transformer's blocks, in place.

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
    """Half of every batch, with its own images and its own copy of the gradients.

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
        """Compute the gradients of half a batch and return its loss and accuracy."""
        images, labels = render(self.batch, self.rng, glyph_bank(FONTS), strength)
        logits = self.model(normalise(images))
        loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        for parameter in self.model.parameters():
            parameter.grad = None
        (loss / _SHARDS).backward()
        return float(loss.detach()), float((logits.argmax(1) == labels).float().mean())


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate of a step relative to its peak.

    100 steps of linear warm-up, constant, then a linear fall to zero over the last `COOLDOWN` of
    the run: the length of a run may still be changed while it is on the constant part.
    """
    warm_up = min(1.0, (step + 1) / 100)
    return min(warm_up, (steps - step) / max(1.0, COOLDOWN * steps))


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weight matrices of the blocks, which Muon trains."""
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
    """Train the demo backbone and write it in fp16.

    Muon for the matrices of the blocks and AdamW for the rest, with the schedule of
    `learning_rate`; cross entropy with label smoothing; gradients clipped to norm 1. The
    augmentation starts weak (`RAMP_STEPS`), which brings a small transformer off its initial
    plateau sooner.

    Args:
        output: Safetensors file to write. `OUTPUT.ckpt` beside it holds the state of an
            unfinished run and is removed at the end.
        epochs: Number of epochs of `STEPS_PER_EPOCH` steps.
        batch_size: Images per step.
        lr: Peak learning rate of Muon; AdamW's is a tenth of it.
        weight_decay: Weight decay of Muon; AdamW's is 0.01.
        seed: Seed of the initial weights and of all images.
        threads: Number of CPU threads, 1 or 2; the result does not depend on it.
        resume: Whether to continue from `OUTPUT.ckpt` if it is there.

    Returns:
        The trained model with its pretraining head.

    Raises:
        ValueError: If `epochs` is below 1, `batch_size` is odd, or the checkpoint has other
            settings.
        RuntimeError: If the loss is no longer finite.
    """
    if epochs < 1 or batch_size < _SHARDS or batch_size % _SHARDS:
        raise ValueError(
            f"epochs must be at least 1 and batch_size a multiple of {_SHARDS}, "
            f"not {epochs}, {batch_size}"
        )
    output = Path(output)
    checkpoint = output.with_name(output.name + ".ckpt")
    run = _Run(epochs, batch_size, lr, weight_decay, seed)
    first = run.load(checkpoint) if resume and checkpoint.is_file() else 0
    output.parent.mkdir(parents=True, exist_ok=True)
    glyph_bank(FONTS)
    run.model.train()
    pool = ThreadPoolExecutor(
        min(threads, _SHARDS), initializer=torch.set_num_threads, initargs=(1,)
    )
    for epoch in range(first, epochs):
        run.epoch(epoch, pool)
        run.save(checkpoint, epoch + 1)
    pool.shutdown()
    save_file({k: v.half().contiguous() for k, v in run.model.state_dict().items()}, output)
    checkpoint.unlink(missing_ok=True)
    return run.model


class _Run:
    """Model, optimizers and schedules of one call of `pretrain`."""

    def __init__(
        self, epochs: int, batch_size: int, lr: float, weight_decay: float, seed: int
    ) -> None:
        self.epochs, self.batch_size, self.lr, self.seed = epochs, batch_size, lr, seed
        self.settings = [batch_size, lr, weight_decay, seed]
        torch.manual_seed(seed)
        self.model: nn.Module = timm.create_model(DEMO_MODEL, num_classes=len(CLASSES), **DEMO_ARGS)
        initialise(self.model)
        matrices = _matrices(self.model)
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=lr, weight_decay=weight_decay),
            create_optimizer_v2(
                [p for p in self.model.parameters() if all(p is not m for m in matrices)],
                opt="adamw",
                lr=lr / 10,
                weight_decay=0.01,
                betas=(0.9, 0.98),
            ),
        ]
        steps = epochs * STEPS_PER_EPOCH
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
            for optimizer in self.optimizers
        ]
        self.shards = [
            _Shard(self.model, batch_size // _SHARDS, shared=i > 0) for i in range(_SHARDS)
        ]
        self.parameters = [list(shard.model.parameters()) for shard in self.shards]

    def load(self, path: Path) -> int:
        """Restore a checkpoint and return the number of epochs that it has finished.

        Raises:
            ValueError: If the checkpoint has other settings.
        """
        state = torch.load(path, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(
                f"{path} belongs to a run with (batch size, lr, weight decay, seed) "
                f"{state['settings']}, not {self.settings}; delete it or pass --no-resume"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        return int(state["epoch"])

    def save(self, path: Path, epoch: int) -> None:
        """Write a checkpoint after `epoch` epochs, whole or not at all."""
        unfinished = path.with_name(path.name + ".tmp")
        torch.save(
            {
                "settings": self.settings,
                "epoch": epoch,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            },
            unfinished,
        )
        unfinished.replace(path)

    def epoch(self, epoch: int, pool: ThreadPoolExecutor) -> None:
        """Train for one epoch, counted from 0, and print its metrics.

        Raises:
            RuntimeError: If the loss is no longer finite.
        """
        for number, shard in enumerate(self.shards):
            shard.rng.manual_seed((self.seed * 100_003 + epoch) * _SHARDS + number)
        title = f"epoch {epoch + 1}/{self.epochs}"
        total = correct = 0.0
        started = time.perf_counter()
        with tqdm(range(STEPS_PER_EPOCH), desc=title, mininterval=2) as bar:
            for index in bar:
                step = epoch * STEPS_PER_EPOCH + index
                loss, accuracy = self.step(step, pool)
                total, correct = total + loss, correct + accuracy
                if not math.isfinite(total):
                    raise RuntimeError(
                        f"the loss is not finite at step {step}; lower --lr ({self.lr})"
                    )
                if index % 20 == 19:
                    bar.set_postfix(
                        loss=f"{total / (index + 1):.3f}", acc=f"{correct / (index + 1):.3f}"
                    )
        rate = STEPS_PER_EPOCH * self.batch_size / (time.perf_counter() - started)
        held_out = held_out_accuracy(self.model, 2000)
        tqdm.write(
            f"{title}  loss {total / STEPS_PER_EPOCH:.3f}  "
            f"train {correct / STEPS_PER_EPOCH:.3f}  held-out {held_out:.3f}  {rate:.0f} images/s"
        )

    def step(self, step: int, pool: ThreadPoolExecutor) -> tuple[float, float]:
        """Take one step and return its loss and accuracy."""
        strength = min(1.0, 0.3 + 0.7 * step / RAMP_STEPS)
        results = list(pool.map(lambda shard: shard.step(strength), self.shards))
        with torch.no_grad():
            for group in zip(*self.parameters, strict=True):
                for other in group[1:]:
                    group[0].grad += other.grad
        nn.utils.clip_grad_norm_(self.parameters[0], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        loss = sum(loss for loss, _ in results) / _SHARDS
        return loss, sum(accuracy for _, accuracy in results) / _SHARDS
