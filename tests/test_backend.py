"""torch.compile(model, backend="fusedres"): layers of a captured graph as operators, the rest as Inductor has it."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from blocks import WRITINGS, D, Written, agrees
from torch import nn

import fusedres
from fusedres.fusing import backend as room
from fusedres.kernels.cpu.plan import CODES

pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Small layers too, but where a test asks which pay."""
    monkeypatch.setattr(room, "LEAST_WORK", 0)
    monkeypatch.setattr(room, "LEAST_WORK_OF_NETWORK", 0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, **options):
    """The model compiled in place, and as it was."""
    eager = deepcopy(model)
    model.compile(backend="fusedres", fullgraph=True, **options)
    return model, eager


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "function",
        "mlp",
        "learned",
        "projection",
        "post-scaled",
        "concat",
        "layer-scale",
        "from-x",
        "gelu-new",
        "no-skip",
    ],
)
def test_layers_run_as_operators_forward_and_backward(name, launches):
    how, expected = WRITINGS[name]
    model, eager = compiled(Written(how).eval())
    x = torch.randn(5, D)
    agrees(model, eager, x)
    launches.clear()
    model(x.requires_grad_()).sum().backward()
    for kind in ("forward", "backward"):  # backward may launch a forward, and several of its own
        assert launches.count(kind) >= len(expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), eager(x))


@pytest.mark.slow
def test_any_number_of_rows_is_compiled_once(launches):
    blocks = [Written(WRITINGS[name][0]) for name in ("function", "mlp")]  # of which one takes the graph's own input
    model, eager = compiled(nn.Sequential(*blocks), dynamic=True)
    agrees(model, eager, torch.randn(3, 4, D))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 7, 16):
            launches.clear()
            agrees(model, eager, torch.randn(rows, 4, D), terms=64.0 * D)  # gradients add rows, and features
            assert launches.count("forward") >= 3


@pytest.mark.slow
def test_dropout_between_leaves_the_sum_to_inductor(launches):
    model, eager = compiled(Written(WRITINGS["mlp-dropout"][0]).train())
    x = torch.randn(5, D)
    torch.manual_seed(1)
    ours = model(x)
    assert launches.count("forward") == 1
    assert ours.shape == eager(x).shape
    model.eval(), eager.eval()
    torch.testing.assert_close(model(x), eager(x))
    assert launches.count("forward") == 3


@pytest.fixture
def graphs(monkeypatch):
    """What Inductor is given: the graphs, run as they are."""
    given = []

    def taken(module, inputs, **options):
        given.append(module)
        return module.forward

    monkeypatch.setattr(room, "_compiled", taken)
    return given


def calls_in(graph):
    """How many layers each call of ours has."""
    found = {torch.ops.fusedres.residual_linear.default: lambda node: 1}
    found[torch.ops.fusedres.residual_network.default] = lambda node: len(node.args[3]) // CODES
    return [found[node.target](node) for node in graph.graph.nodes if node.target in found]


def in_a_row():
    return Written(lambda m, x: m.net(x + m.net(x)))


class Transposed(nn.Module):
    """The Conv1D of transformers: a linear layer of weight [K, N], by rows that it flattens."""

    def __init__(self, K, N):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(K, N)), nn.Parameter(torch.randn(N))

    def forward(self, x):
        sizes = (*x.size()[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(sizes)


class OfTransposed(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.c_fc, self.c_proj, self.end = Transposed(D, 12), Transposed(12, D), end

    def forward(self, x):
        return self.end(x, self.c_proj(torch.tanh(self.c_fc(x))))


@pytest.mark.slow
def test_products_of_flattened_rows_are_linear_layers(launches):
    model, eager = compiled(OfTransposed(lambda x, y: x + y))
    agrees(model, eager, torch.randn(3, 5, D))
    assert launches.count("forward") >= 2
    assert model(torch.randn(4, 5, D)).shape == (4, 5, D)  # with a symbol for its rows


def test_products_that_are_put_otherwise_are_left(graphs):
    model, eager = compiled(OfTransposed(lambda x, y: x.transpose(0, 1) + y.view(5, 3, D)))
    x = torch.randn(3, 5, D)
    torch.testing.assert_close(model(x), eager(x))
    assert calls_in(graphs[0]) == [1]  # c_fc with its activation


@pytest.mark.slow
@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no-gradients"])
def test_layers_in_a_row_are_one_call_where_no_gradient_is_wanted(grad, graphs):
    model, eager = compiled(in_a_row())
    x = torch.randn(5, D)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), eager(x))
    assert calls_in(graphs[0]) == ([1, 1] if grad else [2])
    calls = fusedres.explain(model, x)
    assert [len(getattr(call.spec, "layers", [call])) for call in calls] == [2]


@pytest.mark.parametrize(
    ("rows", "grad", "expected"), [(2, False, []), (16, False, [2]), (16, True, []), (70, True, [1, 1])]
)
def test_small_layers_are_left_to_inductor(rows, grad, expected, graphs, monkeypatch):
    monkeypatch.setattr(room, "LEAST_WORK", 64 * D * D)
    monkeypatch.setattr(room, "LEAST_WORK_OF_NETWORK", 32 * D * D)
    model, eager = compiled(in_a_row())
    x = torch.randn(rows, D)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), eager(x))
    assert calls_in(graphs[0]) == expected


def fused_layers(graph):
    return sum(node.target is torch.ops.fusedres.residual_linear.default for node in graph.graph.nodes)


NOTHING = {
    "convolutions": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU()), (2, 3, 8), torch.float32),
    "plain-product": (lambda: nn.Linear(D, D), (2, D), torch.float32),
    "broadcast-residual": (lambda: Written(lambda m, x: x[:1] + torch.relu(m.fc(x))), (4, D), torch.float32),
    "no-kernel-for-the-dtype": (lambda: Written(WRITINGS["function"][0]).half(), (2, D), torch.float16),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_graph_with_nothing_to_fuse_falls_through_untouched(name, graphs, monkeypatch):
    build, shape, dtype = NOTHING[name]
    model, came = build(), []
    whole = room.fusedres
    monkeypatch.setattr(room, "_rewritten", lambda module: came.append(module) or REWRITTEN(module))
    x = torch.randn(shape, dtype=dtype)
    expected = model(x)
    y = torch.compile(model, backend=whole, fullgraph=True)(x)
    layers = [fused_layers(graph) for graph in graphs]
    if name == "broadcast-residual":  # the activation is a layer, the sum is not
        assert layers == [1]
    else:
        assert layers == [0]
        assert graphs[0] is came[0]
    torch.testing.assert_close(y, expected)


REWRITTEN = room._rewritten


def test_autocast_is_left_to_inductor(graphs):
    model = Written(WRITINGS["function"][0])

    def under_autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    x = torch.randn(3, D)
    torch.testing.assert_close(torch.compile(under_autocast, backend=room.fusedres)(x), under_autocast(x))
    assert [fused_layers(graph) for graph in graphs] == [0]


def branches(m, x):
    return x + torch.relu(m.fc(x)) if x.sum() > 0 else x - torch.relu(m.fc(x))


def test_a_branch_by_data_breaks_the_graph_and_nothing_else(graphs):
    model = Written(branches)
    eager = deepcopy(model)
    model.compile(backend=room.fusedres)
    for x in (torch.ones(3, D), -torch.ones(3, D)):
        agrees(model, eager, x)
    assert sum(map(fused_layers, graphs)) == 2


def test_where_compiling_with_layers_fails_the_graph_is_compiled_as_written(monkeypatch):
    def fails_with_layers(module, inputs, **options):
        if fused_layers(module):
            raise RuntimeError("no such instruction")
        return module.forward

    monkeypatch.setattr(room, "_compiled", fails_with_layers)
    model, eager = compiled(Written(WRITINGS["mlp"][0]))
    x = torch.randn(3, D)
    words = "compiling with 2 fused calls failed, the graph is compiled as it was written: RuntimeError: no such instr"
    with pytest.warns(RuntimeWarning, match=words):
        y = model(x)
    assert torch.equal(y, eager(x))


def test_where_looking_for_layers_fails_the_graph_is_compiled_as_written(monkeypatch, graphs):
    monkeypatch.setattr(room, "find", lambda *_: 1 / 0)
    model, eager = compiled(Written(WRITINGS["mlp"][0]))
    x = torch.randn(3, D)
    with pytest.warns(RuntimeWarning, match="looking for layers failed, .* ZeroDivisionError"):
        y = model(x)
    assert torch.equal(y, eager(x))
    assert [fused_layers(graph) for graph in graphs] == [0]


@pytest.mark.slow
def test_torch_finds_the_backend_by_its_name():
    """In a process that has not imported fusedres; options are Inductor's."""
    code = (
        "import torch; m = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()); x = torch.randn(3, 8);"
        "y = torch.compile(m, backend='fusedres', options={'epilogue-fusion': True})(x);"
        "torch.testing.assert_close(y, m(x)); import sys; print('fusedres.fusing.backend' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "True", found.stderr
    assert "fusedres" in torch._dynamo.list_backends()


def test_explain_lists_the_layers(graphs):
    model = nn.Sequential(Written(WRITINGS["mlp"][0]), nn.Linear(D, 2))
    x = torch.randn(3, D)
    for call in (torch.compile(model, backend="fusedres"), torch.compile(lambda x: model(x), backend="fusedres")):
        calls = fusedres.explain(call, x)
        assert [(one.name, one.backend, one.spec.skip) for one in calls] == [
            ("0.fc1", "native", "none"),
            ("0.fc2", "native", "residual"),
        ]
    for _ in range(10):  # again and again, which is captured once
        assert len(fusedres.explain(call, x)) == 2
    assert not fusedres.explain(torch.compile(model, backend="eager"), x)
    assert not fusedres.explain(model, x)
    model.compile(backend="fusedres")
    assert [one.spec.skip for one in fusedres.explain(model, x)] == ["none", "residual"]


def without_gradients(m, x):
    with torch.no_grad():
        h = torch.relu(m.fc(x))
    return x + h


def some_without_gradients(m, x):
    with torch.no_grad():
        z = m.fc(x)
    return x + torch.relu(z)


@pytest.mark.parametrize("how", [without_gradients, some_without_gradients])
def test_a_layer_does_not_reach_across_the_end_of_a_block(how, graphs):
    model, eager = compiled(Written(how))
    agrees(model, eager, torch.randn(3, D))


@torch.library.custom_op("fusedres_tests::double_", mutates_args={"x"})
def double_(x: torch.Tensor) -> None:
    x.mul_(2)


def changed_by_an_operator(m, x):
    x = x * 1
    z = m.fc(x)
    torch.ops.fusedres_tests.double_(x)
    return z + x


def test_an_operator_that_changes_its_argument_is_not_passed_by(graphs):
    model, eager = compiled(Written(changed_by_an_operator))
    x = torch.randn(3, D)
    with torch.no_grad():
        torch.testing.assert_close(model(x), eager(x))


def test_operands_of_unlike_dtypes_are_not_an_operators(graphs):
    model = Written(lambda m, x: x.double() + torch.relu(m.fc(x)))
    x = torch.randn(3, D)
    y = torch.compile(model, backend=room.fusedres)(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, model(x))


def test_a_network_in_eager_mode_is_not_changed_by_compiling_it(graphs):
    model = Written(WRITINGS["mlp"][0])
    x = torch.randn(3, D)
    expected, other = model(x), torch.compile(model, backend="fusedres")
    before = [(type(part), dict(vars(part))) for part in model.modules()]
    other(x)
    for part, (kind, attributes) in zip(model.modules(), before, strict=True):
        assert type(part) is kind
        assert {n: v for n, v in vars(part).items() if v is not attributes.get(n, vars)} == {}
    assert torch.equal(model(x), expected)
