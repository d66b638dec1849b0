"""The record of timm's Eva."""

from __future__ import annotations

from typing import Any

from timm.models.eva import Eva

from vpt_fast.models.eva.blocks import PromptedEvaBlock
from vpt_fast.models.eva.checks import check_eva
from vpt_fast.models.eva.model import PromptedEva
from vpt_fast.models.eva.rope import CACHED
from vpt_fast.models.family import Family
from vpt_fast.models.isotropic.inputs import plain_inputs
from vpt_fast.models.isotropic.install import install_prompts, places


def _install(model: Any) -> None:
    install_prompts(model)
    if model.rope is not None:
        model.rope.__class__ = CACHED[type(model.rope)]


FAMILIES = {
    Eva: Family(
        plain=Eva,
        tuned=PromptedEva,
        plain_parts={
            PromptedEvaBlock: PromptedEvaBlock.plain_class,
            **{ours: timms for timms, ours in PromptedEvaBlock.attentions.items()},
            **{ours: timms for timms, ours in CACHED.items()},
        },
        check=check_eva,
        install=_install,
        places=places,
        plain_inputs=plain_inputs,
        block=PromptedEvaBlock,
    )
}
