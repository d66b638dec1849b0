"""Baselines, which the papers compare prompts with: one frozen dataclass each.

Section 4.1 of "Visual Prompt Tuning" (ECCV 2022, arXiv 2203.12119) lists them and what each trains.
All of them train the classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vpt_fast.methods.fields import check_count

# timm's names of what follows the blocks: final norm, attention pooling, norm of pooled features.
_AFTER_BLOCKS = ("norm.", "attn_pool.", "fc_norm.")


@dataclass(frozen=True)
class Baseline:
    """A method without prompts; attributes as of `PromptMethod`."""

    name: ClassVar[str]
    paper: ClassVar[str] = "ECCV 2022, arXiv 2203.12119, section 4.1"
    equation: ClassVar[str] = ""
    num_prompts: ClassVar[int] = 0

    def prompted_blocks(self, depth: int) -> tuple[int, ...]:
        """Return (), as none of the `depth` blocks gets prompts."""
        return ()

    def trains(self, name: str, depth: int) -> bool:
        """Return whether the parameter `name` of a backbone of `depth` blocks is trained."""
        return False


@dataclass(frozen=True)
class LinearProbe(Baseline):
    """Train the classifier only."""

    name: ClassVar[str] = "linear"
    equation: ClassVar[str] = "the classifier"


@dataclass(frozen=True)
class FullTuning(Baseline):
    """Train every parameter of the model."""

    name: ClassVar[str] = "full"
    equation: ClassVar[str] = "every parameter"

    def trains(self, name: str, depth: int) -> bool:
        """Return True, for every parameter; see `Baseline.trains`."""
        return True


@dataclass(frozen=True)
class PartialTuning(Baseline):
    """Train the last blocks and what follows them: final norm, attention pooling, classifier.

    Args:
        num_blocks: Number k of trained blocks ("Partial-k"), from 1 to the model's depth.

    Raises:
        TypeError: If `num_blocks` is no int.
        ValueError: If `num_blocks` is less than 1.
    """

    num_blocks: int = 1

    name: ClassVar[str] = "partial"
    equation: ClassVar[str] = "the last blocks and what follows them"

    def __post_init__(self) -> None:
        check_count("num_blocks", self.num_blocks, 1)

    def trains(self, name: str, depth: int) -> bool:
        """Return whether it is in the last blocks or follows them; see `Baseline.trains`."""
        part, _, rest = name.partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) >= depth - self.num_blocks
        return name.startswith(_AFTER_BLOCKS)


@dataclass(frozen=True)
class BiasTuning(Baseline):
    """Train the classifier and every bias, including those of patch embedding and LayerNorms.

    Biases of queries and values (`q_bias`, `v_bias` of timm's EvaAttention) are among them.

    "BitFit", arXiv 2106.10199, section 3.
    """

    name: ClassVar[str] = "bias"
    paper: ClassVar[str] = "BitFit, arXiv 2106.10199"
    equation: ClassVar[str] = "every bias"

    def trains(self, name: str, depth: int) -> bool:
        """Return whether the parameter is a bias; see `Baseline.trains`."""
        return name.rpartition(".")[2] in ("bias", "q_bias", "v_bias")


@dataclass(frozen=True)
class AdapterTuning(Baseline):
    """Train the classifier and a bottleneck after every block's MLP, h + up(gelu(down(h))).

    The adapter is placed just before the residual sum (after LayerScale, if any), as in Pfeiffer et
    al. (arXiv 2005.00247); no LayerNorm is added or trained. `up` starts at zero, so that training
    starts from the pretrained function exactly: Houlsby et al. (arXiv 1902.00751, section 2) ask
    for a near-identity start.

    Args:
        reduction: Divisor of the model's width D, from 1 to D; the bottleneck has D // reduction
            channels.

    Raises:
        TypeError: If `reduction` is no int.
        ValueError: If `reduction` is less than 1.
    """

    reduction: int = 8

    name: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "arXiv 2005.00247"
    equation: ClassVar[str] = "h + up(gelu(down(h))) after every MLP"

    def __post_init__(self) -> None:
        check_count("reduction", self.reduction, 1)


@dataclass(frozen=True)
class MLPHead(Baseline):
    """Train a classifier that is an MLP with ReLU ("Mlp-k"); the backbone stays as it is.

    Args:
        num_layers: Number of the classifier's Linears, including the last one; at least 2
            (`LinearProbe` has 1).
        hidden_dim: Width of the hidden layers; None for the model's width.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    num_layers: int = 3
    hidden_dim: int | None = None

    name: ClassVar[str] = "mlp-head"
    equation: ClassVar[str] = "a classifier of several layers"

    def __post_init__(self) -> None:
        check_count("num_layers", self.num_layers, 2)
        if self.hidden_dim is not None:
            check_count("hidden_dim", self.hidden_dim, 1)
