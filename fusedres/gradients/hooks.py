"""Gradients at the inputs of modules that are not ours: hooks on tensors and on the nodes of autograd's graph.

Nothing is put into the graph, so that gradients are added up in the order in which they always are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .watch import Watch


Gradients = tuple[Tensor | None, ...]  # of the inputs, or of the outputs, of a node


class Hook:
    """A hook on a module. Where code is traced it does nothing, nor on a copy of the module or one read from a file."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *given: Any) -> None:
        if self.call is not None and not torch.compiler.is_compiling():
            self.call(*given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


class Through:
    """What goes through one module: its calls, their inputs, and what comes back to each."""

    def __init__(self, watch: Watch, row: int) -> None:
        self.watch, self.row = watch, row
        self._step = -1
        self._inputs: dict[int, Input] = {}  # by id: a tensor that comes twice is one
        self._entered: Input | None = None  # by the branch, which has not left yet

    def enter(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before a call: all that comes back to its input is noted."""
        x = first_tensor((*inputs, *named.values()))
        if x is not None and self.watch.sees(x):
            self._input(x)

    def enter_branch(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before the call of the branch, whose input this is too."""
        x = first_tensor((*inputs, *named.values()))
        found = None if x is None else self._inputs.get(id(x))
        self._entered = found if found is not None and found.tensor() is x and self._step == self.watch.steps else None
        if x is not None and self._entered is not None:
            self._entered.edge = torch.autograd.graph.get_gradient_edge(x)

    def leave_branch(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """After it: nodes that it has made and that lead straight to its input send back what comes through it."""
        entered, self._entered = self._entered, None
        if entered is None or not torch.is_grad_enabled():
            return
        edge, entered.edge = entered.edge, None
        for node, place in consumers(tensors_of(output), edge):
            entered.has_consumers = True
            self.watch.keep(node.register_hook(entered.came_from(place)))

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """After a call: all that comes back to its output is noted."""
        y = first_tensor(tensors_of(output))
        if y is not None and self.watch.sees(y):
            self._input(y)

    def _input(self, tensor: Tensor) -> None:
        if self._step != self.watch.steps:
            self._step = self.watch.steps
            self._inputs.clear()
        found = self._inputs.get(id(tensor))
        if found is None or found.tensor() is not tensor:
            self._inputs[id(tensor)] = found = Input(self, tensor)
            self.watch.keep(tensor.register_hook(found.came))


class Input:
    """A tensor that has entered a module, and what has come back to it through that module."""

    def __init__(self, through: Through, tensor: Tensor) -> None:
        self.through, self.tensor = through, weakref.ref(tensor)
        self.edge: Any = None  # in autograd's graph, while the branch runs
        self.has_consumers = False
        self._branch: Tensor | None = None

    def came_from(self, place: int) -> Callable[[Gradients, Gradients], None]:
        def note(gradients: Gradients, _: Gradients) -> None:
            gradient = gradients[place]
            if gradient is not None and not torch.is_grad_enabled():
                self._branch = gradient if self._branch is None else self._branch + gradient

        return note

    def came(self, gradient: Tensor) -> None:
        branch, self._branch = self._branch, None
        came_through = branch is not None or not self.has_consumers  # else all of it came by other ways, for others
        if came_through and not torch.is_grad_enabled():  # gradients that are differentiated again are none of a step's
            self.through.watch.note(self.through.row, gradient, branch)


def consumers(outputs: Iterable[Tensor], edge: Any) -> list[tuple[Any, int]]:
    """The nodes between the outputs and an edge that lead straight to it, and which of their gradients goes there."""
    found = []
    seen = {edge.node}
    waiting = [y.grad_fn for y in outputs if y.grad_fn is not None]
    oldest = _age(edge.node)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for place, (below, number) in enumerate(node.next_functions):
            if below is edge.node and number == edge.output_nr:
                found.append((node, place))
            elif below is not None and _age(below) >= oldest:  # what is older than x knows nothing of it
                waiting.append(below)
    return found


def _age(node: Any) -> int:
    """Nodes made later have larger numbers; leaves, which lead nowhere, the largest of all."""
    number = node._sequence_nr()
    return 0 if not node.next_functions and number > 1 << 62 else number


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first that can have a gradient."""
    return next((v for v in values if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())), None)


def tensors_of(output: Any) -> list[Tensor]:
    """Of an output: itself, or those of a tuple, a list or a dict."""
    some = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else (output,)
    return [one for one in some if isinstance(one, Tensor)]
