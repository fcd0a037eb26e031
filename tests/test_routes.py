"""What runs a call, and why: choices with their reasons, the contexts that bend them, and what never depends on M."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import fusedres
from fusedres import FusedResidualLinear, dispatch, functional
from fusedres.dispatch import Eager, Native, Triton
from fusedres.kernels.config import Plan

pytestmark = pytest.mark.backends("triton", "cpu")

ON_A_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")


def in_another_process(code: str, **environment: str) -> str:
    """What a fresh Python prints, without the TRITON_INTERPRET that this one runs under."""

    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------- choices


@pytest.mark.launches_nothing
def test_a_call_takes_the_kernels(backend, device):
    choice = dispatch.choose(torch.device(device), torch.float32, is_empty=False)
    if backend == "cpu":
        assert isinstance(choice, Native)
        assert "the C++ engine runs on the CPU, with products by" in choice.because
        return
    assert isinstance(choice, Triton)
    assert choice.target == ("hip" if torch.version.hip else "cuda") if ON_A_GPU else "interpreter"
    assert ("runs the kernels" if ON_A_GPU else "TRITON_INTERPRET=1") in choice.because


REASONS = {
    "float64": (("cpu", None, torch.float64, True), "accumulate in float32, which is less than torch.float64 asks for"),
    "bfloat16-interpreted": (("cpu", None, torch.bfloat16, True), "interpreter computes bfloat16 products wrongly"),
    "float16-on-the-cpu": (("cpu", None, torch.float16, False), "the CPU engine has no kernels for torch.float16"),
    "meta": (("meta", None, torch.float32, False), "there are no kernels for meta devices"),
    "another-accelerator": (("mps", 0, torch.float32, False), "there are no kernels for mps devices"),
}


@pytest.mark.parametrize(("facts", "words"), REASONS.values(), ids=REASONS)
def test_eager_has_a_reason(facts, words):
    choice = dispatch._backend(*facts)
    assert isinstance(choice, Eager)
    assert words in choice.because


def test_an_old_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    choice = dispatch._backend.__wrapped__("cuda", 0, torch.float32, False)
    assert choice == Eager("the kernels need compute capability 8.0, this GPU has 7.5")


def test_a_missing_triton_is_told(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert dispatch._backend.__wrapped__("cuda", 0, torch.float32, False) == Eager("triton is not installed")


def test_an_empty_tensor_is_told():
    assert "empty" in dispatch.choose(CPU, torch.float32, is_empty=True).because


def test_eager_switches_the_kernels_off(device):
    layer, x = FusedResidualLinear(6).to(device), torch.randn(3, 6, device=device)
    fused = layer(x)
    node = fused.grad_fn.name()
    with fusedres.eager():
        call = fusedres.explain(layer, x)[0]
        assert (call.backend, call.choice) == ("eager", Eager("fusedres.eager() is in force"))
        assert layer(x).grad_fn.name() == "AddBackward0"
        with fusedres.eager():
            pass
        assert fusedres.explain(layer, x)[0].backend == "eager", "an inner context does not end the outer one"
    assert layer(x).grad_fn.name() == node != "AddBackward0"
    assert torch.equal(layer(x), fused)


@pytest.mark.parametrize("context", [fusedres.eager, fusedres.batch_invariant])
def test_a_context_ends_with_an_error(context, device, fused):
    def failing():
        with context():
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    layer, x = FusedResidualLinear(6).to(device), torch.randn(3, 6, device=device)
    call = fusedres.explain(layer, x)[0]
    assert call.backend == fused
    assert not call.spec.batch_invariant


TRANSFORMS = {
    "grad-runs-the-kernels": (lambda f, x: grad(lambda x: f(x).sum())(x), "fused", ""),
    "jacrev-runs-them-forward": (lambda f, x: jacrev(f)(x), "fused", ""),
    "vmap": (lambda f, x: vmap(f)(x), "eager", "torch.vmap may batch any operand"),
    "vmap-of-grad": (lambda f, x: vmap(grad(lambda x: f(x).sum()))(x), "eager", "torch.vmap may batch any operand"),
}


@pytest.mark.launches_nothing
@pytest.mark.parametrize(("transformed", "expected", "words"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_a_transform_runs(transformed, expected, words, device, fused):
    layer, x = FusedResidualLinear(6).to(device), torch.randn(3, 6, device=device)
    call = fusedres.explain(lambda x: transformed(layer, x), x)[0]
    assert call.backend == (fused if expected == "fused" else expected)
    assert words in call.choice.because


@pytest.mark.launches_nothing
def test_a_compiled_transform_has_a_reason(device):
    seen = []

    def layer(x: Tensor) -> Tensor:
        choice = dispatch.choose(x.device, x.dtype, is_empty=False)
        seen.append(choice.because)
        return x.sum()

    torch.compile(grad(layer), backend="eager", fullgraph=True)(torch.ones(3, device=device))
    assert seen == ["torch.compile traces torch.func's transforms through PyTorch's own operations"]


# ---------------------------------------------------------------------------------------------- explained


def test_explain_tells_backend_sizes_and_tiles(backend, device, fused, capsys):
    layer = FusedResidualLinear(6, 4, skip="projection", recompute=True).to(device)
    explanation = fusedres.explain(layer, torch.randn(2, 3, 6, device=device))
    (call,) = explanation
    assert (call.backend, call.M, call.N, call.K, call.dtype) == (fused, 6, 4, 6, torch.float32)
    assert call.spec.skip == "projection"
    if backend == "cpu":
        assert (call.tiles, call.way.name) == (None, "lanes")
        details = ("way lanes, because every width is below 16", "computed again in backward")
    else:
        assert isinstance(call.tiles, Plan)
        details = ("BLOCK_M=16", "z recomputed", "reasoned, not measured")
    printed = capsys.readouterr().out
    assert printed.strip() == str(explanation)
    for words in ("[6, 6] -> [6, 4] torch.float32", fused, call.choice.because, *details):
        assert words in printed


@pytest.mark.parametrize(
    ("backend", "dtype", "words"),
    [
        ("triton", torch.float64, "the kernels accumulate in float32"),
        pytest.param("cpu", torch.float16, "the CPU engine has no kernels", marks=pytest.mark.launches_nothing),
    ],
    indirect=["backend"],
    ids=str,
)
def test_explain_tells_why_eager(dtype, words, device, capsys):
    layer = FusedResidualLinear(6).to(device, dtype)
    (call,) = fusedres.explain(layer, torch.randn(3, 6, device=device, dtype=dtype))
    assert (call.backend, call.tiles) == ("eager", None)
    assert f"eager, because {words}" in capsys.readouterr().out


def test_explain_names_layers(device):
    net = nn.Sequential(FusedResidualLinear(6), nn.ReLU(), nn.Sequential(FusedResidualLinear(6, 4))).to(device)
    x = torch.randn(3, 6, device=device)
    assert [call.name for call in fusedres.explain(net, x)] == ["0", "2.0"]
    assert [call.name for call in fusedres.explain(torch.compile(net, backend="eager", fullgraph=True), x)] == [
        "0",
        "2.0",
    ]
    assert [call.name for call in fusedres.explain(net[0], x)] == [""], "names do not outlive a call"


def test_explain_of_a_function(device):
    x, weight = torch.randn(3, 6, device=device), torch.randn(4, 6, device=device)
    (call,) = fusedres.explain(functional.residual_linear, x, weight, activation="sin")
    assert call.spec.activation == "sin"
    assert "residual_linear" in str(call)


def test_explain_of_a_call_outside_any_layer(device):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = FusedResidualLinear(6)

        def forward(self, x: Tensor) -> Tensor:
            return functional.residual_linear(self.first(x), self.first.weight)

    assert [call.name for call in fusedres.explain(Net().to(device), torch.randn(3, 6, device=device))] == ["first", ""]


def test_explain_without_a_fused_call(capsys):
    assert fusedres.explain(nn.Linear(2, 2), torch.ones(1, 2)) == ()
    assert "no fused call was made" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", torch.float16), ("cpu", torch.bfloat16)], indirect=["backend"], ids=str
)
def test_explain_under_autocast(dtype, device, fused):
    layer, x = FusedResidualLinear(6, 4).to(device), torch.randn(3, 6, device=device)
    with torch.autocast(device, dtype):
        (call,) = fusedres.explain(layer, x)
    assert (call.backend, call.dtype) == (fused, dtype)


def test_explain_changes_nothing(device):
    net = nn.Sequential(FusedResidualLinear(6, drop_path=0.5), nn.BatchNorm1d(6), nn.Dropout(0.5)).to(device)
    x = torch.randn(3, 6, device=device, requires_grad=True)
    states = torch.random.get_rng_state(), [s.clone() for s in net.state_dict().values()]
    on_gpu = torch.cuda.get_rng_state() if ON_A_GPU else None
    fusedres.explain(net, x)
    assert net.training
    assert all(module.training for module in net.modules())
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert not ON_A_GPU or torch.equal(torch.cuda.get_rng_state(), on_gpu)
    for (name, after), before in zip(net.state_dict().items(), states[1], strict=True):
        assert torch.equal(after, before), name
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_explain_inside_explain(device):
    layer, x = FusedResidualLinear(6).to(device), torch.randn(3, 6, device=device)
    inner = []
    outer = fusedres.explain(lambda x: inner.append(fusedres.explain(layer, x)) or layer(x), x)
    assert (len(outer), len(inner[0])) == (1, 1)


# ---------------------------------------------------------------------------------------------- importing


def test_importing_asks_the_machine_nothing():
    printed = in_another_process("""
        import sys, torch
        asked = []
        for name in ("is_available", "device_count", "get_device_capability", "current_device", "get_device_name"):
            setattr(torch.cuda, name, lambda *a, name=name: asked.append(name))
        import fusedres
        layer = fusedres.FusedResidualLinear(4)
        print([m for m in ("triton", "torch._dynamo", "matplotlib", "sklearn") if m in sys.modules], asked)
        print(torch.cuda.is_initialized())
    """)
    assert printed == "[] []\nFalse"


def test_the_cpu_takes_the_engine_where_there_is_one_and_says_so():
    printed = in_another_process("""
        import sys, torch, fusedres
        from fusedres import native
        layer = fusedres.FusedResidualLinear(4)
        call, = fusedres.explain(layer, torch.ones(2, 4))
        layer(torch.ones(2, 4)).sum().backward()
        if reason := native.missing():
            assert (call.backend, call.choice.because) == ("eager", reason)
        else:
            assert call.backend == "native"
        assert "triton" not in sys.modules
    """)
    assert "[2, 4] -> [2, 4] torch.float32: " in printed


def test_a_missing_engine_is_told(monkeypatch):
    monkeypatch.setattr(dispatch.native, "missing", lambda: "there is no compiler")
    assert dispatch._cpu_backend(torch.float32) == Eager("there is no compiler")


def test_bfloat16_needs_brgemm_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch.native, "missing", lambda: None)
    for has_brgemm, kind in ((False, Eager), (True, Native)):
        monkeypatch.setattr(dispatch, "has_brgemm", lambda dtype, has_brgemm=has_brgemm: has_brgemm)
        assert isinstance(dispatch._cpu_backend(torch.bfloat16), kind)
        assert isinstance(dispatch._cpu_backend(torch.float32), Native)


# ---------------------------------------------------------------------------------------------- never of M


def training_bits(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


@pytest.mark.backends("triton")  # the CPU engine chooses its way by the rows, see test_cpu.py
@pytest.mark.parametrize(
    ("batches", "context"),
    [([1, 5, 17, 64], nullcontext), ([65, 70, 130], nullcontext), ([1, 17, 64, 65, 130], fusedres.batch_invariant)],
    ids=["within-few-rows", "within-many-rows", "batch-invariant-across-both"],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"out_features": 20, "skip": "projection"}, {"order": "post", "recompute": True}],
    ids=["identity", "projection", "post"],
)
def test_a_row_does_not_depend_on_its_batch(options, batches, context, device):
    """Its output and its gradient, to the bit; 67 features take several steps of the products.

    On a GPU it may stand anywhere in the batch. The interpreter's products are numpy's, whose bits depend on where in a
    tile a row stands, so that there it stands first in its tile.
    """
    layer = FusedResidualLinear(67, **options).to(device)
    row = torch.randn(1, 67, device=device)
    seen = []
    with context():
        for rows in batches:
            batch = torch.randn(rows, 67, device=device)
            places = {0, rows // 2, rows - 1} if ON_A_GPU else {0, (rows - 1) // 128 * 128}
            batch[list(places)] = row
            y, dx = training_bits(layer, batch)
            seen += [(y[place], dx[place]) for place in places]
    for y, dx in seen:
        assert torch.equal(y, seen[0][0])
        assert torch.equal(dx, seen[0][1])


def test_batch_invariance_reaches_a_backward_outside_it(device):
    """The class is the call's: backward takes the one that forward took."""
    layer = FusedResidualLinear(6).to(device)
    with fusedres.batch_invariant():
        y = layer(torch.randn(3, 6, device=device))
    assert y.grad_fn.spec.batch_invariant
    outside = layer(torch.randn(3, 6, device=device)).grad_fn
    assert outside is not None
    assert not (hasattr(outside, "spec") and outside.spec.batch_invariant)


def test_precision_follows_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert dispatch.precision(torch.float32) == expected
            assert dispatch.precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


SPECIALISATIONS = """
    # what Triton would compile for an H100: its own key of every launch, recorded in the place of launching
    from types import SimpleNamespace

    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import driver, jit

    driver.set_active(SimpleNamespace(get_current_device=lambda: 0))
    backend, keys = make_backend(GPUTarget("cuda", 90, 32)), {{}}

    def record(kernel, *args, grid, warmup, **options):
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialisation, compiled_with = binder(*args, **options, debug=False)
        keys.setdefault((kernel.fn.__name__, str(specialisation), str(compiled_with)), set()).add(M)

    jit.JITFunction.run = record

    import fusedres
    from fusedres import dispatch

    dispatch._constant_backend = lambda *facts: dispatch.Triton("pretended", "cuda", {capability})
    layouts = {{
        "dense": lambda t: t,
        "transposed": lambda t: t.t().contiguous().t(),
        "slices": lambda t: torch.cat([t, t], 1)[:, :t.shape[1]],
        "every-other-row": lambda t: torch.stack([t, t], 1)[:, 0],
    }}
    few, many = {{1, 2, 3, 16, 17, 48, 63, 64}}, {{65, 100, 128, 1000, 1024, 4097}}
    layer = fusedres.FusedResidualLinear({options}).to({dtype})
    for name, laid_out in layouts.items():
        for loss in (torch.sum, lambda y: y.square().sum()):  # an expanded and a dense gradient
            keys.clear()
            for M in sorted(few | many):
                x = laid_out(torch.randn(M, layer.in_features, dtype={dtype})).requires_grad_()
                loss(layer(x)).backward()
            found = {{kernel for kernel, *_ in keys}}
            assert found == {{*{kernels}, "_add_kernel"}} or (name != "dense" and {capability} == 90), keys
            for (kernel, *_), rows in keys.items():
                # one row of a wider matrix is dense, more are not; a tile may serve either class
                one = set() if name == "dense" else {{1}}
                classes = [each - one for each in (few, many, few | many)] + [one]
                assert rows - one in classes or rows == one, f"{{name}}: {{kernel}} is compiled anew for {{rows}} rows"
"""


POINTERS = ("_forward_kernel", "_dz_kernel", "_dx_kernel")


@pytest.mark.parametrize(
    ("options", "capability", "kernels"),
    [
        ("64", 80, ("_forward_kernel", "_backward_kernel")),
        ("61", 80, ("_forward_kernel", "_backward_kernel")),
        ("64, learn_skip_scale=True, drop_path=0.3", 80, ("_forward_kernel", "_backward_kernel")),
        ("131", 80, (*POINTERS, "_finish_kernel")),
        ("64, 40, skip='projection', order='post'", 80, POINTERS),
        ("7, 9, skip='concat'", 80, POINTERS),
        ("64", 90, ("_forward_kernel", "_whole_kernel", "_backward_kernel")),
        ("264", 90, (*POINTERS, "_tiled_kernel", "_kernel")),
        ("264, learn_branch_scale='scalar', drop_path=0.3", 90, (*POINTERS, "_tiled_kernel", "_kernel")),
    ],
    ids=["narrow", "odd", "drop-path", "wide", "projection", "concat", "whole", "descriptors", "descriptors-busy"],
)
def test_no_batch_size_asks_for_another_kernel(options, capability, kernels):
    """Older chips in float32, Hopper in bfloat16, where the copy engine takes all but odd layouts."""
    dtype = "torch.bfloat16" if capability == 90 else "torch.float32"
    given = {"options": options, "capability": capability, "dtype": dtype, "kernels": kernels}
    in_another_process(SPECIALISATIONS.format(**given))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "laid_out", [lambda t: t, lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, :64]]
)
def test_no_new_batch_size_compiles_anything(laid_out, device):
    """The kernels' own caches: after one batch of either class, no other adds an entry."""
    from fusedres.kernels.triton import layer as forward
    from fusedres.kernels.triton import layer_backward as backward
    from fusedres.kernels.triton import layer_narrow as narrow

    layer = FusedResidualLinear(64, learn_skip_scale=True).to(device)

    def entries() -> int:
        kernels = (forward._forward_kernel, backward._dz_kernel, backward._dx_kernel, narrow._backward_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def run(rows: int) -> None:
        layer(laid_out(torch.randn(rows, 64, device=device)).requires_grad_()).square().sum().backward()

    run(48)
    run(128)
    compiled = entries()
    for rows in (1, 2, 3, 16, 17, 63, 64, 65, 100, 1000, 1024, 4097):
        run(rows)
    assert entries() == compiled


@pytest.mark.gpu
def test_training_can_be_captured_as_a_graph(device):
    layer, x = FusedResidualLinear(64).to(device), torch.randn(128, 64, device=device)
    layer(x).sum().backward()
    expected = layer.weight.grad.clone()
    graph = torch.cuda.CUDAGraph()
    layer.weight.grad.zero_()
    with torch.cuda.graph(graph):
        layer(x).sum().backward()
    layer.weight.grad.zero_()
    graph.replay()
    assert torch.equal(layer.weight.grad, expected)


def test_overlapping_eager_blocks_leave_nothing_in_force():
    first, second = fusedres.eager(), fusedres.eager()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert isinstance(dispatch.choose(torch.device("cpu"), torch.float32, False), Eager)
    second.__exit__(None, None, None)
    assert dispatch._Switches.force_eager == 0


def test_explain_names_a_parametrized_layer(device, capsys):
    layer = nn.utils.parametrizations.weight_norm(FusedResidualLinear(6, device=device))
    (call,) = fusedres.explain(nn.Sequential(layer), torch.randn(3, 6, device=device))
    assert call.name == "0"
