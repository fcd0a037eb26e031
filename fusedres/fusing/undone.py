"""What a forward changes of its modules while it is recorded, put back and told."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from .stand_ins import Untraceable


class Undone:
    """What a forward changes of its modules' attributes while it is traced is put back, and told."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> Undone:
        self.before = [(part, dict(part.__dict__), _contents(part)) for part in self.module.modules()]
        self.chance = _chance()
        return self

    def __exit__(self, *_: object) -> None:
        self.changed = []
        for part, attributes, contents in self.before:
            now = part.__dict__
            names = {n for n in {*now, *attributes} if now.get(n, self) is not attributes.get(n, self)}
            names |= {name for name, value in contents.items() if _copied(attributes[name]) != value}
            self.changed += [f"{type(part).__name__}.{name}" for name in sorted(names)]
            for name in names:
                now.pop(name, None)
                if name in attributes:
                    now[name] = attributes[name]
            for name in names & contents.keys():
                _restore(attributes[name], contents[name])
        if _chance() != self.chance:
            random.setstate(self.chance[0])
            torch.set_rng_state(self.chance[1][0])
            self.changed.append("a random state")

    def check(self) -> None:
        if self.changed:
            raise Untraceable(f"its forward changes {', '.join(self.changed[:3])}")


class _Bytes:
    """A tensor of bytes that compares by value."""

    def __init__(self, state: Tensor) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bytes) and torch.equal(self.state, other.state)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: int) -> Tensor:
        return self.state


def _chance() -> tuple[Any, _Bytes]:
    return random.getstate(), _Bytes(torch.get_rng_state())


def _contents(part: nn.Module) -> dict[str, Any]:
    """Copies of what a module's own lists, dicts and sets hold, as identities."""
    return {name: _copied(value) for name, value in part.__dict__.items() if type(value) in (list, dict, set)}


def _copied(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [(key, id(one)) for key, one in value.items()]
    return [id(one) for one in value]


def _restore(value: Any, ids: list[Any]) -> None:
    """Drop what was added to a list, a dict or a set."""
    kept = {one[1] if isinstance(one, tuple) else one for one in ids}
    if isinstance(value, dict):
        for key in [key for key, one in value.items() if id(one) not in kept]:
            del value[key]
    else:
        for one in [one for one in value if id(one) not in kept]:
            value.remove(one)
