"""Which gradients of a model are watched, and how: fused layers record them in their kernels, others by hooks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import recording
from ..kernels import record
from .hooks import Hook, Through
from .statistics import InputGradient, Statistics, halves_of

OUTPUT = "output"  # the name of ∂L/∂y of the model
_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # one for good: compiled code is for one number


class Watch:
    """The rows of a model's layers: gradients at their inputs, and at the output of the model and of its stacks.

    While it is `installed`, a backward through the model adds to them where `is_open`; `take` reads and clears them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.core: nn.Module = getattr(model, "_orig_mod", model)  # of what torch.compile has wrapped
        self.rows: list[str] = []
        self._fused: list[tuple[nn.Module, int]] = []  # and the row of its first layer
        self._hooked: list[tuple[nn.Module, nn.Module, int]] = []  # whose input, what of it is the branch, row
        self._outputs: list[tuple[nn.Module, int]] = []
        self._stacks: list[tuple[nn.Module, int, int]] = []  # first row, and that of its output
        self._find()
        self.sink = recording.Sink(len(self.rows))
        self._handles: list[Any] = []  # of hooks on tensors, which may outlive a step
        self.steps = 0

    def _find(self) -> None:
        inside: set[nn.Module] = set()
        for name, module in self.core.named_modules():
            if module in inside:
                continue
            layers = getattr(module, "watched_layers", None)
            if isinstance(layers, list):
                inside.update(module.modules())
                self._fused.append((module, len(self.rows)))
                first = len(self.rows)
                self.rows += [f"{name}.{layer}".strip(".") or "model" for layer in layers]
                if hasattr(module, "identity_scales"):
                    self._stacks.append((module, first, self._row_of_output(module, f"{name}.{OUTPUT}".strip("."))))
            elif isinstance(block := getattr(module, "block", None), nn.Module) and hasattr(module, "resolved_skip"):
                self._hook(module, block, name)
            elif _owns_weights(module):
                self._hook(module, module, name)
        if all(module is not self.core for module, _ in self._outputs):
            self._row_of_output(self.model, OUTPUT)

    def _hook(self, module: nn.Module, branch: nn.Module, name: str) -> None:
        self._hooked.append((module, branch, len(self.rows)))
        self.rows.append(name or "model")

    def _row_of_output(self, module: nn.Module, name: str) -> int:
        self._outputs.append((module, len(self.rows)))
        self.rows.append(name)
        return len(self.rows) - 1

    @property
    def is_open(self) -> bool:
        return self.sink.is_open

    @is_open.setter
    def is_open(self, is_open: bool) -> None:
        self.sink.is_open = is_open
        for module, _ in self._fused:
            _set_number(module, _number_of(module) if is_open else 0)

    @contextmanager
    def installed(self) -> Iterator[Watch]:
        """Hooks and numbers are in place within it, and gone after it, whatever happens."""
        hooks: list[Any] = []
        rows: dict[int, int] = {}
        for module, row in self._fused:
            layers: Any = module.watched_layers
            rows |= {_number_of(module) + i: row + i for i in range(len(layers))}
        before: list[tuple[nn.Module, Any]] = [(module, module.watch) for module, _ in self._fused]
        with recording.opened(self.sink, rows):
            for module, branch, row in self._hooked:
                through = Through(self, row)
                hooks.append(module.register_forward_pre_hook(Hook(through.enter), with_kwargs=True))
                hooks.append(branch.register_forward_pre_hook(Hook(through.enter_branch), with_kwargs=True))
                hooks.append(branch.register_forward_hook(Hook(through.leave_branch)))
            for module, row in self._outputs:
                outer = self.model if module is self.core else module
                hooks.append(outer.register_forward_hook(Hook(Through(self, row).leave)))
            try:
                self.is_open = self.sink.is_open
                yield self
            finally:
                for module, number in before:
                    _set_number(module, number)
                for hook in hooks:
                    hook.remove()
                self.let_go()
                self.sink.clear()

    def sees(self, tensor: Any) -> bool:
        """Whether what comes back to a tensor is to be noted."""
        is_tensor = self.is_open and isinstance(tensor, Tensor) and torch.is_grad_enabled()
        return is_tensor and tensor.requires_grad and tensor.is_floating_point()

    def keep(self, handle: Any) -> None:
        """A hook on a tensor, until the end of the step."""
        self._handles.append(handle)

    def note(self, row: int, gradient: Tensor, branch: Tensor | None) -> None:
        """What came to a tensor, if it can be counted."""
        if not self.is_open or not recording.has_numbers(gradient):
            return
        with torch.no_grad():
            rows = recording.statistics([gradient], None if branch is None else [branch], self.sink.unscale)
        self.sink.note(row, rows.unsqueeze(0))

    def let_go(self) -> None:
        """Takes the hooks off tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.steps += 1

    def take(self) -> tuple[Tensor | None, list[Tensor | float | None]]:
        """The rows [rows, ROW] of all backwards since the last call, on their device, and λ of each row's layer."""
        self.let_go()
        scales: list[Tensor | float | None] = [None] * len(self.rows)
        for stack, first, _ in self._stacks:
            found: Any = stack.identity_scales
            for i, scale in enumerate(found):
                scales[first + i] = scale
        return self.sink.take(), scales

    def inputs(
        self, numbers: list[list[float]], told: list[Statistics], scales: list[float | None]
    ) -> dict[str, InputGradient]:
        """What the rows say, by layer; those that no gradient has reached are not there."""
        paths = self._identity_paths(numbers, scales)
        hidden = {row for _, row in self._outputs if self.rows[row] != OUTPUT}
        return {
            name: InputGradient(statistics, halves_of(row), paths.get(i))
            for i, (name, row, statistics) in enumerate(zip(self.rows, numbers, told, strict=True))
            if row[record.COUNT] and i not in hidden
        }

    def _identity_paths(self, rows: list[list[float]], scales: list[float | None]) -> dict[int, float]:
        """‖Π λ ∂L/∂x_L‖ by row: from where equal widths end, down through skips alone."""
        found: dict[int, float] = {}
        for _, first, output in self._stacks:
            path: float | None = None  # nan: what came to its upper end is not known
            for row in reversed(range(first, output)):
                scale = scales[row]
                if scale is None:
                    path = None
                    continue
                if path is None:
                    path = _norm(rows[row + 1])
                path *= abs(scale)
                if not math.isnan(path):
                    found[row] = path
        return found


def _number_of(module: nn.Module) -> int:
    if module not in _numbers:
        layers: Any = module.watched_layers
        _numbers[module] = recording.take_numbers(len(layers))
    return _numbers[module]


def _set_number(module: Any, number: int) -> None:
    """On the module itself, in no state of it: a copy of it, or what is read from a file, has none."""
    module.watch = number


def _norm(row: list[float]) -> float:
    return math.sqrt(row[record.SQUARES]) if row[record.COUNT] else math.nan


def _owns_weights(module: nn.Module) -> bool:
    return any(p.dim() >= 2 and p.is_floating_point() for p in module.parameters(recurse=False))


def empty(count: int) -> Statistics:
    """Of a gradient that the loss does not reach."""
    return Statistics(count, 0.0, 0.0, 0.0, 1.0, 0.0, {})
