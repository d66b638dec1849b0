"""Public names of the package, which `vpt_fast` imports when the first of them is used."""

from vpt_fast.adapter.hub.push import push_adapter
from vpt_fast.adapter.load import load_adapter
from vpt_fast.adapter.save import save_adapter
from vpt_fast.adapter.switching.switch import (
    active_adapter,
    adapter_names,
    add_adapter,
    delete_adapter,
    disabled,
    set_adapter,
)
from vpt_fast.bank import PromptBank
from vpt_fast.export import bake
from vpt_fast.methods import VAPT, PromptMethod, VPTDeep, VPTShallow, register_method
from vpt_fast.methods.baselines import (
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
)
from vpt_fast.models.fold import fold_backbone
from vpt_fast.models.initialise import initialise, regularisation
from vpt_fast.modules.block_info import BlockInfo, FrozenWeights
from vpt_fast.modules.prompt_module import PromptModule, Prompts
from vpt_fast.published import BPT, CVPT, DVPT, E2VPT, VFPT, GateVPT
from vpt_fast.tune import (
    count_parameters,
    print_trainable_parameters,
    prompt_tune,
    remove_prompts,
    trainable_parameters,
)
from vpt_fast.version import __version__

__all__ = [
    "BPT",
    "CVPT",
    "DVPT",
    "E2VPT",
    "VAPT",
    "VFPT",
    "AdapterTuning",
    "BiasTuning",
    "BlockInfo",
    "FrozenWeights",
    "FullTuning",
    "GateVPT",
    "LinearProbe",
    "MLPHead",
    "PartialTuning",
    "PromptBank",
    "PromptMethod",
    "PromptModule",
    "Prompts",
    "VPTDeep",
    "VPTShallow",
    "__version__",
    "active_adapter",
    "adapter_names",
    "add_adapter",
    "bake",
    "count_parameters",
    "delete_adapter",
    "disabled",
    "fold_backbone",
    "initialise",
    "load_adapter",
    "print_trainable_parameters",
    "prompt_tune",
    "push_adapter",
    "register_method",
    "regularisation",
    "remove_prompts",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
]
