"""The residual around a block: its sum and gradients on every backend against float64, and the module around them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_operator import SINGLE, Log, dynamo, weighted_sum  # noqa: F401 : a fixture
from tolerances import rule_for
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import fusedres
from fusedres import Residual, checks, philox, residual_dispatch, residual_ops
from fusedres.functional import residual
from fusedres.kernels.spec import LayerSpec

pytestmark = pytest.mark.backends("triton", "cpu")


@pytest.fixture(autouse=True)
def _every_size_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_dispatch, "LEAST", 0)
    monkeypatch.setattr(residual_dispatch, "LEAST_OF_ONE_PASS", 0)


Layout = Callable[[Tensor], Tensor]


def as_it_is(t: Tensor) -> Tensor:
    return t


@dataclass
class Sum:
    """One sum: its shape and options; scales "scalar" or "channel" are learned, numbers are not."""

    shape: tuple[int, ...] = (37, 67)
    dtype: torch.dtype = torch.float32
    branch_scale: float | str = "scalar"
    skip_scale: float | str = 1.0
    channel_dim: int = -1
    drop_path: float = 0.0
    branch_layout: Layout = as_it_is
    x_layout: Layout = as_it_is
    g_layout: Layout = as_it_is

    def tensors(self, device: str) -> dict[str, Tensor]:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape).to(device, self.dtype)

        made = {"branch": self.branch_layout(drawn(*self.shape)), "x": self.x_layout(drawn(*self.shape))}
        if isinstance(self.branch_scale, str):
            channels = (self.shape[self.channel_dim],) if self.branch_scale == "channel" else ()
            made["branch_scale"] = drawn(*channels)
        if self.skip_scale == "scalar":
            made["skip_scale"] = drawn()
        return {name: t.detach().requires_grad_() for name, t in made.items()}

    def options(self) -> dict[str, Any]:
        numbers = {"branch_scale": self.branch_scale, "skip_scale": self.skip_scale}
        given = {name: value for name, value in numbers.items() if not isinstance(value, str)}
        return {**given, "channel_dim": self.channel_dim, "drop_path": self.drop_path}


def formula(
    branch: Tensor,
    x: Tensor,
    *,
    branch_scale: Any = 1.0,
    skip_scale: Any = 1.0,
    channel_dim: int = -1,
    drop_path: float = 0.0,
) -> Tensor:
    """a drop(branch) + λ x as one writes it."""
    a = branch_scale
    if isinstance(a, Tensor) and a.dim():
        shape = [1] * x.dim()
        shape[channel_dim] = -1
        a = a.view(shape)
    branch = a * branch
    if drop_path:
        spec = LayerSpec(drop_path=drop_path)
        kept = philox.kept_rows(philox.draw_seed(), x.shape[:1], spec.drop_threshold, x.device)
        kept = kept.view(-1, *[1] * (x.dim() - 1))
        branch = torch.where(kept, branch / (1 - drop_path), 0)
    return branch + skip_scale * x


def outcome(call: Callable[..., Tensor], tensors: dict[str, Tensor], g: Tensor, options: dict) -> dict[str, Tensor]:
    torch.manual_seed(1)
    y = call(**tensors, **options)
    found = torch.autograd.grad(y, list(tensors.values()), g.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": t for name, t in zip(tensors, found, strict=True)}}


def check(case: Sum, device: str) -> dict[str, Tensor]:
    """Fused is as close to float64 as eager's rules ask; the fused outcome."""
    tensors = case.tensors(device)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    g = case.g_layout(torch.randn(case.shape).to(device, case.dtype))
    fused = outcome(residual, tensors, g, case.options())
    truth = outcome(formula, wide, g.double(), case.options())
    eager = truth if case.dtype == torch.float64 else outcome(formula, tensors, g, case.options())
    for name, value in fused.items():
        terms = truth["y"].numel() / truth[name].numel()
        rule_for(case.dtype, name).check(name, value, eager[name], truth[name], terms)
    return fused


# ---------------------------------------------------------------------------------------------- the sum

on_every_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("triton", torch.float32),
        ("triton", torch.float16),
        ("cpu", torch.float32),
        ("cpu", torch.float64),
        ("cpu", torch.bfloat16),
    ],
    indirect=["backend"],
    ids=str,
)


SCALES = [
    (branch_scale, skip_scale, drop_path)
    for branch_scale in (1.0, -0.5, "scalar", "channel")
    for skip_scale in (1.0, 0.7, "scalar")
    for drop_path in (0.0, 0.4)
    if (branch_scale, skip_scale, drop_path) != (1.0, 1.0, 0.0)  # an addition, and no kernel's work
]


@pytest.mark.parametrize(("branch_scale", "skip_scale", "drop_path"), SCALES)
@on_every_dtype
def test_every_scale(dtype, branch_scale, skip_scale, drop_path, device, monkeypatch):
    monkeypatch.setattr(residual_dispatch, "is_one_pass", lambda *_: False)  # what dispatch leaves to PyTorch too
    check(Sum(dtype=dtype, branch_scale=branch_scale, skip_scale=skip_scale, drop_path=drop_path), device)


SHAPES = {
    "one-number": (1,),
    "a-few-numbers": (7,),
    "one-row": (1, 65),
    "one-column": (65, 1),
    "ragged-rows": (131, 33),
    "more-than-a-line": (20_011,),
    "rows-longer-than-a-line": (3, 2051),
    "lines-of-two-shares": (270, 131),
    "rows-of-few-numbers": (700, 3),
    "images": (5, 3, 6, 7),
    "images-of-one-pixel": (5, 3, 1, 1),
    "many-dimensions": (2, 3, 2, 3, 2, 3),
}


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@on_every_dtype
def test_every_shape(dtype, shape, drop_path, device):
    check(Sum(shape, dtype, skip_scale="scalar", drop_path=drop_path), device)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_channel_dimension(shape, drop_path, device):
    for channel_dim in range(-len(shape), len(shape)):
        case = Sum(shape, branch_scale="channel", skip_scale=0.5, channel_dim=channel_dim, drop_path=drop_path)
        check(case, device)


LAYOUTS: dict[str, Layout] = {
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "samples-innermost": lambda t: t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda t: torch.cat([t[..., :1], t, t[..., :1]], -1)[..., 1:-1],
    "every-other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
    "expanded-inside": lambda t: t[:, :, :1].expand_as(t),
    "of-one-number": lambda t: t[0, 0, 0, 0].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (6, 5, 2, 1)),
}


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("where", ["branch", "x", "g", "all"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(layout, where, drop_path, device):
    layouts = {f"{one}_layout": layout for one in ("branch", "x", "g") if where in (one, "all")}
    for branch_scale in ("scalar", "channel"):
        case = Sum((5, 4, 3, 6), drop_path=drop_path, branch_scale=branch_scale, channel_dim=1, **layouts)
        check(case, device)


def test_the_result_lies_as_the_branch_does(device):
    x = torch.randn(3, 4, 5, 6, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    a = torch.tensor(0.5, device=device)
    assert residual(last, x, branch_scale=a).stride() == last.stride()
    assert residual(x, last, branch_scale=a).stride() == x.stride()
    assert residual(x[:1].expand_as(x), x, branch_scale=a).is_contiguous()


@on_every_dtype
def test_integers_are_exact(dtype, device):
    """Σ of up to 64 products of -2, …, 2: below 2⁸, which bfloat16 can count to."""
    shape = (8, 8)
    branch, x, g = (torch.randint(-2, 3, shape).to(device, dtype).requires_grad_() for _ in range(3))
    a, lam = (torch.tensor(value, device=device, dtype=dtype).requires_grad_() for value in (2.0, -3.0))
    y = residual(branch, x, branch_scale=a, skip_scale=lam)
    found = torch.autograd.grad(y, (branch, x, a, lam), g)
    assert torch.equal(y, 2 * branch - 3 * x)
    for one, expected in zip(found, (2 * g, -3 * g, (g * branch).sum(), (g * x).sum()), strict=True):
        assert torch.equal(one, expected.to(dtype))


def test_nan_stays_where_it_is(device):
    branch, x = torch.randn(30, 70, device=device), torch.randn(30, 70, device=device)
    branch[3, 5], x[20, 69] = float("nan"), float("inf")
    y = residual(branch, x, branch_scale=torch.tensor(0.5, device=device))
    wrong = ~y.isfinite()
    assert wrong.nonzero().tolist() == [[3, 5], [20, 69]]


@pytest.mark.launches_nothing
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)], ids=str)
def test_no_rows(shape, device):
    case = Sum(shape, skip_scale="scalar")
    tensors, g = case.tensors(device), torch.randn(shape, device=device)
    fused, plain = (outcome(call, tensors, g, case.options()) for call in (residual, formula))
    assert_close(fused, plain)


@pytest.mark.parametrize("branch_scale", ["scalar", "channel"])
def test_two_runs_give_the_same_bits_on_any_number_of_threads(branch_scale, backend, device):
    before, outcomes = torch.get_num_threads(), []
    shape = (300, 257) if backend == "cpu" else (60, 97)  # of several threads' work, and of several tiles
    case = Sum(shape, branch_scale=branch_scale, skip_scale="scalar")
    tensors, g = case.tensors(device), torch.randn(case.shape, device=device)
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        outcomes.append(outcome(residual, tensors, g, case.options()))
    torch.set_num_threads(before)
    assert all(torch.equal(value, other[name]) for other in outcomes[1:] for name, value in outcomes[0].items())


def test_gradients_share_no_memory(device):
    tensors = Sum(skip_scale="scalar").tensors(device)
    found = torch.autograd.grad(residual(**tensors).sum(), list(tensors.values()))
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


def test_lazily_negated_tensors_keep_their_sign(device):
    branch, x, a = (torch._neg_view(torch.randn(*s, device=device)) for s in ((9, 16), (9, 16), (16,)))
    assert branch.is_neg()
    assert_close(residual(branch, x, branch_scale=a), a * branch + x)


# ---------------------------------------------------------------------------------------------- stochastic depth


def test_every_backend_drops_the_same_samples(device):
    branch, x = torch.ones(40, 3, 5, device=device), torch.zeros(40, 3, 5, device=device)
    torch.manual_seed(5)
    fused = residual(branch, x, drop_path=0.5)
    torch.manual_seed(5)
    with fusedres.eager():
        eager = residual(branch, x, drop_path=0.5)
    torch.manual_seed(5)
    layer = fusedres.functional.residual_linear(
        torch.ones(40, 1, device=device), torch.ones(1, 1, device=device), activation="none", drop_path=0.5
    )
    assert torch.equal(fused, eager)
    assert set(fused.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(fused[:, 0, :1] > 0, layer > 1), "a layer drops the rows that these samples are"


def test_a_nan_branch_that_is_dropped_is_gone(device):
    x, a = torch.randn(64, 12, device=device), torch.tensor(0.5, device=device, requires_grad=True)
    torch.manual_seed(5)
    rows = (residual(torch.ones_like(x), x, drop_path=0.5) == x).all(-1)
    assert 0 < rows.sum() < 64
    branch = torch.where(rows[:, None], float("nan"), torch.full_like(x, 3))
    torch.manual_seed(5)
    y = residual(branch, x, branch_scale=a, drop_path=0.5)
    assert torch.equal(y[rows], x[rows])
    (da,) = torch.autograd.grad(y.sum(), a)
    assert da == 3 * 2 * (~rows).sum() * 12


def test_a_nan_gradient_of_a_dropped_branch_is_gone(device):
    branch, x = torch.randn(64, 12, device=device, requires_grad=True), torch.randn(64, 12, device=device)
    for a in (torch.tensor(0.5, device=device), torch.rand(12, device=device)):
        torch.manual_seed(5)
        rows = (residual(torch.ones_like(x), x, branch_scale=a, drop_path=0.5) == x).all(-1)
        torch.manual_seed(5)
        y = residual(branch, x, branch_scale=a, drop_path=0.5)
        (db,) = torch.autograd.grad(y, branch, torch.where(rows[:, None], float("nan"), torch.ones_like(x)))
        assert torch.equal(db, torch.where(rows[:, None], 0.0, 2 * a).expand_as(db))


@pytest.mark.launches_nothing
def test_nothing_drops_in_eval_mode(device):
    module = Residual(nn.Identity(), drop_path=0.9).eval()
    x = torch.randn(30, 12, device=device)
    assert torch.equal(module(x), 2 * x)


# ---------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("branch_scale", ["scalar", "channel"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_unlike_dtypes_promote(branch_scale, dtype, device):
    """As autocast leaves them: a half branch, x and scales in float32."""
    case = Sum(branch_scale=branch_scale, skip_scale="scalar")
    tensors = case.tensors(device)
    tensors["branch"] = tensors["branch"].detach().half().requires_grad_()
    tensors["x"] = tensors["x"].detach().to(dtype).requires_grad_()
    g = torch.randn(case.shape, device=device)
    fused, eager = (outcome(call, tensors, g, case.options()) for call in (residual, formula))
    for name, value in eager.items():
        assert fused[name].dtype == value.dtype, name
        assert_close(fused[name], value, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.launches_nothing
def test_autocast(backend, device):
    low = torch.bfloat16 if backend == "cpu" else torch.float16
    module = Residual(nn.Linear(8, 8), learn_branch_scale=True, learn_skip_scale=True, branch_scale=0.5).to(device)
    x = torch.randn(4, 8, device=device)
    with torch.autocast(device, low):
        for given in (x, x.to(low)):
            expected = module.branch_scale * module.block(given) + module.skip_scale * given
            y = module(given)
            assert y.dtype == expected.dtype
            assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_scales_of_another_dtype(backend, device):
    """One number changes no dtype, whatever its own."""
    low = torch.bfloat16 if backend == "cpu" else torch.float16
    branch, x = (torch.randn(9, 16).to(device, low).requires_grad_() for _ in range(2))
    a = torch.tensor(0.3, device=device, requires_grad=True)
    y = residual(branch, x, branch_scale=a)
    found = torch.autograd.grad(y.sum(), (branch, x, a))
    assert [t.dtype for t in (y, *found)] == [low, low, low, torch.float32]
    assert_close(found[2], branch.float().sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scales_of_any_dtype_where_rows_drop(dtype, device):
    torch.manual_seed(0)
    branch, x = torch.randn(2, 9, 16, device=device)
    scales = {"branch_scale": torch.tensor(0.75, dtype=dtype), "skip_scale": torch.tensor(-0.5, dtype=dtype)}
    scales = {name: scale.to(device).requires_grad_() for name, scale in scales.items()}

    def both(call):
        torch.manual_seed(1)
        y = call()
        return y, *torch.autograd.grad(y.sum(), list(scales.values()))

    y, da, dlam = both(lambda: residual(branch, x, **scales, drop_path=0.4))
    with fusedres.eager():
        expected = both(lambda: residual(branch, x, **scales, drop_path=0.4))
    for found, other in zip((y, da, dlam), expected, strict=True):
        assert_close(found, other, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("frozen", [("branch",), ("x",), ("branch_scale",), ("skip_scale",), ("branch", "x")], ids=str)
def test_what_is_frozen_costs_the_others_nothing(frozen, device):
    case = Sum(branch_scale="channel", skip_scale="scalar")
    tensors, g = case.tensors(device), torch.randn(37, 67, device=device)
    every = outcome(residual, tensors, g, case.options())
    for name in frozen:
        tensors[name].requires_grad_(False)
    rest = [name for name in tensors if name not in frozen]
    torch.manual_seed(1)
    found = torch.autograd.grad(residual(**tensors, **case.options()), [tensors[name] for name in rest], g)
    assert all(torch.equal(value, every[f"d{name}"]) for name, value in zip(rest, found, strict=True))


def test_backward_keeps_what_it_reads(device):
    case = Sum(branch_scale=0.5, skip_scale="scalar")
    tensors, kept = case.tensors(device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        residual(**tensors, **case.options())
    assert sorted(kept) == [(), case.shape]  # λ and x; not the branch, whose scale is fixed


def test_a_second_backward_is_right(backend, device):
    dtype = torch.float64 if backend == "cpu" else torch.float32
    for branch_scale, drop_path in (("scalar", 0.0), ("channel", 0.0), ("scalar", 0.4)):
        case = Sum((5, 3), dtype, branch_scale=branch_scale, skip_scale="scalar", drop_path=drop_path)
        tensors = case.tensors(device)

        def second(call, case=case, tensors=tensors):
            torch.manual_seed(1)
            first = torch.autograd.grad(
                weighted_sum(call(**tensors, **case.options())), list(tensors.values()), create_graph=True
            )
            return torch.autograd.grad(sum(t.square().sum() for t in first), list(tensors.values()))

        assert_close(second(residual), second(formula), **SINGLE)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_gradcheck(device):
    case = Sum((4, 3), torch.float64, branch_scale="channel", skip_scale="scalar")
    tensors = case.tensors(device)

    def call(*values):
        return residual(**dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(call, tuple(tensors.values()))


@pytest.mark.launches_nothing
def test_transforms_and_forward_mode(device):
    x, a = torch.randn(4, 6, device=device), torch.tensor(0.5, device=device)

    def loss(x):
        return weighted_sum(residual(x.sin(), x, branch_scale=a))

    def plain(x):
        return weighted_sum(a * x.sin() + x)

    assert_close(grad(loss)(x), grad(plain)(x))
    assert_close(vmap(grad(loss))(x), vmap(grad(plain))(x))
    assert_close(jvp(loss, (x,), (x,)), jvp(plain, (x,), (x,)))


def test_a_batch_of_gradients(device):
    tensors = Sum(skip_scale="scalar").tensors(device)
    y, gs = residual(**tensors), torch.randn(3, 37, 67, device=device)
    found = torch.autograd.grad(y, list(tensors.values()), gs, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(gs):
        one = torch.autograd.grad(y, list(tensors.values()), g, retain_graph=True)
        assert_close([t[i] for t in found], list(one), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- registered

CASES = {
    "scalars": Sum((5, 6), skip_scale="scalar"),
    "channels": Sum((5, 3, 4), branch_scale="channel", channel_dim=1),
    "channels-last": Sum((5, 3, 4, 2), branch_scale="channel", channel_dim=1, branch_layout=LAYOUTS["channels-last"]),
    "numbers": Sum((5, 6), branch_scale=0.3, skip_scale=0.5),
    "dropped": Sum((5, 6), branch_scale="scalar", drop_path=0.5),
    "expanded": Sum((5, 3, 4, 2), x_layout=LAYOUTS["expanded"]),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def operator_arguments(case: Sum, device: str) -> tuple[list, tuple]:
    tensors = case.tensors(device)
    given = {"skip_scale": 1.0, "branch_scale": 1.0, **case.options(), **tensors}
    names = ("branch", "x", "skip_scale", "branch_scale", "channel_dim", "drop_path")
    terms, spec = checks.described_sum(*(given[name] for name in names), True)
    if case.drop_path:
        terms = terms._replace(seed=torch.tensor(12345))
    terms = [t if t is None or t.is_leaf else t.detach().requires_grad_() for t in terms]
    return terms, residual_ops._numbers(spec)


@every_case
def test_opcheck(case, device):
    terms, numbers = operator_arguments(case, device)
    torch.library.opcheck(torch.ops.fusedres.residual, (*terms, *numbers))


@every_case
def test_opcheck_backward(case, device):
    (branch, x, a, lam, seed), numbers = operator_arguments(case, device)
    wanted = [True, True, a is not None, lam is not None]
    kept = [t if is_read else None for t, is_read in ((branch, wanted[2]), (x, wanted[3]))]
    g = torch.randn(case.shape, device=device).requires_grad_()
    dtypes = torch.float32, torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch warns of outputs that share memory
        arguments = (g, *kept, a, lam, seed, *numbers, *dtypes, wanted)
        torch.library.opcheck(torch.ops.fusedres.residual_backward, arguments)


@pytest.mark.launches_nothing
@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", torch.float64), ("cpu", torch.float16)], indirect=["backend"], ids=str
)
@every_case
def test_the_operators_take_what_no_kernel_takes(case, dtype, device):
    """By the formula, laid out as the fakes say."""
    terms, numbers = operator_arguments(replace(case, dtype=dtype), device)
    torch.library.opcheck(torch.ops.fusedres.residual, (*terms, *numbers))


@pytest.mark.parametrize("way", [nullcontext, Log], ids=["plain", "looked-at"])
@every_case
def test_both_ways_in_agree(case, way, device):
    tensors, g = case.tensors(device), torch.randn(case.shape, device=device)
    plain = outcome(residual, tensors, g, case.options())
    with way() as log:
        seen = outcome(residual, tensors, g, case.options())
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    if log is not None:
        assert {"fusedres::residual", "fusedres::residual_backward"} <= set(log.seen)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "scalar": lambda: Residual(nn.Linear(6, 6), learn_branch_scale=True, branch_scale=0.5, learn_skip_scale=True),
    "channel": lambda: Residual(nn.Linear(6, 6), learn_branch_scale="channel", channels=6, branch_scale=0.3),
    "dropped": lambda: Residual(nn.Linear(6, 6), drop_path=0.5),
    "numbers": lambda: Residual(nn.Linear(6, 6), skip_scale=0.5, branch_scale=0.3),
}


def train_step(module: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(weighted_sum(y), (x, *module.parameters()))]


def check_compiled(module: nn.Module, compiler: str, device: str) -> None:
    module = module.to(device)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for rows in (5, 3, 9):
        x = torch.randn(rows, 6, device=device)
        assert_close(train_step(compiled, x), train_step(module, x), **SINGLE)


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_compiled(make, device, dynamo):  # noqa: F811
    check_compiled(make(), "aot_eager", device)


def test_compiled_by_inductor(device, dynamo):  # noqa: F811
    check_compiled(nn.Sequential(*(make() for make in BLOCKS.values())), "inductor", device)


def test_exported_with_a_dynamic_batch(device):
    module = nn.Sequential(*(make() for make in BLOCKS.values())).to(device)
    exported = torch.export.export(
        module, (torch.randn(5, 6, device=device),), dynamic_shapes=({0: torch.export.Dim("rows")},)
    )
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count("fusedres.residual.default") == 4
    x = torch.randn(9, 6, device=device)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    assert_close(exported.module()(x), expected)


# ---------------------------------------------------------------------------------------------- the module


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gated_block_starts_as_the_identity_and_learns(memory_format, device):
    module = Residual(convolutions(), branch_scale=0.0, learn_branch_scale=True).to(device)
    x = torch.randn(3, 4, 5, 5, device=device).to(memory_format=memory_format)
    y = module(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert all(not p.grad.any() for p in module.block.parameters()), "nothing reaches a block behind a gate of 0"
    assert_close(module.branch_scale.grad, (2 * x * module.block(x)).sum(), rtol=1e-4, atol=1e-4)


def test_parameters_and_state(device):
    module = Residual(nn.Linear(4, 4), learn_branch_scale="channel", channels=4, learn_skip_scale=True).to(device)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert shapes == {"skip_scale": (), "branch_scale": (4,), "block.weight": (4, 4), "block.bias": (4,)}
    other = Residual(nn.Linear(4, 4), learn_branch_scale="channel", channels=4, learn_skip_scale=True).to(device)
    nn.init.uniform_(module.branch_scale)
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 4, device=device)
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    other.reset_parameters()
    assert torch.equal(other.branch_scale, torch.ones_like(other.branch_scale))
    assert [name for name, _ in Residual(nn.Linear(4, 4), branch_scale=0.5).named_parameters()] == [
        "block.weight",
        "block.bias",
    ]
    assert module.resolved_skip == "identity"


@pytest.mark.launches_nothing
def test_repr(device):
    module = Residual(nn.Identity(), branch_scale=0.0, learn_branch_scale=True, skip_scale=0.5, drop_path=0.1)
    assert module.extra_repr() == "skip_scale=0.5, branch_scale: learned from 0.0, drop_path=0.1"
    module = Residual(nn.Identity(), learn_branch_scale="channel", channels=3, channel_dim=1)
    assert module.extra_repr() == "branch_scale: learned from 1.0 of 3 at dimension 1"


class Twice(nn.Module):
    """A block that uses x twice."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sin()


@pytest.mark.parametrize(
    "block", [Twice(), nn.Identity(), nn.ReLU(inplace=True)], ids=["twice", "identity", "in-place"]
)
def test_blocks_that_touch_x(block, device):
    """What a block does to x in place, eager's sum reads too."""
    a, lam = (torch.tensor(value, device=device, requires_grad=True) for value in (0.5, 0.3))
    given = torch.randn(5, 6, device=device, requires_grad=True)

    def slopes(call):
        x = given * 1
        return torch.autograd.grad(weighted_sum(call(block(x), x, branch_scale=a, skip_scale=lam)), (given, a, lam))

    assert_close(slopes(residual), slopes(formula))


def test_changing_the_result_in_place(device):
    tensors = Sum((5, 6)).tensors(device)
    y = residual(**tensors)
    y.mul_(2)
    found = torch.autograd.grad(y.sum(), list(tensors.values()))
    assert_close(found[1], torch.full((5, 6), 2.0, device=device))


def test_without_gradients(device):
    module = Residual(nn.Linear(6, 6), learn_branch_scale=True, branch_scale=0.5).to(device)
    x = torch.randn(5, 6, device=device)
    with torch.no_grad():
        y = module(x)
    assert not y.requires_grad
    assert_close(y, 0.5 * module.block(x).detach() + x)


# ---------------------------------------------------------------------------------------------- choices and errors


def test_explained(device, fused, capsys):
    model = nn.Sequential(Residual(nn.Linear(6, 6), learn_branch_scale=True), Residual(nn.Linear(6, 6))).to(device)
    first, second = fusedres.explain(model, torch.randn(5, 6, device=device))
    assert (first.name, first.shape, first.backend) == ("0", (5, 6), fused)
    assert second.backend == "eager"
    assert "1 [5, 6] torch.float32: eager, because PyTorch's addition is one pass already" in capsys.readouterr().out


def described(**given: Any) -> tuple:
    names = {"skip_scale": 1.0, "branch_scale": 1.0, "channel_dim": -1, "drop_path": 0.0, "training": True}
    shape = given.pop("shape", (1 << 10, 1 << 10))
    branch, x = (torch.empty(shape, dtype=given.pop(name, torch.float32)) for name in ("branch", "x"))
    return checks.described_sum(branch, x, *{**names, **given}.values())


@pytest.mark.launches_nothing
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_choices_on_a_cpu(backend, monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    a = torch.tensor(0.5, requires_grad=True)
    numbers = {"skip_scale": 0.5, "branch_scale": 0.3}

    def chosen(**given: Any) -> str:
        choice = residual_dispatch.choose(*described(**given))
        return choice.because if isinstance(choice, fusedres.dispatch.Eager) else "native"

    assert "one pass already" in chosen()
    assert "one pass already" in chosen(branch_scale=0.5)
    assert chosen(**numbers) == "native"
    assert chosen(branch_scale=a) == "native"
    assert chosen(drop_path=0.1, shape=(4, 4)) == "native"
    assert "below 1048576 numbers" in chosen(shape=(2**9, 2**9), branch_scale=a)
    with torch.no_grad():
        assert "below 8388608 numbers" in chosen(branch_scale=a)
        assert chosen(branch_scale=a, shape=(1 << 12, 1 << 11)) == "native"
        assert chosen(**numbers) == "native"
    assert "two" in chosen(branch_scale=a, branch=torch.bfloat16)
    assert "no kernels for torch.float16" in chosen(branch_scale=a, branch=torch.float16, x=torch.float16)
    assert "no row" in chosen(branch_scale=a, shape=(3, 0))
    with fusedres.eager():
        assert "in force" in chosen(branch_scale=a)


@pytest.mark.launches_nothing
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"learn_branch_scale": "channels"}, ValueError, "learn_branch_scale must be False, 'scalar' or 'channel'"),
        ({"learn_skip_scale": 1}, ValueError, "learn_skip_scale must be True or False, got 1"),
        ({"learn_branch_scale": "channel"}, ValueError, "needs channels, how many x has at channel_dim"),
        ({"channels": 3}, ValueError, "got learn_branch_scale=False and channels=3"),
        ({"learn_branch_scale": "channel", "channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"channel_dim": 1.0}, TypeError, "channel_dim must be an integer, got float"),
        ({"drop_path": 1.0}, ValueError, r"drop_path must be a probability in \[0, 1\), got 1.0"),
        ({"skip_scale": "1"}, TypeError, "skip_scale must be a number, got str"),
    ],
)
def test_wrong_options(options, error, words, device):
    with pytest.raises(error, match=words):
        Residual(nn.Identity(), **options)


@pytest.mark.launches_nothing
def test_wrong_operands(device):
    x = torch.randn(2, 3, device=device)
    with pytest.raises(
        ValueError, match=r"branch must be \[2, 3\], the shape of the block's input x, got shape \[2, 4\]"
    ):
        Residual(nn.Linear(3, 4).to(device))(x)
    with pytest.raises(ValueError, match=r"branch must be \[2, 3\]"):
        residual(x[:, :1], x)
    with pytest.raises(ValueError, match=r"branch_scale must be \[\], one for all, or \[3\].* got shape \[2\]"):
        residual(x, x, branch_scale=torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"channel_dim must be one of the 2 dimensions of x \[2, 3\], got 2"):
        residual(x, x, branch_scale=torch.ones(3, device=device), channel_dim=2)
    with pytest.raises(TypeError, match="channel_dim must be an integer, got str"):
        residual(x, x, branch_scale=torch.ones(3, device=device), channel_dim="last")
    with pytest.raises(TypeError, match=r"block must be a torch\.nn\.Module, got the class Linear"):
        Residual(nn.Linear)
    with pytest.raises(ValueError, match=r"skip_scale must be \[\], a learned scalar, got shape \[1\]"):
        residual(x, x, skip_scale=torch.ones(1, device=device))
    with pytest.raises(TypeError, match=r"x must be of a floating-point dtype, got torch\.int64"):
        residual(x, x.long())
    with pytest.raises(TypeError, match="branch must be a tensor, got tuple"):
        residual((x, x), x)
    with pytest.raises(TypeError, match=r"branch_scale must be of a floating-point dtype, got torch\.int64"):
        residual(x, x, branch_scale=torch.ones(3, device=device).long())
    with pytest.raises(ValueError, match=r"branch must be on .*, where x is, got meta"):
        residual(x.to("meta"), x)
    with pytest.raises(ValueError, match=r"drop_path drops samples, the first dimension of x, and x is \[\]"):
        residual(x[0, 0], x[0, 0], drop_path=0.5)
    with pytest.raises(TypeError, match=r"block must be a torch\.nn\.Module, got int"):
        Residual(3)


@pytest.mark.launches_nothing
def test_the_reference_is_the_formula(device):
    for branch_scale in (1.0, -0.5, "scalar", "channel"):
        for skip_scale in (1.0, 0.7, "scalar"):
            for drop_path in (0.0, 0.4):
                case = Sum((5, 6), torch.float64, branch_scale, skip_scale, drop_path=drop_path)
                tensors, g = case.tensors(device), torch.randn(5, 6, device=device)
                with fusedres.eager():
                    ours = outcome(residual, tensors, g, case.options())
                assert_close(ours, outcome(formula, tensors, g, case.options()))
