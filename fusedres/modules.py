"""Drop-in modules: parameters and one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checks, functional


class FusedResidualLinear(nn.Linear):
    """y = λ s(x) + a φ(x Wᵀ + b), with the parameters and the state dict of nn.Linear. x [..., K] -> [..., N].

    Besides `weight` and `bias`: `skip_scale` [] and `branch_scale` [] or [N], parameters where learned, else numbers;
    `projection`, an nn.Linear, with skip="projection".

    Args:
        in_features: K.
        out_features: N; K where not given.
        bias: whether there are b and, with skip="projection", p.
        activation: φ, one of gelu, relu, silu, tanh, sin, none.
        approximate: of gelu: "none", exact, or "tanh".
        order: "pre", or "post" for φ(λ s(x) + a (x Wᵀ + b)).
        skip: "auto" (x where sizes agree, else nothing), "identity", "projection", "concat" (y [..., K + N]), None.
        skip_scale: λ, or where it starts when learned.
        learn_skip_scale: λ is a parameter.
        branch_scale: a, or where it starts when learned.
        learn_branch_scale: a is a parameter: "scalar", or "channel" for one per output feature.
        drop_path: the probability that a row's branch is dropped, in training mode.
        recompute: compute z again in backward instead of keeping it.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: an option is of another type.
        ValueError: an option is unknown, out of range, or makes no sense with another.
    """

    watch: int = 0  # the number by which the gradient of its input is recorded; 0: it is not

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        activation: str = "gelu",
        approximate: str = "none",
        order: str = "pre",
        skip: str | None = "auto",
        skip_scale: float = 1.0,
        learn_skip_scale: bool = False,
        branch_scale: float = 1.0,
        learn_branch_scale: bool | str = False,
        drop_path: float = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_features = in_features if out_features is None else out_features
        checks.learned_scales(learn_skip_scale, learn_branch_scale)
        resolved = checks.resolve_skip(skip, in_features, out_features, False, skip == "projection")
        checks.layer_spec(
            activation, approximate, order, resolved, skip_scale, branch_scale, drop_path, True, recompute
        )
        if learn_skip_scale:
            checks.has_skip_to_scale(resolved)

        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.approximate = approximate
        self.order = order
        self.skip = skip
        self.drop_path = drop_path
        self.recompute = recompute

        def scale(start: float, is_learned: bool, *shape: int) -> nn.Parameter | float:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if is_learned else float(start)

        is_projected = skip == "projection"
        self.projection = nn.Linear(in_features, out_features, bias, device, dtype) if is_projected else None
        self._initial_scales = (float(skip_scale), float(branch_scale))
        channels = (out_features,) if learn_branch_scale == "channel" else ()
        self.skip_scale = scale(skip_scale, learn_skip_scale)
        self.branch_scale = scale(branch_scale, bool(learn_branch_scale), *channels)
        self._reset_scales()

    @property
    def resolved_skip(self) -> str:
        """What skip means here: none, identity, projection or concat."""
        return checks.resolve_skip(self.skip, self.in_features, self.out_features, False, self.projection is not None)

    @property
    def watched_layers(self) -> list[str]:
        """The layers whose gradients are recorded under `watch`: this one."""
        return [""]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "watch"}

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation for the weights; the scales start where they were told to, and draw nothing."""
        super().reset_parameters()
        if hasattr(self, "branch_scale"):  # nn.Linear's constructor comes here before there are any
            if self.projection is not None:
                self.projection.reset_parameters()
            self._reset_scales()

    def _reset_scales(self) -> None:
        for scale, start in zip((self.skip_scale, self.branch_scale), self._initial_scales, strict=True):
            if isinstance(scale, Tensor):
                nn.init.constant_(scale, start)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]; a residual [..., N], where given, is the skip in the place of x."""
        projection = self.projection
        # where nn.Module looks last, after 0.4 µs; a parametrization's are elsewhere
        own: dict[str, Any] = self._parameters
        return functional.layer(
            x,
            own["weight"] if "weight" in own else self.weight,  # noqa: SIM401 : get would look for both
            own["bias"] if "bias" in own else self.bias,  # noqa: SIM401
            residual,
            None if projection is None else projection.weight,
            None if projection is None else projection.bias,
            self.skip_scale,
            self.branch_scale,
            (self.activation, self.approximate, self.order, self.skip, self.drop_path, self.training, self.recompute),
            self.watch,
        )

    if TYPE_CHECKING:  # nn.Module says Any

        def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"activation={self.activation!r}", f"skip={self.skip!r}"]
        if self.approximate != "none":
            parts.append(f"approximate={self.approximate!r}")
        if self.order != "pre":
            parts.append(f"order={self.order!r}")
        for name, start in zip(("skip_scale", "branch_scale"), self._initial_scales, strict=True):
            scale = getattr(self, name)
            if (value := start if isinstance(scale, Tensor) else scale) != 1.0:
                parts.append(f"{name}={value}")
            if isinstance(scale, Tensor):
                how = True if name == "skip_scale" else "channel" if scale.dim() else "scalar"
                parts.append(f"learn_{name}={how!r}")
        if self.drop_path:
            parts.append(f"drop_path={self.drop_path}")
        if self.recompute:
            parts.append("recompute=True")
        return ", ".join(parts)
