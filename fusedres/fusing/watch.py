"""What a rewritten forward takes for granted of the modules that it runs through, and whether it still holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .layers import upwards
from .linears import HOOKS, is_ours
from .stand_ins import SCALARS

_OPTIONLESS = (nn.Linear, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)
_EVERY_MODULES = set(vars(nn.Module())) - {"training"}  # attributes, that are no options

_ANY_HOOKS = [
    getattr(torch_module, f"_global{name}", {}) for name in (*HOOKS, "_forward_hooks_always_called")
]  # of all modules of the process
_NOTHING: Any = object()
_Part = tuple[str, tuple[Any, ...]]  # of an expression: its text, with a {} for each value


class Watch:
    """Checks of modules at every call, written out as one expression each: a loop shows in a small block's time.

    is_whole(): whether the same modules stand in the same places.
    options(): the attributes by which a forward may decide, numbers and switches by value, others by identity.
    """

    is_whole: Callable[[], bool]
    options: Callable[[], tuple[Any, ...]]

    def __init__(self, module: nn.Module, inlined: dict[str, nn.Module]) -> None:
        self.inlined = inlined
        others = [part for path, part in inlined.items() if path]
        self.hooks = [*_ANY_HOOKS, *(getattr(part, name) for part in others for name in HOOKS)]
        links = sorted({path for one in inlined for path in upwards(one) if path})
        self.is_whole = _expression(" and ".join, [self._stands(module, path) for path in links] or [("True", ())])
        own = ["'forward' in {} or {}.get('_compiled_call_impl') is not None"] * len(others)
        replaced: list[_Part] = [(text, (vars(part), vars(part))) for text, part in zip(own, others, strict=True)]
        self._is_busy = _expression(" or ".join, [*(("{}", (hooks,)) for hooks in self.hooks), *replaced])
        self._is_replaced = _expression(" or ".join, replaced or [("False", ())])
        self.options = _expression(_as_tuple, [one for part in inlined.values() for one in _options_of(part)])

    @staticmethod
    def _stands(module: nn.Module, path: str) -> _Part:
        parent, _, name = path.rpartition(".")
        return f"{{}}.get({name!r}) is {{}}", (module.get_submodule(parent)._modules, module.get_submodule(path))

    def is_left_alone(self) -> bool:
        """Whether no call of a module in it is anybody else's business."""
        if not self._is_busy():
            return True
        hooks = [hook for some in self.hooks for hook in some.values()]
        return not self._is_replaced() and all(is_ours(hook) for hook in hooks)


def _options_of(part: nn.Module) -> Iterable[_Part]:
    if type(part) in _OPTIONLESS:
        return
    own = vars(part)
    yield "len({})", (own,)  # one that was its class's until now
    for name, value in own.items():
        if name not in _EVERY_MODULES and name != "_fused_plans":
            text = f"{{}}.get({name!r}, {{}})"
            yield text if type(value) in SCALARS else f"id({text})", (own, _NOTHING)


def _as_tuple(texts: Iterable[str]) -> str:
    return f"({''.join(f'{text}, ' for text in texts)})"


def _expression(joined: Callable[[Iterable[str]], str], parts: Iterable[_Part]) -> Any:
    """A function of nothing: the joined texts, with each {} standing for the next of the values."""
    values: list[Any] = []

    def named(text: str, own: tuple[Any, ...]) -> str:
        first = len(values)
        values.extend(own)
        return text.format(*(f"_{first + i}" for i in range(len(own))))

    text = joined([named(*part) for part in parts])
    names = ", ".join(f"_{i}" for i in range(len(values)))
    return eval(f"lambda {names}: lambda: {text}")(*values)
