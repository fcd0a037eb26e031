"""A whole residual network as one module, its parameters stacked by runs of layers, named as eager names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import dispatch, stack_checks
from ..kernels.spec import Slots
from ..network import Described, Description, Network
from ..reference import MODULES, ResidualStack, learned_scales
from . import convert
from .runs import LinearSlice, Run, StackLayer, StackLayers

# what eager calls layer i's slice of a run's parameter
_NAMES = {
    "weight": "layers.{}.0.weight",
    "bias": "layers.{}.0.bias",
    "skip_scale": "skip_scales.{}",
    "branch_scale": "branch_scales.{}",
}


class _Bound(NamedTuple):
    """A network, and where in the module its tensors, and what holds them, stood: (the place, a name in it, what)."""

    network: Network
    origins: list[tuple[Mapping[str, Any], str, Any]]

    @property
    def is_current(self) -> bool:
        for place, name, tensor in self.origins:  # noqa: SIM110 : a generator shows in a small network's time
            if place.get(name) is not tensor:
                return False
        return True


class FusedResidualStack(nn.Module):
    """y = f_L(… f_1(x)), each f_i(x) = λ s(x) + a φ(x Wᵀ + b), in one call: x [..., d₀] -> [..., d_L].

    The state dict is that of `reference.ResidualStack`, the eager twin, and of any network so named:
    `layers.{i}.0.weight`, `layers.{i}.0.bias`, `projections.{i}.*`, and where learned `skip_scales.{i}` and
    `branch_scales.{i}`. Under one seed both start from the same parameters. But parameters are fewer, since autograd
    costs per parameter: neighbouring layers of one width share `runs.{first}-{last}.weight` [L, d, d], `.bias` [L · d],
    `.skip_scale` [L], `.branch_scale` [L] or [L · d]. Layer i is addressed as in eager: `layers[i][0].weight` is its
    slice, to be read or changed in place, and `.grad` of that the gradient's. `by_layer` gives all slices by name.

    Args:
        sizes: d₀, …, d_L of L layers.
        activation: φ, one of gelu, relu, silu, tanh, sin, none.
        approximate: of gelu: "none", exact, or "tanh".
        order: "pre", or "post" for φ(λ s(x) + a (x Wᵀ + b)).
        skip: "auto" (x where sizes agree, else nothing), "projection" (where they differ a learned nn.Linear of x),
            "identity" (sizes must agree everywhere), None.
        skip_scale: λ, or where it starts when learned; a number, or one for every layer.
        learn_skip_scale: the λ of every skip is a parameter.
        branch_scale: a, or where it starts when learned; a number, or one for every layer.
        learn_branch_scale: the a of every layer is one: "scalar", or "channel" for a number per output feature.
        drop_path: the probability that a row's branch is dropped, in training mode; a number for all layers with a
            skip, or one for every layer.
        last_activation: "same" as the others', or "none".
        recompute: whether backward computes activations again instead of keeping them; "auto" keeps what is small.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a size or an option is of another type.
        ValueError: a size or an option is unknown, out of range, or makes no sense with another.
    """

    runs: Any  # nn.ModuleDict of Run
    layers: StackLayers
    projections: Any  # nn.ModuleDict of nn.Linear
    skip_scales: Any  # nn.ParameterDict of the layers that are in no run
    branch_scales: Any
    _bound: _Bound | None = None

    watch: int = 0  # the number by which its first layer's gradient is recorded; 0: none is

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: str = "gelu",
        approximate: str = "none",
        order: str = "pre",
        skip: str | None = "auto",
        skip_scale: float | Sequence[float] = 1.0,
        learn_skip_scale: bool = False,
        branch_scale: float | Sequence[float] = 1.0,
        learn_branch_scale: bool | str = False,
        drop_path: float | Sequence[float] = 0.0,
        last_activation: str = "same",
        recompute: bool | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in stack_checks.OPTIONS}
        super().__init__()
        self.recipe = recipe = stack_checks.described(sizes, options)
        self.recompute = recompute
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        runs = [Run(layers, recipe, **factory) for layers in recipe.runs() if len(layers) > 1]
        run_of = {i: run for run in runs for i in run.layers}
        self.runs = nn.ModuleDict({run.name: run for run in runs})
        self.layers = StackLayers()
        for i, ((K, N), layer) in enumerate(zip(recipe.pairs, recipe.layers, strict=True)):  # each draws as it is made
            linear = LinearSlice(run_of[i], i) if i in run_of else nn.Linear(K, N, **factory)
            self.layers.append(StackLayer(linear, MODULES[layer.activation](), layer.skip))
        self.projections = nn.ModuleDict({str(i): nn.Linear(*recipe.pairs[i], **factory) for i in recipe.projected})
        alone = [i for i in range(len(recipe.layers)) if i not in run_of]
        self.skip_scales, self.branch_scales = learned_scales(recipe, alone, **factory)
        self._groups = recipe.runs()
        self._has = [[one is not None for one in self._own(layers)] for layers in self._groups]
        self._description = self._described()

    @property
    def sizes(self) -> tuple[int, ...]:
        """d₀, …, d_L."""
        return self.recipe.sizes

    @property
    def skips(self) -> list[bool]:
        """Whether each layer takes a skip."""
        return [layer.skip != "none" for layer in self.recipe.layers]

    @property
    def watched_layers(self) -> list[str]:
        """The layers whose gradients are recorded under `watch` and the numbers after it."""
        return [f"layers.{i}" for i in range(len(self.layers))]

    @property
    def identity_scales(self) -> list[float | Tensor | None]:
        """λ of each layer whose skip is x itself, with no activation after the sum; None of the others."""
        learned = self.by_layer() if self.recipe.learns_skip_scale else {}
        return [
            learned.get(_NAMES["skip_scale"].format(i), layer.skip_scale)
            if layer.skip == "identity" and not layer.activates_sum
            else None
            for i, layer in enumerate(self.recipe.layers)
        ]

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation, drawn layer after layer, then for the projections; scales start as told to."""
        for linear in [*(layer[0] for layer in self.layers), *self.projections.values()]:
            linear.reset_parameters()
        for run in self.runs.values():
            run.reset_scales()
        for which, scales in enumerate((self.skip_scales, self.branch_scales)):
            for i, scale in scales.items():
                nn.init.constant_(scale, cast(float, self.recipe.scale_starts(int(i))[which]))

    def extra_repr(self) -> str:
        shown = self.recipe.options | ({} if self.recompute == "auto" else {"recompute": self.recompute})
        sizes = (
            [*map(str, self.sizes)] if len(self.sizes) <= 16 else [*map(str, self.sizes[:3]), "…", str(self.sizes[-1])]
        )
        return ", ".join([f"[{', '.join(sizes)}]", *(f"{name}={value!r}" for name, value in shown.items())])

    # ------------------------------------------------------------------------------------------ calling

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d₀] -> [..., d_L]."""
        # compilers and transforms call with tensors of their own, which are not to outlive the call
        if torch.compiler.is_compiling() or dispatch.transforms_are_active():
            return Described(self._description, self._tensors()).watch(self.watch)(x, self.training)
        bound = self._bound
        if bound is None or not bound.is_current:
            tensors = self._tensors()  # once: each look at a parametrized one computes it
            origins = self._origins(tensors)
            bound = _Bound(Described(self._description, tensors), origins or [])
            self.__dict__["_bound"] = bound if origins else None
        if self.watch != bound.network.watched:
            bound.network.watch(self.watch)
        return bound.network(x, self.training)

    if TYPE_CHECKING:  # nn.Module says Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def _described(self) -> Description:
        recipe = self.recipe
        rows = [self._entry(layers) for layers in self._groups]
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        names = ("activation", "approximate", "order", "last_activation")
        options = {name: recipe.options.get(name, stack_checks.OPTIONS[name]) for name in names}
        drops = [layer.drop_path for layer in recipe.layers]
        return Network(**columns, **options, drop_path=drops, recompute=self.recompute).description

    def _entry(self, layers: range) -> dict[str, Any]:
        """What `Network` takes of a run, or of a layer by itself."""
        specs = [self.recipe.layers[i] for i in layers]
        weight, bias, projection_weight, projection_bias, *found = self._own(layers)
        scales: list[Any] = [*found]
        for place, name in enumerate(("skip_scale", "branch_scale")):
            if scales[place] is None:
                numbers = [getattr(one, name) for one in specs]
                scales[place] = numbers if len(layers) > 1 else numbers[0]
        return {
            "weights": weight,
            "biases": bias,
            "projection_weights": projection_weight,
            "projection_biases": projection_bias,
            "skip": None if specs[0].skip == "none" else specs[0].skip,
            "skip_scale": scales[0],
            "branch_scale": scales[1],
        }

    def _tensors(self) -> list[Tensor]:
        """The parameters as they are now, in the order of the description."""
        found = [self._own(layers) for layers in self._groups]
        there = [[one is not None for one in own] for own in found]
        if there != self._has:
            i, is_there = next((i, own) for i, own in enumerate(there) if own != self._has[i])
            names = [name for name, now, once in zip(Slots._fields, is_there, self._has[i], strict=True) if now != once]
            raise ValueError(f"layer {self._groups[i][0]}: {names[0]} must stay what it was, a tensor or None")
        return [one for own in found for one in own if one is not None]

    def _own(self, layers: range) -> tuple[Tensor | None, ...]:
        """The tensors of a run, or of a layer by itself, in the order of `Slots`."""
        if len(layers) > 1:
            run = self.runs[f"{layers[0]}-{layers[-1]}"]
            return run.weight, run.bias, None, None, run.skip_scale, run.branch_scale
        name = str(layers[0])
        linear = self.layers[layers[0]][0]
        weight = bias = None
        if name in self.projections:
            weight, bias = self.projections[name].weight, self.projections[name].bias
        scales = [one[name] if name in one else None for one in (self.skip_scales, self.branch_scales)]  # noqa: SIM401
        return linear.weight, linear.bias, weight, bias, *scales

    def _origins(self, tensors: Sequence[Tensor]) -> list[tuple[Mapping[str, Any], str, Any]] | None:
        """Where the tensors and what holds them stand: (place, name, what); None where a tensor is computed anew."""
        found: list[tuple[Mapping[str, Any], str, Any]] = []

        def stands(module: nn.Module, name: str) -> Any:
            place = module._modules if name in module._modules else module._parameters
            if place.get(name) is not None:
                found.append((place, name, place[name]))
            return place.get(name)

        for kind in ("runs", "layers", "projections", "skip_scales", "branch_scales"):
            if len(getattr(self, kind)):
                stands(self, kind)
        for layers in self._groups:
            name = str(layers[0])
            owners: list[tuple[nn.Module, tuple[str, ...]]]
            if len(layers) > 1:
                owners = [
                    (stands(self.runs, f"{layers[0]}-{layers[-1]}"), ("weight", "bias", "skip_scale", "branch_scale"))
                ]
            else:
                owners = [(stands(stands(self.layers, name), "0"), ("weight", "bias"))]
                if name in self.projections:
                    owners.append((stands(self.projections, name), ("weight", "bias")))
                owners += [(scales, (name,)) for scales in (self.skip_scales, self.branch_scales) if name in scales]
            for owner, names in owners:
                for one in names:
                    stands(owner, one)
        ids = {id(what) for _, _, what in found}
        return found if all(id(one) in ids for one in tensors) else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_bound", "watch")}

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._let_go()
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    def _let_go(self) -> None:
        """Before tensors may change places with others, as torch.utils.swap_tensors does: nobody else may hold them."""
        self.__dict__["_bound"] = None

    # ------------------------------------------------------------------------------------------ by layer

    def by_layer(self, tensors: Mapping[str, Tensor] | None = None, prefix: str = "") -> dict[str, Tensor]:
        """Tensors by the name of a parameter, such as gradients, with those of runs as slices by the names of eager.

        By default the parameters themselves. Names that do not begin with the prefix stay as they are.
        """
        given = dict(self.named_parameters() if tensors is None else tensors)
        mine = {name: value for name, value in given.items() if name.startswith(prefix)}
        for run in self.runs.values():
            for kind, name in _NAMES.items():
                stack = f"{prefix}runs.{run.name}.{kind}"
                if stack in mine:
                    slices = run.slices(kind, mine.pop(stack))
                    mine |= {prefix + name.format(i): one for i, one in zip(run.layers, slices, strict=True)}
        ordered = {prefix + name: mine[prefix + name] for name in self._names() if prefix + name in mine} | mine
        found: dict[str, Tensor] = {}
        for name, value in given.items():  # where the first of them stood stand all
            if not name.startswith(prefix):
                found[name] = value
            elif ordered:
                found |= ordered
                ordered = {}
        return found

    def _names(self) -> list[str]:
        """Of eager's parameters, in its order."""
        layers, recipe = range(len(self.recipe.layers)), self.recipe
        starts = [recipe.scale_starts(i) for i in layers]
        return [
            *(f"layers.{i}.0.{kind}" for i in layers for kind in ("weight", "bias")),
            *(f"projections.{i}.{kind}" for i in recipe.projected for kind in ("weight", "bias")),
            *(f"skip_scales.{i}" for i in layers if starts[i][0] is not None),
            *(f"branch_scales.{i}" for i in layers if starts[i][1] is not None),
        ]

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """By the names of eager; what belongs to a run are slices, which share its memory."""
        prefix = args[1] if len(args) > 1 else prefix  # as torch once passed it
        found = super().state_dict(*args[:1], prefix=prefix, **kwargs)
        if torch.onnx.is_in_onnx_export():  # whose TorchScript exporter looks among these for the parameters themselves
            return found
        layered = self.by_layer(found, prefix)
        found.clear()
        found.update(layered)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's, but that nothing is loaded where anything does not fit.

        Raises:
            RuntimeError: a tensor is of another shape; with strict also where one is missing or not known here.
        """
        if isinstance(state_dict, Mapping) and strict and (faults := self._faults(state_dict, "")):
            raise RuntimeError(_told(self, faults))
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Stacks the slices that there are; a layer whose slice is missing keeps its own."""
        if faults := self._faults(state_dict, prefix, is_missing_fine=True):
            raise RuntimeError(_told(self, faults))
        self._let_go()
        for run in self.runs.values():
            for kind, name in _NAMES.items():
                if getattr(run, kind) is None:
                    continue
                own = run.slices(kind, getattr(run, kind).detach())
                names = [prefix + name.format(i) for i in run.layers]
                missing_keys += [one for one in names if one not in state_dict]
                slices = [state_dict.pop(one, value) for one, value in zip(names, own, strict=True)]
                state_dict[f"{prefix}runs.{run.name}.{kind}"] = run.stacked(slices)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _faults(self, state_dict: Mapping[str, Any], prefix: str, is_missing_fine: bool = False) -> list[str]:
        """What of a state dict does not fit this module, one line each."""
        own = {prefix + name: value for name, value in self.by_layer().items()}
        given = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        missing = [name for name in own if name not in given]
        # beside the slices, torch.distributed.checkpoint hands the parameters back too
        known = own if missing else {*own, *(prefix + name for name, _ in self.named_parameters())}
        unknown = [name for name in given if name not in known]
        faults = []
        if not is_missing_fine:
            faults += [f"missing: {_shortened(missing)}"] if missing else []
            faults += [f"not known here: {_shortened(unknown)}"] if unknown else []
        for name, value in own.items():
            if name in given and not isinstance(given[name], Tensor):
                faults.append(f"{name} must be a tensor, got {type(given[name]).__name__}")
            elif name in given and given[name].shape != value.shape:
                faults.append(f"{name} must be {list(value.shape)}, got shape {list(given[name].shape)}")
        return faults

    # ------------------------------------------------------------------------------------------ eager and back

    @classmethod
    def from_eager(cls, module: nn.Module, **options: Any) -> FusedResidualStack:
        """A stack with the parameters, dtype, device and mode of an eager network, copied.

        Args:
            module: `reference.ResidualStack`, or any whose `layers` are nn.Sequential(nn.Linear, activation) in order,
                with `projections` {i: nn.Linear} or none. What it adds, it need not say: what it computes tells.
            options: of the constructor.

        Raises:
            TypeError: the module is built otherwise.
            ValueError: it computes something else than any stack would.
        """
        sizes, found = convert.recipe_of(module, {k: v for k, v in options.items() if k != "recompute"})
        stack = cls(sizes, device="meta", recompute=options.get("recompute", "auto"), **found)
        return cast(FusedResidualStack, convert.filled(stack, dict(module.named_parameters()), module.training))

    def to_eager(self) -> ResidualStack:
        """The eager twin with copies of the parameters, in the same dtype, on the same device, in the same mode."""
        twin = ResidualStack(self.sizes, device="meta", **self.recipe.options)
        return cast(ResidualStack, convert.filled(twin, self.by_layer(), self.training))


def _shortened(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _told(module: nn.Module, faults: list[str]) -> str:
    lines = [*faults[:8], *([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])]
    return f"the state dict does not fit {type(module).__name__}, which stays as it was:\n\t" + "\n\t".join(lines)
