"""What people type: values in any case with `_` or `-`, synonyms, and flags of other programs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

METHODS = {
    "deep": "vpt-deep",
    "shallow": "vpt-shallow",
    "linear-probe": "linear",
    "linear-probing": "linear",
    "full-tuning": "full",
    "fine-tune": "full",
    "fine-tuning": "full",
    "partial-tuning": "partial",
    "bias-tuning": "bias",
    "bitfit": "bias",
    "adapter-tuning": "adapter",
    "mlp": "mlp-head",
}
DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
DEVICES = {"gpu": "cuda"}
FORMATS = {
    "folder": "folders",
    "vtab-1k": "vtab",
    "huggingface": "hf",
    "hfds": "hf",
    "wds": "webdataset",
}
SPLITS = {"validation": "val", "valid": "val"}

FLAGS = {
    "--amp": "--amp-dtype=16-bit",
    "--bf16": "--amp-dtype=bfloat16",
    "--fp16": "--amp-dtype=float16",
    "--cutmix-alpha": "--cutmix",
    "--data-format": "--format",
    "--early-stopping-patience": "--patience",
    "--initial-checkpoint": "--checkpoint",
    "--label-smoothing": "--smoothing",
    "--label-smoothing-factor": "--smoothing",
    "--lr-base": "--lr",
    "--mixup-alpha": "--mixup",
    "--model-name-or-path": "--model",
    "--normalization": "--normalisation",
    "--num-tokens": "--num-prompts",
    "--num-train-epochs": "--epochs",
    "--num-virtual-tokens": "--num-prompts",
    "--optimizer": "--opt",
    "--output-dir": "--output",
    "--overwrite-output-dir": "--overwrite",
    "--top-k": "--topk",
    "--wd": "--weight-decay",
}
"""Flags of timm's, PEFT's and Hugging Face's programs, as these commands spell them."""

REFUSED = {
    "--channels-last": "the layout follows from the device; leave it out",
    "--crop-pct": "--resize crop takes 224 / 256, --resize squash all of the image",
    "--data-dir": "the data are an argument: vpt-fast train DIR",
    "--dataset": "the data are an argument, DIR, and --format says how they are laid out",
    "--drop-path": "the backbone is frozen; --dropout is that of prompts",
    "--experiment": "--output names the folder of a run",
    "--grad-accum-steps": "--batch-size is that of a step, --accumulation the parts it is done in",
    "--grad-checkpointing": "--memory minimal saves each block's input alone",
    "--gradient-accumulation-steps": "--batch-size is that of a step, --accumulation the parts it "
    "is done in",
    "--gradient-checkpointing": "--memory minimal saves each block's input alone",
    "--input-size": "--img-size is the side in pixels",
    "--learning-rate": "--lr is the base rate, which is multiplied by batch size / 256",
    "--local-rank": "start several processes with torchrun, which needs no such option",
    "--momentum": "it is 0.9 with sgd, as in the papers; leave it out",
    "--no-prefetcher": "there is no prefetcher; --workers is how many processes load images",
    "--num-classes": "the data say how many classes there are; leave it out",
    "--per-device-train-batch-size": "--batch-size is that of all devices together",
    "--sched": "it is the cosine; --schedule says whether by epoch or by step",
    "--torchcompile": "blocks run as one function already; leave it out",
    "--warmup-lr": "warm-up begins at 0; --warmup-epochs is how long it takes",
    "--warmup-ratio": "--warmup-epochs is how long the warm-up takes",
}
"""Flags of those programs that have no counterpart, and what is said."""

Names = Iterable[str] | Callable[[], Iterable[str]]


def _key(text: str) -> str:
    return text.casefold().replace("_", "").replace("-", "")


def spelling(
    names: Names, synonyms: Mapping[str, str] | None = None
) -> Callable[[str | None], str | None]:
    """Return a function that turns what was typed into the name that is meant.

    What is no name stays as it is, for the one who knows the choices to refuse.

    Args:
        names: Names, or a function that returns them.
        synonyms: Names by other words for them.
    """

    def spelled(value: str | None) -> str | None:
        known = list(names() if callable(names) else names)
        if value is None or value in known:
            return value
        meant = {_key(word): name for word, name in (synonyms or {}).items()}
        meant |= {_key(name): name for name in known}
        return meant.get(_key(value), value)

    return spelled


def each(spelled: Callable[[str | None], str | None]) -> Callable[[str | None], str | None]:
    """Return a function that does the same for each of several values with commas between them."""
    return lambda text: text and ",".join(str(spelled(part.strip())) for part in text.split(","))


def device(value: str) -> str:
    """Return a device as PyTorch spells it: gpu:1 is cuda:1."""
    kind, colon, index = value.casefold().partition(":")
    return f"{DEVICES.get(kind, kind)}{colon}{index}"


def model(value: str) -> str:
    """Return a model as timm spells it, in small letters with underscores, without "timm/"."""
    value = value.removeprefix("timm/")
    spelled = value.lower().replace("-", "_")
    if ":" in value or "/" in value or value == spelled:
        return value
    from timm import is_model  # takes seconds, and most names are spelled right

    return value if is_model(value.partition(".")[0]) else spelled


def respelled(words: Sequence[str], own: Collection[str]) -> list[str]:
    """Return a command's words with the flags of other programs as the command spells them.

    Args:
        words: Words after the command's name.
        own: Options of the command.

    Raises:
        ValueError: If a flag has no counterpart.
    """
    first: list[str] = []
    others: list[str] = []
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if word == "--":
            return [*first, *others, *words[index:]]
        if not flag.startswith("--") or flag in own:
            others.append(word)
            continue
        hyphened = flag.replace("_", "-")
        meant = FLAGS.get(hyphened, hyphened)
        option, has_value, _ = meant.partition("=")
        if option not in own:
            if hyphened in REFUSED:
                raise ValueError(f"{flag} is not an option: {REFUSED[hyphened]}")
            others.append(word)
        elif has_value and not equals:
            first.append(meant)  # so that an option that is given by itself, before or after, wins
        else:
            others.append(f"{option}{equals}{value}")
    return [*first, *others]
