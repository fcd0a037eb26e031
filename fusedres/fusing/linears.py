"""Which modules are linear layers, and which of them are to be left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def linear_of(part: nn.Module) -> Callable[[Any], Any] | None:
    """x -> x Wᵀ + b where a module computes just that, in another writing than nn.Linear's."""
    if is_transposed(part):
        return lambda x: F.linear(x, part.weight.t(), part.bias)  # type: ignore[operator,arg-type]
    return None


def is_transposed(part: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers, a linear layer that keeps its weight as [K, N]."""
    return type(part).__name__ == "Conv1D" and type(part).__module__ == "transformers.pytorch_utils"


def is_linear_like(part: nn.Module) -> bool:
    """Whether a user would call it a linear layer: plain, or somebody's own, quantised, adapted."""
    return isinstance(part, nn.Linear) or is_transposed(part) or type(part).__name__.endswith("Linear")


def why_left(part: nn.Module) -> str | None:
    """Why a linear layer is not to be touched; None where it is plain."""
    kind = f"{type(part).__module__}.{type(part).__name__}"
    if type(part).__module__.startswith("peft.") or hasattr(part, "lora_A"):
        return f"{kind} adapts its weights (LoRA) and computes in its own way"
    if "quantized" in kind.lower() or type(part).__module__.startswith("bitsandbytes"):
        return f"{kind} is quantised"
    if hasattr(part, "parametrizations"):
        return "its weight is parametrized"
    if type(part) is not nn.Linear and not is_transposed(part):
        return f"{kind} computes in its own way"
    if reason := hooked(part):
        return reason
    weight = part._parameters.get("weight")
    if type(weight) is not Parameter:
        return f"its weight is a {type(weight).__name__}"
    return None


def hooked(part: nn.Module) -> str | None:
    """Why its calls are to be left to it: hooks, or a forward of its own."""
    for name in HOOKS:
        if any(not is_ours(hook) for hook in getattr(part, name, {}).values()):
            return "it has hooks, which are to be called"
    if "forward" in part.__dict__:
        return "its forward was replaced"
    if part.__dict__.get("_compiled_call_impl") is not None:
        return "it is compiled by itself"
    return None


def is_ours(hook: Callable[..., Any]) -> bool:
    """Whether a hook is `explain`'s, which only looks."""
    return getattr(hook, "is_explains", False)
