"""Other people's models: their residual layers fused in place, and as they were."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..mlp import FusedResidualMLP
from ..modules import FusedResidualLinear
from ..stack import FusedResidualStack
from .layers import NOTHING_FOLLOWS
from .linears import is_linear_like, why_left
from .plans import Plan, Plans
from .report import FusedLayer, FuseReport, LeftLayer
from .swapping import fused_class, is_fused, swap, swap_back
from .tracing import forward_of


def fuse_(model: nn.Module) -> FuseReport:
    """Run Linear + activation + addition of a model as fused layers, in place: where its modules' forwards have them.

    Every module keeps its identity, its parameters, its names and its state dict, so that optimisers, checkpoints and
    hooks stay valid; those in the report run a forward of their own, made from what their author's does. Nothing
    outside the model is changed. Layers are found in what a forward does, however it is written, once for each kind of
    call (which arguments are there, training or not, options); for a kind that cannot be recorded, for a module that
    has got hooks inside, and under torch.compile, torch.export and torch.jit.trace, the author's forward runs.
    torch.jit.script needs the author's classes: `unfuse_` first.

    A forward is taken to depend on its arguments, its modules' attributes and parameters, and nothing else.

    Returns what was fused, what was left and why. `unfuse_` undoes it; a model that is fused already is fused anew.

    Raises:
        TypeError: model is no nn.Module.
        RuntimeError: a fused module has been given another class since, as sharding does.
    """
    unfuse_(model)
    planned, why = _planned(model)
    for _, module, *_ in planned:
        fused_class(type(module))  # raises here, where nothing has been changed
    done = []
    try:
        for _, module, plans, _ in planned:
            swap(module, plans)
            done.append(module)
    except BaseException:
        for module in done:
            swap_back(module)
        raise
    return _report(model, planned, why)


def unfuse_(model: nn.Module) -> None:
    """Give every module that `fuse_` changed its own class and forward back.

    Raises:
        TypeError: model is no nn.Module.
        RuntimeError: a fused module has been given another class since, as sharding does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    fused = [module for module in model.modules() if is_fused(module)]
    for module in fused:
        if "fused_from" not in vars(type(module)):
            swap_back(module)  # raises, before anything is changed
    for module in fused:
        swap_back(module)


_OURS = (FusedResidualLinear, FusedResidualMLP, FusedResidualStack)
Modes = dict[bool, Plan | None]  # by whether it trains
Planned = list[tuple[str, nn.Module, Plans, Modes]]


def _planned(model: nn.Module) -> tuple[Planned, dict[str, str]]:
    """The modules to fuse, outermost first, and why linear layers, or others' forwards, are left, by name."""
    planned: Planned = []
    why: dict[str, str] = {}
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, _OURS):
            covered |= set(module.modules())
        has_linears = any(is_linear_like(part) for part in module.modules())
        if module in covered or not has_linears or is_linear_like(module) or not _has_forward(module):
            continue
        if reason := _refused(module):
            why[name] = reason
            continue
        plans = Plans()
        modes = _in_both_modes(module, plans)
        if any(modes.values()):
            plans = Plans(takes_childrens=True)
            modes = _in_both_modes(module, plans)
            planned.append((name, module, plans, modes))
            covered |= {part for plan in modes.values() if plan for path, part in plan.trace.inlined.items() if path}
        elif plans.because:
            why[name] = plans.because
        why |= {_joined(name, linear): reason for linear, reason in plans.why_not.items()}
    return planned, why


def _in_both_modes(module: nn.Module, plans: Plans) -> Modes:
    """A plan for training and one for evaluation, the module being left in the mode that it is in."""
    before = {part: part.training for part in module.modules()}
    found: Modes = {}
    try:
        for is_training in (True, False):
            if is_training is not module.training:
                for part in before:
                    part.training = is_training
            found[is_training] = plans.make(module, *_stand_ins(module))
            for part, mode in before.items():
                part.training = mode
    finally:
        for part, mode in before.items():
            part.training = mode
    return found


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _refused(module: nn.Module) -> str | None:
    """Why a module's forward is not to be replaced."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if "forward" in vars(module):
        return "its forward was replaced"
    own = next((cls for cls in type(module).__mro__ if "__init_subclass__" in vars(cls) and cls is not object), None)
    if own is not None and not own.__module__.startswith(("transformers.", "typing", "abc")):
        return f"{own.__name__} has an __init_subclass__, which a class over it would call"
    return None


def _stand_ins(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for a forward: a tensor wherever it asks for one."""
    tensor = torch.empty(0, device="cpu")
    args, kwargs = [], {}
    for parameter in list(inspect.signature(forward_of(module)).parameters.values())[1:]:
        if parameter.default is not parameter.empty:
            continue
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            args.append(tensor)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = tensor
    return tuple(args), kwargs


def _report(model: nn.Module, planned: Planned, why: dict[str, str]) -> FuseReport:
    fused: list[FusedLayer] = []
    for name, _, _, modes in planned:
        fused += _fused_layers(name, modes)
    linears = {
        _joined(name, own) for name, _, _, modes in planned for plan in modes.values() if plan for own in plan.linears
    }
    ours = {
        _joined(name, one)
        for name, part in model.named_modules()
        if isinstance(part, _OURS)
        for one, _ in part.named_modules()
    }
    left = [
        LeftLayer(name, why_left(part) or _why_around(name, why))
        for name, part in model.named_modules()
        if is_linear_like(part) and name not in linears | ours
    ]
    return FuseReport(tuple(fused), tuple(left), tuple(name for name, *_ in planned))


def _fused_layers(module: str, modes: Modes) -> list[FusedLayer]:
    """What is fused in training and in evaluation, in the order of the network; once where it is the same."""
    found: dict[tuple[str, str], FusedLayer] = {}
    for is_training, plan in modes.items():
        for name, formula, out_features, passes in plan.layers if plan else ():
            when = "always" if (name, formula) in found else "training" if is_training else "evaluation"
            found[name, formula] = FusedLayer(_joined(module, name), formula, module, when, out_features, passes)
    order = [layer.name for plan in modes.values() if plan for layer in plan.layers]
    return sorted(found.values(), key=lambda layer: order.index(layer.linear.removeprefix(module).lstrip(".")))


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _why_around(name: str, why: dict[str, str]) -> str:
    """Why nothing around a linear layer took it in: what was seen of it, or of the nearest forward that was not."""
    around = name
    while around:
        if around in why:
            return why[around] if around == name else f"in {around}: {why[around]}"
        around = around.rpartition(".")[0]
    return f"in the model itself: {why['']}" if "" in why else NOTHING_FOLLOWS
