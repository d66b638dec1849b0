"""The prompt methods: one frozen dataclass each.

VPT-Shallow and VPT-Deep are section 3.2 of "Visual Prompt Tuning" (ECCV 2022, arXiv 2203.12119),
whose section 4.3 ablates which blocks have prompts and whether they share them. VAPT is section 4
of "Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv
2501.18936).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from vpt_fast.methods.fields import check_count, check_dropout, check_flag
from vpt_fast.methods.prompt_method import PromptMethod

INITS = ("uniform", "spt-random", "spt-mean", "spt-max", "vipamin")
"""Names of initial values of VPT-Deep's prompts."""


def _check_prompts(method: VPTShallow | VPTDeep) -> None:
    if method.project_dim is not None:
        check_count("project_dim", method.project_dim, 1)
    check_flag("pool_prompts", method.pool_prompts)


@dataclass(frozen=True)
class VPTShallow(PromptMethod):
    """Prompts that join the sequence before block 0 and pass through every block as tokens.

    Args:
        num_prompts: Number of prompts p, at least 0.
        dropout: Probability of prompt dropout, an independent mask per image; in [0, 1).
        project_dim: Width of the stored prompts, which one Linear maps to the model's width; None
            for prompts of the model's width.
        pool_prompts: Whether average, max and attention pooling also read the prompt rows of the
            last block's output, as the published MAE runs do.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    project_dim: int | None = None
    pool_prompts: bool = False

    name: ClassVar[str] = "vpt-shallow"
    paper: ClassVar[str] = "ECCV 2022, arXiv 2203.12119"
    equation: ClassVar[str] = "[prefix, P, patches] enters block 0"
    shared: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompts(self)

    def prompted_blocks(self, depth: int) -> tuple[int, ...]:
        """Return which of `depth` blocks get prompts: block 0."""
        return (0,) if self.num_prompts else ()


@dataclass(frozen=True)
class VPTDeep(PromptMethod):
    """Prompts of its own for every chosen block, which replace the prompt rows of its input.

    Args:
        num_prompts: Number of prompts p of each block, at least 0.
        dropout: Probability of prompt dropout, an independent mask per image and block; in [0, 1).
        project_dim: Width of the stored prompts, which one Linear for all blocks maps to the
            model's width; None for prompts of the model's width.
        blocks: Indices of the prompted blocks, a range or a list, numbered through all stages of a
            model with stages; None for all blocks. Where an unprompted block follows a prompted
            one, the prompt rows pass through it as tokens.
        shared: Whether all prompted blocks have one set of prompts.
        pool_prompts: Whether the pooling also reads the prompt rows of the last block's output.
        init: Initial values: "uniform", those of VPT, or from images, by `vpt_fast.initialise`:
            random tokens of the block's own input, or means or maxima of windows of them (SPT:
            "spt-random", "spt-mean", "spt-max"), or "vipamin". Not with `project_dim` or `shared`.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range, or `blocks` is empty or names a block twice.
    """

    project_dim: int | None = None
    blocks: Iterable[int] | None = None
    shared: bool = False
    pool_prompts: bool = False
    init: str = "uniform"

    name: ClassVar[str] = "vpt-deep"
    paper: ClassVar[str] = "ECCV 2022, arXiv 2203.12119"
    equation: ClassVar[str] = "K = [K_p; K_x], V = [V_p; V_x] with K_p, V_p of P_i"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompts(self)
        check_flag("shared", self.shared)
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {self.init!r}")
        if self.init != INITS[0] and (self.shared or self.project_dim is not None):
            raise ValueError(
                f"init={self.init!r} sets each block's own prompts, of the model's width; leave "
                "shared and project_dim out"
            )
        if self.blocks is None:
            return
        if isinstance(self.blocks, (str, bytes)) or not isinstance(self.blocks, Iterable):
            raise TypeError(f"blocks must be a range or a list of block indices: {self.blocks!r}")
        blocks = tuple(self.blocks)
        if not blocks:
            raise ValueError("blocks is empty; name at least one block, or None for all of them")
        for index in blocks:
            check_count("blocks: every index", index, 0)
        repeated = sorted({i for i in blocks if blocks.count(i) > 1})
        if repeated:
            raise ValueError(f"blocks names block {repeated[0]} more than once: {list(blocks)}")
        object.__setattr__(self, "blocks", tuple(sorted(blocks)))

    def prompted_blocks(self, depth: int) -> tuple[int, ...]:
        """Return which of `depth` blocks get prompts, in ascending order.

        Raises:
            ValueError: If `blocks` names a block that a model of this depth does not have.
        """
        blocks = tuple(range(depth)) if self.blocks is None else tuple(self.blocks)
        if blocks and blocks[-1] >= depth:
            raise ValueError(
                f"blocks names block {blocks[-1]}, but the model has {depth} blocks "
                f"(0 to {depth - 1})"
            )
        return blocks if self.num_prompts else ()


VAPT_VARIANTS = ("code", "paper")


@dataclass(frozen=True)
class VAPT(PromptMethod):
    """Prompts that depend on the image: experts compute them from the patches of a block's input.

    Block 0 has static prompts. From block 1 on, the block's input is normalised (LayerNorm), its
    patches are convolved with one `kernel_size` x `kernel_size` kernel for all channels, combined
    into p prompts by a token-wise projector, and passed through a feature projector that all blocks
    share.

    Args:
        num_prompts: Number of prompts p of each block, at least 0.
        dropout: Probability of prompt dropout in block 0, an independent mask per image; in [0, 1).
        kernel_size: Height and width K of the convolution's kernel, at most those of the patch
            grid.
        hidden_dim: Width r of the feature projector's hidden layer.
        projector_dropout: Probability of dropout in that hidden layer, in [0, 1).
        channel_dropout: Probability of dropping a channel of an image from the token mixing, in
            [0, 1).
        variant: "code", which the published figures come from, or "paper", the paper's equations:
            no residual around the feature projector, no bias in the token-wise projector.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    kernel_size: int = 2
    hidden_dim: int = 8
    projector_dropout: float = 0.1
    channel_dropout: float = 0.1
    variant: str = "code"

    name: ClassVar[str] = "vapt"
    paper: ClassVar[str] = "ICLR 2026, arXiv 2501.18936"
    equation: ClassVar[str] = "P = g + W2 relu(W1 g), g = W vec(conv(norm(x))) + b"
    shared: ClassVar[bool] = False
    project_dim: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("kernel_size", self.kernel_size, 1)
        check_count("hidden_dim", self.hidden_dim, 1)
        for name in ("projector_dropout", "channel_dropout"):
            check_dropout(name, getattr(self, name))
        if self.variant not in VAPT_VARIANTS:
            raise ValueError(
                f"variant must be one of {', '.join(VAPT_VARIANTS)}; got {self.variant!r}"
            )
