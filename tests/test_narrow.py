"""A narrow layer's backward in one kernel: every gradient against float64, on integers exactly, and its bits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from configurations import Layer, everything
from integers import compare, integers, truth_of
from layers import Case, Shape, three_ways
from tolerances import rule_for
from torch import Tensor

from fusedres import ops, philox, reference
from fusedres.kernels import record
from fusedres.kernels.config import Separate, StackTile, Tile
from fusedres.kernels.record import Recording
from fusedres.kernels.spec import Gradients, LayerSpec, Operands, Wanted
from fusedres.kernels.triton import layer_backward, layer_narrow

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # Triton's interpreter computes bf16 wrongly
]
ACTIVATIONS = ["gelu", "gelu-tanh", "relu", "silu", "tanh", "sin", "none"]
KINDS = list(product(("pre", "post"), ("identity", "residual", None)))
TILE = StackTile(16, 4, 2)
RAGGED = Shape((37,), 21, 21)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel in the place of the layer's backward, 2 programs of 16 rows at a time; how often it was called.

    Forward is the formula: it is not in question, and keeps nothing.
    """
    calls: list[int] = []

    def forward(operands: Operands, spec: LayerSpec, keep: bool) -> tuple[Tensor, None, None]:
        return reference.layer(operands, spec), None, None

    def backward(
        g: Tensor, operands: Operands, z: Tensor | None, s: Tensor | None, spec: LayerSpec, wanted: Wanted
    ) -> Gradients:
        calls.append(1)
        shapes = [None if t is None else t.shape for t in operands[:-1]]
        x, residual = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (operands.x, operands.residual))
        given = operands._replace(x=x, residual=residual)
        found = layer_narrow.backward(g.reshape(-1, g.shape[-1]), given, spec, wanted, TILE, 2, "ieee")
        pairs = zip(found, shapes, strict=True)
        return Gradients(*(None if t is None else t.reshape(shape) for t, shape in pairs))

    monkeypatch.setattr(ops, "_forward", forward)
    monkeypatch.setattr(ops, "_backward", backward)
    return calls


def check(case: Case, device: str, calls: list[int], layout: Callable[[Tensor], Tensor] = lambda g: g) -> None:
    fused, eager, truth = three_ways(case, device, layout)
    assert calls == [1], "the kernel did not run once: this test has proved nothing of it"
    for name in truth.keys() - {"y"}:
        terms = max(1.0, truth["y"].numel() / truth[name].numel()) / (1 - case.drop_path)
        rule_for(case.dtype, name).check(name, fused[name], eager[name], truth[name], terms)


def learned(skip: str | None) -> dict[str, str | float]:
    return {"skip_scale": "scalar" if skip else 1.0, "branch_scale": "channel"}


# ------------------------------------------------------------------------------------------------ against float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("order", "skip"), [("pre", "identity"), ("post", "residual")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, order, skip, dtype, device, narrow):
    named = {"activation": "gelu", "approximate": "tanh"} if activation == "gelu-tanh" else {"activation": activation}
    check(Case(RAGGED, dtype, order=order, skip=skip, **named, **learned(skip)), device, narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("order", "skip"), KINDS)
def test_every_width(order, skip, dtype, device, narrow):
    square, oblong = [(1, 1), (16, 16), (17, 17)], [(1, 33), (33, 1), (16, 60), (60, 12)]
    for N, K in square if skip == "identity" else square + oblong:
        check(Case(Shape((37,), N, K), dtype, order=order, skip=skip), device, narrow)
        narrow.clear()


def test_sums_over_many_tiles_stay_in_fp32(device, narrow):
    check(Case(Shape((1500,), 8, 8), torch.float16, **learned("identity")), device, narrow)


def test_the_widest(device, narrow):
    check(Case(Shape((37,), 128, 128), torch.float16, skip_scale="scalar"), device, narrow)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 48, 80, 81])
def test_rows_at_the_edges_of_tiles(rows, device, narrow):
    check(Case(Shape((rows,), 18, 18), order="post", skip="residual", **learned("residual")), device, narrow)


@pytest.mark.parametrize("branch_scale", [-0.5, "scalar", "channel"])
@pytest.mark.parametrize("skip_scale", [1.0, 0.7, "scalar"])
@pytest.mark.parametrize(("order", "skip"), [("pre", "identity"), ("post", "identity"), ("pre", "residual")])
def test_every_scale(order, skip, skip_scale, branch_scale, device, narrow):
    bias = branch_scale == "channel"
    case = Case(RAGGED, order=order, skip=skip, skip_scale=skip_scale, branch_scale=branch_scale, bias=bias)
    check(case, device, narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("order", "skip"), [kind for kind in KINDS if kind[1]])
def test_stochastic_depth(order, skip, dtype, device, narrow):
    check(Case(Shape((5, 19), 21, 21), dtype, order=order, skip=skip, drop_path=0.4, **learned(skip)), device, narrow)


@pytest.mark.parametrize(("order", "skip"), [("pre", "identity"), ("post", "residual")])
@pytest.mark.parametrize("layout", ["expanded", "one-column-expanded", "transposed", "sliced", "every-other"])
def test_every_layout_of_the_incoming_gradient(layout, order, skip, device, narrow):
    laid_out = {
        "expanded": lambda g: g[0, 0].expand_as(g),
        "one-column-expanded": lambda g: g[:, :1].expand_as(g),
        "transposed": lambda g: g.t().contiguous().t(),
        "sliced": lambda g: torch.cat([g[:, :1], g, g[:, :1]], 1)[:, 1:-1],
        "every-other": lambda g: g.repeat_interleave(2, 1)[:, ::2],
    }[layout]
    check(Case(RAGGED, order=order, skip=skip), device, narrow, laid_out)


@pytest.mark.parametrize("operand", ["x", "weight", "bias", "residual", "branch_scale"])
def test_every_layout_of_operands(operand, device, narrow):
    def layout(name: str, t: Tensor) -> Tensor:
        return t if name != operand else t.repeat_interleave(2, -1)[..., ::2] if t.dim() == 1 else t.t().clone().t()

    case = Case(Shape((37,), 21, 18), order="post", skip="residual", layout=layout, **learned("residual"))
    check(case, device, narrow)


def test_no_rows(device):
    g, operands = drawn(EXACT["everything"], 0, 12, 9, torch.float32, device)
    found = run(g, operands, EXACT["everything"].spec, everything(operands))
    assert (found.x.shape, found.residual.shape) == ((0, 9), (0, 12))
    assert all(t.abs().sum() == 0 for t in (found.weight, found.bias, found.skip_scale, found.branch_scale))


def test_offsets_beyond_32_bits(device):
    """Rows 2³⁰ elements apart: the third row's offset does not fit an int32. Untouched pages cost no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**30 + 8
    g, operands = drawn(EXACT["identity"], 3, 16, 16, torch.float16, device)
    x = torch.empty(2 * stride + 16, dtype=torch.float16, device=device).as_strided((3, 16), (stride, 1))
    x.copy_(operands.x)
    near = run(g, operands, EXACT["identity"].spec, everything(operands))
    far = run(g, operands._replace(x=x), EXACT["identity"].spec, everything(operands))
    assert x.stride(0) == stride
    assert torch.equal(far.x, near.x)
    assert torch.equal(far.weight, near.weight)


# ------------------------------------------------------------------------------------------------ exactly

EXACT = {  # relu and no activation keep integers; λ, a and 1 / (1 - drop_path) are powers of two
    "everything": Layer(LayerSpec("relu", "post", "residual", drop_path=0.5), is_learned=True, has_residual=True),
    "identity": Layer(LayerSpec("relu", skip="identity", skip_scale=2.0, drop_path=0.5)),
    "post-identity": Layer(LayerSpec("relu", "post", skip="identity", branch_scale=-2.0), is_learned=True),
    "residual": Layer(LayerSpec("relu", skip="residual", skip_scale=-2.0), has_residual=True),
    "bare": Layer(LayerSpec("none", branch_scale=2.0)),
}


def drawn(subject: Layer, M: int, N: int, K: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Operands]:
    """g and operands of integers."""
    draw = torch.Generator().manual_seed(M * 10_000 + N * 100 + K)

    def make(name: str, *shape: int) -> Tensor:
        return integers(name, shape, K, draw).to(device, dtype)

    operands = subject.operands(M, N, K, make)
    if operands.seed is not None:
        operands = operands._replace(seed=torch.randint(2**62, (), generator=draw))
    return make("g", M, N), operands


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_every_element_is_exact(name, dtype, device):
    subject = EXACT[name]
    for M, N, K, tile, programs in [
        (1, 16, 16, StackTile(16, 4, 3), 4),
        (35, 5, 23, StackTile(16, 4, 2), 2),
        (67, 23, 5, StackTile(32, 4, 1), 1),
        (131, 64, 64, StackTile(64, 4, 3), 132),
        (67, 96, 96, StackTile(32, 8, 2), 2),
    ]:
        K = N if subject.spec.skip == "identity" else K
        g, operands = drawn(subject, M, N, K, dtype, device)
        *_, truth = truth_of(operands, subject.spec, g)
        found = layer_narrow.backward(g, operands, subject.spec, everything(operands), tile, programs, "ieee")
        pairs = {name: (t, truth[name]) for name, t in found._asdict().items() if t is not None}
        assert pairs.keys() == truth.keys()
        assert compare(pairs, f" of {M} x {N} x {K}") == []


@pytest.mark.parametrize("name", ["everything", "post-identity", "residual"])
def test_any_number_of_programs(name, device):
    g, operands = drawn(EXACT[name], 83, 12, 12, torch.float32, device)
    *_, truth = truth_of(operands, EXACT[name].spec, g)
    for programs in (1, 3, 5, 6, 1000):
        found = layer_narrow.backward(g, operands, EXACT[name].spec, everything(operands), TILE, programs, "ieee")
        pairs = {name: (t, truth[name]) for name, t in found._asdict().items() if t is not None}
        assert compare(pairs, f" by {programs}") == []


# ------------------------------------------------------------------------------------------------ bits


def normal(subject: Layer, M: int, N: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Operands]:
    """g and operands, normally distributed."""
    operands = subject.operands(M, N, N, lambda name, *shape: torch.randn(shape).to(device, dtype))
    return torch.randn(M, N).to(device, dtype), operands


def run(g: Tensor, operands: Operands, spec: LayerSpec, wanted: Wanted, **options: Any) -> Gradients:
    return layer_narrow.backward(g, operands, spec, wanted, TILE, 2, "ieee", **options)


@pytest.mark.parametrize("name", ["everything", "post-identity", "residual", "bare"])
def test_every_subset_of_gradients_has_the_bits_of_all(name, device):
    spec = EXACT[name].spec._replace(activation="gelu")
    g, operands = normal(EXACT[name], 19, 12, device)
    every = everything(operands)
    names = [name for name, is_wanted in every._asdict().items() if is_wanted]
    full = run(g, operands, spec, every)
    for chosen in product((False, True), repeat=len(names)):
        wanted = Wanted(*(name in names and chosen[names.index(name)] for name in Wanted._fields))
        for name, t in run(g, operands, spec, wanted)._asdict().items():
            assert (t is not None) == getattr(wanted, name), name
            assert t is None or torch.equal(t, getattr(full, name)), name


def test_two_runs_give_the_same_bits(device):
    spec = EXACT["everything"].spec._replace(activation="gelu")
    g, operands = normal(EXACT["everything"], 150, 40, device)
    first, second = (layer_narrow.backward(g, operands, spec, everything(operands), TILE, 7, "ieee") for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_share_no_memory(device):
    g, operands = normal(EXACT["everything"], 37, 12, device)
    found = [t for t in run(g, operands, EXACT["everything"].spec, everything(operands)) if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in (*found, g)}) == len(found) + 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("order", "skip"), KINDS)
def test_what_is_no_number_stays_in_its_row(order, skip, bad, device, narrow):
    """In dx; in the sums over rows it is where eager has it. tanh' is 0 at infinity, so that a finite dz goes on."""
    case = Case(Shape((40,), 20, 20), activation="tanh", order=order, skip=skip, **learned(skip))

    def spoiled(name: str, t: Tensor) -> Tensor:
        if name == "x":
            t[7, 3] = bad
        return t

    case.layout = spoiled
    fused, eager, _ = three_ways(case, device)
    assert narrow == [1]
    others = torch.arange(40, device=device) != 7
    assert fused["dx"][others].isfinite().all()
    for name in eager:
        assert torch.equal(fused[name].isnan(), eager[name].isnan()), name


@pytest.mark.parametrize("order", ["pre", "post"])
def test_a_dropped_row_spoils_no_gradient(order, device):
    """Though what its branch would be has no square in float32, nor any gelu'."""
    subject = Layer(LayerSpec("relu" if order == "post" else "gelu", order, "identity", drop_path=0.5), is_learned=True)
    g, operands = normal(subject, 40, 20, device)
    operands = operands._replace(weight=8 * operands.weight)
    row = int((~philox.kept_rows(operands.seed, (40,), 1 << 31, g.device)).nonzero()[0])
    operands.x[row] = 3e38 * operands.x[row].sign()
    found = run(g, operands, subject.spec, everything(operands))
    assert all(t.isfinite().all() for t in found._replace(skip_scale=None) if t is not None)  # dλ is Σ g x


def test_a_gradient_of_a_wider_type(device):
    """As autocast gives it where a residual is wider than x."""
    g, operands = normal(EXACT["residual"], 37, 12, device, torch.float16)
    operands = operands._replace(residual=operands.residual.float())
    found = run(g.float(), operands, EXACT["residual"].spec, everything(operands))
    assert (found.x.dtype, found.residual.dtype) == (torch.float16, torch.float32)
    assert torch.equal(found.residual, -2 * g.float())


@pytest.mark.parametrize("skip", ["identity", "none"])
def test_what_is_recorded(skip, device):
    """The same as of the same dx by the layer's separate kernels, and no bit of a gradient changes."""
    subject = Layer(LayerSpec("none", skip=skip, skip_scale=2.0))  # dz is g itself, so that both round alike
    g, operands = drawn(subject, 83, 12, 12, torch.float16, device)
    plain = run(g, operands, subject.spec, everything(operands))
    noted: list[tuple[int, Tensor]] = []
    recording = Recording(0.5, lambda row, parts: noted.append((row, parts)), 3)
    found = run(g, operands, subject.spec, everything(operands), recording=recording)
    tile = Tile(16, 16, 16, 4, 2)
    form, wanted = Separate(tile, tile), everything(operands)
    layer_backward.backward(g, operands, None, None, subject.spec, wanted, form, None, "ieee", 1, recording)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    (row, ours), (_, theirs) = noted
    assert (row, ours.shape) == (3, (2, 1, record.ROW))
    assert torch.equal(totals(ours), totals(theirs))
    assert totals(ours)[record.COUNT] == 83 * 12
    assert totals(ours)[record.SUM] == (0.5 * found.x.double()).abs().sum()


def totals(parts: Tensor) -> Tensor:
    """One row [ROW] in float64 of parts [parts, 1, ROW]: sums in the unit 1, integers here, so exact."""
    parts = parts[:, 0].double()
    unit = parts[:, record.SCALE, None]
    parts[:, [record.SUM]] *= unit
    squares = [record.SQUARES, record.BRANCH, record.SKIP, record.PRODUCT]
    parts[:, squares] *= unit * unit
    added, largest = parts.sum(0), parts.amax(0)
    added[record.LARGEST], added[record.SCALE] = largest[record.LARGEST], 1.0
    return added
