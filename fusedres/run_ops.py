"""Runs of layers of one width within a network on a GPU, each run in one kernel forward and one backward.

A run's call is an autograd.Function in eager mode, and the operator `fusedres::residual_network` for whoever is to see
it. Backward, where it is itself differentiated or batched, is that of the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, network_ops, ops, recording, reference, run_launch
from .kernels.cpu.plan import encoded
from .kernels.spec import NetworkSpec, Slots


class Segment(NamedTuple):
    """Layers first, …, last - 1 of a network: a run, with a spec of its own, or one layer."""

    first: int
    last: int
    run: NetworkSpec | None = None
    encoded: tuple[list[int], list[float]] = ([], [])
    slots: tuple[int, ...] = ()  # of the run's tensors, among the network's
    dropping: tuple[int, ...] = ()  # which of the run's layers drop rows

    @property
    def name(self) -> str:
        return f"layers.{self.first}-{self.last - 1}"


def segments(spec: NetworkSpec) -> list[Segment]:
    """A network's layers, those together that a run's kernel computes alike from stacked parameters."""

    found = []
    for _, group in groupby(range(len(spec.layers)), lambda i: spec.layers[i].run_kind or i):
        layers = list(group)
        if len(layers) == 1:
            found.append(Segment(layers[0], layers[0] + 1))
            continue
        slots = spec.layers[layers[0]].slots
        there = tuple(slot for slot in slots if slot >= 0)
        places = Slots(*(there.index(slot) if slot >= 0 else -1 for slot in slots))
        run = NetworkSpec([spec.layers[i]._replace(slots=places, slice=j) for j, i in enumerate(layers)])
        found.append(Segment(layers[0], layers[-1] + 1, run, encoded(run), there, tuple(run.dropping)))
    return found


def own_tensors(segment: Segment, spec: NetworkSpec, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A run's tensors: whole stacks, or its layers' share of them."""
    first = spec.layers[segment.first]
    stacked, begin, depth = tensors[first.slots.weight].shape[0], first.slice, segment.last - segment.first
    found = [tensors[slot] for slot in segment.slots]
    if depth == stacked:
        return found
    sizes = [t.shape[0] // stacked for t in found]  # flat vectors have as many numbers to a layer
    return [t[begin * size : (begin + depth) * size] for t, size in zip(found, sizes, strict=True)]


def stays_in(dtype: torch.dtype, x: Tensor, segment: Segment, tensors: Sequence[Tensor]) -> bool:
    """Whether autocast to a dtype leaves a run's rows in it: sums promote where x, or a scale per channel, is wider."""
    slots = segment.run.layers[0].slots
    if slots.branch_scale < 0:
        return x.dtype == dtype
    a, weight = tensors[segment.slots[slots.branch_scale]], tensors[segment.slots[slots.weight]]
    is_per_channel = a.dim() == 2 or a.numel() > weight.shape[0]
    return x.dtype == dtype and (a.dtype == dtype or not is_per_channel)


def cast(tensors: list[Tensor], segment: Segment, dtype: torch.dtype) -> list[Tensor]:
    """A run's tensors as autocast has them: what is multiplied and its bias; scales keep theirs, up to float32."""
    slots = segment.run.layers[0].slots

    def low(i: int, t: Tensor) -> Tensor:
        if i in (slots.weight, slots.bias):
            return t.to(dtype)
        return t.float() if t.dtype == torch.float64 else t

    return [low(i, t) for i, t in enumerate(tensors)]


def residual_run(
    x: Tensor, tensors: Sequence[Tensor], segment: Segment, seeds: Tensor | None, recompute: bool | str, watch: int = 0
) -> Tensor:
    """y [..., d] of a run whose tensors are checked; watch: the number by which its first layer is recorded."""
    if torch.compiler.is_compiling() or ops.needs_operator((x, *tensors)):
        return network_ops.residual_network(x, tensors, seeds, *segment.encoded, watch)
    spec = segment.run
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
        width = spec.widths[0]
        every = dispatch.stack_keeps(len(spec.layers), x.numel() // width, width, x.dtype, recompute)
        return _Run.apply(spec, seeds, every, watch, x, *tensors)
    return run_launch.forward(spec, tensors, x, seeds, None)[0]


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: NetworkSpec, seeds: Tensor | None, every: int, watch: int, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        y, kept = run_launch.forward(spec, tensors, x, seeds, every)
        ctx.save_for_backward(x, *tensors, kept)
        ctx.spec, ctx.seeds, ctx.every, ctx.watch = spec, seeds, every, watch
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, *tensors, kept = ctx.saved_tensors
        spec, seeds, wanted = ctx.spec, ctx.seeds, ctx.needs_input_grad[4:]
        if torch.is_grad_enabled() or dispatch.is_legacy_batch(g):
            if ctx.watch:
                recording.spoil(ctx.watch, len(spec.layers))

            def formula(x: Tensor, *tensors: Tensor) -> Tensor:
                return reference.network(x, tensors, spec, seeds)

            found = iter(reference.differentiable_gradients(formula, (x, *tensors), g, wanted))
            return (None, None, None, None, *[next(found) if is_wanted else None for is_wanted in wanted])
        watched = recording.of(ctx.watch) if ctx.watch else None
        gradients = run_launch.backward(g, spec, tensors, x, kept, seeds, ctx.every, wanted, watched)
        return (None, None, None, None, *gradients)
