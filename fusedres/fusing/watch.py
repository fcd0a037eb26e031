"""What a rewritten forward takes for granted of the modules that it runs through, and whether it still holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .layers import upwards
from .linears import HOOKS, is_ours
from .values import EVERY_MODULES, SCALARS, contents, of_class

_OPTIONLESS = (nn.Linear, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)
_OWN_ALONE = (nn.Linear, nn.ModuleList, nn.ModuleDict)  # whose forward, or none, reads no parameters but those
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # which code may read, and not call
_ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid)  # which compute by their options alone
_ANY_HOOKS = [
    getattr(torch_module, f"_global{name}", {}) for name in (*HOOKS, "_forward_hooks_always_called")
]  # of all modules of the process
_ASKED = {  # facts of a parameter, and by what names code may ask for them
    "dtype": {"dtype", "itemsize", "element_size", "is_floating_point", "is_complex", "type"},
    "device": {"device", "is_cuda", "get_device"},
}
_NOTHING: Any = object()
PLANS = "_fused_plans"  # the attribute by which a fused module has them
_Part = tuple[str, tuple[Any, ...]]  # of an expression: its text, with a {} for each value


class Watch:
    """Checks of modules at every call, written out as one expression each: a loop shows in a small block's time.

    facts(): what a forward may decide by. Of each module the children, by identity, the parameters, by shape and what
    else is asked of them, and the attributes, by value where they are numbers, switches, or lists of them, others by
    identity; of those that are not run through what some code names; of classes, the attributes that are no methods.
    """

    facts: Callable[[], tuple[Any, ...]]
    held: Callable[[], tuple[Any, ...]]  # the objects by whose identity facts tell: to be kept, lest others get theirs

    def __init__(self, module: nn.Module, inlined: dict[str, nn.Module], names: set[str]) -> None:
        self.module, self.inlined, self.names = module, inlined, names
        others = [part for path, part in inlined.items() if path]
        self.hooks = [(vars(part), name) for part in others for name in HOOKS]
        replaced: list[_Part] = [
            ("'forward' in {} or {}.get('_compiled_call_impl') is not None", (vars(part), vars(part)))
            for part in others
        ]
        hooked: list[_Part] = [(f"{{}}[{name!r}]", (own,)) for own, name in self.hooks]
        self._is_busy = _expression(" or ".join, [*(("{}", (hooks,)) for hooks in _ANY_HOOKS), *hooked, *replaced])
        self._is_replaced = _expression(" or ".join, replaced or [("False", ())])
        parts = list(self._parts())
        self.facts = _expression(_as_tuple, parts)
        self.held = _expression(_as_tuple, [(_without_ids(text), own) for text, own in parts])

    def _parts(self) -> Iterable[_Part]:
        above = {path for one in self.inlined for path in ("", *upwards(one))}
        for path, part in self.module.named_modules():
            if isinstance(part, _CONTAINERS) or (path in above and part._modules):
                yield "tuple(map(id, {}['_modules'].values()))", (vars(part),)
        for path, part in self.module.named_modules():
            yield from _of_parameters(part, self.names, path in self.inlined or isinstance(part, _CONTAINERS))
            yield from _of_attributes(part, self.names, path in self.inlined)

    def is_left_alone(self) -> bool:
        """Whether no call of a module in it is anybody else's business."""
        if not self._is_busy():
            return True
        hooks = [hook for some in (*_ANY_HOOKS, *(own[name] for own, name in self.hooks)) for hook in some.values()]
        return not self._is_replaced() and all(is_ours(hook) for hook in hooks)


def _of_parameters(part: nn.Module, names: set[str], is_inlined: bool) -> Iterable[_Part]:
    """Those that a forward is run through with, or names: their shapes, and what else it asks of tensors."""
    own = vars(part)
    asked = ["shape", *(fact for fact, asking in _ASKED.items() if not names.isdisjoint(asking))]
    for kind in ("_parameters", "_buffers"):
        for name in own[kind]:
            for fact in asked if is_inlined or name in names else ():
                yield f"getattr({{}}[{kind!r}].get({_quoted(name)}), {fact!r}, None)", (own,)
        if is_inlined and type(part) not in _OWN_ALONE and (own[kind] or isinstance(part, _CONTAINERS)):
            yield f"len({{}}[{kind!r}])", (own,)


def _of_attributes(part: nn.Module, names: set[str], is_inlined: bool) -> Iterable[_Part]:
    own = vars(part)
    if "forward" in names:
        yield "'forward' in {}", (own,)
    is_plain, is_activation = type(part) in _OPTIONLESS, type(part) in _ACTIVATIONS
    if is_inlined and not is_plain and not is_activation:
        yield f"len({{}}) - ({PLANS!r} in {{}})", (own, own)  # one that was its class's until now
    for name, value in own.items():
        is_option = is_inlined and not is_plain and not (is_activation and name == "training")
        if name not in EVERY_MODULES and name != PLANS and (name in names or is_option):
            text = f"{{}}.get({_quoted(name)}, {{}})"
            is_compared = type(value) in SCALARS or contents(value) is not None
            yield text if type(value) is str else f"_known({text})" if is_compared else f"id({text})", (own, _NOTHING)
    for name, value in of_class(part).items() if names else ():
        if name in names and name not in own and (type(value) in SCALARS or contents(value) is not None):
            yield f"_known(getattr({{}}, {name!r}, None))", (type(part),)


def _quoted(name: str) -> str:
    """A name as a part of an expression's text, in which braces stand for values."""
    return repr(name).replace("{", "{{").replace("}", "}}")


def _without_ids(text: str) -> str:
    return text.replace("tuple(map(id, ", "tuple((").replace("id(", "(").replace("_known(", "(")


def _known(value: Any) -> Any:
    """A number with its type, since True equals 1, and what lists hold; other objects as themselves."""
    return (type(value), value) if type(value) in SCALARS else contents(value) or id(value)


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
    return eval(f"lambda {names}: lambda: {text}", {"_known": _known})(*values)
