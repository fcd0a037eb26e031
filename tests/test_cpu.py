"""The C++ engine itself: each of its ways at the edges of its blocks, its φ table, its threads, and their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import exact_cpu
import pytest
import torch
from exact_cpu import going
from layers import Case, Shape, three_ways
from test_layer import ACTIVATIONS, LAYOUTS, SUMS, check, learned_scales, named
from torch import Tensor

import fusedres
from fusedres import FusedResidualLinear, dispatch, functional, philox
from fusedres.kernels.config import Separate, Tile
from fusedres.kernels.spec import WAYS, LayerSpec, Operands, Wanted

pytestmark = pytest.mark.backends("cpu")

every_way = pytest.mark.parametrize("way", WAYS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
SHAPES = {"lanes": Shape((70,), 19, 19), "dots": Shape((7,), 33, 33), "blocks": Shape((70,), 33, 33)}
SHAPES["layers"] = Shape((140,), 147, 147)


@pytest.fixture
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


on_one_and_two_threads = pytest.mark.parametrize("threads", [1, 2], indirect=True)


@pytest.fixture(params=["brgemm", "own-products"])
def products(request) -> Iterator[str]:
    """Whose matrix products: oneDNN's where torch has them, or the engine's own."""
    with torch.backends.mkldnn.flags(enabled=request.param == "brgemm"):
        dispatch._cached_backend.cache_clear()
        dispatch._backend.cache_clear()
        yield request.param
    dispatch._cached_backend.cache_clear()
    dispatch._backend.cache_clear()


# ---------------------------------------------------------------------------------------------- every way


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(("order", "skip"), SUMS)
@every_dtype
@every_way
def test_every_sum(way, dtype, order, skip, recompute, device):
    case = Case(SHAPES[way], dtype, order=order, skip=skip, recompute=recompute, **learned_scales(skip))
    with going(way):
        check(case, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_way
def test_every_activation(way, activation, device):
    with going(way):
        for order in ("pre", "post"):
            check(Case(SHAPES[way], order=order, skip="residual", branch_scale="channel", **named(activation)), device)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(("order", "skip"), [("pre", "identity"), ("pre", "projection"), ("post", "residual")])
@every_way
def test_dropped_rows(way, order, skip, recompute, device):
    case = Case(SHAPES[way], order=order, skip=skip, drop_path=0.4, recompute=recompute, **learned_scales(skip))
    with going(way):
        check(case, device)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@every_dtype
@every_way
def test_every_layout(way, dtype, layout, device):
    """Of every operand in turn, and of the incoming gradient."""
    operands = ("x", "weight", "bias", "residual", "branch_scale", "g")
    with going(way):
        for operand in operands:

            def laid_out(name: str, t: Tensor, operand: str = operand) -> Tensor:
                return layout(t) if name == operand else t

            case = Case(SHAPES[way], dtype, skip="residual", branch_scale="channel", layout=laid_out)
            check(case, device, layout if operand == "g" else lambda g: g)


@every_way
def test_expanded_and_overlapping_rows(way, device):
    shape = SHAPES[way]
    with going(way):
        check(Case(shape, layout=lambda n, t: t[:1].detach().expand_as(t) if n == "x" else t), device)

        def overlapping(name: str, t: Tensor) -> Tensor:
            return t.flatten().detach().as_strided(t.shape, (2, 1)) if name == "x" else t

        check(Case(shape, layout=overlapping), device)
        check(Case(shape), device, lambda g: g[:1].expand_as(g))
        check(Case(shape), device, lambda g: g[:1, :1].expand_as(g))


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@every_dtype
@every_way
def test_nan_stays_in_its_row(way, dtype, recompute, device):
    """Rows are padded to blocks, and the padding may carry nothing over."""
    for skip in ("identity", "residual", "projection", None):
        tensors = Case(SHAPES[way], dtype, skip=skip).tensors(device)
        last = len(tensors["x"]) - 1
        with torch.no_grad():
            tensors["x"][last, 3] = float("nan")
        with going(way):
            y = functional.residual_linear(**tensors, skip="auto" if skip == "residual" else skip, recompute=recompute)
            (dx,) = torch.autograd.grad(y, [tensors["x"]], torch.ones_like(y))
        for found in (y, dx):
            assert found[last].isnan().any()
            assert found[:last].isfinite().all()


def test_rows_that_backward_computes_again_in_slices(device):
    """More of them than one slice holds; a slice counts dropped rows from the batch's first."""
    from_engine = {}
    for recompute in (False, True):
        torch.manual_seed(1)
        case = Case(Shape((2100,), 130, 130), drop_path=0.3, recompute=recompute, **learned_scales("identity"))
        from_engine[recompute], _, _ = three_ways(case, device)
    check(case, device)
    for name, kept in from_engine[False].items():
        scale = kept.abs().max()
        torch.testing.assert_close(from_engine[True][name] / scale, kept / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["blocks", "layers"])
def test_own_products(way, products, device):
    with going(way):
        for skip in ("identity", "projection"):
            check(Case(SHAPES[way], skip=skip), device)
            check(Case(Shape((17,), 130, 67), skip="projection" if skip == "projection" else None), device)


def test_deep_products_are_about_as_near_to_the_truth_as_eagers(products, device):
    """In one sum of 8192 products each is rounded as the whole is: the error would be four times eager's."""
    x, weight = (torch.randn(rows, 8192, device=device) for rows in (32, 64))
    with torch.no_grad():
        ours = functional.residual_linear(x, weight, activation="none", skip=None)
    exact = x.double() @ weight.double().t()
    ours, eager = ((y - exact).square().mean().sqrt() for y in (ours, x @ weight.t()))
    assert ours <= 2.5 * eager


@pytest.mark.parametrize("order", ["pre", "post"])
@every_way
def test_gradients_asked_for_one_by_one_and_in_pairs(way, order, device):
    """What forward kept for all of them serves any of them, to the same bits."""
    case = Case(SHAPES[way], order=order, skip="projection", **learned_scales("projection"))
    tensors = case.tensors(device)
    with going(way):
        y = functional.residual_linear(**tensors, **case.options())
        g = torch.randn_like(y)
        every = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), g, retain_graph=True), strict=True))
        for names in [*combinations(tensors, 1), *combinations(tensors, 2)]:
            some = torch.autograd.grad(y, [tensors[name] for name in names], g, retain_graph=True)
            assert all(torch.equal(found, every[name]) for name, found in zip(names, some, strict=True)), names


SMALL = {
    "lanes": Shape((4,), 3, 3),
    "dots": Shape((2,), 5, 5),
    "blocks": Shape((3,), 5, 5),
    "layers": Shape((3,), 5, 5),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(("order", "skip"), [("pre", "identity"), ("pre", "concat"), ("post", "projection")])
@every_way
def test_gradcheck_and_gradgradcheck(way, order, skip, recompute, device):
    """First derivatives by the kernels themselves, in float64; second ones by the formula from the same inputs."""
    case = Case(
        SMALL[way],
        torch.float64,
        activation="silu",
        order=order,
        skip=skip,
        recompute=recompute,
        drop_path=0.4,
        **learned_scales(skip),
    )
    tensors = case.tensors(device)

    def layer(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return functional.residual_linear(**dict(zip(tensors, values, strict=True)), **case.options())

    with going(way):
        assert torch.autograd.gradcheck(layer, tuple(tensors.values()))
        assert torch.autograd.gradgradcheck(layer, tuple(tensors.values()))


def test_explain_names_the_way_by_widths_and_rows(device):
    found = []
    for rows, width in ((1, 15), (500, 15), (4, 16), (90, 16), (90, 17), (90, 128), (90, 129)):
        layer = FusedResidualLinear(width, device=device)
        (call,) = fusedres.explain(layer, torch.randn(rows, width, device=device))
        assert call.backend == "native"
        found.append(call.way.name)
    assert found == ["lanes", "lanes", "dots", "blocks", "lanes", "blocks", "layers"]


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_autocast_computes_in_bfloat16(dtype, device):
    """Where all operands come to one dtype: a skip that stays in float32 takes the formula."""
    layer, x = FusedResidualLinear(20, 30, skip="projection", device=device), torch.randn(9, 20, device=device)
    with torch.autocast("cpu", dtype):
        (call,) = fusedres.explain(layer, x)
        found = layer(x)
        with fusedres.eager():
            expected = layer(x)
    assert (call.backend, call.dtype) == ("native", dtype)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("products", ["own-products"], indirect=True)
def test_a_row_does_not_depend_on_its_batch(products, device):
    """Within batch_invariant, by the engine's own products; oneDNN promises nothing."""
    for width in (7, 67, 150):
        layer, row = FusedResidualLinear(width, device=device), torch.randn(1, width, device=device)
        seen = []
        with fusedres.batch_invariant():
            for rows in (1, 3, 17, 130):
                batch = torch.randn(rows, width, device=device)
                places = {0, rows // 2, rows - 1}
                batch[list(places)] = row
                batch.requires_grad_()
                y = layer(batch)
                (dx,) = torch.autograd.grad(y.square().sum(), batch)
                seen += [(y[place], dx[place]) for place in places]
        for y, dx in seen:
            assert torch.equal(y, seen[0][0]), width
            assert torch.equal(dx, seen[0][1]), width


# ---------------------------------------------------------------------------------------------- φ and φ'


def through(layer: Callable[..., Tensor], x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """φ(x) and φ'(x) of a column x [M, 1]."""
    x = x.detach().requires_grad_()
    y = layer(x, torch.ones(1, 1, dtype=x.dtype), skip=None, **named(activation))
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), slope


def line() -> Tensor:
    """float64 [M, 1], each a float32: dense around zero and far into the tails."""
    near = torch.logspace(-30, 1, 400, dtype=torch.float64)
    dense = torch.linspace(-20, 20, 3001, dtype=torch.float64)
    return torch.cat([-near, near, dense, torch.tensor([0.0, -0.0])]).float().double()[:, None]


def table(z: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """φ, φ' and what φ' adds up, in float64 and without cancellation in the tails, where torch's gelu has it."""
    if activation in ("gelu", "gelu-tanh", "silu"):
        if activation == "gelu":
            p, dp = torch.special.erfc(-z * 0.5**0.5) / 2, torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
        else:
            a = 2 * (2 / torch.pi) ** 0.5
            v, dv = (z, 1) if activation == "silu" else (a * (z + 0.044715 * z**3), a * (1 + 3 * 0.044715 * z**2))
            p, dp = torch.sigmoid(v), torch.sigmoid(v) * torch.sigmoid(-v) * dv
        return z * p, p + z * dp, p + (z * dp).abs()
    if activation == "tanh":
        slope = torch.cosh(z) ** -2
        return torch.tanh(z), slope, slope
    if activation == "sin":
        return torch.sin(z), torch.cos(z), torch.ones_like(z)
    values, slopes = (z, torch.ones_like(z)) if activation == "none" else (z.relu(), (z > 0).double())
    return values, slopes, slopes


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_dtype
@every_way
def test_the_table_in_every_way(way, dtype, activation, device):
    """To a few units in the last place, tails included; in bfloat16 to the rounding of the result."""
    x = line().to(dtype)
    x = x[:: 37 if way == "dots" else 1]  # few rows at a time
    eps, tiny = torch.finfo(dtype).eps, 1e-35  # in float32 tails end a little before their numbers become subnormal
    with going(way):
        for some in x.split(4 if way == "dots" else len(x)):
            values, slopes = through(functional.residual_linear, some, activation)
            value, slope, terms = table(some.double(), activation)
            # exp(-2u) multiplies by 2u the rounding of u, a sum of two; exp(-z²/2) by z²/2 that of z²
            exponents = {"gelu-tanh": (1.6 * some * (1 + 0.045 * some**2)).abs(), "gelu": 1 + some**2 / 2}
            more = exponents[activation].clamp_min(1).double() if activation in exponents else 1.0
            for name, ours, truth, scale in (("φ", values, value, value.abs()), ("φ'", slopes, slope, terms)):
                if dtype == torch.bfloat16:  # computed in float32, then rounded once
                    allowed = 0.51 * eps * truth.abs() + 1e-6 * scale * more + tiny
                else:
                    allowed = 8 * eps * scale * more + tiny
                wrong = ~((ours.double() - truth).abs() <= allowed)
                assert not wrong.any(), (
                    f"{name} at {some[wrong][:3].tolist()}: {ours[wrong][:3].tolist()}, not {truth[wrong][:3].tolist()}"
                )


@pytest.mark.skipif("FUSEDRES_SANITIZE" in os.environ, reason="the sanitized library is of this machine's level alone")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_levels_are_right_too(capability):
    """Where the processor has less: other vectors, and no fused multiplication."""
    chosen = "table_in_every_way or own_products or right_every_way"
    command = ["-m", "pytest", "tests/test_cpu.py", "tests/test_anything.py", "-k", chosen, "-q"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert " passed" in ran.stdout


def test_gelu_is_nearer_to_the_truth_than_torch(device):
    x = torch.cat([torch.linspace(-20, 20, 400_001), torch.randn(100_000)])[:, None]
    value, slope, _ = table(x.double(), "gelu")
    leaf = x.clone().requires_grad_()
    theirs = torch.nn.functional.gelu(leaf)
    (their_slope,) = torch.autograd.grad(theirs.sum(), leaf)
    found = through(functional.residual_linear, x, "gelu")
    # 0.7: nearer by more than another processor's or another erf's rounding; here it is 0.2 to 0.5
    for ours, eager, truth in zip(found, (theirs, their_slope), (value, slope), strict=True):
        mine, other = ours.double() - truth, eager.double() - truth
        assert mine.abs().max() <= 0.7 * other.abs().max()
        assert mine.square().mean() <= (0.7 * 0.7) * other.square().mean()


def by_triton(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    from fusedres.kernels.triton import layer, layer_backward

    device = "cuda" if torch.cuda.is_available() else "cpu"
    operands = Operands(x.float().to(device), torch.ones(1, 1, device=device))
    spec = LayerSpec("gelu_tanh" if activation == "gelu-tanh" else activation)
    tile = Tile(128, 16, 16, 4, 2)
    y, z, s = layer.forward(operands, spec, torch.float32, tile, "ieee", True, False)
    wanted = Wanted(True, *[False] * 7)
    found = layer_backward.backward(
        torch.ones_like(y), operands, z, s, spec, wanted, Separate(tile, tile), None, "ieee", 1
    )
    return y.cpu(), found.x.cpu()


@pytest.fixture
def interpreted(monkeypatch) -> None:
    """Triton's kernels beside the engine's: called past the dispatcher, where there is no GPU in the interpreter."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_table_agrees_with_tritons(activation, backend, interpreted):
    x, eps = line(), torch.finfo(torch.float32).eps
    theirs = by_triton(x, activation)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        ours = through(functional.residual_linear, x.float(), activation)
    # beyond 1e-3 Triton's formulas add ones, 1 + erf and 1 - tanh², and their rounding is multiplied by z
    absolute = 4 * eps * x.abs().clamp_min(1) * (x.abs() > 1e-3)
    for our, their in zip(ours, theirs, strict=True):
        wrong = ~((our - their).abs() <= 8 * eps * their.abs() + absolute)
        assert not wrong.any(), (
            f"at x = {x[wrong][:3].tolist()}: {our[wrong][:3].tolist()}, {their[wrong][:3].tolist()}"
        )


@pytest.mark.parametrize("order", ["pre", "post"])
@every_way
def test_infinities_and_nan_in_every_way(way, order, device):
    """The limits of φ, NaN for NaN, in each element of a row whatever stands beside it."""
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 1e30, -1e30, 100.0, -100.0])
    limits = {
        "gelu": [float("inf"), 0.0, float("nan"), 0.0, 1e30, 0.0, 100.0, 0.0],
        "silu": [float("inf"), 0.0, float("nan"), 0.0, 1e30, 0.0, 100.0, 0.0],
        "relu": [float("inf"), 0.0, float("nan"), 0.0, 1e30, 0.0, 100.0, 0.0],
        "tanh": [1.0, -1.0, float("nan"), 0.0, 1.0, -1.0, 1.0, -1.0],
    }
    limits["gelu-tanh"] = limits["gelu"]
    N = 11 if way == "lanes" else 19
    # a bias brings the values, so that no inf meets a 0 in the product
    bias = values.repeat(3)[:N]
    for activation, expected in limits.items():
        with going(way):
            y = functional.residual_linear(
                torch.zeros(3, 5), torch.ones(N, 5), bias, skip=None, order=order, **named(activation)
            )
        wanted = torch.tensor(expected).repeat(3)[:N].expand(3, N)
        torch.testing.assert_close(y, wanted, equal_nan=True, rtol=1e-6, atol=1e-30)


# ---------------------------------------------------------------------------------------------- dropped rows


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_the_rows_that_triton_drops(rows, backend, interpreted):
    """By the kernels' own generators, the reference's between them."""
    from fusedres.kernels.triton import layer

    spec = LayerSpec("relu", skip="identity", drop_path=0.5)
    seed = torch.tensor(2**62 + 2**31 + 12345)
    kept = philox.kept_rows(seed, torch.Size([rows]), spec.drop_threshold, torch.device("cpu")).flatten()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, bias = torch.randn(rows, 8), torch.zeros(8, 8), torch.ones(8)  # a kept row gains 2
    operands = Operands(x.to(device), weight.to(device), bias.to(device), seed=seed)
    by_triton = layer.forward(operands, spec, torch.float32, Tile(16, 16, 16, 4, 2), "ieee", False, False)[0].cpu()
    assert torch.equal((by_triton != x).all(1), kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        for way in WAYS:
            with going(way):
                y = fusedres.ops.residual_linear(Operands(x, weight, bias, seed=seed), spec)
            assert torch.equal((y != x).all(1), kept), way


# ---------------------------------------------------------------------------------------------- threads

# wide and long enough for every way to share its work
LARGE = {
    "lanes": Shape((3001,), 13, 13),
    "dots": Shape((4,), 700, 700),
    "blocks": Shape((777,), 70, 70),
    "layers": Shape((777,), 150, 150),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@on_one_and_two_threads
@every_way
def test_two_runs_give_the_same_bits(way, threads, recompute, device):
    case = Case(LARGE[way], skip="projection", recompute=recompute, drop_path=0.3, **learned_scales("projection"))
    with going(way):
        torch.manual_seed(3)
        first, _, _ = three_ways(case, device)
        torch.manual_seed(3)
        second, _, _ = three_ways(case, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_one_and_two_threads
@every_way
def test_large_layers_on_threads(way, threads, device):
    with going(way):
        check(Case(LARGE[way], skip="projection", **learned_scales("projection")), device)


@on_one_and_two_threads
@every_dtype
@every_way
def test_integers_on_threads_are_exact(way, dtype, threads, device):
    shape = LARGE[way]
    mode = next(name for name, value in exact_cpu.DTYPES.items() if value == dtype)
    for layer in ("everything", "everything-projection", "identity"):
        for recompute in (False, True):
            case = exact_cpu.Case(way, mode, layer, *shape.leading, shape.N, shape.K, recompute)
            assert exact_cpu.mismatches(case, seed=0) == []


@every_way
def test_python_threads_call_at_once(way, device):
    """As data loaders and servers do: each caller gets what it would get alone."""
    shape = LARGE[way]
    layer = FusedResidualLinear(shape.K, shape.N, device=device)
    inputs = [torch.randn(*shape.leading, shape.K, device=device) for _ in range(4)]

    def step(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias])]

    with going(way):
        alone = [step(x) for x in inputs]
        with ThreadPoolExecutor(2) as pool:
            together = [list(pool.map(step, inputs)) for _ in range(5)]
    for found in together:
        for ours, expected in zip(found, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_threads_come_and_go(device):
    """Callers that end leave nothing behind that the next one could trip over."""
    layer, x = FusedResidualLinear(64, device=device), torch.randn(500, 64, device=device)
    expected = layer(x).detach()
    found: list[Tensor] = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: found.append(layer(x).detach()))
        thread.start()
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is not on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("threads", [2], indirect=True)
@every_way
def test_a_forked_child_computes(way, threads, device):
    """On one thread, as torch's data loaders set it: GNU's OpenMP pool, and torch with it, hangs in a child on more."""
    shape = LARGE[way]
    x = torch.randn(*shape.leading, shape.K, requires_grad=True)
    weight = torch.randn(shape.N, shape.K)

    def step() -> list[Tensor]:
        torch.set_num_threads(1)
        with torch.no_grad():
            return [functional.residual_linear(x, weight), functional.residual_linear(x, weight, activation="sin")]

    with going(way):
        torch.autograd.grad(functional.residual_linear(x, weight).sum(), x)  # on two
        expected = step()
        child = os.fork()
        if child == 0:
            os._exit(0 if all(map(torch.equal, step(), expected)) else 1)
    assert exit_of(child) == 0


def exit_of(child: int, limit_s: float = 60) -> int | str:
    """The child's exit code, or "hangs"."""
    last = time.monotonic() + limit_s
    while time.monotonic() < last:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"
