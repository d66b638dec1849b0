"""timm's VisionTransformer and its distilled form, tuned: the classes that models are given."""

from __future__ import annotations

from typing import Any

from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpt_fast.models.fusion.fused_block import Use, run_together
from vpt_fast.models.fusion.look_ahead import look_ahead
from vpt_fast.models.graphs.block_graphs import replayed
from vpt_fast.models.patches import first_block_input
from vpt_fast.models.prompt_rows import strip_rows
from vpt_fast.models.tuned import Tuned, check_pooling
from vpt_fast.models.vit.blocks import PromptedBlock, fused, through_block
from vpt_fast.models.vit.head_rows import HeadReading
from vpt_fast.models.vit.install import install_prompts
from vpt_fast.modules.baseline_layers import new_classifier
from vpt_fast.modules.experts import PromptExperts, check_grid
from vpt_fast.modules.hooks import is_taken_over
from vpt_fast.ops.backend import uses_kernels
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.tracing import any_derivative, is_transformed


class _PromptedModel(Tuned, VisionTransformer):
    """Base of both tuned classes. Blocks insert and strip prompt rows; the rest is timm's."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Return the logits; the last block computes only the rows that the head reads."""
        if is_transformed():
            with any_derivative():
                return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        count = self._rows_read()
        if count is None or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self._head_of(DeferredSum(first_block_input(self, x)), 0, count)

    def forward_until(self, x: Tensor, first: int) -> Tensor:
        """Return the input (B, N, D) of block `first` for images (B, 3, height, width)."""
        blocks: Any = self.blocks
        total = DeferredSum(first_block_input(self, x))
        return self._through(list(blocks[:first]), total, self._memory()).materialize()

    def forward_from(self, x: Tensor, first: int) -> Tensor:
        """Return the logits (B, classes) for the input (B, N, D) of block `first`.

        `forward_until` and then this is the model.
        """
        return self._head_of(DeferredSum(x), first, self._rows_read())

    def _head_of(self, total: DeferredSum, first: int, count: int | None) -> Tensor:
        """Return the logits for the input of block `first`, from `count` rows of the last block."""
        graphs, static = self.tune_record.graphs, (first, count, self._memory())
        x = replayed(graphs, self, self._rows_from, total.materialize(), *static)
        return self.forward_head(self.norm(x))

    def _rows_from(self, x: Tensor, first: int, count: int | None, memory: str) -> Tensor:
        """Return `count` rows of the last block (None: all) for the input of block `first`."""
        blocks = list(self.blocks)[first:]
        rows = self._through(blocks, DeferredSum(x), memory, count).materialize()
        return rows if blocks and count is not None else self._without_late_rows(rows)

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the final norm of the last block's output (B, N, D), as timm's."""
        blocks: Any = self.blocks
        apart = type(blocks) is not nn.Sequential or is_taken_over(blocks)
        if attn_mask is not None or is_causal or apart:
            x = super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
            return self._without_late_rows(x)
        static = (0, None, self._memory())
        x = replayed(
            self.tune_record.graphs, self, self._rows_from, first_block_input(self, x), *static
        )
        return self.norm(x)

    def _without_late_rows(self, x: Tensor) -> Tensor:
        """Strip prompt rows that leave the last block where blocks after it were removed."""
        late = self._rows_leaving(-1) if len(self.blocks) and not self.pools_prompts() else 0
        return strip_rows(x, late, self.num_prefix_tokens)

    def _memory(self) -> str:
        return "minimal" if self.grad_checkpointing else self.tune_record.memory

    def _through(
        self, blocks: list[Any], total: DeferredSum, memory: str, count: int | None = None
    ) -> DeferredSum:
        """Return the output of the given blocks: `count` rows of the last one, None for all."""
        firsts = [*[None] * (len(blocks) - 1), count][: len(blocks)]
        # The last block is not fused where it computes a few rows on a CPU.
        together = len(blocks) - (count is not None and not uses_kernels(total.residual))
        ahead = look_ahead(blocks[:together], total.residual, fused)
        if ahead is not None:
            uses = [Use(memory, queries=first) for first in firsts[:together]]
            total = run_together(*ahead, total, uses)
            blocks, firsts = blocks[together:], firsts[together:]
        for block, first in zip(blocks, firsts, strict=True):
            total = through_block(block, total, memory, first)
        return total

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add position embeddings; refuse a patch grid other than that of the prompt experts."""
        experts = getattr(self.blocks[-1], "prompt", None)
        if isinstance(experts, PromptExperts):
            check_grid(experts.grid, x.shape[1:3] if x.ndim == 4 else self.patch_embed.grid_size)
        return super()._pos_embed(x)

    def _rows_read(self) -> int | None:
        """Return the number of rows that the last block has to compute; None for all."""
        reading = self.__dict__.get("_head_reading")
        if reading is None:
            reading = self.__dict__["_head_reading"] = HeadReading(PromptedBlock)
        rows: int | None = reading.rows(self)
        return rows

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Return timm's intermediates, with live prompt rows stripped from every entry."""
        height, width = x.shape[-2:]
        result: Any = super().forward_intermediates(
            x,
            indices,
            return_prefix_tokens=True,
            norm=norm,
            stop_early=stop_early,
            output_fmt="NLC" if output_fmt == "NCHW" else output_fmt,
            intermediates_only=intermediates_only,
            output_dict=True,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        taken, last = feature_take_indices(len(self.blocks), indices)
        patches = [
            entry[:, self._rows_leaving(index) :]
            for index, entry in zip(sorted(taken), result["image_intermediates"], strict=True)
        ]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
        result["image_intermediates"] = patches
        if not intermediates_only:
            stop = last if stop_early else len(self.blocks) - 1
            pooled = stop == len(self.blocks) - 1 and self.pools_prompts()
            count = 0 if pooled else self._rows_leaving(stop)
            result["image_features"] = strip_rows(
                result["image_features"], count, self.num_prefix_tokens
            )
        if output_dict:
            if not return_prefix_tokens:
                result.pop("image_intermediates_prefix", None)
            return result
        if return_prefix_tokens and self.num_prefix_tokens:
            patches = list(zip(patches, result["image_intermediates_prefix"], strict=True))
        return patches if intermediates_only else (result["image_features"], patches)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return the logits of features; an MLP head's hidden layers come before `head`."""
        hidden = self._modules.get("head_hidden")
        if hidden is None or isinstance(self.head, nn.Identity):
            return super().forward_head(x, pre_logits=pre_logits)
        pooled = super().forward_head(x, pre_logits=True)
        return pooled if pre_logits else self.head(hidden(pooled))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, of an MLP head its last layer.

        Raises:
            ValueError: The new pooling does not read prompts, and the method pools them.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if num_classes:
            check_pooling(self.tune_record.method, pool)
        super().reset_classifier(num_classes, global_pool)
        width = getattr(self.tune_record.method, "hidden_dim", None)
        if (
            width is not None
            and isinstance(self.head, nn.Linear)
            and "head_hidden" in self._modules
        ):
            self.head = new_classifier(width, self.head).train(self.training)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Remove blocks as timm does; the new last block strips its prompt rows."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        install_prompts(self)
        return taken

    def _rows_leaving(self, index: int) -> int:
        block = self.blocks[index]
        return block.rows.leaving if isinstance(block, PromptedBlock) else 0


class PromptedVisionTransformer(_PromptedModel):
    """timm's VisionTransformer, tuned."""

    plain_class = VisionTransformer


class PromptedVisionTransformerDistilled(_PromptedModel, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (DeiT with a distillation token), tuned."""

    plain_class = VisionTransformerDistilled
