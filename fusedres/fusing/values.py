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
    return (type(value), *map(typed, held)) if all(map(is_constant, held)) else None


def typed(value: Any) -> tuple[Any, ...]:
    """A constant with its type, and those in a tuple, since True equals 1."""
    return (tuple, *map(typed, value)) if type(value) is tuple else (type(value), value)


def of_class(module: Any) -> dict[str, Any]:
    """The attributes that a module has of its author's classes: what is neither a method nor a descriptor."""
    classes = [
        cls for cls in reversed(type(module).__mro__) if cls.__module__.partition(".")[0] not in ("torch", "builtins")
    ]
    own = {name: value for cls in classes for name, value in vars(cls).items() if not name.startswith("__")}
    return {name: value for name, value in own.items() if not (callable(value) or hasattr(value, "__get__"))}


def kind(value: Any) -> Any:
    """What a forward may decide by: of what cannot change all of it, of tensors and objects that they are there."""
    if isinstance(value, Tensor):
        return Tensor
    return typed(value) if is_constant(value) else type(value)
