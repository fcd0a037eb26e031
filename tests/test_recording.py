"""What is recorded of gradients: against float64, for every option, fused, by the formula, and by hooks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from stacks import STACKS, every_stack
from torch import nn

import fusedres
from fusedres import FusedResidualLinear, FusedResidualStack, gradient_profile, philox, recording, reference
from fusedres.gradients import Recorder
from fusedres.gradients.statistics import Rows, halves_of, statistics_of
from fusedres.kernels import record
from fusedres.kernels.spec import LayerSpec, Operands
from fusedres.reference import ShapeGatedStack

both = pytest.mark.backends("triton", "cpu")
# Of a norm, a mean: sums in float32 of gradients that are themselves rounded, in up to a dozen layers.
FLOAT32 = 2e-4
# A half is known to within a rounding of the whole (`kernels/cpu/record.h`).
OF_THE_WHOLE = 1e-4


def truth(twin, x, g):
    """Of every layer of a stack's eager twin, in float64: (∂L/∂x, through the branch, through the skip)."""
    torch.manual_seed(1)
    found = []
    x = x.detach().double().requires_grad_()
    for i, spec in enumerate(twin.recipe.layers):
        linear, name = twin.layers[i][0], str(i)
        branch, skip = x.view_as(x), x.view_as(x)
        found.append((x, branch, skip))
        scales = [one.get(name, None) for one in (twin.skip_scales, twin.branch_scales)]
        residual, kind = None, spec.skip
        if kind == "identity":
            residual, kind = skip, "residual"
        elif kind == "projection":
            residual, kind = twin.projections[name](skip), "residual"
        seed = philox.draw_seed() if spec.drop_path > 0 and twin.training else None
        spec = spec._replace(skip=kind, drop_path=0.0 if seed is None else spec.drop_path)
        x = reference.layer(Operands(branch, linear.weight, linear.bias, residual, None, None, *scales, seed), spec)
    flat = [t for three in found for t in three]
    gradients = torch.autograd.grad(x, flat, g.double(), allow_unused=True)
    return [gradients[3 * i : 3 * i + 3] for i in range(len(found))]


def read(model, x, g):
    """What a step's record says of the inputs, for the loss Σ y g."""
    torch.manual_seed(1)
    with Recorder(model) as recorder:
        (model(x) * g).sum().backward()
        recorder.step()
    return recorder.records[0].inputs


def assert_tells(found, total, branch, skip, tolerance=FLOAT32):
    """That a readout of an input says what the gradient and its halves are."""
    statistics, size = found.statistics, total.abs()
    close = lambda value: pytest.approx(value, rel=tolerance, abs=1e-300)  # noqa: E731
    assert statistics.count == total.numel()
    assert statistics.mean_abs == close(size.mean().item())
    assert statistics.rms == close(total.square().mean().sqrt().item())
    assert statistics.norm == close(total.norm().item())
    assert statistics.max_abs == close(size.max().item())
    assert sum(statistics.octaves.values()) + round(statistics.zero * total.numel()) == total.numel()
    assert statistics.zero == pytest.approx((total == 0).double().mean().item(), abs=1e-3)
    middle = sum((e + 0.5) * n for e, n in statistics.octaves.items()) / max(sum(statistics.octaves.values()), 1)
    there = size[size > 0]
    exact = (there.log2().floor() + 0.5).mean().item() if len(there) else 0.0
    assert middle == pytest.approx(exact, abs=2.0 / max(len(there), 1) ** 0.5 * 0.05 + 0.02)

    if skip is None or not skip.any():
        assert found.halves is None
        return
    within = OF_THE_WHOLE * max(total.norm().item(), branch.norm().item(), skip.norm().item())
    assert found.halves.branch == pytest.approx(branch.norm().item(), abs=within)
    assert found.halves.skip == pytest.approx(skip.norm().item(), abs=within)
    if branch.norm() > 1e-3 * total.norm():
        cosine = F.cosine_similarity(branch.flatten(), skip.flatten(), 0).item()
        assert found.halves.cosine == pytest.approx(cosine, abs=2e-3)
        b, s, c = found.halves
        assert math.sqrt(b * b + s * s + 2 * b * s * c) == pytest.approx(total.norm().item(), rel=1e-3)


def checked(model, twin, x, g, first=0):
    found = read(model, x, g)
    expected = truth(twin.double(), x, g)
    names = [f"layers.{i}" for i in range(first, len(expected))]
    assert [name for name in found if name != "output"] == names
    for name, (total, branch, skip) in zip(names, expected[first:], strict=True):
        assert_tells(found[name], total, branch, skip)
    assert found["output"].statistics.norm == pytest.approx(g.double().norm().item(), rel=1e-6)
    return found


# ------------------------------------------------------------------------------------------------ stacks


def stack_and_input(sizes, options, M, device, dtype=torch.float32):
    torch.manual_seed(0)
    stack = FusedResidualStack(sizes, **options, dtype=dtype).to(device)
    x = torch.randn(M, sizes[0], dtype=dtype).to(device).requires_grad_()
    g = torch.randn(M, sizes[-1], dtype=dtype).to(device)
    return stack, x, g


@every_stack
@both
def test_stacks(sizes, options, device):
    stack, x, g = stack_and_input(sizes, options, 23, device)
    if options.get("drop_path"):  # a layer that all rows lose is left out of the call, and of the readout
        x, g = x.detach().repeat(4, 1).requires_grad_(), g.repeat(4, 1)
    checked(stack, stack.to_eager(), x, g)


@pytest.mark.parametrize("name", ["system-a", "system-d", "post", "drop-path", "learned-channels"])
def test_the_formula_and_the_eager_twin_say_the_same(name):
    sizes, options = STACKS[name]
    stack, x, g = stack_and_input(sizes, options, 92, "cpu")
    with fusedres.eager():
        checked(stack, stack.to_eager(), x, g)
    checked(stack.to_eager(), stack.to_eager(), x, g)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("skip", ["identity", "projection", None])
@pytest.mark.parametrize(
    ("sizes", "M", "recompute"),
    [
        ([7] * 4, 150, False),  # lanes
        ([7] * 4, 2500, True),  # lanes, many rows in passing
        ([33] * 3, 3, False),  # dots
        ([64] * 3, 70, False),  # blocks, of whole vectors
        ([64] * 3, 70, True),
        ([150, 150, 150], 300, False),  # layers
        ([150, 150, 150], 2100, True),
    ],
    ids=["lanes", "lanes-recompute", "dots", "blocks", "blocks-recompute", "layers", "layers-recompute"],
)
def test_every_way_of_the_engine(sizes, M, recompute, skip, dtype, device):
    options = {"skip": skip, "recompute": recompute}
    stack, x, g = stack_and_input(sizes, options, M, device, dtype)
    checked(stack, stack.to_eager(), x, g)


@pytest.mark.parametrize("M", [40, 300])
@pytest.mark.parametrize("every", [False, True], ids=["kept", "recompute"])
@pytest.mark.parametrize("d", [16, 24, 72, 136])
def test_runs(d, every, M, device):
    """In Triton: dw summed in the kernel or not, whole tiles and ragged ones, operands out of memory, segments."""
    options = {"recompute": every, "learn_skip_scale": True, "skip_scale": 0.9}
    stack, x, g = stack_and_input([d] * 6, options, M, device)
    checked(stack, stack.to_eager(), x, g)


@both
def test_an_input_that_requires_no_gradient_has_none(device):
    stack, x, g = stack_and_input([6] * 5, {}, 9, device)
    checked(stack, stack.to_eager(), x.detach(), g, first=1)


@both
@pytest.mark.parametrize("skip_scale", [0.5, 1.0, 1.1])
def test_the_path_of_skips_alone(skip_scale, device):
    stack, x, g = stack_and_input([6, 6, 6, 6, 3, 3, 3], {"skip_scale": skip_scale}, 9, device)
    found = read(stack, x, g)
    at_end, in_middle = g.norm().item(), found["layers.3"].statistics.norm
    expected = [in_middle * skip_scale**3, in_middle * skip_scale**2, in_middle * skip_scale, None]
    expected += [at_end * skip_scale**2, at_end * skip_scale]
    paths = [found[f"layers.{i}"].identity_path for i in range(6)]
    assert paths == [None if e is None else pytest.approx(e, rel=1e-5) for e in expected]

    closed, x, g = stack_and_input([6] * 5, {"skip_scale": skip_scale, "branch_scale": 0.0}, 9, device)
    for one in read(closed, x, g).values():  # without branches that path is all there is
        if one.identity_path is not None:
            assert one.statistics.norm == pytest.approx(one.identity_path, rel=1e-5)


def test_no_path_leads_through_an_activation_after_the_sum():
    stack, x, g = stack_and_input([6] * 4, {"order": "post"}, 9, "cpu")
    assert all(one.identity_path is None for one in read(stack, x, g).values())


# ------------------------------------------------------------------------------------------------ layers

LAYERS = {
    "identity": {},
    "plain": {"skip": None},
    "post": {"order": "post", "activation": "relu"},
    "projection": {"skip": "projection"},
    "projection-post": {"skip": "projection", "order": "post", "learn_skip_scale": True},
    "concat": {"skip": "concat", "skip_scale": 0.7},
    "concat-learned": {"skip": "concat", "learn_skip_scale": True},
    "scales": {"skip_scale": 0.5, "learn_skip_scale": True, "learn_branch_scale": "channel"},
    "closed-gate": {"branch_scale": 0.0, "learn_branch_scale": "scalar"},
    "linear": {"activation": "none", "recompute": True},
    "no-bias": {"bias": False, "activation": "sin"},
    "dropped-rows": {"drop_path": 0.5},
}


def of_layer(layer, x, g):
    """(∂L/∂x, through the branch, through the skip) of one layer in float64, by the formula with x apart."""
    wide = {name: value.detach().double() for name, value in layer.state_dict().items()}
    x = x.detach().double().requires_grad_()
    branch, skip = x.view_as(x), x.view_as(x)
    kind, residual = layer.resolved_skip, None
    if kind == "identity":
        residual, kind = skip, "residual"
    elif kind == "projection":
        residual, kind = F.linear(skip, wide["projection.weight"], wide["projection.bias"]), "residual"
    elif kind == "concat":
        residual = skip
    torch.manual_seed(1)
    scales = {
        name: value for name in ("skip_scale", "branch_scale") if isinstance(value := getattr(layer, name), float)
    }
    spec = LayerSpec(layer.activation, layer.order, kind, **scales, drop_path=layer.drop_path)
    learned = [wide.get(name) for name in ("skip_scale", "branch_scale")]
    seed = philox.draw_seed() if layer.drop_path else None
    y = reference.layer(Operands(branch, wide["weight"], wide.get("bias"), residual, None, None, *learned, seed), spec)
    return torch.autograd.grad(y, (x, branch, skip), g.double(), allow_unused=True)


@both
@pytest.mark.parametrize("M", [3, 70], ids=["few-rows", "rows"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_layers(options, M, device):
    layer = FusedResidualLinear(24, **options).to(device)
    x = torch.randn(2, M, 24, device=device, requires_grad=True)
    g = torch.randn(2, M, 48 if options.get("skip") == "concat" else 24, device=device)
    found = read(layer, x, g)
    assert_tells(found["model"], *of_layer(layer, x, g))


@both
def test_a_residual_of_its_own_is_no_half_of_the_input(device):
    layer = FusedResidualLinear(24).to(device)
    number, sink = recording.take_numbers(1), recording.Sink(1)
    x, residual = torch.randn(2, 9, 24, device=device, requires_grad=True).unbind(0)
    layer.watch = number
    with recording.opened(sink, {number: 0}):
        layer(x, residual).sum().backward()
    rows = sink.take()
    assert halves_of(rows[0].tolist()) is None
    assert statistics_of(Rows.of(rows.cpu()))[0].count == x.numel()


@pytest.mark.backends("cpu")
def test_bfloat16(backend):
    stack, x, g = stack_and_input([64] * 4, {}, 70, "cpu", torch.bfloat16)
    found = read(stack, x, g)
    for (total, branch, skip), (name, one) in zip(truth(stack.to_eager().double(), x, g), found.items(), strict=False):
        assert one.statistics.norm == pytest.approx(total.norm().item(), rel=0.02), name
        assert one.halves.branch == pytest.approx(branch.norm().item(), rel=0.03)
        assert one.halves.skip == pytest.approx(skip.norm().item(), rel=0.02)


# ------------------------------------------------------------------------------------------------ any module


class Plain(nn.Module):
    """A residual block of PyTorch's own, and a convolution that nobody fuses."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(2, 3, 3, padding=1)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        h = self.stem(x)
        h = 0.5 * h + torch.tanh(self.inner(h))
        return self.head(h.flatten(1))


def test_any_module_by_hooks():
    model, x = Plain(), torch.randn(5, 2, 8)
    found = gradient_profile(model, x).inputs
    assert list(found) == ["inner", "head", "output"]

    wide = Plain().double()
    wide.load_state_dict(model.state_dict())
    h = wide.stem(x.double())
    branch, skip = h.view_as(h), h.view_as(h)
    top = (0.5 * skip + torch.tanh(wide.inner(branch))).flatten(1)
    expected = torch.autograd.grad(wide.head(top).square().mean(), (h, branch, skip, top))
    assert_tells(found["inner"], *expected[:3])
    assert_tells(found["head"], expected[3], None, None)


def test_eager_and_fused_networks_are_told_alike():
    torch.manual_seed(0)
    eager = ShapeGatedStack([3] * 13 + [1])
    fused = FusedResidualStack.from_eager(eager)
    of_eager, of_fused = (gradient_profile(model, torch.ones(3)).inputs for model in (eager, fused))
    assert len(of_fused) == 13
    for name, one in of_fused.items():
        theirs = of_eager[name if name == "output" else f"{name}.0"]
        assert one.statistics.norm == pytest.approx(theirs.statistics.norm, rel=1e-4)
        if one.halves is not None:
            assert one.halves == pytest.approx(theirs.halves, rel=1e-3, abs=1e-6)


# ------------------------------------------------------------------------------------------------ numbers


def told(values, unscale=1.0):
    """What is said of these numbers."""
    return statistics_of(Rows.of(recording.statistics([values], None, unscale).cpu()))[0]


@both
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30], ids=lambda size: f"{size:.0e}")
def test_neither_small_nor_large_numbers_are_lost(size, backend, device):
    values = (torch.rand(5000) + 0.5) * size
    found, exact = told(values.to(device)), values.double()
    assert found.mean_abs == pytest.approx(exact.mean().item(), rel=1e-5)
    assert found.rms == pytest.approx(exact.square().mean().sqrt().item(), rel=1e-5)
    assert found.max_abs == pytest.approx(exact.max().item(), rel=1e-6)
    if size > 1e-38:
        assert min(found.octaves) >= math.floor(math.log2(0.5 * size))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30], ids=lambda size: f"{size:.0e}")
def test_halves_that_cancel_are_not_lost(size, device):
    """The whole is 0, or 1e-25 of its halves, which are themselves far from 1."""
    branch = (torch.rand(5000) + 0.5) * size
    for total in (torch.zeros(5000), torch.full((5000,), 1e-25 * size)):
        row = recording.statistics([total], [branch], 1.0)[0].tolist()
        assert halves_of(row).branch == pytest.approx(branch.double().norm().item(), rel=1e-5)
        assert halves_of(row).skip == pytest.approx(branch.double().norm().item(), rel=1e-5)
        assert halves_of(row).cosine == pytest.approx(-1.0)


@both
def test_what_is_not_finite_is_counted_and_left_out(backend, device):
    values = torch.tensor([1.0, -3.0, 0.0, math.nan, math.inf, -math.inf, -0.0, 2.0**-130])
    found = told(values.to(device))
    assert (found.count, found.max_abs, found.zero, found.non_finite) == (8, 3.0, 0.25, 0.375)
    assert found.mean_abs == pytest.approx(4 / 5)
    assert found.rms == pytest.approx(math.sqrt(2.0))
    assert found.octaves == {0: 1, 1: 1, -127: 1}


@pytest.mark.backends("triton")
@pytest.mark.parametrize("size", [1e-8, 1e5], ids=["vanish", "overflow"])
@pytest.mark.parametrize("kind", ["layer", "stack"])
def test_float16_is_told_as_it_is_stored(kind, size, device):
    """A loss scale is chosen by this: what float16 has no number for."""
    torch.manual_seed(0)
    made = FusedResidualLinear(16) if kind == "layer" else FusedResidualStack([16] * 3)
    made, x = made.half().to(device), torch.randn(9, 16, device=device, dtype=torch.float16, requires_grad=True)
    with Recorder(made) as recorder:
        made(x).backward(torch.full((9, 16), 6e4 if size > 1 else 6e-8, dtype=torch.float16, device=device))
        recorder.step()
    found = next(iter(recorder.records[0].inputs.values())).statistics
    assert found.zero == pytest.approx((x.grad == 0).double().mean().item())
    assert found.non_finite == pytest.approx((~x.grad.isfinite()).double().mean().item())
    assert found.zero + found.non_finite > 0


@both
def test_small_numbers_beside_large_ones_are_not_zero(device):
    found = told(torch.tensor([1e-30] * 5 + [1e16] * 2, device=device))
    assert found.zero == 0
    assert found.octaves == {-100: 5, 53: 2}


@both
def test_lazily_negated_gradients(device):
    total, branch = torch.tensor([3.0, -1.0], device=device), torch.tensor([1.0, 2.0], device=device)
    row = recording.statistics([total], [torch._neg_view(-branch)], 1.0)[0].tolist()
    assert halves_of(row) == pytest.approx((5**0.5, 13**0.5, (2 - 6) / 65**0.5))


def test_parts_that_overlap_are_all_added():
    part = torch.zeros(2, 2, record.ROW)
    part[..., record.COUNT], part[..., record.SCALE] = 1.0, 1.0
    found = recording._added_up([(2, part), (3, part)], 6)
    assert found[:, record.COUNT].tolist() == [0, 0, 2, 4, 2, 0]
    once = recording._added_up([(4, part[:1].double()), (1, part[:1].double())], 7)
    assert once[:, record.COUNT].tolist() == [0, 1, 1, 0, 1, 1, 0]
    assert recording._added_up([(1, part[:1].double())] * 2, 3)[:, record.COUNT].tolist() == [0, 2, 2]


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("count", [1, 63, 64, 4032, 30_000, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_numbers_of_any_size_next_to_each_other(dtype, count, device):
    """Stretches of all sizes, some of them of one, with zeros, halves, and what is not finite."""
    stretches = torch.arange(count) // 1500
    sizes = torch.exp2(torch.randint(-100, 60, (int(stretches[-1]) + 1,)).double())[stretches]
    wide = torch.where(stretches % 2 == 0, torch.exp2(40 * torch.randn(count).clamp(-2, 1).double()), 1.0)
    values, branch = (torch.randn(2, count).double() * sizes * wide).to(dtype)
    values[::7] = 0.0
    values[stretches == 3] = 0.0
    branch[(stretches == 3) & (torch.arange(count) % 2 == 0)] = 0.0
    values[torch.arange(count) % 20_000 == 19_999] = math.nan
    row = recording.statistics([values], [branch], 1.0)[0]

    is_finite = values.isfinite()
    total, first = values[is_finite].double(), branch[is_finite].double()
    second = total - first
    assert (row[record.COUNT], row[record.ZEROS]) == (count, (total == 0).sum())
    assert row[record.LARGEST] == total.abs().max()
    close = lambda value: pytest.approx(value.item(), rel=1e-5)  # noqa: E731
    assert row[record.SUM] == close(total.abs().sum())
    assert row[record.SQUARES] == close(total.square().sum())
    assert row[record.BRANCH] == close(first.square().sum())
    assert row[record.SKIP] == close(second.square().sum())
    assert row[record.PRODUCT].item() == pytest.approx((first * second).sum().item(), rel=1e-3)
    octaves = (torch.frexp(total[total != 0])[1] - 1 + record.EXPONENT_BIAS).clamp(0, 254)
    expected = torch.bincount(octaves, minlength=256)
    expected[0], expected[record.NOT_FINITE] = expected[0] + (total == 0).sum(), count - len(total)
    assert row[record.OCTAVES :].long().equal(expected)


def assert_exponents_are_counted(dtype, device):
    """Few of them and many, of so many numbers that threads share them, times a factor that is no power of two."""
    for spread in (2, 12):
        sizes = torch.exp2(torch.randint(-spread, spread, (70_001,)))
        values = (torch.randn(70_001) * sizes).to(device, dtype)
        found = told(values, 3.0)
        exponents = torch.frexp((values.to(torch.promote_types(dtype, torch.float32)) * 3.0).double())[1] - 1
        there = exponents[values != 0].tolist()
        assert found.octaves == {e: there.count(e) for e in set(there)}


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exponents_are_counted_one_by_one(dtype, device):
    assert_exponents_are_counted(dtype, device)


@both
@pytest.mark.launches_nothing
def test_the_formula_counts_exponents_too(device):
    assert_exponents_are_counted(torch.float16, device)


@pytest.mark.backends("cpu")
def test_float64_exponents_are_counted_as_far_as_float32_has_them(device):
    assert_exponents_are_counted(torch.float64, device)
    found = told(torch.tensor([1e-200, 1e-300, 1.0, 0.0], dtype=torch.float64))
    assert (found.octaves, found.zero) == ({-127: 2, 0: 1}, 0.25)
    assert found.mean_abs == pytest.approx(0.25)


def test_numbers_of_layers_are_nobody_elses():
    first, second = recording.take_numbers(3), recording.take_numbers(1)
    assert second == first + 3


@pytest.mark.backends("cpu")
def test_a_model_that_nobody_watches_carries_no_number(backend):
    stack = FusedResidualStack([4] * 4)
    x = torch.randn(5, 4, requires_grad=True)
    with Recorder(stack) as recorder:
        stack(x).sum().backward()
        assert stack.watch > 0
        recorder.step()
    assert stack.watch == 0
    assert recording._open == {}
    stack(x).sum().backward()
    assert len(recorder.records) == 1


@pytest.mark.parametrize("options", [{}, {"branch_scale": 0.0, "learn_branch_scale": True}, {"skip_scale": 0.5}])
def test_a_residual_block_has_two_halves(options):
    """Its own, and those of the layers within, of a convolution that is no layer of ours."""
    block = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 3, 3, padding=1))
    model = nn.Sequential(nn.Conv1d(2, 3, 1), fusedres.Residual(block, **options))
    x, g = torch.randn(5, 2, 8), torch.randn(5, 3, 8)
    found = read(model, x, g)
    assert list(found) == ["1", "1.block.0", "1.block.2", "output"]

    wide = copy.deepcopy(model).double()
    h = wide[0](x.double())
    branch, skip = h.view_as(h), h.view_as(h)
    a, lam = (torch.as_tensor(s).detach() for s in (wide[1].branch_scale, wide[1].skip_scale))
    y = a * wide[1].block(branch) + lam * skip
    assert_tells(found["1"], *torch.autograd.grad(y, (h, branch, skip), g.double()))
