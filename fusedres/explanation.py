"""What would run, and why: every fused call notes its choice here while someone listens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import dispatch
from .dispatch import Eager, Triton
from .kernels.config import Tiles
from .kernels.spec import LayerSpec, Operands


@dataclass(frozen=True)
class Call:
    """One fused call: its layer's name in the module, its shape x [M, K] -> [M, N], and what runs it."""

    name: str
    M: int
    N: int
    K: int
    dtype: torch.dtype
    spec: LayerSpec
    choice: Eager | Triton
    tiles: Tiles | None

    @property
    def backend(self) -> str:
        """triton, triton-interpreter or eager."""
        if isinstance(self.choice, Eager):
            return "eager"
        return "triton-interpreter" if self.choice.target == "interpreter" else "triton"

    def __str__(self) -> str:
        layer = f"{self.name or 'residual_linear'} [{self.M}, {self.K}] -> [{self.M}, {self.N}] {self.dtype}"
        lines = [f"{layer}: {self.backend}, because {self.choice.because}"]
        if self.tiles is not None:
            kept = "z recomputed in backward" if self.spec.recompute else "z kept for backward"
            lines.append(f"    {self.spec.activation}, order {self.spec.order}, skip {self.spec.skip}; {kept}")
            lines += [f"    {kernel:<8}{tile}" for kernel, tile in self.tiles._asdict().items()]
            lines.append("    dW, dP   torch.matmul")
        return "\n".join(lines)


class Explanation(tuple[Call, ...]):
    """The fused calls of one run, in order; prints as one line each, with tiles beneath."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no fused call was made"


_listener: list[Call] | None = None
_names: list[str] = []  # of the modules that a call is inside of, innermost last


def is_listening() -> bool:
    return _listener is not None


def note(choice: Eager | Triton, operands: Operands, spec: LayerSpec, dtype: torch.dtype) -> None:
    """Tell the listener about a call."""
    N, K = operands.weight.shape
    M = operands.x.shape[:-1].numel()
    chosen = None
    if isinstance(choice, Triton):
        chosen = dispatch.layer_tiles(operands, spec, dtype, choice.target)
    _listener.append(Call(_names[-1] if _names else "", M, N, K, dtype, spec, choice, chosen))


def explain(module_or_call: Callable[..., object], *args: Tensor, **kwargs: object) -> Explanation:
    """Run module_or_call(*args) without gradients, print and return what ran each fused call, and why.

    Leaves random states and the module's buffers as they were.
    """
    global _listener
    calls: list[Call] = []
    hooks, buffers = [], []
    if isinstance(module_or_call, nn.Module):
        for name, module in module_or_call.named_modules():
            hooks.append(module.register_forward_pre_hook(_entering(name)))
            hooks.append(module.register_forward_hook(_leaving))
        buffers = [(buffer, buffer.clone()) for buffer in module_or_call.buffers()]
    devices = {value.device for value in args if isinstance(value, Tensor) and value.is_cuda}
    before, _listener = _listener, calls
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), _uncompiled():
            module_or_call(*args, **kwargs)
    finally:
        _listener = before
        _names.clear()
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    explanation = Explanation(calls)
    print(explanation)
    return explanation


def _uncompiled() -> AbstractContextManager[object]:
    """Compiled functions run as they were written: what they would choose can then be noted."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _entering(name: str) -> Callable[..., None]:
    return lambda *_: _names.append(name.removeprefix("_orig_mod."))


def _leaving(*_: object) -> None:
    _names.pop()
