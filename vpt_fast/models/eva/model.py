"""timm's Eva, tuned: the class that models are given."""

from __future__ import annotations

from typing import Any

from timm.models.eva import Eva
from torch import Tensor, nn
from torch.fx import Proxy

from vpt_fast.models.eva.blocks import PromptedEvaBlock
from vpt_fast.models.isotropic.intermediates import without_live_rows
from vpt_fast.models.isotropic.model import PromptedModel
from vpt_fast.models.isotropic.rope_tables import LatestTables, RopeTables
from vpt_fast.models.patches import embedded_patches
from vpt_fast.ops.tracing import is_traced


class PromptedEva(PromptedModel, Eva):
    """timm's Eva, tuned."""

    plain_class = Eva
    tuned_block = PromptedEvaBlock
    container = nn.ModuleList

    def embedded(self, images: Tensor) -> tuple[Tensor, RopeTables | None]:
        """Return the first block's input and the tables; see `PromptedModel.embedded`."""
        x, rope = self._pos_embed(embedded_patches(self.patch_embed, images))
        return self.norm_pre(x), self._tables(rope)

    def forward_until(self, x: Tensor, first: int) -> Tensor:
        """Return the input of block `first`; see `PromptedModel.forward_until`.

        Raises:
            ValueError: The images' patch grid is not the model's own: `forward_from`, which gets
                rows alone, would take them for rows of that grid.
        """
        if self.rope is not None:
            embed: Any = self.patch_embed
            own, grid = tuple(embed.grid_size), tuple(embed.dynamic_feat_size(x.shape[-2:]))
            if grid != own:
                raise ValueError(
                    f"images of {grid[0]} x {grid[1]} patches in a model of {own[0]} x {own[1]}: "
                    "the positions of their rows would not be known later; resize the images, or "
                    "call set_input_size"
                )
        return super().forward_until(x, first)

    def tables_of(self, x: Tensor) -> RopeTables | None:
        """Return the tables for the model's own image size; see `PromptedModel.tables_of`.

        Raises:
            ValueError: The tokens are those of another size.
        """
        grid = self.patch_embed.grid_size
        rows = self.num_prefix_tokens + grid[0] * grid[1]
        if self.rope is None:
            return None
        if x.shape[1] != rows:
            raise ValueError(
                f"the model's images have {rows} tokens ({grid[0]} x {grid[1]} patches), but these "
                f"have {x.shape[1]}: their positions are not known; resize the images, or call "
                "set_input_size"
            )
        embedding: Any = self.rope
        fixed = not self.dynamic_img_size and hasattr(embedding, "feat_shape")
        return self._tables(embedding.get_embed(None if fixed else grid))

    def _tables(self, rope: Tensor | None) -> RopeTables | None:
        if rope is None:
            return None
        form = len(self.blocks), self.rope_mixed
        if is_traced(rope) or isinstance(rope, Proxy) or rope.is_inference():
            return RopeTables(rope, *form)
        latest: LatestTables = self.__dict__.setdefault("_rope_tables", LatestTables())
        return latest.of(rope, *form)

    def _forget(self) -> None:
        """Drop all readings of the blocks' weights and the tables of positions."""
        super()._forget()
        self.__dict__.pop("_rope_tables", None)
        if self.rope is not None:
            self.rope.__dict__.pop("tables", None)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Return timm's intermediates, with live prompt rows stripped from every entry."""
        result: Any = super().forward_intermediates(
            x,
            indices,
            return_prefix_tokens=self.num_prefix_tokens > 0,  # timm cannot give none
            norm=norm,
            stop_early=stop_early,
            output_fmt="NLC" if output_fmt == "NCHW" else output_fmt,
            intermediates_only=intermediates_only,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        features, found = (None, result) if intermediates_only else result
        rows, prefixes = zip(*found, strict=True) if self.num_prefix_tokens else (found, ())
        outputs, features = without_live_rows(
            self, list(rows), features, x, indices, stop_early, output_fmt
        )
        if return_prefix_tokens and prefixes:
            outputs = list(zip(outputs, prefixes, strict=True))
        return outputs if intermediates_only else (features, outputs)
