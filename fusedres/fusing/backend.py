"""torch.compile(model, backend="fusedres"): residual layers of a captured graph as operators, the rest by Inductor.

Dynamo captures, this finds `linear → activation → (scale) → add` in any writing and puts the layer's operator there,
whose backward is an operator too; everything else, and a graph without such layers, is Inductor's as it came. torch
finds the backend by its entry point.
"""

from __future__ import annotations

import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .. import checks, dispatch, explanation, network_ops, ops  # noqa: F401 : the operators
from ..kernels.cpu.plan import encoded
from ..kernels.spec import LayerSpec, Operands
from . import networks
from .chains import Chain, chains
from .patterns import Match, Shape, find
from .rewriting import options, rewrite, without_idle_dropout

_FOREIGN = {  # autocast, in which the operator does not cast, and torch.func's levels
    "_enter_autocast", "_exit_autocast", "_vmap_increment_nesting", "_grad_increment_nesting",
    "_jvp_increment_nesting", "_enter_dual_level",
}  # fmt: skip
# M N K on a CPU from which a call pays: an operator's call in a compiled function costs more than Inductor's. Of one
# layer, and of all layers of a network, which is one call where no gradient is wanted.
LEAST_WORK, LEAST_WORK_OF_NETWORK = 4_000_000, 500_000
_LAYER, _NETWORK = torch.ops.fusedres.residual_linear.default, torch.ops.fusedres.residual_network.default


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
    count = sum(node.target in (_LAYER, _NETWORK) for node in module.graph.nodes)
    return f"{count} fused call{'s' if count > 1 else ''}"


def _rewritten(module: GraphModule) -> GraphModule | None:
    """A copy of a captured graph with its layers as operators; None where there are none to find."""
    try:
        copied = GraphModule(module, _copied(module))
        found = layers_of(copied)
        specs = {layer.match.end: layer.spec for chain in found for layer in chain}

        def put(chain: Chain) -> Node:
            if len(chain) > 1:
                return _of_network(copied.graph, chain)
            return _of_layer(copied.graph, chain[0], specs[chain[0].end])

        rewrite(copied.graph, [[layer.match for layer in chain] for chain in found], put)
        copied.recompile()
    except Exception as error:
        warnings.warn(_as_written("looking for layers failed", error), RuntimeWarning, stacklevel=3)
        return None
    return copied if found else None


def _of_layer(graph: torch.fx.Graph, match: Match, spec: LayerSpec) -> Node:
    scales = (match.skip_scale, match.branch_scale)
    given = (
        match.x, match.weight, match.bias, match.residual, match.projection_weight, match.projection_bias,
        *(_scalar(graph, one) if isinstance(one, Node) else None for one in scales), None, *spec, _trains(match),
    )  # fmt: skip
    return graph.call_function(operator.getitem, (graph.call_function(_LAYER, given), 0))


def _of_network(graph: torch.fx.Graph, chain: Chain) -> Node:
    parts, nodes = networks.parts_of(chain, [""] * len(chain))
    codes, numbers = encoded(networks.described(parts, [_value(one) for one in nodes]))
    return graph.call_function(_NETWORK, (chain[0].x, nodes, None, codes, numbers, 0))


def _trains(match: Match) -> bool:
    return torch.is_grad_enabled() and any(_value(one).requires_grad for one in match.operands)


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
    _with_linears(graph)
    return graph


def _with_linears(graph: torch.fx.Graph) -> None:
    """Products of flattened rows, which the Conv1D of transformers writes, as the linear layers that they are."""
    for product in list(graph.nodes):
        if product.target is not torch.addmm or product.kwargs or len(product.users) != 1:
            continue
        bias, rows, weight = product.args
        (y,) = product.users
        if not (_is_view(rows) and _is_view(y) and _value(bias).shape == _value(weight).shape[-1:]):
            continue
        x = rows.args[0]
        K, N = _value(weight).shape
        given = (*_value(rows).shape[1:], *_value(x).shape[-1:], *_value(y).shape)
        if not _agree(given, (K, K, *_value(x).shape[:-1], N)):
            continue
        with graph.inserting_before(y):
            transposed = graph.call_method("t", (weight,))
            transposed.meta["example_value"] = _value(weight).t()
            linear = graph.call_function(torch.nn.functional.linear, (x, transposed, bias))
        linear.meta.update(y.meta)
        y.replace_all_uses_with(linear)
        for node in (y, product):
            graph.erase_node(node)


def _is_view(node: Any) -> bool:
    is_view = isinstance(node, Node) and node.op == "call_method" and node.target in ("view", "reshape")
    return is_view and isinstance(_value(node), Tensor) and isinstance(_value(node.args[0]), Tensor)


class Layer(NamedTuple):
    """A layer of a captured graph: the match, its options, and who runs it."""

    match: Match
    spec: LayerSpec
    choice: dispatch.Triton | dispatch.Native


def layers_of(module: GraphModule) -> list[list[Layer]]:
    """The layers of a captured graph that kernels take, together those that are to be one call."""
    names = {str(getattr(node.target, "__name__", "")) for node in module.graph.nodes}
    if names & _FOREIGN or dispatch.is_any_autocast_enabled():
        return []
    described: dict[Match, Layer | None] = {}

    def admits(match: Match) -> bool:
        described[match] = _described(match)
        return described[match] is not None

    def may_join(chain: Chain) -> bool:
        return _is_network([cast(Layer, described[match]) for match in chain])

    matches = find(module.graph, _shape, admits)
    joined = chains(module.graph, matches, _shape, admits, may_join)
    found = [[cast(Layer, described[match]) for match in chain] for chain in joined]
    return [chain for chain in found if _pays(chain)]


def _pays(chain: list[Layer]) -> bool:
    """Whether a call of these is quicker than what Inductor makes of them."""
    least = LEAST_WORK if len(chain) == 1 else LEAST_WORK_OF_NETWORK
    return not isinstance(chain[0].choice, dispatch.Native) or sum(_work(layer.match) for layer in chain) >= least


def _is_network(chain: list[Layer]) -> bool:
    """Whether a network is to compute them: its backward would compute activations again."""
    last = chain[-1]
    if not isinstance(last.choice, dispatch.Native) or any(_trains(layer.match) for layer in chain):
        return False
    parts, nodes = networks.parts_of([layer.match for layer in chain], [""] * len(chain))
    try:
        networks.described(parts, [_value(one) for one in nodes])
    except (TypeError, ValueError):
        return False
    return True


def _work(match: Match) -> int:
    """M N K, by the sizes that a graph was captured with; of sizes that only a call tells, enough."""
    sizes = [_hint(size) for size in (*_value(match.x).shape, _value(match.weight).shape[0])]
    return LEAST_WORK if None in sizes else math.prod(cast(list[int], sizes))


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
    x, weight, end = _value(match.x), _value(match.weight), _value(match.end)
    skip = x if match.residual is None else _value(match.residual)
    if x.dim() == 0 or not all(one.dim() > 0 and _as_int(one.shape[-1]) for one in (x, skip)):
        return False
    width = weight.shape[0] + (skip.shape[-1] if match.skip == "concat" else 0)
    expected = (*x.shape[:-1], width)
    pairs = [(end.shape, expected)]
    if match.residual is not None:
        pairs.append((skip.shape[:-1], x.shape[:-1]))
    return all(_agree(a, b) for a, b in pairs)


def _agree(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether sizes are the same, whatever the symbols among them become."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(a) == len(b) and all(statically_known_true(one == other) for one, other in zip(a, b, strict=True))


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
    found = layers_of(GraphModule(module, _copied(module)))

    def run(*args: Any) -> Any:
        for chain in found:
            _note(chain)
        return module(*args)

    return run


def _note(chain: list[Layer]) -> None:
    names = [_name_of(layer.match.linear) for layer in chain]
    (match, spec, choice), x = chain[0], _sized(chain[0].match.x)
    if len(chain) == 1:
        with explanation.part(names[0]):
            explanation.note(choice, Operands(x, _sized(match.weight)), spec, x.dtype, choice)
        return
    parts, nodes = networks.parts_of([layer.match for layer in chain], names)
    network = networks.described(parts, [_value(one) for one in nodes])
    way = dispatch.cpu_way(x.numel() // network.widths[0], network.widths, x.dtype)
    with explanation.part(f"{names[0]}…{names[-1]}"):
        explanation.note_network(choice, x, network, None if isinstance(way, dispatch.Eager) else way, keeps=False)


def _sized(node: Node) -> Tensor:
    """A tensor of the sizes that a node's value was captured with, of which some may be symbols since."""
    value = _value(node)
    sizes = [_hint(size) or 1 for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device="meta")


def _hint(size: Any) -> int | None:
    return size if type(size) is int else cast("int | None", size.node.hint)


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
