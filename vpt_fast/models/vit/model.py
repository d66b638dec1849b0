"""timm's VisionTransformer and its distilled form, tuned: the classes that models are given."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vpt_fast.models.isotropic.model import PromptedModel
from vpt_fast.models.prompt_rows import strip_rows
from vpt_fast.models.vit.blocks import PromptedViTBlock


class PromptedVisionTransformer(PromptedModel, VisionTransformer):
    """timm's VisionTransformer, tuned."""

    plain_class: ClassVar[type[VisionTransformer]] = VisionTransformer
    tuned_block = PromptedViTBlock

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
            entry[:, self.rows_leaving(index) :]
            for index, entry in zip(sorted(taken), result["image_intermediates"], strict=True)
        ]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
        result["image_intermediates"] = patches
        if not intermediates_only:
            stop = last if stop_early else len(self.blocks) - 1
            pooled = stop == len(self.blocks) - 1 and self.pools_prompts()
            count = 0 if pooled else self.rows_leaving(stop)
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


class PromptedVisionTransformerDistilled(PromptedVisionTransformer, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (DeiT with a distillation token), tuned."""

    plain_class = VisionTransformerDistilled
