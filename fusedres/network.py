"""A whole network of residual layers in one call: described and checked once, then called at the price of one layer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import dispatch, explanation, functional, network_checks, network_ops, ops, reference, run_launch, run_ops
from .dispatch import (
    Eager,
    Native,
    Triton,
    Way,
    is_any_autocast_enabled,
    modes_in_force,
    transforms_are_active,
)
from .kernels.cpu import launch
from .kernels.cpu.plan import encoded
from .kernels.spec import NetworkSpec
from .network_ops import differentiated_again
from .run_ops import Segment, segments

Scale = float | Tensor | Sequence[float | Tensor | Sequence[float]]


class Description:
    """What a network is, but for its tensors."""

    def __init__(self, spec: NetworkSpec, recompute: bool | str) -> None:
        self.spec = spec
        self.recompute = recompute
        self.dropping = spec.dropping
        self.encoded = encoded(spec)
        self.segments = segments(spec)


class Network:
    """y = f_L(… f_1(x)), every layer of `functional.residual_linear`'s formula: x [..., d₀] -> [..., d_L].

    Bound to its tensors, and seeing whatever becomes of them: gradients, in-place updates, `load_state_dict`, `.to`.
    Once called, it holds them, so that `torch.utils.swap_tensors` refuses them.

    Args:
        weights: W of every layer, [N, K]; or [L, N, N] for a run of L layers, whose bias is [L, N], λ [L], a [L] or
            [L, N] then (or flat, [L * N]). One parameter costs autograd less than L.
        biases: None, or b [N] (or None) for every entry of weights.
        activation: φ of all layers, one of gelu, relu, silu, tanh, sin, none.
        approximate: of gelu: "none", exact, or "tanh".
        order: "pre", or "post" for φ(λ s(x) + a (x Wᵀ + b)).
        skip: auto, identity, projection or None; one for all, or one for every entry of weights.
        skip_scale: λ; a number or a tensor for all layers, or one for every entry of weights; the entry of a run may be
            a number for each of its layers.
        branch_scale: a, likewise.
        projection_weights: None, or P [N, K] (or None) for every entry of weights.
        projection_biases: None, or p [N] (or None) for every entry of weights.
        last_activation: "same" as the others', or "none".
        drop_path: while training, the probability that a row's branch is dropped; for all, or one for every layer.
        recompute: whether backward computes activations again instead of keeping them; "auto" keeps what is small.

    Raises:
        TypeError: what a layer would raise, with its index.
        ValueError: what a layer would raise, with its index; too few or too many of a kind.
    """

    def __init__(
        self,
        weights: Tensor | Sequence[Tensor],
        biases: Tensor | Sequence[Tensor | None] | None = None,
        *,
        activation: str = "gelu",
        approximate: str = "none",
        order: str = "pre",
        skip: str | Sequence[str | None] | None = "auto",
        skip_scale: Scale = 1.0,
        branch_scale: Scale = 1.0,
        projection_weights: Sequence[Tensor | None] | None = None,
        projection_biases: Sequence[Tensor | None] | None = None,
        last_activation: str = "same",
        drop_path: float | Sequence[float] = 0.0,
        recompute: bool | str = "auto",
    ) -> None:
        options = (activation, approximate, order, last_activation, drop_path, recompute)
        spec, tensors = network_checks.described(
            weights, biases, projection_weights, projection_biases, skip, skip_scale, branch_scale, options
        )
        self._adopt(Description(spec, recompute), tensors)

    def _adopt(self, description: Description, tensors: Sequence[Tensor]) -> None:
        self.description = description
        self.spec, self.recompute = description.spec, description.recompute
        self._tensors = tuple(tensors)
        self._forget()

    def _forget(self) -> None:
        """What is found out anew in a copy, or in another process."""
        self._known: dict[tuple[int, torch.dtype], tuple[int, bool] | None] = {}  # way and keeps, or None for others
        self._handle: int | None = None
        self.watched = 0  # the number by which the first layer's gradient is recorded; 0: none is
        self._checked: set[tuple[Any, ...]] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def watch(self, number: int) -> Network:
        """From now on records its layers' gradients under this number and the following (`recording.py`); 0: not."""
        self.watched = number
        self._known.clear()
        return self

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Its tensors, each once."""
        return tuple({id(t): t for t in self._tensors}.values())

    @property
    def sizes(self) -> tuple[int, ...]:
        """d₀, …, d_L."""
        return self.spec.widths

    def __repr__(self) -> str:
        sizes = self.sizes if len(self.sizes) <= 16 else (*self.sizes[:3], ..., *self.sizes[-3:])
        shown = ", ".join("…" if size is ... else str(size) for size in sizes)
        return f"Network([{shown}], {len(self.spec.layers)} layers)"

    def __call__(self, x: Tensor, training: bool = False) -> Tensor:
        """x [..., d₀] -> [..., d_L]; training: rows drop as drop_path says, drawn as the layers one by one would."""
        if is_compiling():
            return self._traced_call(x, training)
        try:
            is_bent_or_watched = (  # written out: a function's call shows in a small network's time
                modes_in_force()
                or transforms_are_active()
                or dispatch.is_switched()
                or explanation.is_listening()
                or is_any_autocast_enabled()
                or getattr(forward_ad, "_current_level", -1) >= 0
            )
            if is_bent_or_watched or type(x) is not Tensor or not x.is_cpu:
                return self._general_call(x, training)
            key = (x.numel(), x.dtype)
            known = self._known.get(key, _UNKNOWN)
            if known is _UNKNOWN:
                known = self._remember(key, x)
            if known is None:
                return self._general_call(x, training)
            way, keeps = known
            seeds = self._seeds(training) if training else None
            if self._handle in differentiated_again and x.requires_grad and torch.is_grad_enabled():
                return network_ops.differentiable(x, self._tensors, self.spec, seeds)
            return launch.run(self._handle or self._bind(), x, way, seeds, keeps)
        except RuntimeError:
            network_checks.check(x, self.spec, self._tensors, False)  # where it is the caller's mistake, in their words
            raise

    def _remember(self, key: tuple[int, torch.dtype], x: Tensor) -> tuple[int, bool] | None:
        if torch.jit.is_tracing():  # sizes are tensors then, and no two calls have the same
            return None
        choice, way, keeps = self._choose(x)
        if len(self._known) >= 256:
            self._known.clear()
        self._known[key] = known = None
        if isinstance(choice, Native) and self._is_plain and not self.watched:
            self._known[key] = known = (way.index, keeps)
        return known

    def _bind(self) -> int:
        handle = launch.bind(self.spec, self._tensors)
        network_ops.bound.add(handle)
        weakref.finalize(self, _forget, handle).atexit = False
        self._handle = handle
        return handle

    @property
    def _is_plain(self) -> bool:
        """Whether all tensors are of torch's own types, and on the CPU."""
        return all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in self._tensors)

    def _choose(self, x: Tensor) -> tuple[Eager | Native | Triton, Way | None, bool]:
        """What runs a call of x; with the C++ engine also in which way, and whether it keeps activations."""
        choice = self._backend(x)
        if not isinstance(choice, Native):
            return choice, None, False
        M = x.numel() // self.sizes[0]
        way = dispatch.cpu_way(M, self.sizes, x.dtype)
        if isinstance(way, Eager):
            return way, None, False
        if self.recompute == "auto":
            return choice, way, dispatch.keeps(M, self.sizes, x.dtype, way.name)
        return choice, way, not self.recompute

    def _backend(self, x: Tensor) -> Eager | Native | Triton:
        return dispatch.choose(x.device, x.dtype, x.numel() == 0 or 0 in self.sizes)

    def _seeds(self, training: bool) -> Tensor | None:
        dropping = self.description.dropping
        if not (training and dropping):
            return None
        return network_ops.draw_seeds(dropping, len(self.spec.layers))

    def _general_call(self, x: Tensor, training: bool) -> Tensor:
        """Whatever x is, and whoever looks on."""
        network_checks.check_input(x, self.sizes[0])
        if getattr(forward_ad, "_current_level", -1) >= 0:  # a layer refuses it, while the formula has it
            return reference.network(x, self._tensors, self.spec, self._seeds(training))
        if self._goes_by_layers(x):
            return self._one_by_one(x, training)
        if type(x.numel()) is not int:  # traced: the operator finds its way as it runs
            return self._by_operator(x, self._seeds(training))
        choice, way, keeps = self._choose(x)
        if explanation.is_listening():
            explanation.note_network(choice, x, self.spec, way, keeps)
        seeds = self._seeds(training)
        if way is None:
            return reference.network(x, self._tensors, self.spec, seeds, watch=self.watched)
        if ops.needs_operator((x, *self._tensors)):
            return self._by_operator(x, seeds)
        if self._handle in differentiated_again and x.requires_grad and torch.is_grad_enabled():
            return network_ops.differentiable(x, self._tensors, self.spec, seeds, self.watched)
        return launch.run(self._handle or self._bind(), x, way.index, seeds, keeps, self.watched)

    def _traced_call(self, x: Tensor, training: bool) -> Tensor:
        network_checks.check_input(x, self.sizes[0])
        if self._goes_by_layers(x):
            return self._one_by_one(x, training)
        return self._by_operator(x, self._seeds(training))

    def _by_operator(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """The call that others see."""
        return network_ops.residual_network(x, self._tensors, seeds, *self.description.encoded, self.watched)

    def _goes_by_layers(self, x: Tensor) -> bool:
        """Whether each layer is called by itself: on a GPU, and where not all of the network is the engine's to run."""
        if dispatch.transforms_are_active() or dispatch.is_switched() or functional.autocast_dtype(x) is not None:
            return True
        return not isinstance(self._backend(x), Native)

    def _one_by_one(self, x: Tensor, training: bool) -> Tensor:
        autocast = functional.autocast_dtype(x)
        self._check_for_kernels(x, autocast is not None)  # Triton's check nothing
        own = None
        for segment in self.description.segments:
            if segment.run is not None and self._goes_by_run(x, segment, autocast):
                with _part(segment.name):
                    x = self._run(x, segment, training, autocast)
                continue
            own = self.spec.tensors(self._tensors) if own is None else own
            for i in range(segment.first, segment.last):
                layer = self.spec.layers[i]
                spec = layer.spec if training else layer.spec._replace(drop_path=0.0)
                if self.watched:
                    spec = spec._replace(watch=self.watched + i)
                with _part(f"layers.{i}"):
                    x = functional.call(layer.operands(x, own[i]), spec, autocast)
        return x

    def _goes_by_run(self, x: Tensor, segment: Segment, autocast: torch.dtype | None) -> bool:
        if dispatch.transforms_are_active():
            return False
        if autocast is not None and not run_ops.stays_in(autocast, x, segment, self._tensors):
            return False
        is_triton = isinstance(dispatch.choose(x.device, x.dtype, x.numel() == 0), Triton)
        width = segment.run.widths[0]
        if not is_triton or not run_launch.has_tiles(x.device.type, x.device.index, x.dtype, width):
            return False
        return _is_surely(dispatch.stack_pays(x.numel() // width, width))

    def _run(self, x: Tensor, segment: Segment, training: bool, autocast: torch.dtype | None) -> Tensor:
        if explanation.is_listening():
            choice = cast(Triton, dispatch.backend(x.device, x.dtype))
            explanation.note_run(choice, x, segment.run, run_launch.tiles(x, segment.run), self.recompute)
        dropping = segment.dropping if training else ()
        seeds = network_ops.draw_seeds(dropping, len(segment.run.layers)) if dropping else None
        tensors = run_ops.own_tensors(segment, self.spec, self._tensors)
        if autocast is not None:
            tensors = run_ops.cast(tensors, segment, autocast)
        watch = self.watched + segment.first if self.watched else 0
        return run_ops.residual_run(x, tensors, segment, seeds, self.recompute, watch)

    def _check_for_kernels(self, x: Tensor, is_autocast: bool) -> None:
        """Every layer's operands, once for all calls that are alike in what is checked."""
        if is_compiling():  # which comes here once
            network_checks.check(x, self.spec, self._tensors, is_autocast)
            return
        facts = (is_autocast, x.dtype, x.device, *((t.shape, t.dtype, t.device) for t in self._tensors))
        if facts not in self._checked:
            network_checks.check(x, self.spec, self._tensors, is_autocast)
            self._checked = {facts}


def _is_surely(condition: Any) -> bool:
    """Compiled for any number of rows, only what holds for all of them is, so that none are ruled out."""
    if not is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _forget(handle: int) -> None:
    network_ops.bound.discard(handle)
    differentiated_again.discard(handle)
    launch.unbind(handle)


def _part(name: str) -> AbstractContextManager[object]:
    return explanation.part(name) if explanation.is_listening() else nullcontext()


class Described(Network):
    """A network of other tensors in the places of those that were checked when it was described."""

    def __init__(self, description: Description, tensors: Sequence[Tensor]) -> None:
        self._adopt(description, tensors)


_UNKNOWN: Any = object()
