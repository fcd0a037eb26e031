"""What a forward changes of its modules while it is recorded, put back and told."""

from __future__ import annotations

import random
import sys
from collections import deque
from typing import Any

import torch
from torch import nn

from .values import Untraceable

_ABSENT: Any = object()


class Undone:
    """Attributes of a module and its parts, what lists, dicts and sets among them hold, and states of chance."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> Undone:
        self.before = [(part, dict(vars(part)), _contents(part)) for part in self.module.modules()]
        self.chance = random.getstate(), torch.get_rng_state(), _of_numpy()
        return self

    def __exit__(self, *_: object) -> None:
        self.changed: list[str] = []
        for part, attributes, contents in self.before:
            now = vars(part)
            for name in {*now, *attributes}:
                if now.get(name, _ABSENT) is not attributes.get(name, _ABSENT):
                    self.changed.append(f"{type(part).__name__}.{name}")
                    now.pop(name, None)
            now.update({name: value for name, value in attributes.items() if name not in now})
            for name, held in contents.items():
                if not _is_as_it_was(attributes[name], held):
                    self.changed.append(f"{type(part).__name__}.{name}")
                    _put_back(attributes[name], held)
        self._put_chance_back()

    def _put_chance_back(self) -> None:
        of_random, of_torch, of_numpy = self.chance
        now = _of_numpy()
        if random.getstate() != of_random or not torch.equal(torch.get_rng_state(), of_torch) or now != of_numpy:
            random.setstate(of_random)
            torch.set_rng_state(of_torch)
            if of_numpy is not None:
                sys.modules["numpy"].random.set_state(_unpacked(of_numpy))
            self.changed.append("a random state")

    def check(self) -> None:
        """Raises Untraceable where anything had been changed."""
        if self.changed:
            raise Untraceable(f"its forward changes {', '.join(sorted(self.changed)[:3])}")


def _of_numpy() -> tuple[Any, ...] | None:
    if "numpy" not in sys.modules:
        return None
    name, keys, *rest = sys.modules["numpy"].random.get_state()
    return (name, keys.tobytes(), *rest)


def _unpacked(state: tuple[Any, ...]) -> tuple[Any, ...]:
    name, keys, *rest = state
    return (name, sys.modules["numpy"].frombuffer(keys, dtype="uint32"), *rest)


def _contents(part: nn.Module) -> dict[str, list[Any]]:
    """What a module's own containers hold."""
    return {name: _held(value) for name, value in vars(part).items() if isinstance(value, list | dict | set | deque)}


def _held(value: Any) -> list[Any]:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _is_as_it_was(value: Any, held: list[Any]) -> bool:
    now = _held(value)
    if len(now) != len(held):
        return False
    if isinstance(value, dict):
        return all(a[0] == b[0] and a[1] is b[1] for a, b in zip(now, held, strict=True))
    return all(a is b for a, b in zip(now, held, strict=True))


def _put_back(value: Any, held: list[Any]) -> None:
    value.clear()
    if isinstance(value, dict | set):
        value.update(held)
    else:
        value.extend(held)
