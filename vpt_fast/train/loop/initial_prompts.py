"""Initial values of prompts from training images, for methods that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from vpt_fast.models.initialise import initialise, initialises
from vpt_fast.train.data.images import Batch

INIT_IMAGES = 256
"""Number of images that prompts are initialised from; all, if there are fewer."""


def initial_prompts(
    model: nn.Module, batches: Iterable[Batch], log: Callable[[str], None] | None = None
) -> None:
    """Initialise the prompts of a tuned model from the first training images, if its method does.

    Args:
        model: Tuned model, on its device.
        batches: Loader of training images, in a random order.
        log: Function that takes a line of text.
    """
    if not initialises(model):
        return
    count = initialise(model, _first(batches))
    if log is not None:
        log(f"initial prompts from {count} training images")


def _first(batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Yield the first `INIT_IMAGES` images."""
    missing = INIT_IMAGES
    for batch in batches:
        if len(batch.images):
            yield batch.images[:missing]
        missing -= len(batch.images)
        if missing <= 0:
            return
