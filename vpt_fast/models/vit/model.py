"""timm's VisionTransformer and its distilled form, tuned: the classes that models are given."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vpt_fast.models.isotropic.intermediates import without_live_rows
from vpt_fast.models.isotropic.model import PromptedModel
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
        found, features = result["image_intermediates"], result.get("image_features")
        outputs, features = without_live_rows(
            self, found, features, x, indices, stop_early, output_fmt
        )
        if output_dict:
            result["image_intermediates"] = outputs
            if features is not None:
                result["image_features"] = features
            if not return_prefix_tokens:
                result.pop("image_intermediates_prefix", None)
            return result
        if return_prefix_tokens and self.num_prefix_tokens:
            outputs = list(zip(outputs, result["image_intermediates_prefix"], strict=True))
        return outputs if intermediates_only else (features, outputs)


class PromptedVisionTransformerDistilled(PromptedVisionTransformer, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (DeiT with a distillation token), tuned."""

    plain_class = VisionTransformerDistilled
