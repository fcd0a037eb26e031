"""Whom a row is measured against, all with the same parameters and the same optimiser.

eager       nn.Linear, φ and the sum, layer by layer
compile     torch.compile of that module, and again by max-autotune; on CUDA without its own graphs, since there
            everybody's calls are captured alike
cublaslt    forward alone, with relu or gelu's tanh form: φ(x Wᵀ + b) in cuBLASLt's epilogue, then the sum
fused       fusedres.network.Network of the same parameters; of a layer fusedres.functional.residual_linear, and of
            blocks of two that function twice, the block's input being the second one's residual
recomputed  of a layer, the same with recompute=True
stacked     fusedres.FusedResidualStack, each run of equal layers in one parameter [L, N, N]
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import Row
from torch import Tensor, nn

COMPILED = {
    "cpu": {"compile": "default", "compile-autotuned": "max-autotune"},
    "cuda": {"compile": "default", "compile-autotuned": "max-autotune-no-cudagraphs"},
}
OURS = ("fused", "recomputed", "stacked")
WAYS = ("eager", *COMPILED["cpu"], "cublaslt", *OURS)
PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "none": lambda z: z,
}
EPILOGUES = ("relu", "gelu-tanh")  # that cuBLASLt has
TIMED_RATE = 1e-9  # of learning: every call finds the same numbers, which times depend on
CHECKED_RATE = 0.01


class EagerNetwork(nn.Module):
    """x [M, d₀] -> [M, d_L] in PyTorch's own operations, by the row's formula."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row
        self.layers = nn.ModuleList(nn.Linear(K, N, dtype=row.dtype) for K, N in row.layers)
        learns = [row.learns and skips for skips in row.skips]
        self.scales = nn.ParameterList(nn.Parameter(torch.ones((), dtype=row.dtype)) for is_one in learns if is_one)
        place = iter(range(row.depth))
        self.scale_of = [next(place) if is_one else None for is_one in learns]
        self.skips = row.skips
        projected = [i for i, (K, N) in enumerate(row.layers) if row.rule == "projection" and K != N]
        self.projections = nn.ModuleDict({str(i): nn.Linear(*row.layers[i], dtype=row.dtype) for i in projected})
        with torch.no_grad():
            for layer, skips in zip(self.layers, row.skips, strict=True):
                depth = row.depth if skips else 1  # or what a thousand layers add would leave the range of numbers
                layer.weight.copy_(torch.randn(layer.weight.shape) * (depth * layer.in_features) ** -0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape) * 0.1 * depth**-0.5)
            for scale in self.scales:
                scale.copy_(1 + 0.1 * row.depth**-0.5 * torch.randn(()))

    def branch(self, layer: nn.Linear, x: Tensor, activation: str) -> Tensor:
        """φ(x Wᵀ + b)."""
        return PHI[activation](layer(x))

    def forward(self, x: Tensor, branch: Callable[[nn.Linear, Tensor, str], Tensor] | None = None) -> Tensor:
        """branch: who computes φ(x Wᵀ + b), in the place of the method."""
        branch = branch or self.branch
        if self.row.is_of_blocks:
            return self._blocks(x, branch)
        for i, (layer, skips, place) in enumerate(zip(self.layers, self.skips, self.scale_of, strict=True)):
            y = branch(layer, x, self.row.activation)
            if str(i) in self.projections:
                x = self.projections[str(i)](x)
            if place is not None:
                x = self.scales[place] * x
            x = x + y if skips else y
        return x

    def _blocks(self, x: Tensor, branch: Callable[[nn.Linear, Tensor, str], Tensor]) -> Tensor:
        phi = self.row.activation
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            total = x + second(branch(first, x, phi))
            x = PHI[phi](total) if self.row.rule == "post" else total
        return x


@dataclass
class Contender:
    """A network, its parameters, and how tensors shaped as those go by layer: {"weight 3": …}."""

    network: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    by_layer: Callable[[list[Tensor]], dict[str, Tensor]]
    is_within: bool = False  # a network: the gradient of y is given, and that of x wanted

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def backward(self, y: Tensor, target: Tensor) -> None:
        """From the mean squared error, or within a network from the target as the gradient of y."""
        if self.is_within:
            y.backward(target)
        else:
            F.mse_loss(y, target).backward()

    def step(self, x: Tensor, target: Tensor) -> None:
        """Forward, and backward to all parameters. Old gradients are let go, not zeroed."""
        for parameter in self.parameters:
            parameter.grad = None
        x.grad = None
        self.backward(self.network(x), target)

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """AdamW as everybody gets it: fused, and fit for a CUDA graph on CUDA."""
        is_cuda = self.parameters[0].is_cuda
        return torch.optim.AdamW(self.parameters, lr=rate, fused=True, capturable=is_cuda)

    def call(self, kind: str, x: Tensor, target: Tensor) -> Callable[[], object]:
        """What is timed; for F it is to be called without gradients."""
        if kind == "F":
            return partial(self.network, x)
        if kind == "FB":
            return partial(self.step, x, target)
        optimizer = self.optimizer(TIMED_RATE)

        def full_step() -> None:
            self.step(x, target)
            optimizer.step()

        return full_step

    def answer(self, kind: str, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """{"y": …} of F; else {"y": …, "weight 0": its gradient, …}, within a network "x" too. Copies."""
        if kind == "F":
            with torch.no_grad():
                return {"y": self.network(x).clone()}
        self.clear()
        x.grad = None
        y = self.network(x)
        self.backward(y, target)
        answer = {"y": y.detach().clone()}
        found = [parameter.grad for parameter in self.parameters]
        if any(gradient is None for gradient in (*found, *([x.grad] if self.is_within else []))):
            raise AssertionError("a parameter, or x, got no gradient")
        answer |= {name: gradient.clone() for name, gradient in self.by_layer(found).items()}
        if self.is_within:
            answer["x"] = x.grad.clone()
        self.clear()
        x.grad = None
        return answer

    def stepped(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Its parameters by layer, as one step of the optimiser from these gradients leaves them; then as before."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        slots = [torch.zeros_like(parameter) for parameter in self.parameters]
        for name, slot in self.by_layer(slots).items():
            slot.copy_(gradients[name])
        for parameter, slot in zip(self.parameters, slots, strict=True):
            parameter.grad = slot
        self.optimizer(CHECKED_RATE).step()
        after = {name: tensor.detach().clone() for name, tensor in self.by_layer(self.parameters).items()}
        with torch.no_grad():
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.copy_(value)
        self.clear()
        return after


def of_module(module: EagerNetwork, network: Callable[[Tensor], Tensor] | None = None) -> Contender:
    """The module itself, or another network with its parameters."""
    named = {f"{kind} {i}": tensor for kind, tensors in _named(module).items() for i, tensor in tensors.items()}
    return Contender(
        module if network is None else network,
        list(named.values()),
        lambda found: dict(zip(named, found, strict=True)),
        module.row.is_within,
    )


def cublaslt(module: EagerNetwork) -> Contender:
    def branch(layer: nn.Linear, x: Tensor, activation: str) -> Tensor:
        return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=activation == "gelu-tanh")

    return of_module(module, partial(module.forward, branch=branch))


def fused(module: EagerNetwork, row: Row, **options: object) -> Contender:
    """The very parameters of the module."""
    from fusedres.network import Network

    if row.is_of_blocks:
        return of_module(module, _blocks_of_two(module, row, **options))
    if row.family == "layer":
        return of_module(module, _one_layer(module, row, **options))
    named = _named(module)
    scales = [named["scale"].get(i, 1.0) for i in range(row.depth)] if row.learns else 1.0
    weights, biases = list(named["weight"].values()), list(named["bias"].values())
    options |= _words(row.activation)
    if row.rule == "projection":
        options["skip"] = ["projection" if i in named["projection"] else "auto" for i in range(row.depth)]
        for kind, option in (("projection", "projection_weights"), ("projection bias", "projection_biases")):
            options[option] = [named[kind].get(i) for i in range(row.depth)]
    return of_module(module, Network(weights, biases, skip_scale=scales, **options))


def _one_layer(module: EagerNetwork, row: Row, **options: Any) -> Callable[[Tensor], Tensor]:
    from fusedres.functional import residual_linear

    (layer,) = module.layers
    return partial(residual_linear, weight=layer.weight, bias=layer.bias, **_words(row.activation), **options)


def _blocks_of_two(module: EagerNetwork, row: Row, **options: Any) -> Callable[[Tensor], Tensor]:
    from fusedres.functional import residual_linear

    words = _words(row.activation)
    ends = {**words, "order": "post"} if row.rule == "post" else {"activation": "none"}
    pairs = list(zip(module.layers[::2], module.layers[1::2], strict=True))

    def network(x: Tensor) -> Tensor:
        for first, second in pairs:
            h = residual_linear(x, first.weight, first.bias, skip=None, **words, **options)
            x = residual_linear(h, second.weight, second.bias, x, **ends, **options)
        return x

    return network


def _words(activation: str) -> dict[str, Any]:
    """A row's φ in the options of fusedres."""
    name, _, approximate = activation.partition("-")
    return {"activation": name, "approximate": approximate or "none"}


def stacked(module: EagerNetwork, row: Row, **options: Any) -> Contender:
    """The module for whole networks, with copies of the parameters, those of equal layers stacked."""
    from fusedres import FusedResidualStack

    like = module.layers[0].weight
    options = {**_words(row.activation), "device": like.device, "dtype": like.dtype, **options}
    stack = FusedResidualStack(row.sizes, learn_skip_scale=row.learns and any(row.skips), **options)
    names = {"weight": "layers.{}.0.weight", "bias": "layers.{}.0.bias", "scale": "skip_scales.{}"}
    held = {kind: tensors for kind, tensors in _named(module).items() if tensors}
    kinds = {names[kind].format(i): (kind, i) for kind, tensors in held.items() for i in tensors}
    stack.load_state_dict({name: held[kind][i] for name, (kind, i) in kinds.items()})
    own, parameters = zip(*stack.named_parameters(), strict=True)

    def by_layer(found: list[Tensor]) -> dict[str, Tensor]:
        slices = stack.by_layer(dict(zip(own, found, strict=True)))
        return {"{} {}".format(*kinds[name]): slice for name, slice in slices.items()}

    return Contender(stack, list(parameters), by_layer, row.is_within)


def compiled(module: EagerNetwork, way: str) -> Contender:
    from torch._inductor import select_algorithm  # a second's import, for those who compile

    select_algorithm.PRINT_AUTOTUNE = False
    mode = COMPILED[module.layers[0].weight.device.type][way]
    return of_module(module, torch.compile(module, mode=mode, dynamic=False))


def draw(row: Row, device: str = "cpu") -> tuple[EagerNetwork, Tensor, Tensor]:
    """(module, x, target), the same each time on a device."""
    torch.manual_seed(0)
    with torch.device(device):
        module = EagerNetwork(row)
        x = torch.randn(row.M, row.sizes[0]).to(row.dtype)
        target = torch.randn(row.M, row.sizes[-1]).to(row.dtype)
    return module, x.requires_grad_(row.is_within), target


def truth(module: EagerNetwork, row: Row, kind: str, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Eager's answer in wider arithmetic: float64, and float32 for the halves."""
    wide = torch.float64 if row.dtype == torch.float32 else torch.float32
    with torch.device(x.device):
        twin = EagerNetwork(row).to(wide)
    twin.load_state_dict(module.state_dict())
    wide_x = x.detach().to(wide).requires_grad_(row.is_within)
    return of_module(twin).answer(kind, wide_x, target.to(wide))


def _named(module: EagerNetwork) -> dict[str, dict[int, Tensor]]:
    """{weight, bias, scale, …: {layer: parameter}}."""
    places = enumerate(module.scale_of)
    projections = {int(i): projection for i, projection in module.projections.items()}
    return {
        "weight": {i: layer.weight for i, layer in enumerate(module.layers)},
        "bias": {i: layer.bias for i, layer in enumerate(module.layers)},
        "scale": {i: module.scales[place] for i, place in places if place is not None},
        "projection": {i: projection.weight for i, projection in projections.items()},
        "projection bias": {i: projection.bias for i, projection in projections.items()},
    }


# ---------------------------------------------------------------------------------------------- beside the point


class Chosen(NamedTuple):
    """What the dispatcher chose for a call, in a line, and whether it left it to eager."""

    line: str
    is_eager: bool


def chosen(network: Callable[[Tensor], Tensor], x: Tensor) -> Chosen:
    """What `fusedres.explain` says of a network's call."""
    from fusedres import explain

    with contextlib.redirect_stdout(io.StringIO()):
        calls = explain(network, x)
    reasons = [line.strip() for line in str(calls).splitlines() if "because" in line]
    reasons = list(dict.fromkeys(line.partition(": ")[2] if "]" in line else line for line in reasons))  # not the shape
    line = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return Chosen(line, all(call.backend == "eager" for call in calls))
