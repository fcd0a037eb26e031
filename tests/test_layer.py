"""The layer's outputs and every gradient against float64, at least as close as eager PyTorch is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from layers import SHAPES, Case, Shape, three_ways
from tolerances import rule_for
from torch import Tensor

import fusedres
from fusedres import FusedResidualLinear, FusedResidualStack, philox

ACTIVATIONS = ["gelu", "gelu-tanh", "relu", "silu", "tanh", "sin", "none"]
SKIPS = ["identity", "residual", "projection", "concat", None]
on_every_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("triton", torch.float32),
        ("triton", torch.float16),
        pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),  # Triton's interpreter computes bf16 wrongly
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cpu", torch.float64),
    ],
    indirect=["backend"],
    ids=lambda value: str(value).removeprefix("torch."),
)
pytestmark = pytest.mark.backends("triton", "cpu")
RAGGED = Shape((19,), 21, 21)
# activation after the addition needs an addition, which concat has not: that is an error, under test in test_errors.py
SUMS = [(order, skip) for order in ("pre", "post") for skip in SKIPS if (order, skip) != ("post", "concat")]


def check(case: Case, device: str, layout: Callable[[Tensor], Tensor] = lambda g: g) -> None:
    fused, eager, truth = three_ways(case, device, layout)
    for name in truth:
        terms = terms_of(case, truth["y"], truth[name])
        rule_for(case.dtype, name).check(name, fused[name], eager[name], truth[name], terms)


def terms_of(case: Case, y: Tensor, entries: Tensor) -> float:
    """How many terms near one an entry sums up; kept rows count 1 / (1 - p) times as much as their share 1 - p."""
    return max(1.0, y.numel() / max(entries.numel(), 1)) / (1 - case.drop_path)


def named(activation: str) -> dict[str, str]:
    return {"activation": "gelu", "approximate": "tanh"} if activation == "gelu-tanh" else {"activation": activation}


def learned_scales(skip: str | None) -> dict[str, str | float]:
    return {"skip_scale": "scalar" if skip else 1.0, "branch_scale": "channel"}


@pytest.mark.usefixtures("in_pieces")
@on_every_dtype
@pytest.mark.parametrize(("order", "skip"), SUMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_order_and_skip(activation, order, skip, dtype, device):
    check(Case(RAGGED, dtype, order=order, skip=skip, **named(activation), **learned_scales(skip)), device)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@on_every_dtype
@pytest.mark.parametrize("skip", ["residual", "projection"])
def test_every_shape(shape, dtype, skip, device):
    check(Case(shape, dtype, skip=skip, skip_scale="scalar"), device)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("branch_scale", [1.0, -0.5, "scalar", "channel"])
@pytest.mark.parametrize("skip_scale", [1.0, 0.7, "scalar"])
@pytest.mark.parametrize(
    ("order", "skip"), [("pre", "identity"), ("pre", "concat"), ("post", "residual"), ("post", "projection")]
)
def test_every_scale_and_memory_policy(order, skip, skip_scale, branch_scale, bias, recompute, device):
    check(
        Case(
            RAGGED,
            order=order,
            skip=skip,
            skip_scale=skip_scale,
            branch_scale=branch_scale,
            bias=bias,
            recompute=recompute,
        ),
        device,
    )


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize(("order", "skip"), [pair for pair in SUMS if pair[1] is not None])
def test_stochastic_depth(order, skip, device):
    check(Case(Shape((5, 19), 21, 21), order=order, skip=skip, drop_path=0.4, **learned_scales(skip)), device)


def transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t() if t.dim() == 2 else t


def sliced(t: Tensor) -> Tensor:
    """The same values as columns of a wider matrix: a row stride that is not the width, an odd first address."""
    return torch.cat([t[..., :1], t, t[..., :1], t[..., :1]], -1)[..., 1:-2] if t.dim() > 0 else t


def every_other(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2] if t.dim() > 0 else t


LAYOUTS = {"transposed": transposed, "sliced": sliced, "every-other": every_other}


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("operand", ["x", "weight", "bias", "residual", "projection_weight", "branch_scale"])
def test_every_layout_of_operands(operand, layout, device):
    skip = operand if operand == "residual" else "projection" if operand.startswith("projection") else "identity"
    case = Case(RAGGED, skip=skip, branch_scale="channel", layout=lambda n, t: layout(t) if n == operand else t)
    strides = case.tensors(device)[operand].stride()
    dense = Case(RAGGED, skip=skip, branch_scale="channel").tensors(device)[operand].stride()
    assert strides != dense or operand in ("bias", "branch_scale")
    check(case, device)


def test_expanded_rows(device):
    check(Case(RAGGED, layout=lambda n, t: t[:1].detach().expand_as(t) if n == "x" else t), device)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced", "every-other", "one-column-expanded"])
def test_every_layout_of_the_incoming_gradient(layout, skip, recompute, device):
    laid_out = {
        "expanded": lambda g: g[0, 0].expand_as(g),
        "one-column-expanded": lambda g: g[:, :1].expand_as(g),
        **LAYOUTS,
    }[layout]
    check(Case(RAGGED, skip=skip, recompute=recompute), device, laid_out)


@pytest.mark.parametrize("skip", SKIPS, ids=str)
def test_nan_stays_in_its_row(skip, device):
    case = Case(Shape((70,), 20, 20), skip=skip)
    tensors = case.tensors(device)
    with torch.no_grad():
        tensors["x"][7, 3] = float("nan")
    y = fusedres.functional.residual_linear(**tensors, **case.options())
    (dx,) = torch.autograd.grad(y, [tensors["x"]], torch.ones_like(y))
    others = torch.arange(70, device=device) != 7
    assert y[7].isnan().any()
    assert y[others].isfinite().all()
    assert dx[7].isnan().any()
    assert dx[others].isfinite().all()


def finite_where_dropped(module, x, device):
    """That a row which loses its branch in every layer spoils nothing, though its branch would be infinite."""
    torch.manual_seed(5)
    depth = len(getattr(module, "layers", [module]))
    kept = torch.stack([philox.kept_rows(philox.draw_seed(), x.shape[:1], 1 << 31, x.device) for _ in range(depth)])
    row = int((~kept.any(0)).nonzero()[0])
    with torch.no_grad():
        x[row] = 3e38 * x[row].sign()
    x.requires_grad_()
    torch.manual_seed(5)
    y = module(x)
    found = torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))
    assert all(gradient.isfinite().all() for gradient in (y, *found))


@pytest.mark.parametrize("way", ["fused", pytest.param("formula", marks=pytest.mark.launches_nothing)])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("kind", ["layer", "stack"])
def test_a_dropped_row_spoils_no_gradient(kind, order, recompute, way, device):
    torch.manual_seed(0)
    activation = "relu" if order == "post" else "gelu"  # of 3e38 itself, gelu' is no number in eager
    options = {"drop_path": 0.5, "order": order, "activation": activation, "learn_branch_scale": "channel"}
    options["recompute"] = recompute
    made = FusedResidualLinear(16, **options) if kind == "layer" else FusedResidualStack([16] * 3, **options)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("weight"):
                p.mul_(8)
    with fusedres.eager() if way == "formula" else nullcontext():
        finite_where_dropped(made.to(device), torch.randn(24, 16).to(device), device)


def test_two_runs_give_the_same_bits(device):
    case = Case(Shape((150,), 40, 40), skip="projection", drop_path=0.3, **learned_scales("projection"))
    torch.manual_seed(3)
    first, _, _ = three_ways(case, device)
    torch.manual_seed(3)
    second, _, _ = three_ways(case, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.launches_nothing
@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(leading, skip, device):
    fused, eager, _ = three_ways(Case(Shape(leading, 6, 6), skip=skip), device)
    assert all(torch.equal(fused[name], eager[name]) for name in eager)
    assert fused["dweight"].abs().sum() == 0


@pytest.mark.launches_nothing
@pytest.mark.parametrize(("N", "K"), [(0, 4), (4, 0), (0, 0)], ids=str)
def test_no_features(N, K, device):
    skip = "identity" if N == K else None
    fused, eager, _ = three_ways(Case(Shape((3,), N, K), skip=skip), device)
    assert all(torch.equal(fused[name], eager[name]) for name in eager)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", torch.float16), ("cpu", torch.bfloat16)], indirect=["backend"], ids=str
)
def test_offsets_beyond_32_bits(dtype, device):
    """Rows 2³⁰ elements apart: the third row's offset does not fit an int32. Untouched pages cost no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**30 + 8
    x = torch.empty(2 * stride + 16, dtype=dtype, device=device).as_strided((3, 16), (stride, 1))
    with torch.no_grad():
        x.copy_(torch.randn(3, 16))
    weight = torch.randn(16, 16, device=device, dtype=dtype) / 4
    far = fusedres.functional.residual_linear(x, weight)
    near = fusedres.functional.residual_linear(x.clone(memory_format=torch.contiguous_format), weight)
    assert x.stride(0) == stride
    assert torch.equal(far, near)


@pytest.mark.parametrize("allowed", [False, True], ids=["highest", "high"])
def test_fp32_products_follow_the_matmul_precision(allowed, device):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        assert fusedres.dispatch.precision(torch.float32) == ("tf32" if allowed else "ieee")
        if not allowed or device == "cpu":  # the interpreter multiplies in full fp32 either way
            check(Case(RAGGED), device)
    finally:
        torch.set_float32_matmul_precision(before)


def test_lazily_negated_tensors_keep_their_sign(device):
    """torch keeps the sign of conj().imag aside from the memory that a kernel reads."""
    x, weight, bias, g = (
        torch._neg_view(torch.randn(*shape, device=device)) for shape in ((9, 16), (16, 16), (16,), (9, 16))
    )
    assert all(t.is_neg() for t in (x, weight, bias, g))
    dense = [t.resolve_neg().clone().requires_grad_() for t in (x, weight, bias)]
    lazy = [t.detach().requires_grad_() for t in (x, weight, bias)]
    outcomes = []
    for tensors, gradient in ((lazy, g), (dense, g.resolve_neg())):
        y = fusedres.functional.residual_linear(*tensors)
        outcomes.append([y, *torch.autograd.grad(y, tensors, gradient)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_gradients_share_no_memory(device):
    tensors = Case(RAGGED, skip_scale="scalar", branch_scale="channel").tensors(device)
    y = fusedres.functional.residual_linear(**tensors)
    found = torch.autograd.grad(y.sum(), list(tensors.values()))
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


@pytest.mark.launches_nothing
def test_concat_with_a_residual_of_no_width(device):
    x, weight = torch.randn(5, 8, device=device), torch.randn(16, 8, device=device)
    y = fusedres.functional.residual_linear(x, weight, residual=torch.randn(5, 0, device=device), skip="concat")
    assert y.shape == (5, 16)


def test_tf32_allowed_by_torchs_newer_setting(device):
    """After it, torch.get_float32_matmul_precision raises."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert fusedres.dispatch.precision(torch.float32) == "tf32"
        fusedres.functional.residual_linear(torch.randn(3, 8, device=device), torch.randn(8, 8, device=device))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
