"""Styles of tensor parallelism for `torch.distributed.tensor.parallel.parallelize_module`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .. import checks, functional
from ..modules import FusedResidualLinear


class _Style(ParallelStyle):
    """Where a layer's inputs and its output lie, and whether the output is a tensor of its rank alone."""

    def __init__(
        self,
        input_layouts: Placement,
        output_layouts: Placement,
        residual_layouts: Placement,
        use_local_output: bool,
    ) -> None:
        super().__init__()
        self.input_layouts = (input_layouts,)
        self.output_layouts = (output_layouts,)
        self.residual_layouts = (residual_layouts,)
        self.use_local_output = use_local_output

    def _check(self, module: nn.Module, mesh: DeviceMesh, size: str) -> FusedResidualLinear:
        """The module, of which every rank can have as many features as the others."""
        me = type(self).__name__
        if not isinstance(module, FusedResidualLinear):
            raise TypeError(f"{me} is for a FusedResidualLinear, got {type(module).__name__}")
        if mesh.ndim != 1:
            raise ValueError(f"{me} takes a mesh of one dimension, such as mesh['tp'], got {mesh.ndim} dimensions")
        if (features := getattr(module, size)) % mesh.size():
            raise ValueError(
                f"{size} must be a multiple of {mesh.size()}, the ranks of the mesh, so that their tensors tell the "
                f"whole one's shape, got {features}"
            )
        if module.resolved_skip == "concat":
            raise ValueError(f"skip='concat' puts x beside the branch, whose columns {me} divides: got skip='concat'")
        return module

    def _share(self, module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
        value = getattr(module, name, None)
        if isinstance(value, Tensor):
            shared = distribute_tensor(value.detach(), mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(shared, requires_grad=value.requires_grad))

    def _output(self, module: nn.Module, inputs: Any, y: DTensor) -> Tensor:
        if y.placements != self.output_layouts:
            y = y.redistribute(placements=self.output_layouts, async_op=True)
        return y.to_local() if self.use_local_output else y

    def __repr__(self) -> str:
        layouts = (f"{name}={getattr(self, name)}" for name in ("input_layouts", "output_layouts", "residual_layouts"))
        return f"{type(self).__name__}({', '.join(layouts)}, use_local_output={self.use_local_output})"


class FusedColwiseParallel(_Style):
    """Every rank has N / ranks output features of a `FusedResidualLinear`, and adds those of the skip.

    Divided: weight, bias, the projection's, a branch scale per channel. x is gathered where it is not whole, once; its
    gradient is summed over the ranks, once. Where the skip is x itself each rank takes its columns of it.

    Args:
        input_layouts: how x lies where it is a plain tensor; default Replicate().
        residual_layouts: the same of the residual, the layer's second input where it has one; default Replicate().
        output_layouts: how y is to lie; default Shard(-1). Replicate() gathers it.
        use_local_output: y is the rank's plain tensor, not a DTensor.

    Raises, when it is applied:
        TypeError: the module is no FusedResidualLinear.
        ValueError: out_features is no multiple of the ranks, the mesh has several dimensions, or the skip is "concat".
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        residual_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(
            input_layouts or Replicate(), output_layouts or Shard(-1), residual_layouts or Replicate(), use_local_output
        )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = self._check(module, device_mesh, "out_features")
        if layer.skip == "identity":  # which refuses a residual, and means the same where the sizes agree
            layer.skip = "auto"
        for part in (layer, layer.projection):
            for name in ("weight", "bias") if part is not None else ():
                self._share(part, name, device_mesh, Shard(0))
        scale = layer.branch_scale
        is_per_channel = isinstance(scale, Tensor) and scale.dim() > 0
        self._share(layer, "branch_scale", device_mesh, Shard(0) if is_per_channel else Replicate())
        self._share(layer, "skip_scale", device_mesh, Replicate())
        layer.register_forward_pre_hook(partial(self._inputs, mesh=device_mesh), with_kwargs=True)
        layer.register_forward_hook(self._output)
        return layer

    def _inputs(self, layer: Any, args: Any, kwargs: Any, *, mesh: DeviceMesh) -> tuple[Any, Any]:
        x, residual = _taken(*args, **kwargs)
        whole = _laid_out(x, mesh, self.input_layouts).redistribute(placements=[Replicate()])
        if (residual is None and layer.resolved_skip == "identity") or residual is x:
            residual = _own_columns(whole, mesh)
        elif residual is not None:
            residual = _laid_out(residual, mesh, self.residual_layouts).redistribute(placements=[Shard(-1)])
        return (whole, residual), {}


class FusedRowwiseParallel(_Style):
    """Every rank has K / ranks input features of a `FusedResidualLinear` without activation: λ s + a (x Wᵀ + b).

    The ranks' products are summed, and then bias and residual are added, once; the second layer of a block
    x + fc2(φ(fc1(x))), whose first one is a `FusedColwiseParallel`.

    Args:
        input_layouts: how x lies where it is a plain tensor; default Shard(-1), the output of `FusedColwiseParallel`.
        output_layouts: how y is to lie; default Replicate(). Shard(d) of a leading dimension divides the sum, too.
        residual_layouts: how the residual lies where it is a plain tensor; default output_layouts.
        use_local_output: y is the rank's plain tensor, not a DTensor.

    Raises, when it is applied:
        TypeError: the module is no FusedResidualLinear.
        ValueError: in_features is no multiple of the ranks, the mesh has several dimensions, there is an activation, or
            a projection; or drop_path with divided rows, of which the same ones are to drop as undivided.
    Raises, when the layer is called:
        ValueError: the skip is x itself, of which a rank has some columns alone: give it as residual.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        residual_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        output = output_layouts or Replicate()
        super().__init__(input_layouts or Shard(-1), output, residual_layouts or output, use_local_output)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = self._check(module, device_mesh, "in_features")
        if layer.activation != "none":
            raise ValueError(
                "FusedRowwiseParallel sums before bias and residual, and an activation would stand between: build the "
                f"layer with activation='none', got {layer.activation!r}"
            )
        if layer.projection is not None:
            raise ValueError("FusedRowwiseParallel takes the skip as the layer's second input, got skip='projection'")
        output = self.output_layouts[0]
        if not isinstance(output, Replicate | Shard):
            raise ValueError(f"output_layouts must be Replicate() or Shard of a leading dimension of y, got {output}")
        if layer.drop_path and not isinstance(output, Replicate):
            raise ValueError(
                f"drop_path={layer.drop_path} counts rows from the first of the batch: output_layouts must be "
                f"Replicate(), got {output}"
            )
        self._share(layer, "weight", device_mesh, Shard(1))
        for name in ("bias", "skip_scale", "branch_scale"):
            self._share(layer, name, device_mesh, Replicate())
        layer.__dict__["forward"] = partial(self._forward, layer, device_mesh)  # a hook after it has no residual to add
        layer.register_forward_hook(self._output)
        return layer

    def _forward(self, layer: FusedResidualLinear, mesh: DeviceMesh, x: Tensor, residual: Tensor | None = None) -> Any:
        K, N = layer.in_features, layer.out_features
        if checks.resolve_skip(layer.skip, K, N, residual is not None, False) == "identity":
            raise ValueError(
                "the skip is x itself, of which each rank has some columns alone: give it as the layer's second input, "
                "or build the layer with skip=None"
            )
        along = _laid_out(x, mesh, self.input_layouts).redistribute(placements=[Shard(-1)])
        own = functional.residual_linear(along.to_local(), _local(layer.weight), None, activation="none", skip=None)
        output = self.output_layouts[0]
        if isinstance(output, Shard) and output.dim % x.dim() == x.dim() - 1:
            raise ValueError(f"output_layouts must be Replicate() or Shard of a leading dimension of y, got {output}")
        summed = DTensor.from_local(own, mesh, [Partial()], run_check=False).redistribute(
            placements=self.output_layouts
        )
        # what every rank has whole counts, where rows are divided, for its rows alone
        gradient = Replicate() if isinstance(output, Replicate) else Partial()
        z = summed.to_local()
        if layer.bias is not None:
            z = z + _local(layer.bias, gradient)
        lam, scale = (_local(one, gradient) for one in (layer.skip_scale, layer.branch_scale))
        s = None
        if residual is not None:
            s = _laid_out(residual, mesh, self.residual_layouts).redistribute(placements=self.output_layouts).to_local()
        y = _sum(z, s, lam, scale, layer.drop_path, layer.training)
        return DTensor.from_local(
            y, mesh, self.output_layouts, run_check=False, shape=summed.shape, stride=summed.stride()
        )


def _sum(z: Tensor, s: Tensor | None, skip_scale: Any, branch_scale: Any, drop_path: float, training: bool) -> Tensor:
    """λ s + a z, by rows."""
    if s is None:
        return z if isinstance(branch_scale, float) and branch_scale == 1.0 else z * branch_scale
    rows = [t.reshape(-1, t.shape[-1]) for t in (z, s)]
    total = functional.residual(
        *rows, skip_scale=skip_scale, branch_scale=branch_scale, drop_path=drop_path, training=training
    )
    return total.view(z.shape)


def _taken(x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return x, residual


def _laid_out(value: Tensor, mesh: DeviceMesh, layouts: tuple[Placement, ...]) -> DTensor:
    if isinstance(value, DTensor):
        return value
    return DTensor.from_local(value, mesh, layouts, run_check=False)


def _own_columns(whole: DTensor, mesh: DeviceMesh) -> DTensor:
    """This rank's share of a tensor's last dimension; its gradient is summed with the tensor's others, not gathered."""
    share = whole.shape[-1] // mesh.size()
    own = whole.to_local(grad_placements=[Partial()]).narrow(-1, mesh.get_local_rank() * share, share)
    return DTensor.from_local(own, mesh, [Shard(whole.ndim - 1)], run_check=False)


def _local(value: Any, gradient: Placement | None = None) -> Any:
    if not isinstance(value, DTensor):
        return value
    return value.to_local(grad_placements=None if gradient is None else [gradient])
