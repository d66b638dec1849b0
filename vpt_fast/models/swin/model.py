"""timm's SwinTransformer, tuned: the class that models are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from vpt_fast.models.graphs.block_graphs import replayed
from vpt_fast.models.interop.symbolic import runs_plainly
from vpt_fast.models.patches import embedded_patches
from vpt_fast.models.prompt_rows import LiveRows
from vpt_fast.models.swin.blocks import check_blocks
from vpt_fast.models.swin.install import install_prompts
from vpt_fast.models.tuned import Tuned, blocks_of, check_pooling
from vpt_fast.modules.baseline_layers import new_classifier
from vpt_fast.modules.hooks import is_taken_over
from vpt_fast.ops.tracing import as_plain_operators


def plain_inputs(model: Any, batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the inputs (B, H * W, D) of each block in turn, as `isotropic.inputs.plain_inputs`."""
    inputs = [model.patch_embed(images) for images in batches]
    for stage in model.layers:
        inputs = [stage.downsample(x) for x in inputs]
        for block in stage.blocks:
            yield [x.flatten(1, 2) for x in inputs]
            inputs = [SwinTransformerBlock.forward(block, x) for x in inputs]


class PromptedSwinTransformer(Tuned, SwinTransformer):
    """timm's SwinTransformer, tuned.

    Its features are images without prompt rows; with `pool_prompts` they are
    (B, 1, p + H * W, D), prompt rows first.
    """

    plain_class = SwinTransformer

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        if not runs_plainly(x):
            return super().forward(x)
        with as_plain_operators(x):
            return super().forward(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the final norm of the last stage's output, as timm's."""
        static = tuple(stage.grad_checkpointing for stage in self.layers)
        x = embedded_patches(self.patch_embed, x)
        return self.norm(replayed(self.tune_record.graphs, self, self._through, x, *static))

    def _through(self, x: Tensor, *static: bool) -> Tensor:
        """Return the features that the head pools, from the first stage's input (B, H, W, D)."""
        if not self._has_live_rows():
            return self.layers(x)
        if type(self.layers) is not nn.Sequential or is_taken_over(self.layers):
            raise ValueError(
                "`layers` is hooked, compiled or not timm's, but prompt rows pass beside what it "
                "sees; hook or compile its stages instead"
            )
        live = LiveRows()
        for stage in self.layers:
            x = stage(x, live=live)
        return self._with_rows(x, live)

    def _has_live_rows(self) -> bool:
        blocks = blocks_of(self)
        check_blocks(blocks)
        return any(block.rows.entering or block.rows.leaving for block in blocks)

    def _with_rows(self, x: Tensor, live: LiveRows) -> Tensor:
        """Return the features that the head pools: x (B, H, W, D), with live rows if pooled."""
        if live.rows is None or not self.pools_prompts():
            return x
        return torch.cat([live.rows.to(x.dtype), x.flatten(1, 2)], 1).unsqueeze(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of features; an MLP head's hidden layers come before `head.fc`."""
        hidden = self._modules.get("head_hidden")
        if hidden is None or isinstance(self.head.fc, nn.Identity):
            return super().forward_head(x, pre_logits=pre_logits)
        pooled = self.head(x, pre_logits=True)
        return pooled if pre_logits else self.head.fc(hidden(pooled))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return outputs of stages (B, D, H, W) as timm does, without prompt rows.

        Raises:
            ValueError: `output_fmt` is not NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; Swin's features are NCHW only")
        stages: Any = list(self.layers)
        taken, last = feature_take_indices(len(stages), indices)
        live, intermediates = LiveRows(), []
        x = embedded_patches(self.patch_embed, x)
        for index, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = stage(x, live=live)
            if index in taken:
                final = norm and index == len(stages) - 1
                found = self.norm(x) if final else x
                intermediates.append(found.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return intermediates
        if not stop_early or last == len(stages) - 1:
            x = self.norm(self._with_rows(x, live))
        return x, intermediates

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, of an MLP head its last layer.

        Raises:
            ValueError: The new pooling does not read prompts, and the method pools them.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if num_classes:
            check_pooling(self.tune_record.method, pool)
        super().reset_classifier(num_classes, global_pool)
        hidden = self._modules.get("head_hidden")
        if isinstance(hidden, nn.Sequential) and isinstance(self.head.fc, nn.Linear):
            linear: Any = hidden[-2]  # the last one is a ReLU
            fc = new_classifier(linear.out_features, self.head.fc)
            self.head.fc = fc.train(self.training)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Remove stages as timm does; the new last block drops its prompt rows."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        install_prompts(self)
        return taken
