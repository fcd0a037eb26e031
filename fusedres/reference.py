"""The residual layer and its networks in eager PyTorch: the specification, the fallback and the tests' truth.

z = x Wᵀ + b        y = λ s(x) + a φ(z)        or, with order="post",   y = φ(λ s(x) + a z)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, philox, recording, stack_checks
from .kernels.spec import LayerSpec, NetworkSpec, Operands, Terms, Wanted, WantedTerms

vjp: Any = torch.func.vjp  # whose annotation is a union over has_aux
Activations = Mapping[str, Callable[[Tensor], Tensor]]
ACTIVATIONS: Activations = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": torch.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "none": lambda z: z,
}


def layer(operands: Operands, spec: LayerSpec, activations: Activations = ACTIVATIONS) -> Tensor:
    """y [..., N], with concat [..., S + N]."""
    if spec.watch:
        operands, spec = _apart(operands, spec)
    x, weight, bias, residual, projection_weight, projection_bias, skip_scale, branch_scale, seed = operands
    activation = activations[spec.activation]
    is_post = spec.order == "post"

    branch = F.linear(x, weight, bias)
    kept = _kept(branch, seed, spec, branch.dim() - 1) if spec.drop_path > 0 else None
    if kept is not None:  # before φ, since of what a dropped row has there, φ and φ' may be no numbers
        branch = torch.where(kept, branch, 0.0)
    if not is_post:
        branch = activation(branch)
    if branch_scale is not None or spec.branch_scale != 1.0:
        branch = branch * (spec.branch_scale if branch_scale is None else branch_scale)
    if kept is not None:
        branch = torch.where(kept, branch * spec.keep_scale, 0.0)

    if spec.skip == "none":
        total = branch
    else:
        if spec.skip == "projection":
            skip = F.linear(x, projection_weight, projection_bias)
        else:
            skip = x if residual is None else residual
        if skip_scale is not None or spec.skip_scale != 1.0:
            skip = skip * (spec.skip_scale if skip_scale is None else skip_scale)
        total = torch.cat([skip, branch], -1) if spec.skip == "concat" else skip + branch
    return activation(total) if is_post else total


def _apart(operands: Operands, spec: LayerSpec) -> tuple[Operands, LayerSpec]:
    """The same layer, where branch and skip take x: its gradient is recorded in two halves."""
    takes_x = spec.skip != "none" and operands.residual is None
    x, source = recording.apart(operands.x, spec.watch, takes_x)
    if not takes_x:
        return operands._replace(x=x), spec
    if spec.skip == "projection":
        source = F.linear(source, operands.projection_weight, operands.projection_bias)
    return operands._replace(x=x, residual=source), spec._replace(
        skip="concat" if spec.skip == "concat" else "residual"
    )


def network(
    x: Tensor,
    parameters: Sequence[Tensor],
    spec: NetworkSpec,
    seeds: Tensor | None = None,
    activations: Activations = ACTIVATIONS,
    watch: int = 0,
) -> Tensor:
    """y [..., d_L], layer after layer; seeds [layers] int64, without which no row drops; watch: the first one's."""
    for i, (bound, own) in enumerate(zip(spec.layers, spec.tensors(parameters), strict=True)):
        options = bound.spec if seeds is not None else bound.spec._replace(drop_path=0.0)
        if watch:
            options = options._replace(watch=watch + i)
        x = layer(bound.operands(x, own, None if seeds is None else seeds[i]), options, activations)
    return x


def layer_gradients(g: Tensor, operands: Operands, spec: LayerSpec, wanted: Wanted) -> tuple[Tensor, ...]:
    """The wanted gradients alone, themselves differentiable."""
    names = [name for name, is_wanted in wanted._asdict().items() if is_wanted]

    def of(*values: Tensor) -> Tensor:
        return layer(operands._replace(**dict(zip(names, values, strict=True))), spec)

    y, pull = vjp(of, *(getattr(operands, name) for name in names))
    found: tuple[Tensor, ...] = pull(g.to(y.dtype))
    return found


def network_gradients(
    g: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    spec: NetworkSpec,
    seeds: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of those wanted among x and the parameters, themselves differentiable."""
    tensors = [x, *parameters]
    at = [i for i, is_wanted in enumerate(wanted) if is_wanted]

    def of(*values: Tensor) -> Tensor:
        filled = list(tensors)
        for i, value in zip(at, values, strict=True):
            filled[i] = value
        return network(filled[0], filled[1:], spec, seeds)

    y, pull = vjp(of, *(tensors[i] for i in at))
    found: tuple[Tensor, ...] = pull(g.to(y.dtype))
    return found


def differentiable_gradients(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], g: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    """The wanted gradients of formula(*inputs), themselves differentiable where gradients are recorded.

    For a backward that is being differentiated: each input counts for its own place alone, even where one is computed
    from another, or stands twice; hooks on them wait for what comes out of this.
    """
    creates_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(g.device.type, enabled=False):
        places = [t.view_as(t) if is_wanted else t for t, is_wanted in zip(inputs, wanted, strict=True)]
        chosen = [t for t, is_wanted in zip(places, wanted, strict=True) if is_wanted]
        y = formula(*places)
        return list(torch.autograd.grad(y, chosen, g.to(y.dtype), create_graph=creates_graph, materialize_grads=True))


def residual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    approximate: str = "none",
    order: str = "pre",
    skip: str | None = "auto",
    skip_scale: float | Tensor = 1.0,
    branch_scale: float | Tensor = 1.0,
    projection_weight: Tensor | None = None,
    projection_bias: Tensor | None = None,
    drop_path: float = 0.0,
    training: bool = True,
    recompute: bool = False,
) -> Tensor:
    """`functional.residual_linear` in eager PyTorch: the same arguments, shapes and errors; forward mode works too."""
    given = Operands(x, weight, bias, residual, projection_weight, projection_bias)
    options = (activation, approximate, order, skip, drop_path, training, recompute)
    is_autocast = isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    operands, spec = checks.described(given, skip_scale, branch_scale, options, is_autocast)
    if spec.drop_path > 0:
        operands = operands._replace(seed=philox.draw_seed())
    return layer(operands, spec)


def _kept(branch: Tensor, seed: Tensor, spec: LayerSpec, leading: int) -> Tensor:
    """Which rows stochastic depth leaves, [..., 1, …]; a row is what the first `leading` dimensions leave."""
    kept = philox.kept_rows(seed, branch.shape[:leading], spec.drop_threshold, branch.device)
    return kept.reshape(*kept.shape, *(1,) * (branch.dim() - leading))


def _drop(branch: Tensor, seed: Tensor, spec: LayerSpec, leading: int) -> Tensor:
    """Zero in dropped rows, whatever stood there, 1 / (1 - drop_path) times the rest."""
    return torch.where(_kept(branch, seed, spec, leading), branch * spec.keep_scale, 0.0)


def residual(terms: Terms, spec: LayerSpec) -> Tensor:
    """a drop(branch) + λ x, in as few of PyTorch's operations as there are for it."""
    branch, x, branch_scale, skip_scale, seed = terms
    if spec.drop_path > 0:
        branch = _drop(branch, seed, spec, 1)
    if branch_scale is None and skip_scale is None:
        if spec.skip_scale == 1.0:
            return torch.add(x, branch, alpha=spec.branch_scale)
        scaled = branch if spec.branch_scale == 1.0 else branch * spec.branch_scale
        return torch.add(scaled, x, alpha=spec.skip_scale)
    if skip_scale is None and spec.skip_scale == 1.0:
        return _multiply_add(x, branch, branch_scale)
    if branch_scale is not None or spec.branch_scale != 1.0:
        branch = branch * (spec.branch_scale if branch_scale is None else branch_scale)
    return torch.add(branch, x, alpha=spec.skip_scale) if skip_scale is None else _multiply_add(branch, x, skip_scale)


def _multiply_add(other: Tensor, value: Tensor, factor: Tensor) -> Tensor:
    """other + value · factor, in the type that these two operations give: autocast lets addcmul promote further."""
    if other.dtype == value.dtype == factor.dtype:
        return torch.addcmul(other, value, factor)
    return other + value * factor


def residual_gradients(
    g: Tensor, terms: Sequence[Any], spec: LayerSpec, dtypes: Sequence[torch.dtype], wanted: WantedTerms
) -> tuple[Tensor, ...]:
    """The wanted gradients of `residual` alone, themselves differentiable; branch and x are of these dtypes.

    Of `Terms`, branch is read for its scale's gradient alone, and x for its own's.
    """
    branch, x, branch_scale, skip_scale, seed = terms

    def dropped(value: Tensor) -> Tensor:
        return _drop(value, seed, spec, 1) if spec.drop_path > 0 else value

    found = []
    if wanted.branch:
        found.append((dropped(g) * (spec.branch_scale if branch_scale is None else branch_scale)).to(dtypes[0]))
    if wanted.x:
        found.append((g * (spec.skip_scale if skip_scale is None else skip_scale)).to(dtypes[1]))
    if wanted.branch_scale:
        found.append((g * dropped(branch)).sum_to_size(branch_scale.shape).to(branch_scale.dtype))
    if wanted.skip_scale:
        found.append((g * x).sum().to(skip_scale.dtype))
    return tuple(found)


class Sin(nn.Module):
    """sin z, elementwise."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(z)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sin": Sin,
    "none": nn.Identity,
}


class ResidualStack(nn.Module):
    """`FusedResidualStack` in plain PyTorch: the same arguments but for `recompute`, names, draws and errors.

    sizes [d₀, …, d_L] gives L layers; x [..., d₀] -> [..., d_L]. Parameters `layers.{i}.0.*`, `projections.{i}.*` where
    a skip is projected, `skip_scales.{i}` [] and `branch_scales.{i}` [] or [d_{i+1}] where learned.
    """

    watch: int = 0  # the number by which its first layer's gradient is recorded; 0: none is
    layers: Any  # nn.ModuleList of nn.Sequential
    projections: Any  # nn.ModuleDict of nn.Linear

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.recipe = recipe = stack_checks.described(sizes, options)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(K, N, **factory), MODULES[one.activation]())
            for (K, N), one in zip(recipe.pairs, recipe.layers, strict=True)
        )
        self.projections = nn.ModuleDict({str(i): nn.Linear(*recipe.pairs[i], **factory) for i in recipe.projected})
        self.skip_scales, self.branch_scales = learned_scales(recipe, range(len(recipe.layers)), **factory)
        self.skips = [one.skip != "none" for one in recipe.layers]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "watch"}

    @property
    def watched_layers(self) -> list[str]:
        """The layers whose gradients are recorded under `watch` and the numbers after it."""
        return [f"layers.{i}" for i in range(len(self.layers))]

    @property
    def identity_scales(self) -> list[float | Tensor | None]:
        """λ of each layer whose skip is x itself, with no activation after the sum; None of the others."""
        return [
            None if one.skip != "identity" or one.activates_sum else self.skip_scales.get(str(i), one.skip_scale)
            for i, one in enumerate(self.recipe.layers)
        ]

    def forward(self, x: Tensor) -> Tensor:
        for i, spec in enumerate(self.recipe.layers):
            linear, name = self.layers[i][0], str(i)
            weight = bias = None
            if spec.skip == "projection":
                weight, bias = self.projections[name].weight, self.projections[name].bias
            scales = [one.get(name, None) for one in (self.skip_scales, self.branch_scales)]
            given = Operands(x, linear.weight, linear.bias, None, weight, bias, *scales)
            if spec.drop_path > 0:
                if self.training:
                    given = given._replace(seed=philox.draw_seed())
                else:
                    spec = spec._replace(drop_path=0.0)
            x = layer(given, spec._replace(watch=self.watch + i) if self.watch else spec)
        return x

    if TYPE_CHECKING:  # nn.Module says Any

        def __call__(self, x: Tensor) -> Tensor: ...


def learned_scales(recipe: stack_checks.Recipe, layers: Iterable[int], **factory: Any) -> list[nn.ParameterDict]:
    """The learned λ and a of these layers, by index: where they start."""
    starts = {str(i): recipe.scale_starts(i) for i in layers}
    shapes = {str(i): ((), recipe.scale_shape(int(i))) for i in starts}
    return [
        nn.ParameterDict(
            {
                i: nn.Parameter(torch.full(shapes[i][which], start[which], **factory))
                for i, start in starts.items()
                if start[which] is not None
            }
        )
        for which in (0, 1)
    ]


class ShapeGatedStack(nn.Module):
    """System A: Linear then GELU at every layer, the input added wherever the output has its shape.

    sizes [d₀, …, d_L] gives L layers; x [..., d₀] -> [..., d_L]. Parameters `layers.{i}.0.weight`, `layers.{i}.0.bias`.
    """

    def __init__(self, sizes: Sequence[int], use_residual: bool = True) -> None:
        super().__init__()
        pairs = list(pairwise(sizes))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(K, N), nn.GELU()) for K, N in pairs)
        self.use_residual = use_residual
        self.skips = [use_residual and K == N for K, N in pairs]

    def forward(self, x: Tensor) -> Tensor:
        for layer, takes_skip in zip(self.layers, self.skips, strict=True):
            x = x + layer(x) if takes_skip else layer(x)
        return x

    if TYPE_CHECKING:  # nn.Module says Any

        def __call__(self, x: Tensor) -> Tensor: ...


class ProjectionStack(nn.Module):
    """System D: as system A, with a learned Linear on the skip wherever the sizes differ.

    sizes [d₀, …, d_L] gives L layers; x [..., d₀] -> [..., d_L]. Parameters `layers.{i}.0.*`, and `projections.{i}.*`
    for the layers whose sizes differ.
    """

    def __init__(self, sizes: Sequence[int], use_shortcut: bool = True) -> None:
        super().__init__()
        pairs = list(pairwise(sizes))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(K, N), nn.GELU()) for K, N in pairs)
        self.projections = nn.ModuleDict(
            {str(i): nn.Linear(K, N) for i, (K, N) in enumerate(pairs) if use_shortcut and K != N}
        )
        self.use_shortcut = use_shortcut
        self.skips = [use_shortcut] * len(pairs)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if not self.use_shortcut:
                x = layer(x)
            elif str(i) in self.projections:
                x = layer(x) + self.projections[str(i)](x)
            else:
                x = layer(x) + x
        return x

    if TYPE_CHECKING:  # nn.Module says Any

        def __call__(self, x: Tensor) -> Tensor: ...
