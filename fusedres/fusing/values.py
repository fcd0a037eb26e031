"""What a forward may decide by without a recording being wrong for others: values that are only themselves."""

from __future__ import annotations

import functools
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor, nn

SCALARS = (bool, int, float, str, type(None))
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodDescriptorType, type, functools.partial)
_FACTS = (complex, bytes, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
EVERY_MODULES = set(vars(nn.Module())) - {"training"}  # attributes, that are no options


class Untraceable(BaseException):
    """Why a forward cannot be recorded. No author's `except Exception` is to catch it."""


def is_constant(value: Any) -> bool:
    """Whether a value cannot change inside."""
    if type(value) in SCALARS or type(value) in _FACTS:
        return True
    if type(value) is tuple:
        return all(map(is_constant, value))
    return isinstance(value, (Enum, *_FUNCTIONS))


def contents(value: Any) -> tuple[Any, ...] | None:
    """What a list, a dict or a set of constants holds, to be compared; None of anything else."""
    if type(value) not in (list, dict, set):
        return None
    held = (*value, *value.values()) if type(value) is dict else tuple(value)
    return (type(value), held, tuple(map(type, held))) if all(map(is_constant, held)) else None


def kind(value: Any) -> Any:
    """What a forward may decide by: of what cannot change all of it, of tensors and objects that they are there."""
    if isinstance(value, Tensor):
        return Tensor
    return (type(value), value) if is_constant(value) else type(value)
