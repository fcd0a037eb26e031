"""The kernels that copy by descriptors, called past the dispatcher: against float64, at the edges of every tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from integers import DEVICE, HAS_GPU
from layers import Case, Shape, three_ways
from tolerances import rule_for

from fusedres import FusedResidualLinear, dispatch, reference
from fusedres.kernels.config import Inside, PersistentTile, Separate, Tile
from fusedres.kernels.record import BRANCH, LARGEST, OCTAVES, PRODUCT, SCALE, SKIP, SQUARES, SUM, Recording
from fusedres.kernels.spec import LayerSpec, Operands, Wanted

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    HAS_GPU and torch.cuda.get_device_capability() < (9, 0), reason="copies by descriptors begin with sm_90"
)
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
TILED, QUARTERS = PersistentTile(64, 64, 32, 4, 2, parts=2, group=2), PersistentTile(64, 128, 64, 4, 2, parts=4)
WHOLE = PersistentTile(64, 128, 128, 4, 2, parts=2)
FORWARD = {"tiled": TILED, "in-quarters": QUARTERS, "whole": WHOLE}
BACKWARD = {"several-across": TILED, "in-quarters": QUARTERS, "one-across": WHOLE._replace(BLOCK_K=32)}
SIZES = [(1, 8, 8), (131, 104, 104), (70, 24, 120)]  # M, N, K
PROGRAMS = 3  # fewer than there are tiles, so that each has several


def drawn(M: int, N: int, K: int, spec: LayerSpec, dtype: torch.dtype, learned: str = "") -> Operands:
    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(DEVICE, dtype)

    return Operands(
        make(M, K),
        (torch.randn(N, K) * K**-0.5).to(DEVICE, dtype),
        make(N),
        residual=make(M, N) if spec.skip == "residual" else None,
        skip_scale=make() if "λ" in learned else None,
        branch_scale=make(N) if "a" in learned else None,
        seed=torch.tensor(2**62 + 5) if spec.drop_path else None,
    )


def run(operands: Operands, spec: LayerSpec, tile: PersistentTile, keep: bool) -> tuple:
    from fusedres.kernels.triton import layer_persistent

    return layer_persistent.forward(operands, spec, operands.x.dtype, tile, "ieee", keep, PROGRAMS)


def judged(operands: Operands, spec: LayerSpec, g: torch.Tensor, to: torch.dtype) -> dict[str, torch.Tensor]:
    """y and every gradient of the reference, computing in this type."""
    leaves = Operands(
        *(None if t is None else t.detach().to(to).requires_grad_() for t in operands[:-1]), operands.seed
    )
    named = {name: t for name, t in leaves._asdict().items() if t is not None and name != "seed"}
    y = reference.layer(leaves, spec)
    found = torch.autograd.grad(y, list(named.values()), g.to(to))
    return {"y": y.detach()} | {f"d{name}": t for name, t in zip(named, found, strict=True)}


SPECS = {
    "identity": (LayerSpec(skip="identity", skip_scale=0.7, branch_scale=-1.5), ""),
    "identity-post-dropping": (LayerSpec("silu", "post", "identity", drop_path=0.4), "λ"),
    "learned-dropping": (LayerSpec("gelu", "pre", "identity", drop_path=0.4), "λa"),
    "no-skip": (LayerSpec("tanh"), "a"),
    "no-activation": (LayerSpec("none", skip="identity"), ""),
    "residual": (LayerSpec("sin", "pre", "residual"), ""),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize(("spec", "learned"), SPECS.values(), ids=SPECS)
def test_forward(spec, learned, tile, dtype):
    for M, N, K in SIZES:
        operands = drawn(M, N, N if spec.skip == "identity" else K, spec, dtype, learned)
        g = torch.ones(M, N, device=DEVICE)
        truth, eager = judged(operands, spec, g, torch.float64)["y"], judged(operands, spec, g, dtype)["y"]
        y, kept = run(operands, spec, tile, keep=False)
        assert kept is None
        rule_for(dtype, "y").check("y", y, eager, truth, 1 / (1 - spec.drop_path))
        again, kept = run(operands, spec, tile, keep=True)
        assert torch.equal(y, again), "what is kept changes no bit"
        assert kept.dtype == operands.kept_dtype
        assert kept.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", BACKWARD.values(), ids=BACKWARD)
@pytest.mark.parametrize(("spec", "learned"), SPECS.values(), ids=SPECS)
def test_dz_inside_the_product_for_dx(spec, learned, tile, dtype):
    from fusedres.kernels.triton import layer_backward_inside, sums

    for M, N, K in SIZES:
        operands = drawn(M, N, N if spec.skip == "identity" else K, spec, dtype, learned)
        g = torch.randn(M, N).to(DEVICE, dtype)
        truth, eager = (judged(operands, spec, g, to) for to in (torch.float64, dtype))
        _, kept = run(operands, spec, TILED, keep=spec.activation != "none")
        wanted = Wanted(*(t is not None for t in operands[:-1]))
        dz, dx, parts = layer_backward_inside.dz_and_dx(g, operands, kept, spec, wanted, tile, "ieee", PROGRAMS)
        found = {"dx": dx, "dweight": (dz.float().t() @ operands.x.float()).to(dtype)}
        found |= {f"d{name}": of_rows for name, of_rows in sums.added(parts, operands).items()}
        assert found.keys() | {"y", "dresidual"} >= truth.keys()
        for name, mine in found.items():
            terms = max(1.0, M * N / truth[name].numel()) / (1 - spec.drop_path)
            rule_for(dtype, name).check(f"{name} of {M} x {N} x {K}", mine, eager[name], truth[name], terms)


def test_a_row_that_is_no_number_stays_alone():
    from fusedres.kernels.triton import layer_backward_inside

    spec = LayerSpec(skip="identity")
    operands = drawn(130, 64, 64, spec, torch.float32)
    operands.x[70] = float("nan")
    for tile in FORWARD.values():
        y, kept = run(operands, spec, tile, keep=True)
        assert y.isnan().any(1).nonzero().flatten().tolist() == [70]
        g, wanted = torch.ones_like(y), Wanted(True, *[False] * 7)
        _, dx, _ = layer_backward_inside.dz_and_dx(g, operands, kept, spec, wanted, TILED, "ieee", PROGRAMS)
        assert dx.isnan().any(1).nonzero().flatten().tolist() == [70]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The dispatcher plans as for an H100, whose kernels the interpreter then runs."""
    choice = dispatch.Triton("pretended", "interpreter" if not HAS_GPU else "cuda", 90)
    monkeypatch.setattr(dispatch, "_constant_backend", lambda *facts: choice)
    dispatch._cached_backend.cache_clear()
    yield
    dispatch._cached_backend.cache_clear()


LAYERS = {
    "identity": {"skip": "identity", "skip_scale": 0.7},
    "residual": {"skip": "residual", "skip_scale": 0.7},
    "post-residual": {"skip": "residual", "order": "post"},
    "busy": {"skip": "identity", "skip_scale": "scalar", "branch_scale": "channel", "drop_path": 0.4},
    "post": {"skip": "identity", "order": "post"},
    "bare": {"skip": None, "bias": False},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("width", [48, 136], ids=["whole", "wide"])
def test_from_the_module_to_the_copy_engine_and_back(width, options, hopper, monkeypatch):
    from fusedres.kernels.triton import layer_backward, layer_narrow, layer_persistent

    calls = []
    for module, name in ((layer_persistent, "forward"), (layer_backward, "dz_and_dx"), (layer_narrow, "backward")):
        monkeypatch.setattr(module, name, counted(calls, module.__name__, getattr(module, name)))
    case = Case(Shape((70,), width, width), torch.float16, **options)
    fused, eager, truth = three_ways(case, DEVICE)
    apart = options.get("order") == "post" and options["skip"] == "residual"  # whose gradient is more than λ g
    inside = [] if apart else ["backward"]
    assert [name.rpartition("_")[2] for name in calls] == ["persistent", *(["narrow"] if width == 48 else inside)]
    for name in truth:
        terms = max(1.0, truth["y"].numel() / truth[name].numel()) / (1 - case.drop_path)
        rule_for(torch.float16, name).check(name, fused[name], eager[name], truth[name], terms)


@pytest.mark.skipif(HAS_GPU, reason="counts what the interpreter runs")
@pytest.mark.parametrize(
    ("width", "is_hopper", "forward", "backward"),
    [(48, True, 1, 2), (136, True, 1, 2), (136, False, 1, 3)],
    ids=["one-kernel", "dz-inside", "in-pieces"],
)
def test_how_many_launches_a_step_takes(width, is_hopper, forward, backward, monkeypatch, request):
    """Beside the library's product for dw, which only the one kernel does without."""
    from triton.runtime.interpreter import GridExecutor

    if is_hopper:
        request.getfixturevalue("hopper")
    launches: list[int] = []
    run_one = GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *given, **named: (launches.append(1), run_one(self, *given, **named))[1]
    )
    layer, x = FusedResidualLinear(width, dtype=torch.float16), torch.randn(70, width, dtype=torch.float16)
    y = layer(x.requires_grad_())
    assert len(launches) == forward
    y.sum().backward()
    assert len(launches) == forward + backward


def counted(calls: list[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: (calls.append(name), call(*given, **named))[1]


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("skip", ["identity", "none"])
def test_what_is_recorded_of_a_gradient_that_others_have_written(skip, order):
    """The halves of dx, from dz inside the product and from the library's, are those of the kernel that records."""
    from fusedres.kernels.triton import layer_backward

    spec = LayerSpec("gelu", order, skip, skip_scale=0.5)
    operands = drawn(70, 40, 40, spec, torch.float32)
    g, (_, kept) = torch.randn(70, 40).to(DEVICE), run(operands, spec, TILED, keep=True)
    tile, wanted = Tile(32, 32, 32, 4, 2), Wanted(True, *[False] * 7)
    found = []
    for form in (Separate(tile, tile), Separate(tile, None), Inside(TILED)):
        noted = Recording(2.0, lambda row, parts: found.append(totals(parts)), 0)
        layer_backward.backward(g, operands, kept, None, spec, wanted, form, None, "ieee", PROGRAMS, noted)
    first, *others = found
    assert len(others) == 2
    for other in others:
        torch.testing.assert_close(other[:OCTAVES], first[:OCTAVES], rtol=1e-4, atol=0)
        assert other[OCTAVES:].sum() == first[OCTAVES:].sum() == 70 * 40
    assert (first[SKIP] > 0) == (skip == "identity")


def totals(parts: torch.Tensor) -> torch.Tensor:
    """One row of numbers from the parts of one gradient, its unit taken out of its sums."""
    rows = parts.flatten(0, 1).double().cpu()
    unit = rows[:, SCALE].clone()
    for at, power in ((SUM, 1), (SQUARES, 2), (BRANCH, 2), (SKIP, 2), (PRODUCT, 2)):
        rows[:, at] *= unit**power
    largest = rows[:, LARGEST].max()
    found = rows.sum(0)
    found[LARGEST], found[SCALE] = largest, 0
    return found


def test_what_the_copy_engine_takes():
    from fusedres.kernels.triton.layer_persistent import is_described

    x = torch.empty(32, 64, dtype=torch.float16)
    assert is_described(x)
    assert is_described(x[:, 8:])
    assert is_described(x[1:])
    assert not is_described(x[:, 1:]), "its first byte"
    assert not is_described(torch.empty(32, 60, dtype=torch.float16)), "its rows"
    assert not is_described(x.t()), "its inner stride"
    assert not is_described(x[:1].expand(32, -1)), "rows of no length"
