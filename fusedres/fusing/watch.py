"""What a rewritten forward takes for granted of the modules that it runs through, and whether it still holds."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .layers import upwards
from .linears import HOOKS, is_ours
from .stand_ins import SCALARS

_OPTIONLESS = (nn.Linear, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)
_NOT_OPTIONS = ("_is_full_backward_hook", "_compiled_call_impl")
_ANY_HOOKS = [
    getattr(torch_module, f"_global{name}", {}) for name in (*HOOKS, "_forward_hooks_always_called")
]  # of all modules of the process


_NOTHING: Any = object()


class Watch:
    """What rewritten forwards take for granted of the modules that they run through."""

    def __init__(self, module: nn.Module, inlined: dict[str, nn.Module]) -> None:
        self.inlined = inlined
        links = {path for one in inlined for path in upwards(one) if path}
        parents = [path.rpartition(".") for path in sorted(links)]
        self.links = [
            (module.get_submodule(parent)._modules, name, module.get_submodule(f"{parent}.{name}".lstrip(".")))
            for parent, _, name in parents
        ]
        others = [part for path, part in inlined.items() if path]
        self.hooks = [*_ANY_HOOKS, *(getattr(part, name) for part in others for name in HOOKS)]
        self.owners = [vars(part) for part in others]
        self.options = [
            (vars(part), name)
            for part in inlined.values()
            if type(part) not in _OPTIONLESS
            for name, value in vars(part).items()
            if type(value) in SCALARS and name not in _NOT_OPTIONS
        ]

    def is_whole(self) -> bool:
        """Whether the same modules stand in the same places."""
        for place, name, part in self.links:  # noqa: SIM110 : a generator shows in a small block's time
            if place.get(name) is not part:
                return False
        return True

    def is_left_alone(self) -> bool:
        """Whether no call of a module in it is anybody else's business."""
        for hooks in self.hooks:
            if hooks and not all(is_ours(hook) for hook in hooks.values()):
                return False
        for own in self.owners:  # noqa: SIM110
            if "forward" in own or own.get("_compiled_call_impl") is not None:
                return False
        return True

    def facts(self) -> tuple[Any, ...]:
        """Numbers and switches of the modules, by which a forward may decide."""
        return tuple([own.get(name, _NOTHING) for own, name in self.options])
