"""What would run, and why: every fused call notes its choice here while someone listens."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from . import dispatch, plans
from .dispatch import Eager, Native, Triton, Way
from .kernels.config import Plan, StackTiles, Together
from .kernels.spec import LayerSpec, NetworkSpec, Operands


@dataclass(frozen=True)
class Call:
    """One fused call: its layer's or network's name in the module, its shape x [M, K] -> [M, N], and what runs it.

    Attributes:
        name: of the layer or network in the module; empty where that is itself what was called.
        M: rows.
        N: output features.
        K: input features.
        dtype: in which it computes.
        spec: its options.
        choice: what runs it, with `.because`.
        tiles: of Triton's kernels.
        because: why each part of a plan is what it is.
        in_training: what runs the layer where gradients are wanted, if another.
        way: of the C++ engine.
        keeps: whether activations would be kept for backward.
        threads: of the C++ engine, at most.
        shape: of x, of the sum that ends a `Residual`, whose last dimension is N = K.
    """

    name: str
    M: int
    N: int
    K: int
    dtype: torch.dtype
    spec: LayerSpec | NetworkSpec
    choice: Eager | Triton | Native
    tiles: Plan | StackTiles | None = None
    because: plans.Because | None = None
    in_training: Eager | Triton | Native | None = None
    way: Way | None = None
    keeps: bool = True
    threads: int = 1
    shape: tuple[int, ...] | None = None

    @property
    def backend(self) -> str:
        """triton, triton-interpreter, native or eager."""
        return _backend(self.choice)

    def __str__(self) -> str:
        layers = f", {len(self.spec.layers)} layers" if isinstance(self.spec, NetworkSpec) else ""
        if self.shape is not None:
            call = f"{self.name or 'residual'} {list(self.shape)} {self.dtype}"
            return f"{call}: {self.backend}, because {self.choice.because}"
        kind = "network" if layers else "residual_linear"
        call = f"{self.name or kind} [{self.M}, {self.K}] -> [{self.M}, {self.N}] {self.dtype}{layers}"
        lines = [f"{call}: {self.backend}, because {self.choice.because}"]
        if isinstance(self.tiles, StackTiles):
            kept = "rows between layers kept for" if self.keeps else "some rows kept, the others computed again in"
            lines.append(f"    {self._options()}, in one kernel each way; {kept} backward")
            lines += [f"    {kernel:<8} {tile}" for kernel, tile in self.tiles._asdict().items()]
        elif self.tiles is not None:
            is_one = isinstance(self.tiles.backward, Together)
            kept = (
                "x alone kept for"
                if is_one
                else "φ' (z where a is learned) kept for"
                if self.keeps
                else "z recomputed in"
            )
            lines.append(f"    {self._options()}; {kept} backward")
            parts = self.tiles._fields[:-1] if is_one else self.tiles._fields  # where weight is backward's too
            for part in parts:
                form = getattr(self.tiles, part) or "torch.matmul"
                lines += [f"    {part:<9}{form}", f"             {getattr(self.because, part)}"]
        if self.in_training is not None:
            lines.append(f"    in training: {_backend(self.in_training)}, because {self.in_training.because}")
        if self.way is not None:
            kept = "activations kept for backward" if self.keeps else "activations computed again in backward"
            lines.append(f"    {self._options()}; {kept}")
            lines.append(f"    way {self.way.name}, because {self.way.because}; threads: {self.threads} at most")
        return "\n".join(lines)

    def _options(self) -> str:
        if isinstance(self.spec, LayerSpec):
            return f"{self.spec.activation}, order {self.spec.order}, skip {self.spec.skip}"
        counts = Counter((layer.spec.activation, layer.spec.order, layer.spec.skip) for layer in self.spec.layers)
        return "; ".join(f"{n} × {phi}, order {order}, skip {skip}" for (phi, order, skip), n in counts.items())


def _backend(choice: Eager | Triton | Native) -> str:
    if isinstance(choice, Triton):
        return "triton-interpreter" if choice.target == "interpreter" else "triton"
    return "native" if isinstance(choice, Native) else "eager"


class Explanation(tuple[Call, ...]):
    """The fused calls of one run, in order; prints as one line each, with tiles or a way beneath."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no fused call was made"


# who knows of calls that compiled functions make: (function, its arguments) -> notes of them
listers: list[Callable[[Callable[..., object], tuple[object, ...], dict[str, object]], None]] = []
_listener: list[Call] | None = None
_names: list[str] = []  # of the modules that a call is inside of, innermost last


def is_listening() -> bool:
    return _listener is not None


def _tell(call: Call) -> None:
    if _listener is not None:
        _listener.append(call)


def note(
    choice: Eager | Triton | Native,
    operands: Operands,
    spec: LayerSpec,
    dtype: torch.dtype,
    in_training: Eager | Triton | Native,
) -> None:
    """Tell the listener about a call of one layer."""
    N, K = operands.weight.shape
    M = operands.x.shape[:-1].numel()
    tiles = because = way = None
    by_kernels = choice if isinstance(choice, Triton) else in_training
    if isinstance(by_kernels, Triton):
        tiles, because = plans.explained(operands, spec, by_kernels, dtype)
    elif isinstance(choice, Native):
        way = cast(Way, dispatch.layer_way(operands, spec, dtype))
    _tell(
        Call(
            _name(), M, N, K, dtype, spec, choice, tiles, because,
            in_training=None if type(in_training) is type(choice) else in_training,
            way=way, keeps=not spec.recompute, threads=torch.get_num_threads(),
        )
    )  # fmt: skip


def note_residual(choice: Eager | Triton | Native, x: Tensor, spec: LayerSpec) -> None:
    """Tell the listener about the sum that ends a residual block."""
    last = x.shape[-1] if x.dim() else 1
    M = x.shape[:-1].numel()
    _tell(Call(_name(), M, last, last, x.dtype, spec, choice, shape=tuple(x.shape)))


def note_network(choice: Eager | Triton | Native, x: Tensor, spec: NetworkSpec, way: Way | None, keeps: bool) -> None:
    """Tell the listener about one call of a whole network."""
    K, N = spec.widths[0], spec.widths[-1]
    M = x.shape[:-1].numel()
    _tell(Call(_name(), M, N, K, x.dtype, spec, choice, way=way, keeps=keeps, threads=torch.get_num_threads()))


def note_run(choice: Triton, x: Tensor, spec: NetworkSpec, tiles: StackTiles, recompute: bool | str) -> None:
    """Tell the listener about one call of a run of layers."""
    d, M = spec.widths[0], x.shape[:-1].numel()
    keeps = dispatch.stack_keeps(len(spec.layers), M, d, x.dtype, recompute) == 1
    _tell(Call(_name(), M, d, d, x.dtype, spec, choice, tiles, keeps=keeps))


@contextmanager
def part(name: str) -> Iterator[None]:
    """Calls within are of a part of the module that is being called."""
    _names.append(f"{_name()}.{name}".lstrip("."))
    try:
        yield
    finally:
        _names.pop()


def _name() -> str:
    return _names[-1] if _names else ""


def explain(module_or_call: Callable[..., object], *args: Tensor, **kwargs: object) -> Explanation:
    """Run module_or_call(*args) without gradients, print and return what ran each fused call, and why.

    Leaves random states and the module's buffers as they were.

    Args:
        module_or_call: a module, or a function that calls some.
        args: what it is called with.
        kwargs: what it is called with.
    """
    global _listener
    calls: list[Call] = []
    held = module_or_call.buffers() if isinstance(module_or_call, nn.Module) else ()
    buffers = [(buffer, buffer.clone()) for buffer in held]
    devices = {value.device for value in args if isinstance(value, Tensor) and value.is_cuda}
    before, _listener = _listener, calls
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            with _uncompiled(), _naming(module_or_call):
                module_or_call(*args, **kwargs)
            for lister in listers:
                lister(module_or_call, args, kwargs)
    finally:
        _listener = before
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    explanation = Explanation(calls)
    print(explanation)
    return explanation


@contextmanager
def _naming(module_or_call: Callable[..., object]) -> Iterator[None]:
    """Within it calls are known by the module that they are made in."""
    hooks = []
    if isinstance(module_or_call, nn.Module):
        for name, module in module_or_call.named_modules():
            hooks.append(module.register_forward_pre_hook(_entering(name)))
            hooks.append(module.register_forward_hook(_leaving))
    try:
        yield
    finally:
        _names.clear()
        for hook in hooks:
            hook.remove()


def _uncompiled() -> AbstractContextManager[object]:
    """Compiled functions run as they were written: what they would choose can then be noted."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _entering(name: str) -> Callable[..., None]:
    def enter(*_: object) -> None:
        _names.append(name.removeprefix("_orig_mod").lstrip("."))

    return _only_looking(enter)


def _leaving(*_: object) -> None:
    _names.pop()


def _only_looking(hook: Callable[..., None]) -> Callable[..., None]:
    """Marked as a hook for which nobody has to do anything otherwise."""
    hook.__dict__["is_explains"] = True
    return hook


_only_looking(_leaving)
