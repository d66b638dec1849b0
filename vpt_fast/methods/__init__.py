"""Methods of tuning: one frozen dataclass each."""

from vpt_fast.methods.prompt_method import PromptMethod, prompted_blocks
from vpt_fast.methods.prompts import INITS, VAPT, VAPT_VARIANTS, VPTDeep, VPTShallow
from vpt_fast.methods.registry import (
    METHODS,
    NAMES,
    Method,
    check_method,
    find_method,
    from_dict,
    method_names,
    modules_of,
    register_method,
    to_dict,
)

__all__ = [
    "INITS",
    "METHODS",
    "NAMES",
    "VAPT",
    "VAPT_VARIANTS",
    "Method",
    "PromptMethod",
    "VPTDeep",
    "VPTShallow",
    "check_method",
    "find_method",
    "from_dict",
    "method_names",
    "modules_of",
    "prompted_blocks",
    "register_method",
    "to_dict",
]
