"""torch.func.vmap of an operator that has no kernel for a batch: one call after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_by_one(operator: Callable[..., list[Tensor]]) -> Callable[..., tuple[list[Tensor], list[int]]]:
    """A rule for `torch.library.register_vmap` of an operator that returns tensors."""

    def rule(info: Any, in_dims: tuple, *arguments: Any) -> tuple[list[Tensor], list[int]]:
        def call(i: int) -> list[Tensor]:
            return operator(*(_at(i, value, dim) for value, dim in zip(arguments, in_dims, strict=True)))

        found = [torch.stack(each) for each in zip(*map(call, range(info.batch_size)), strict=True)]
        return found, [0] * len(found)

    return rule


def _at(i: int, value: Any, dim: Any) -> Any:
    """The i-th of a batch along dim, in tensors and lists of them."""
    if isinstance(value, Tensor):
        return value if dim is None else value.select(dim, i)
    is_batched = isinstance(dim, list | tuple)
    return [_at(i, v, d) for v, d in zip(value, dim, strict=True)] if is_batched else value
