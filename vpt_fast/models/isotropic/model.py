"""A transformer of one width with prompts: what the tuned models of all families share."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import Proxy

from vpt_fast.models.fusion.fused_block import Use, run_together
from vpt_fast.models.fusion.look_ahead import look_ahead
from vpt_fast.models.graphs.block_graphs import replayed
from vpt_fast.models.interop.symbolic import runs_plainly, without_masks
from vpt_fast.models.isotropic.block import PromptedBlock
from vpt_fast.models.isotropic.head_rows import HeadReading
from vpt_fast.models.isotropic.inputs import block_inputs, table_of
from vpt_fast.models.isotropic.install import install_prompts
from vpt_fast.models.isotropic.rope_tables import RopeTables
from vpt_fast.models.prompt_rows import strip_rows
from vpt_fast.models.tuned import SHARED, Tuned, check_pooling, reads_feature
from vpt_fast.modules.baseline_layers import new_classifier
from vpt_fast.modules.experts import PromptExperts, check_grid
from vpt_fast.modules.hooks import is_taken_over
from vpt_fast.ops.backend import uses_kernels
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.tracing import (
    as_plain_operators,
    is_symbolic,
)

_Timms: Any = nn.Module
"""Stands for timm's class, whose methods mypy cannot see."""


class PromptedModel(Tuned, _Timms):
    """A tuned model; mixed into timm's class. Blocks insert and strip prompt rows.

    Attributes:
        tuned_block: Class that blocks are given.
        container: timm's class of `blocks`.
    """

    tuned_block: ClassVar[type[PromptedBlock]]
    container: ClassVar[type[nn.Module]] = nn.Sequential
    blocks: Any
    num_prefix_tokens: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Return the logits; the last block computes only the rows that the head reads."""
        if runs_plainly(x):
            x, attn_mask, is_causal = without_masks(x, attn_mask, is_causal)
            with as_plain_operators(x):
                return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        count = self._rows_read()
        if count is None or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self._head_of(*self.embedded(x), 0, count)

    def embedded(self, images: Tensor) -> tuple[Tensor, RopeTables | None]:
        """Return the input (B, N, D) of the first block for images (B, 3, height, width).

        With it the tables of the rotary position embedding, None for a model without one.
        """
        return block_inputs(self, images)

    def tables_of(self, x: Tensor) -> RopeTables | None:
        """Return the tables for tokens (B, N, D) of the model's own image size."""
        return None

    def forward_until(self, x: Tensor, first: int) -> Tensor:
        """Return the input (B, N, D) of block `first` for images (B, 3, height, width)."""
        tokens, tables = self.embedded(x)
        total = DeferredSum(tokens)
        return self._through(
            list(self.blocks[:first]), total, self._memory(), None, tables, 0
        ).materialize()

    def feature_of(self, x: Tensor) -> Any:
        """Return what the method's shared module makes of the first block's input (B, N, D).

        None if no block reads it.
        """
        shared = self._modules.get(SHARED)
        return shared(x) if shared is not None and reads_feature(self.blocks) else None

    def forward_from(self, x: Tensor, first: int) -> Tensor:
        """Return the logits (B, classes) for the input (B, N, D) of block `first`.

        `forward_until` and then this is the model, unless its prompts come from a feature of the
        image: that is made of the first block's input, and none of them runs here.
        """
        return self._head_of(x, self.tables_of(x), first, self._rows_read())

    def _head_of(
        self, x: Tensor, tables: RopeTables | None, first: int, count: int | None
    ) -> Tensor:
        """Return the logits for the input of block `first`, from `count` rows of the last block."""
        own: Any = self
        rows = self._replayed(x, tables, first, count)
        logits: Tensor = own.forward_head(own.norm(rows))
        return logits

    def _replayed(
        self, x: Tensor, tables: RopeTables | None, first: int, count: int | None
    ) -> Tensor:
        """Return `_rows_from`, from recorded CUDA graphs where there are any."""
        graphs = self.tune_record.graphs
        if tables is not None and not tables.is_constant:
            graphs = None
        return replayed(graphs, self, self._rows_from, x, first, count, self._memory(), tables)

    def _rows_from(
        self, x: Tensor, first: int, count: int | None, memory: str, tables: RopeTables | None
    ) -> Tensor:
        """Return `count` rows of the last block (None: all) for the input of block `first`."""
        blocks, feature = list(self.blocks)[first:], None if first else self.feature_of(x)
        total = self._through(blocks, DeferredSum(x), memory, count, tables, first, feature)
        rows = total.materialize()
        return rows if blocks and count is not None else self._without_late_rows(rows)

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the final norm of the last block's output (B, N, D), as timm's."""
        own: Any = self
        apart = type(self.blocks) is not self.container or is_taken_over(self.blocks)
        if attn_mask is not None or is_causal or apart:
            x = super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
            return self._without_late_rows(x)
        features: Tensor = own.norm(self._replayed(*self.embedded(x), 0, None))
        return features

    def _without_late_rows(self, x: Tensor) -> Tensor:
        """Strip prompt rows that leave the last block where blocks after it were removed."""
        late = self.rows_leaving(-1) if len(self.blocks) and not self.pools_prompts() else 0
        return strip_rows(x, late, self.num_prefix_tokens)

    def _memory(self) -> str:
        own: Any = self
        return "minimal" if own.grad_checkpointing else self.tune_record.memory

    def _through(
        self,
        blocks: list[Any],
        total: DeferredSum,
        memory: str,
        count: int | None,
        tables: RopeTables | None,
        first: int,
        feature: Any = None,
    ) -> DeferredSum:
        """Return the output of the given blocks: `count` rows of the last one, None for all.

        Args:
            blocks: Consecutive blocks.
            total: Input of the first of them.
            memory: What is saved for backward.
            count: Number of first rows of the last block.
            tables: Tables of the rotary position embedding, or None.
            first: Index of the first of the blocks in the model.
            feature: What `feature_of` returned.
        """
        firsts = [*[None] * (len(blocks) - 1), count][: len(blocks)]
        ropes = [table_of(tables, first + index) for index in range(len(blocks))]
        # The last block is not fused where it computes a few rows on a CPU.
        together = len(blocks) - (count is not None and not uses_kernels(total.residual))
        rotated = tables is None or is_symbolic() or tables.can_rotate(total.residual)
        together = together if rotated else 0
        ahead = look_ahead(blocks[:together], total.residual, self.tuned_block.fused, feature)
        if ahead is not None:
            uses = [Use(memory, queries=rows) for rows in firsts[:together]]
            total = run_together(*ahead, total, uses, ropes[:together])
            blocks, firsts, ropes = blocks[together:], firsts[together:], ropes[together:]
        for block, rows, rope in zip(blocks, firsts, ropes, strict=True):
            total = self.tuned_block.through(block, total, memory, rows, rope, feature)
        return total

    def _pos_embed(self, x: Tensor) -> Any:
        """Add position embeddings; refuse a patch grid other than that of the prompt experts."""
        own: Any = self
        experts = getattr(self.blocks[-1], "prompt", None)
        if isinstance(experts, PromptExperts) and not isinstance(x, Proxy):
            check_grid(experts.grid, x.shape[1:3] if x.ndim == 4 else own.patch_embed.grid_size)
        return super()._pos_embed(x)

    def _rows_read(self) -> int | None:
        """Return the number of rows that the last block has to compute; None for all."""
        reading = self.__dict__.get("_head_reading")
        if reading is None:
            reading = self.__dict__["_head_reading"] = HeadReading(self.tuned_block)
        rows: int | None = reading.rows(self)
        return rows

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return the logits of features; an MLP head's hidden layers come before `head`."""
        own: Any = self
        hidden = self._modules.get("head_hidden")
        if hidden is None or isinstance(own.head, nn.Identity):
            return super().forward_head(x, pre_logits=pre_logits)
        pooled = super().forward_head(x, pre_logits=True)
        return pooled if pre_logits else own.head(hidden(pooled))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, of an MLP head its last layer.

        Raises:
            ValueError: The new pooling does not read prompts, and the method pools them.
        """
        own: Any = self
        pool = own.global_pool if global_pool is None else global_pool
        if num_classes:
            check_pooling(self.tune_record.method, pool)
        super().reset_classifier(num_classes, global_pool)
        width = getattr(self.tune_record.method, "hidden_dim", None)
        if width is not None and isinstance(own.head, nn.Linear) and "head_hidden" in self._modules:
            own.head = new_classifier(width, own.head).train(self.training)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Remove blocks as timm does; the new last block strips its prompt rows."""
        taken: list[int] = super().prune_intermediate_layers(*args, **kwargs)
        install_prompts(self)
        return taken

    def rows_leaving(self, index: int) -> int:
        """Return the number of prompt rows in the output of block `index`."""
        block = self.blocks[index]
        return block.rows.leaving if isinstance(block, self.tuned_block) else 0
