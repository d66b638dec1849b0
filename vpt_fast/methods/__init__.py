"""Methods of tuning: one frozen dataclass each."""

from vpt_fast.methods.prompts import VAPT, VAPT_VARIANTS, VPTDeep, VPTShallow
from vpt_fast.methods.registry import METHODS, Method, check_method, from_dict, to_dict

__all__ = [
    "METHODS",
    "VAPT",
    "VAPT_VARIANTS",
    "Method",
    "VPTDeep",
    "VPTShallow",
    "check_method",
    "from_dict",
    "to_dict",
]
