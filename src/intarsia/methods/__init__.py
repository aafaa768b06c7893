"""The literature's methods as rows of data."""

from intarsia.methods.method import METHODS, Group, Method, Patch, Policy, Row, build, union
from intarsia.methods.rows import (
    bitfit,
    freeze_k,
    full,
    head,
    houlsby,
    ia3,
    ln,
    lora,
    parallel,
    pfeiffer,
    prefix,
    prompt,
)

__all__ = [
    "METHODS",
    "Group",
    "Method",
    "Patch",
    "Policy",
    "Row",
    "bitfit",
    "build",
    "freeze_k",
    "full",
    "head",
    "houlsby",
    "ia3",
    "ln",
    "lora",
    "parallel",
    "pfeiffer",
    "prefix",
    "prompt",
    "union",
]
