"""Readouts while training: every n-th step, at a cost that one can leave on."""

from __future__ import annotations

import json
from collections import deque
from contextlib import ExitStack
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import record
from . import pictures, table
from .readout import GradientProfile, from_statistics, residual_layers, rows_of, split, splits_of
from .statistics import Rows, statistics_of
from .watch import Watch

_UNREAD = 1 << 18  # numbers of steps that nobody has read yet: to read some at once is quicker


class Recorder:
    """Records a model's gradients while it trains.

        with Recorder(model, every=10) as recorder:
            for x, target in data:
                loss = loss_fn(model(x), target)
                loss.backward()
                recorder.step(loss)
                optimizer.step()
                optimizer.zero_grad()
        recorder.plot_depth("depth.png")

    `step` stands after the last backward of a step, before anything changes gradients: clipping, `scaler.unscale_`,
    `optimizer.step`. Of several backwards, as accumulated gradients take them, inputs count all rows, parameters their
    sum. Training is not changed by a bit. What is recorded stays on its device; a recorded step copies it to the host
    once, and that is read at the next, so that nothing waits for the device.

    Args:
        model: any module, compiled or not. Inside compiled code fused layers are seen, and parameters.
        every: records steps 0, every, 2 every, …
        scaler: a `torch.amp.GradScaler`, whose scale is taken out of what is recorded.
        keep: how many readouts stay in memory; when there are more, every second one goes, and from then on every
            second one is kept: they are spread over the whole training.
        path: a file of JSON lines, to which all of them are appended, however many.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        *,
        scaler: Any = None,
        keep: int = 512,
        path: str | PathLike[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, value, least in (("every", every, 1), ("keep", keep, 2)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        self.model, self.every, self.scaler, self.keep = model, every, scaler, keep
        self.path = None if path is None else Path(path)
        self.steps = 0  # that were made
        self._kept: list[_Pending] = []
        self._stride, self._recorded = 1, 0  # of the recorded ones, every so many are kept
        self._pending: deque[_Pending] = deque()
        self._watch: Watch | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        if self._watch is not None:
            raise RuntimeError("this recorder is recording already")
        watch = Watch(self.model)
        watch.sink.is_open = self.steps % self.every == 0
        watch.sink.read_unscale = self._unscale
        with ExitStack() as stack:
            if self.path is not None:
                self._file = stack.enter_context(open(self.path, "a", buffering=1))
            stack.enter_context(watch.installed())
            self._stack = stack.pop_all()
        self._watch, self._model = watch, _Model(watch.core)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._settle()
        finally:
            self._stack.close()
            self._watch = None

    def step(self, loss: Tensor | float | None = None) -> None:
        """Takes what the step's backwards have left, on every n-th step; loss, where given, goes with it.

        Raises:
            RuntimeError: it is not inside the recorder's with block.
            ValueError: loss is a tensor of more than one number.
        """
        watch = self._watch
        if watch is None:
            raise RuntimeError("step() is for inside the recorder's with block")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss must be one number, got a tensor of shape {list(loss.shape)}")
        if self.steps % self.every == 0:
            self._pending.append(_Pending(self.steps, watch, self._model, loss))
            if self.path is not None or sum(one.size for one in self._pending) > _UNREAD:
                self._settle(but=1)
        else:
            watch.take()
        self.steps += 1
        is_open = self.steps % self.every == 0
        if is_open != watch.is_open:
            watch.is_open = is_open

    @property
    def records(self) -> list[GradientProfile]:
        """The readouts in memory, in the order of steps."""
        self._settle()
        return [one.profile for one in self._kept]

    def _unscale(self) -> float | Tensor:
        """What gradients of this step are to be multiplied by: nothing is read from the device."""
        if self.scaler is None or not self.scaler.is_enabled():
            return 1.0
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        scale: Tensor = self.scaler.scale(torch.ones((), device=device))
        return scale.reciprocal() if device.type != "cpu" else 1.0 / float(scale)

    def _settle(self, but: int = 0) -> None:
        """Reads what has come of all steps, but for so many of the last: nobody waits for what is on its way."""
        while len(self._pending) > but:
            found = self._pending.popleft().arrive()
            if self.path is not None:
                self._file.write(json.dumps(found.profile.to_dict()) + "\n")
            if self._recorded % self._stride == 0:
                self._kept.append(found)
            self._recorded += 1
            if len(self._kept) > self.keep:
                self._kept = self._kept[::2]
                self._stride *= 2

    # ---------------------------------------------------------------------------------------- what becomes of them

    def to_dict(self) -> dict[str, Any]:
        """The readouts in memory, as JSON can say them."""
        return {"every": self.every, "steps": self.steps, "records": [one.to_dict() for one in self.records]}

    def to_jsonl(self, path: str | PathLike[str]) -> None:
        """A line of JSON for each."""
        table.write_jsonl(self.records, path)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """A line for each gradient of each."""
        table.write_csv(self.records, path)

    def to_tensorboard(self, writer: Any) -> None:
        """Into a `torch.utils.tensorboard.SummaryWriter`."""
        table.write_tensorboard(self.records, writer)

    def plot_depth(self, path: str | PathLike[str]) -> None:
        """mean |∂L/∂W| over depth at some steps; ImportError without matplotlib, ValueError before any readout."""
        pictures.plot_depth(self.records, path)

    def plot_heatmap(self, path: str | PathLike[str]) -> None:
        """mean |∂L/∂W| as colour, by layer and step; errors as `plot_depth`."""
        pictures.plot_heatmap(self.records, path)

    def plot_halves(self, path: str | PathLike[str]) -> None:
        """The norms through branch and skip over training, layer by layer; ValueError too where no layer has a skip."""
        pictures.plot_halves(self.records, path)


class _Model:
    """What of a model stays as it is from step to step: looked up again when a parameter has been replaced."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._read()

    def _read(self) -> None:
        model = self._model
        self.layers, self._splits = residual_layers(model), splits_of(model)
        self._all = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self._slices = {name: self._slices_of(name, p) for name, p in self._all.items()}
        self._held = [(m._parameters, k, p) for m in model.modules() for k, p in m._parameters.items()]
        self._trained: list[str] = []
        self._by_layer: dict[str, Tensor] = {}

    def _slices_of(self, name: str, parameter: Tensor) -> list[str]:
        """The names of the layers' own in a stacked parameter: like parts of it, one after the other."""
        found = split({name: parameter}, self._splits)
        if len(found) > 1:
            parts = zip(found.values(), parameter.detach().reshape(len(found), -1), strict=True)
            if any(one.data_ptr() != part.data_ptr() or one.numel() != part.numel() for one, part in parts):
                raise RuntimeError(f"{name} must be a stack of {', '.join(found)}, each of them a slice of it")
        return list(found)

    def parameters(self) -> dict[str, Tensor]:
        """Those that are trained now, each layer's by itself."""
        if any(held.get(key) is not p for held, key, p in self._held):
            self._read()
        trained = [name for name, p in self._all.items() if p.requires_grad]
        if trained != self._trained:
            self._trained, self._by_layer = trained, split({name: self._all[name] for name in trained}, self._splits)
        return self._by_layer

    def gradients(self) -> tuple[list[str], list[Tensor]]:
        """As they are now, each layer's by itself, with their names."""
        names: list[str] = []
        found: list[Tensor] = []
        for name, p in self._all.items():
            if p.grad is not None and p.requires_grad:
                slices = self._slices[name]
                names += slices
                found += [p.grad] if len(slices) == 1 else p.grad.reshape(len(slices), -1).unbind()
        return names, found


class _Pending:
    """A recorded step on its way to the host."""

    def __init__(self, step: int, watch: Watch, model: _Model, loss: Tensor | float | None) -> None:
        self.step, self.watch, self.layers, self.parameters = step, watch, model.layers, model.parameters()
        self.names, gradients = model.gradients()
        with torch.no_grad():
            rows = rows_of(gradients, watch.sink.unscale)
        inputs, scales = watch.take()
        self.cargo = cargo = _Cargo()
        cargo.put(rows)
        if inputs is not None:
            cargo.put(inputs)
        self.rows = len(rows) + (0 if inputs is None else len(inputs))
        self.scales = [cargo.put(one) if isinstance(one, Tensor) else one for one in scales]
        self.loss = cargo.put(loss) if isinstance(loss, Tensor) else loss
        self.size = cargo.leave()

    def arrive(self) -> _Pending:
        """Takes what came, small enough to be kept; it is read when somebody asks."""
        numbers = self.cargo.arrive()
        self.found = Rows.of(numbers[: self.rows * record.ROW].view(-1, record.ROW))
        self.numbers = [numbers[one].item() if isinstance(one, slice) else one for one in (*self.scales, self.loss)]
        del self.cargo
        return self

    @cached_property
    def profile(self) -> GradientProfile:
        *scales, loss = self.numbers
        told, numbers, first = statistics_of(self.found), self.found.numbers.tolist(), len(self.names)
        inputs = self.watch.inputs(numbers[first:], told[first:], scales) if len(told) > first else {}
        found = dict(zip(self.names, told, strict=False))
        return from_statistics(self.layers, loss, self.parameters, found, inputs, self.step)


class _Cargo:
    """Numbers on a device that go to the host in one copy, which nothing waits for."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._size = 0
        self._event: Any = None

    def put(self, value: Tensor) -> slice | float:
        """Where it will be found on arrival; a number that is on the host already, itself."""
        if value.dim() == 0 and value.device.type == "cpu":
            return value.item()
        part = value.detach().to(torch.float64).reshape(-1)
        self._parts.append(part)
        self._size += part.numel()
        return slice(self._size - part.numel(), self._size)

    def leave(self) -> int:
        """Sends it off; how many numbers it is."""
        device = next((part.device for part in self._parts if part.device.type != "cpu"), torch.device("cpu"))
        self._numbers = torch.cat([part.to(device, non_blocking=True) for part in self._parts])
        self._parts.clear()
        if self._numbers.is_cuda:
            host = torch.empty(self._numbers.shape, dtype=torch.float64, pin_memory=True)
            self._numbers = host.copy_(self._numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        return self._size

    def arrive(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._numbers
