"""A module's class, and one of its own over it that runs rewritten forwards: the same object, parameters and names."""

from __future__ import annotations

import copyreg
import functools
import weakref
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.jit import is_tracing

from .calls import NothingReturned
from .plans import Plans
from .values import is_constant
from .watch import PLANS

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def is_fused(module: nn.Module) -> bool:
    return PLANS in vars(module)


def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A class that computes what cls does, by the plans of each module. One for each class."""
    if cls not in _CLASSES:
        author = cls.forward

        @functools.wraps(author)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_compiling() or is_tracing():  # who sees the model as its author wrote it
                return author(self, *args, **kwargs)
            plans = vars(self).get(PLANS)
            if plans is None or cls.forward is not author:  # a new instance, or another forward since
                return cls.forward(self, *args, **kwargs)
            plan = plans.found(self, args, kwargs)
            standing = None if plan is None else plan.standing()
            if standing is None:
                return author(self, *args, **kwargs)
            given = [one for one in args if type(one) is Tensor or not is_constant(one)]
            if kwargs:
                given += [one for one in kwargs.values() if type(one) is Tensor or not is_constant(one)]
            try:
                return plan.run(None, *given, *standing)
            except NothingReturned:
                plans.refuse(plan)
                return author(self, *args, **kwargs)

        def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
            reduced: Any = super(_CLASSES[cls], self).__reduce_ex__(protocol)
            made, args, *rest = reduced
            if made is not copyreg.__newobj__:  # type: ignore[attr-defined]
                fused = _CLASSES[cls]
                return (cls if made is fused else made, tuple(cls if one is fused else one for one in args), *rest)
            return (_remade, (cls, *args[1:]), *rest)

        def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            _let_go(self)
            return cls._apply(self, *args, **kwargs)

        def _load_from_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            _let_go(self)
            cls._load_from_state_dict(self, *args, **kwargs)

        own = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": __reduce_ex__,
            "_apply": _apply,
            "_load_from_state_dict": _load_from_state_dict,
            "forward": forward,
            "fused_from": cls,
        }
        _CLASSES[cls] = type(cls)(cls.__name__, (cls,), own)  # type: ignore[misc]
    return _CLASSES[cls]


def _let_go(module: nn.Module) -> None:
    """Before its parameters may change places with others, as torch.utils.swap_tensors does."""
    plans = vars(module).get(PLANS)
    if plans is not None:
        plans.let_go()


def _remade(cls: type[nn.Module], *args: Any) -> nn.Module:
    """A copied or loaded module, before it is filled."""
    module = cls.__new__(cls, *args)
    module.__class__ = fused_class(cls)
    return module


def swap(module: nn.Module, plans: Plans) -> None:
    plans.module = weakref.ref(module)
    vars(module)[PLANS] = plans
    module.__class__ = fused_class(type(module))


def swap_back(module: nn.Module) -> None:
    """Raises RuntimeError where somebody else has given it another class since."""
    cls = type(module)
    if "fused_from" not in vars(cls):
        raise RuntimeError(
            f"{cls.__name__} was fused and has been given another class since, {cls.__module__}.{cls.__qualname__}, "
            "as sharding and parametrizing do: undo that first, or fuse the model before"
        )
    module.__class__ = cls.fused_from  # type: ignore[attr-defined]
    del vars(module)[PLANS]
