"""Models with fused layers compiled, exported, packaged, traced: what leaves PyTorch, and what runs elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pairs import OPERATORS, SINGLE, WIDTH, every_kind, fused_module, gradients, layer_or_stack, pair
from test_module import OPTIONS
from test_operator import dynamo  # noqa: F401 : a fixture
from test_routes import in_another_process
from torch import Tensor, nn
from torch.testing import assert_close

import fusedres
from fusedres import FusedResidualLinear, Residual, dispatch

pytestmark = pytest.mark.backends("cpu")

BATCHES = (5, 2, 70)
ROWS = ({0: torch.export.Dim("rows")},)


def within(body: nn.Module) -> nn.Module:
    """The module among those of PyTorch, which start alike around every other."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, WIDTH), body, nn.LayerNorm(WIDTH))


def batches() -> list[Tensor]:
    return [torch.randn(rows, 3) for rows in BATCHES]


def operators(program: torch.export.ExportedProgram) -> list[str]:
    """Of this project, in the program's graph."""
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("fusedres")]


# ---------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@every_kind
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_whole_by_the_default_backend(kind, backend, dynamo):  # noqa: F811
    """One graph for every batch, forward and backward, with PyTorch's modules around."""
    fused, plain = pair(kind)
    model, twin = within(fused), within(plain)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for x in batches():
        model.zero_grad()
        twin.zero_grad()
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = compiled(ours), twin(theirs)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        assert_close(y, expected, **SINGLE)
        assert_close(ours.grad, theirs.grad, **SINGLE)
        found = gradients(fused)
        for name, parameter in plain.named_parameters():
            scale = parameter.grad.abs().max().clamp_min(1)  # sums over rows
            assert_close(found[name] / scale, parameter.grad / scale, **SINGLE)
        assert_close(model[0].weight.grad, twin[0].weight.grad, **SINGLE)


# ---------------------------------------------------------------------------------------------- exported


@layer_or_stack
def test_an_export_takes_in_no_question_about_the_machine(kind, backend):
    """Where it is the first thing that a process does."""
    dispatch._backend.cache_clear()
    module, x = fused_module(kind), torch.randn(5, WIDTH)
    program = torch.export.export(module, (x,), dynamic_shapes=ROWS)
    assert operators(program) == [f"fusedres.{OPERATORS[kind]}.default"]
    assert torch.equal(program.module()(x), module(x))


LOADS = """
    import torch
    import fusedres

    for path in {paths!r}:
        program = {load}
        x, y = torch.load(path + ".batches")
        with torch.no_grad():
            print(all(torch.equal(program(one), expected) for one, expected in zip(x, y)))
"""


def run_elsewhere(load: str, models: dict[str, nn.Module]) -> None:
    """Loads what stands in each path in a process of its own, and asks for the bits of the model here."""
    for path, model in models.items():
        x = batches()
        with torch.no_grad():
            torch.save((x, [model(one) for one in x]), path + ".batches")
    printed = in_another_process(LOADS.format(load=load, paths=list(models)))
    assert printed.split() == ["True"] * len(models)


def calls_of(kind):
    """The operators that a module's program calls."""
    return [f"fusedres.{OPERATORS[kind]}.default"] * (2 if kind == "mlp" else 1)


def test_exported_and_loaded_in_another_process(backend, tmp_path):
    models = {}
    for kind in OPERATORS:
        models[path := str(tmp_path / f"{kind}.pt2")] = model = within(fused_module(kind)).eval()
        program = torch.export.export(model, (torch.randn(5, 3),), dynamic_shapes=ROWS)
        assert operators(program) == calls_of(kind)
        torch.export.save(program, path)
    run_elsewhere("torch.export.load(path).module()", models)


@pytest.mark.slow
def test_packaged_by_aotinductor(backend, dynamo, tmp_path):  # noqa: F811
    model = within(nn.Sequential(*map(fused_module, OPERATORS))).eval()
    program = torch.export.export(model, (torch.randn(5, 3),), dynamic_shapes=ROWS)
    assert operators(program) == [name for kind in OPERATORS for name in calls_of(kind)]
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # to compile; it is 30 s otherwise
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2"), inductor_configs=quick
    )
    loaded = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for x in batches():
            assert_close(loaded(x), model(x), **SINGLE)
    run_elsewhere("torch._inductor.aoti_load_package(path)", {path: loaded})


# ---------------------------------------------------------------------------------------------- ONNX


@pytest.fixture
def onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[test]'")


def check_onnx(path: Path, model: Callable[[Tensor], Tensor], columns: int) -> set[str]:
    """What stands in path gives the model's numbers for any batch, by ONNX's own operators, which are returned."""
    import onnx
    import onnxruntime

    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert [one.domain for one in written.opset_import] == [""]
    assert not written.functions
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in BATCHES:
        x = torch.randn(rows, columns)
        (found,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(found), model(x), **SINGLE)
    return {node.op_type for node in written.graph.node}


# of older tools than torch.export, and of what pytest shows though torch and fusedres ask that it be ignored
quietly = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning:fusedres")
EXPORTERS = {"dynamo": {"dynamo": True, "dynamic_shapes": ROWS}, "torchscript": {"dynamic_axes": {"x": {0: "rows"}}}}


@quietly
@pytest.mark.parametrize("exporter", EXPORTERS)
@every_kind
def test_onnx(kind, exporter, onnx, backend, tmp_path):
    fused, plain = (within(one).eval() for one in pair(kind))
    x = torch.randn(5, 3)
    fused(x)  # which stands in no way of an export
    options = {"dynamo": False, "input_names": ["x"], **EXPORTERS[exporter]}
    torch.onnx.export(fused, (x,), tmp_path / "model.onnx", verbose=False, **options)
    assert {"Gemm", "Gelu", "LayerNormalization"} <= check_onnx(tmp_path / "model.onnx", plain, 3)
    assert_close(fused(x), plain(x), **SINGLE)
    assert torch.export.export(fused, (x,)).graph.find_nodes(
        op="call_function", target=getattr(torch.ops.fusedres, OPERATORS[kind]).default
    ), "what is exported later has its fused layers"


class Every(nn.Module):
    """Layers of all options, side by side."""

    def __init__(self) -> None:
        super().__init__()
        options = [*OPTIONS.values(), *({"activation": name} for name in ("silu", "tanh", "sin", "none"))]
        self.layers = nn.ModuleList(FusedResidualLinear(WIDTH, **one) for one in options)
        block = nn.Linear(WIDTH, WIDTH)
        self.layers.append(Residual(block, branch_scale=0.5, learn_branch_scale=True, learn_skip_scale=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def test_onnx_of_every_option(onnx, backend, tmp_path):
    model = Every().eval()
    options = {"input_names": ["x"], **EXPORTERS["dynamo"]}
    torch.onnx.export(model, (torch.randn(5, WIDTH),), tmp_path / "model.onnx", verbose=False, **options)
    check_onnx(tmp_path / "model.onnx", model, WIDTH)


@every_kind
def test_onnx_of_a_program_exported_before(kind, onnx, backend, tmp_path):
    fused, plain = (one.eval() for one in pair(kind))
    with fusedres.eager():
        program = torch.export.export(fused, (torch.randn(5, WIDTH),), dynamic_shapes=ROWS)
    assert operators(program) == []
    torch.onnx.export(program, (), tmp_path / "model.onnx", verbose=False, dynamo=True)
    check_onnx(tmp_path / "model.onnx", plain, WIDTH)
    assert_close(fused(x := torch.randn(5, WIDTH)), program.module()(x), **SINGLE)


# ---------------------------------------------------------------------------------------------- TorchScript


@quietly
@every_kind
def test_traced(kind, backend):
    """To PyTorch's own operations, for every batch, also by modules that have been called."""
    fused, plain = pair(kind)
    fused(torch.randn(5, WIDTH))
    traced = torch.jit.trace(fused, (torch.randn(5, WIDTH),))
    assert not [node.kind() for node in traced.inlined_graph.nodes() if "fusedres" in node.kind()]
    for rows in BATCHES:
        x = torch.randn(rows, WIDTH)
        y = traced(x)
        assert_close(y, plain(x), **SINGLE)
        for model in (traced, plain):
            model.zero_grad()
            model(x).square().mean().backward()
        found = gradients(fused)  # whose parameters a traced module shares
        for name, parameter in plain.named_parameters():
            assert_close(found[name], parameter.grad, **SINGLE)
    x = torch.randn(5, WIDTH)
    assert "ResidualNetwork" in fused(x).grad_fn.name(), "what is called later has its kernels"


@quietly
def test_traced_with_every_option(backend):
    model = Every().eval()
    model(torch.randn(5, WIDTH))
    traced, x = torch.jit.trace(model, (torch.randn(5, WIDTH),)), torch.randn(70, WIDTH)
    assert not [node.kind() for node in traced.inlined_graph.nodes() if "fusedres" in node.kind()]
    assert_close(traced(x), model(x), **SINGLE)


TRACES = """
    import warnings
    import torch

    warnings.simplefilter("error", torch.jit.TracerWarning)
    import fusedres

    for path in {paths!r}:
        torch.jit.trace(torch.load(path, weights_only=False), (torch.ones(5, {width}),)).save(path + ".traced")
"""
RUNS = """
    import sys, torch

    for path in {paths!r}:
        x, y = torch.load(path + ".batch")
        print(torch.allclose(torch.jit.load(path + ".traced")(x), y, rtol=1e-4, atol=2e-5), "fusedres" in sys.modules)
"""


def test_traced_without_a_word_and_run_where_fusedres_is_not(backend, tmp_path):
    paths = []
    for kind in OPERATORS:
        paths.append(path := str(tmp_path / f"{kind}.pt"))
        module, x = fused_module(kind), torch.randn(70, WIDTH)
        torch.save(module, path)
        torch.save((x, module(x).detach()), path + ".batch")
    assert in_another_process(TRACES.format(paths=paths, width=WIDTH)) == ""
    assert in_another_process(RUNS.format(paths=paths)).split() == ["True", "False"] * len(paths)
