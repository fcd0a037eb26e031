"""torch.compile(model, backend="fusedres"): residual layers of a captured graph as operators, the rest by Inductor.

Dynamo captures, this finds `linear → activation → (scale) → add` in any writing and puts the layer's operator there,
whose backward is an operator too; everything else, and a graph without such layers, is Inductor's as it came. torch
finds the backend by its entry point.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .. import checks, dispatch, explanation, ops  # noqa: F401 : the operators
from ..kernels.spec import LayerSpec, Operands
from .patterns import Match, Shape, find
from .rewriting import options, rewrite, without_idle_dropout

_FOREIGN = {  # autocast, in which the operator does not cast, and torch.func's levels
    "_enter_autocast", "_exit_autocast", "_vmap_increment_nesting", "_grad_increment_nesting",
    "_jvp_increment_nesting", "_enter_dual_level",
}  # fmt: skip
_OPERATOR = torch.ops.fusedres.residual_linear.default


def fusedres(module: GraphModule, inputs: Sequence[Any], **inductor: Any) -> Callable[..., Any]:
    """A compiled function of a captured graph. More arguments, such as mode and options, are Inductor's."""
    rewritten = _rewritten(module)
    if rewritten is not None:
        try:
            return _compiled(rewritten, inputs, **inductor)
        except torch._dynamo.exc.RestartAnalysis:  # Dynamo's own way to begin again
            raise
        except Exception as error:
            what = f"compiling with {_counted(rewritten)} failed"
            warnings.warn(_as_written(what, error), RuntimeWarning, stacklevel=2)
    return _compiled(module, inputs, **inductor)


def _compiled(
    module: GraphModule, inputs: Sequence[Any], mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """What torch.compile(mode=…, options=…) makes of a graph by itself."""
    from torch._inductor.compile_fx import compile_fx

    patches = dict(options or {})
    if mode and mode != "default":
        patches = torch._inductor.list_mode_options(mode) | patches
    patches = {name.replace("-", "_"): value for name, value in patches.items()}
    function = cast(Callable[..., Any], compile_fx(module, list(inputs), config_patches=patches))
    return function


def _counted(module: GraphModule) -> str:
    count = sum(node.target is _OPERATOR for node in module.graph.nodes)
    return f"{count} fused layer{'s' if count > 1 else ''}"


def _rewritten(module: GraphModule) -> GraphModule | None:
    """A copy of a captured graph with its layers as operators; None where there are none to find."""
    try:
        copied = GraphModule(module, _copied(module))
        found = {layer.match: layer for layer in layers_of(copied)}
        graph = copied.graph

        def put(match: Match, tensors: tuple[Any, ...], scales: tuple[Any, ...]) -> Node:
            values = [_value(one) for one in match.operands]
            keep = torch.is_grad_enabled() and any(value.requires_grad for value in values)
            learned = [_scalar(graph, one) if isinstance(one, Node) else None for one in scales]
            given = (*tensors, *learned, None, *found[match].spec, keep)
            return graph.call_function(operator.getitem, (graph.call_function(_OPERATOR, given), 0))

        rewrite(graph, list(found), put)
        copied.recompile()
    except Exception as error:
        warnings.warn(_as_written("looking for layers failed", error), RuntimeWarning, stacklevel=3)
        return None
    return copied if found else None


def _scalar(graph: torch.fx.Graph, scale: Node) -> Node:
    """A learned scale [1] as []: they all have one dtype here."""
    return graph.call_method("reshape", (scale, ())) if _shape(scale) == (1,) else scale


def _as_written(what: str, error: Exception) -> str:
    return f"fusedres: {what}, the graph is compiled as it was written: {type(error).__name__}: {error}"


def _copied(module: GraphModule) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    without_idle_dropout(graph)
    return graph


class Layer(NamedTuple):
    """A layer of a captured graph: the match, its options, and who runs it."""

    match: Match
    spec: LayerSpec
    choice: dispatch.Triton | dispatch.Native


def layers_of(module: GraphModule) -> list[Layer]:
    """The layers of a captured graph that kernels take."""
    names = {str(getattr(node.target, "__name__", "")) for node in module.graph.nodes}
    if names & _FOREIGN or dispatch.is_any_autocast_enabled():
        return []
    described: dict[Match, Layer | None] = {}

    def admits(match: Match) -> bool:
        described[match] = _described(match)
        return described[match] is not None

    return [cast(Layer, described[match]) for match in find(module.graph, _shape, admits)]


def _value(one: Any) -> Any:
    """The stand-in that Dynamo noted for a node's value."""
    return one.meta.get("example_value", one.meta.get("val")) if isinstance(one, Node) else one


def _shape(node: Node) -> Shape | None:
    value = _value(node)
    if not isinstance(value, Tensor):
        return None
    sizes = tuple(_as_int(size) for size in value.shape)
    return None if None in sizes else cast(Shape, sizes)


def _as_int(size: Any) -> int | None:
    """A size that is a number, or a symbol that has become one."""
    return size if type(size) is int else size.node.maybe_as_int()


def _described(match: Match) -> Layer | None:
    """None where its tensors do not fit one another, or no kernel takes them."""
    places = (
        match.x, match.weight, match.bias, match.residual, match.projection_weight, match.projection_bias,
        match.skip_scale, match.branch_scale,
    )  # fmt: skip
    values = [_value(one) for one in places]
    x, end = values[0], _value(match.end)
    tensors = [end, *(value for one, value in zip(places, values, strict=True) if isinstance(one, Node))]
    if not all(isinstance(one, Tensor) and (one.dtype, one.device) == (x.dtype, x.device) for one in tensors):
        return None
    choice = dispatch.choose(x.device, x.dtype, is_empty=False)
    if isinstance(choice, dispatch.Eager) or not _is_of_rows(match):
        return None
    scales = [one.new_empty(()) if isinstance(one, Tensor) and one.shape == (1,) else one for one in values[6:]]
    given = Operands(*(_one_row(one) if i in (0, 3) else one for i, one in enumerate(values[:6])))  # type: ignore[arg-type]
    try:
        _, spec = checks.described(given, scales[0], scales[1], options(match), False)
    except (TypeError, ValueError):
        return None
    return Layer(match, spec, choice)


def _one_row(value: Tensor | None) -> Tensor | None:
    """Of rows [..., K]: how many there are may be a symbol, and is compared elsewhere."""
    return None if value is None else value.new_empty((1, cast(int, _as_int(value.shape[-1]))))


def _is_of_rows(match: Match) -> bool:
    """Whether the residual has x's leading sizes, symbols or not, and y is what a layer returns."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    x, weight, end = _value(match.x), _value(match.weight), _value(match.end)
    skip = x if match.residual is None else _value(match.residual)
    if x.dim() == 0 or not all(one.dim() > 0 and _as_int(one.shape[-1]) for one in (x, skip)):
        return False
    width = weight.shape[0] + (skip.shape[-1] if match.skip == "concat" else 0)
    expected = (*x.shape[:-1], width)
    pairs = [(end.shape, expected)]
    if match.residual is not None:
        pairs.append((skip.shape[:-1], x.shape[:-1]))
    return all(
        len(a) == len(b) and all(statically_known_true(one == other) for one, other in zip(a, b, strict=True))
        for a, b in pairs
    )


# ------------------------------------------------------------------------------------------------ explain


def _listed(compiled: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Tell `explain` about the layers that this backend finds in a call of what it compiles."""
    inner = _author_of(compiled)
    if inner is None:
        return

    with torch.no_grad():
        torch.compile(inner, backend=_noting, dynamic=False)(*args, **kwargs)


def _noting(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A captured graph as it is, which tells of its layers at each call. One backend, so that it is captured once."""
    layers = layers_of(GraphModule(module, _copied(module)))

    def run(*args: Any) -> Any:
        for match, spec, choice in layers:
            values = Operands(_sized(match.x), _sized(match.weight))
            with explanation.part(_name_of(match.linear)):
                explanation.note(choice, values, spec, values.x.dtype, choice)
        return module(*args)

    return run


def _sized(node: Node) -> Tensor:
    """A tensor of the sizes that a node's value was captured with, of which some may be symbols since."""
    value = _value(node)
    sizes = [size if type(size) is int else size.node.hint for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device="meta")


def _author_of(compiled: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function or module that this backend compiles; None of others."""
    own = getattr(compiled, "_compiled_call_impl", None)
    if own is not None:  # nn.Module.compile
        return None if _author_of(own) is None else compiled._call_impl  # type: ignore[attr-defined]
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None:
        config = getattr(compiled, "get_compiler_config", None)
        cells = getattr(config, "__closure__", None) or ()
        context = next((cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "callback")), None)
    backend: Any = getattr(context, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    if getattr(backend, "compiler_fn", backend) is not fusedres:
        return None
    return getattr(compiled, "_orig_mod", None) or getattr(compiled, "_torchdynamo_orig_callable", None)


def _name_of(linear: Node) -> str:
    """The path of the module that a product was called in."""
    stack = list(linear.meta.get("nn_module_stack", {}).values())
    path = re.sub(r"^[LG]\[[^]]*\]\.?", "", stack[-1][0]) if stack else ""
    return path.removeprefix("_orig_mod.")


explanation.listers.append(_listed)
