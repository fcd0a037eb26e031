"""The stack as a module: the eager network's names, draws and answers, and what torch's tools make of it."""

from __future__ import annotations

import copy
import io
import pickle
import time
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from networks import is_one_node
from tolerances import SINGLE_SUM, rule_for
from torch import nn
from torch.testing import assert_close

import fusedres
from fusedres import FusedResidualStack, gradient_profile
from fusedres.reference import ProjectionStack, ResidualStack, ShapeGatedStack, Sin

pytestmark = pytest.mark.backends("triton", "cpu")
SINGLE = {"rtol": 1e-4, "atol": 1e-5}
SIZES_A = [3] * 13 + [1]
STACKS = {
    "system-a": (SIZES_A, {}),
    "system-a-plain": (SIZES_A, {"skip": None}),
    "system-d": ([12, 8, 4, 4, 4, 2, 1], {"skip": "projection"}),
    "system-e": ([6] * 8, {"activation": "none"}),
    "one-layer": ([5, 5], {}),
    "width-one": ([1, 1, 1, 1], {"learn_branch_scale": "channel", "learn_skip_scale": True}),
    "linear-head": ([7, 7, 7, 7], {"last_activation": "none"}),
    "post": ([4, 9, 9, 9, 2], {"order": "post", "activation": "relu", "learn_skip_scale": True}),
    "tanh-gelu": ([4, 9, 9], {"approximate": "tanh", "branch_scale": 0.5, "skip_scale": 0.9}),
    "learned-scalars": ([6, 6, 6, 6], {"learn_skip_scale": True, "learn_branch_scale": "scalar", "branch_scale": 0.5}),
    "learned-channels": ([6, 6, 6, 3, 3], {"learn_branch_scale": "channel", "skip": "projection", "activation": "sin"}),
    "numbers-by-layer": ([5, 5, 5, 5], {"skip_scale": [0.9, 1.0, 1.1], "branch_scale": [1.0, 0.0, -1.0]}),
    "starts-by-layer": ([5, 5, 5, 2], {"skip_scale": [0.9, 1.0, 1.1], "learn_skip_scale": True}),
    "drop-path": ([6, 6, 6, 6, 2], {"drop_path": 0.4, "learn_branch_scale": "scalar", "learn_skip_scale": True}),
    "drop-path-by-layer": ([6, 6, 6, 6, 2], {"drop_path": [0.0, 0.2, 0.5, 0.0]}),
    "two-runs": ([6, 6, 6, 4, 4, 4, 6], {"skip": "projection", "last_activation": "none"}),
}
every_stack = pytest.mark.parametrize(("sizes", "options"), STACKS.values(), ids=STACKS)


def twins(sizes, options, device="cpu", **more):
    torch.manual_seed(0)
    fused = FusedResidualStack(sizes, **options, **more).to(device)
    torch.manual_seed(0)
    return fused, ResidualStack(sizes, **options).to(device)


def gradients(model, x, g):
    """y, and every gradient by eager's name."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    y = model(x)
    dx, *found = torch.autograd.grad(y, (x, *parameters), g)
    named = dict(zip(names, found, strict=True))
    return {"y": y.detach(), "dx": dx, **(model.by_layer(named) if isinstance(model, FusedResidualStack) else named)}


def kind_of(name):
    """What the rules call a tensor of this name."""
    if name in ("y", "dx"):
        return name
    if "scales" in name:
        return "dskip_scale" if "skip" in name else "dbranch_scale"
    return "d" + name.rpartition(".")[2]


# ------------------------------------------------------------------------------------------------ right answers


@every_stack
@pytest.mark.parametrize("leading", [(), (1,), (37,), (2, 3)], ids=str)
def test_outputs_and_gradients_are_as_near_to_float64_as_eager(sizes, options, leading, device):
    fused, eager = twins(sizes, options, device)
    exact = copy.deepcopy(eager).double()
    x, g = torch.randn(*leading, sizes[0], device=device), torch.randn(*leading, sizes[-1], device=device)
    ours, theirs, truth = gradients(fused, x, g), gradients(eager, x, g), gradients(exact, x.double(), g.double())
    assert list(ours) == list(truth)
    rows = max(1, x[..., 0].numel())
    for name, value in truth.items():
        rule_for(torch.float32, kind_of(name)).check(name, ours[name], theirs[name], value, float(rows * len(sizes)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_other_dtypes(dtype, backend):
    fused, eager = (twin.to(dtype) for twin in twins([8, 8, 8, 8, 3], {"learn_skip_scale": True}))
    x, g = torch.randn(33, 8).to(dtype), torch.randn(33, 3).to(dtype)
    ours, theirs = gradients(fused, x, g), gradients(eager, x, g)
    truth = gradients(copy.deepcopy(eager).double(), x.double(), g.double())
    for name, value in truth.items():
        rule_for(dtype, kind_of(name)).check(name, ours[name], theirs[name], value, 33.0 * 4)


@pytest.mark.parametrize("width", [1, 3, 17, 64, 100, 128])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_thousand_layers(width, backend):
    fused, eager = twins([width] * 1001, {"branch_scale": 0.03})
    rows = 5 if width > 17 else 40
    x, g = torch.randn(rows, width), torch.randn(rows, width)
    ours, theirs = gradients(fused, x, g), gradients(eager, x, g)
    truth = gradients(eager.double(), x.double(), g.double())
    assert len(dict(fused.named_parameters())) == 2
    for kind in ("y", "dx", "dweight", "dbias"):  # of all layers: one of a thousand is always the worst
        tensors = [
            torch.cat([t[name].flatten() for name in truth if kind_of(name) == kind]) for t in (ours, theirs, truth)
        ]
        rule = SINGLE_SUM if kind.startswith("dw") or kind == "dbias" else rule_for(torch.float32, kind)  # over rows
        rule.check(kind, *tensors, float(rows))


def test_it_is_the_same_as_layer_by_layer(device):
    sizes = [6, 6, 6, 4, 4, 4, 4, 9]
    stack, _ = twins(sizes, {"skip": "projection"}, device)
    layers = []
    for i, layer in enumerate(stack.layers):
        K, N = sizes[i : i + 2]
        one = fusedres.FusedResidualLinear(K, N, skip=layer.resolved_skip, device=device)
        names = {"weight": layer[0].weight, "bias": layer[0].bias}
        if layer.resolved_skip == "projection":
            names |= {f"projection.{name}": value for name, value in stack.projections[str(i)].named_parameters()}
        one.load_state_dict(names)
        layers.append(one)
    x = torch.randn(70, 6, device=device)
    assert_close(stack(x), nn.Sequential(*layers)(x), **SINGLE)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_it_is_one_node(backend):
    fused, _ = twins(SIZES_A, {})
    assert is_one_node(fused(torch.ones(3)))
    assert [tuple(p.shape) for p in fused.parameters()] == [(12, 3, 3), (36,), (1, 3), (1,)]


def test_rows_do_not_depend_on_the_batch_and_bits_repeat(device):
    stack, _ = twins([20] * 6, {}, device)
    x = torch.randn(130, 20, device=device)
    x[7] = float("nan")
    with torch.no_grad():
        y, again, part = stack(x), stack(x), stack(x[:100])
    assert torch.equal(y.nan_to_num(), again.nan_to_num())
    assert torch.equal(y[:100].nan_to_num(), part.nan_to_num())
    assert y.isnan().any(-1).nonzero().flatten().tolist() == [7]


@pytest.mark.launches_nothing
def test_empty_batches(device):
    stack, _ = twins([4, 4, 2], {}, device)
    x = torch.randn(0, 4, device=device, requires_grad=True)
    stack(x).sum().backward()
    assert x.grad.shape == (0, 4)
    assert all((p.grad == 0).all() for p in stack.parameters())


# ------------------------------------------------------------------------------------------------ names and draws


@every_stack
def test_names_and_draws_are_eager_s(sizes, options):
    fused, eager = twins(sizes, options)
    ours, theirs = fused.state_dict(), eager.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fused.load_state_dict({name: torch.rand_like(value) - 0.5 for name, value in theirs.items()})
    eager.load_state_dict(fused.state_dict())
    x = torch.randn(4, sizes[0])
    assert_close(fused.eval()(x), eager.eval()(x), **SINGLE)
    torch.manual_seed(3)
    fused.reset_parameters()
    torch.manual_seed(3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(fused.state_dict().values(), ResidualStack(sizes, **options).state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("twin", "sizes"), [(ShapeGatedStack, SIZES_A), (ProjectionStack, [12, 8, 4, 4, 4, 1])])
@pytest.mark.parametrize("has_skips", [True, False])
def test_the_write_ups_networks_go_in_and_out(twin, sizes, has_skips):
    torch.manual_seed(0)
    eager = twin(sizes, has_skips).eval()
    fused = FusedResidualStack.from_eager(eager)
    torch.manual_seed(0)
    skip = None if not has_skips else "projection" if twin is ProjectionStack else "auto"
    born = FusedResidualStack(sizes, skip=skip)
    x = torch.randn(5, sizes[0])
    assert not fused.training
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), born.parameters(), strict=True))
    assert_close(fused(x), eager(x), **SINGLE)
    back = fused.to_eager()
    assert torch.equal(back(x), eager(x))
    eager.load_state_dict(back.state_dict())
    back.layers[0][0].weight.data.zero_()
    assert fused.layers[0][0].weight.abs().max() > 0
    assert gradient_profile(fused, x).mean_abs.keys() == gradient_profile(eager, x).mean_abs.keys()
    assert gradient_profile(fused, x).skips_taken == gradient_profile(eager, x).skips_taken


class Unusual(nn.Module):
    """A user's own, which says nothing of what it adds."""

    def __init__(self, sizes, activation, scale=1.0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(K, N), activation()) for K, N in pairwise(sizes))
        self.scale = scale

    def forward(self, x):
        for layer in self.layers:
            y = layer(x)
            x = self.scale * x + y if y.shape == x.shape else y
        return x


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Identity, Sin])
def test_a_network_of_others_is_read_by_what_it_computes(activation):
    module = Unusual([4, 4, 4, 2], activation).double()
    fused = FusedResidualStack.from_eager(module)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_close(fused(x), module(x))
    scaled = Unusual([4, 4, 4, 2], activation, scale=0.5)
    with pytest.raises(ValueError, match="Unusual computes something else than a stack of its layers would, with"):
        FusedResidualStack.from_eager(scaled)
    assert_close(FusedResidualStack.from_eager(scaled, skip_scale=0.5)(x.float()), scaled(x.float()), **SINGLE)


def test_networks_that_are_no_stacks():
    def changed(change):
        module = Unusual([4, 4, 4, 2], nn.GELU)
        change(module)
        return module

    cases = [
        (nn.Linear(3, 3), TypeError, "module must have `layers`"),
        (changed(lambda m: m.layers.insert(1, nn.LayerNorm(4))), TypeError, "layers.1 must be nn.Sequential"),
        (changed(lambda m: m.layers[1].append(nn.Dropout())), TypeError, "layers.1 must be nn.Sequential"),
        (
            changed(lambda m: m.layers[1].__setitem__(1, nn.ELU())),
            TypeError,
            "layers.1.1 must be one of the activations",
        ),
        (changed(lambda m: m.layers[1].__setitem__(1, nn.ReLU())), ValueError, "activations must be the same in all"),
        (changed(lambda m: m.layers.__setitem__(1, m.layers[0])), ValueError, "uses a parameter in several places"),
        (
            changed(lambda m: m.layers[1][0].requires_grad_(False)),
            ValueError,
            "layers of runs.0-1.weight are one parameter",
        ),
        (
            changed(lambda m: m.register_parameter("norm", nn.Parameter(torch.ones(1)))),
            ValueError,
            "has other parameters",
        ),
    ]
    for module, error, message in cases:
        with pytest.raises(error, match=message):
            FusedResidualStack.from_eager(module)


def test_what_is_frozen_stays_frozen():
    eager = ShapeGatedStack([4, 4, 4, 2]).requires_grad_(False)
    eager.layers[2][0].bias.requires_grad_(True)
    fused = FusedResidualStack.from_eager(eager)
    assert [name for name, p in fused.named_parameters() if p.requires_grad] == ["layers.2.0.bias"]
    assert [name for name, p in fused.to_eager().named_parameters() if p.requires_grad] == ["layers.2.0.bias"]


# ------------------------------------------------------------------------------------------------ one layer of a run


def test_a_layer_is_addressed_as_in_eager():
    fused, eager = twins([4] * 5, {})
    x = torch.randn(6, 4)
    for model in (fused, eager):
        with torch.no_grad():
            model.layers[1][0].weight.mul_(2)
        model.layers[2][0].bias.data.fill_(0.5)
        for module in model.layers[3].modules():
            if isinstance(module, nn.Linear):
                nn.init.eye_(module.weight)
        penalty = model.layers[1][0].weight.square().sum()
        (model(x).square().sum() + penalty).backward()
    assert_close(fused(x), eager(x), **SINGLE)
    assert_close(fused.layers[1](x), eager.layers[1](x), **SINGLE)
    for ours, theirs in zip(fused.layers, eager.layers, strict=True):
        assert_close(ours[0].weight.grad, theirs[0].weight.grad, **SINGLE)
        assert_close(ours[0].bias.grad, theirs[0].bias.grad, **SINGLE)
    assert [name for name, _ in fused.layers[0].named_parameters()] == ["0.weight", "0.bias"]
    assert sum(p.numel() for p in fused.layers[0].parameters()) == 20
    fused.zero_grad()
    with pytest.warns(UserWarning, match="not a leaf"):
        assert fused.layers[1][0].weight.grad is None
    with pytest.raises(AttributeError, match=r"weight of a layer in a run is a slice of runs.0-3.weight"):
        fused.layers[1][0].weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(RuntimeError, match="leaf"):
        fused.layers[1].requires_grad_(False)
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD(fused.layers[1].parameters())


def test_apply_initialises_every_layer():
    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)

    fused, eager = twins([4] * 5 + [3], {"skip": "projection"})
    for model in (fused, eager):
        torch.manual_seed(5)
        model.apply(init)
    theirs = eager.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in fused.state_dict().items())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_training_goes_as_eager_s(optimizer, device):
    """With decay for matrices alone, by the rule that goes by dimensions and by the one that goes by names."""
    options = {"learn_skip_scale": True, "learn_branch_scale": "channel"}
    fused, eager = twins([5, 5, 5, 5, 2], options, device)
    x, target = torch.randn(40, 5, device=device), torch.randn(40, 2, device=device)
    losses = {}
    for model in (fused, eager):
        named = list(model.named_parameters())
        decayed = [p for _, p in named if p.dim() >= 2]
        assert {id(p) for p in decayed} == {id(p) for name, p in named if name.endswith("weight")}
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for _, p in named if p.dim() < 2]}]
        steps = optimizer(groups, lr=0.01, weight_decay=0.0)
        losses[model] = []
        for _ in range(8):
            steps.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.step()
            losses[model].append(loss.item())
    assert losses[fused] == pytest.approx(losses[eager], rel=1e-4)
    assert losses[fused][-1] < losses[fused][0]


# ------------------------------------------------------------------------------------------------ state dicts


def foreign_states():
    good = ResidualStack([4, 4, 4, 2]).state_dict()
    return {
        "missing": ({k: v for k, v in good.items() if k != "layers.1.0.bias"}, "missing: layers.1.0.bias"),
        "unknown": (good | {"layers.9.0.weight": torch.ones(4, 4)}, "not known here: layers.9.0.weight"),
        "of-the-parameters": (
            dict(FusedResidualStack([4, 4, 4, 2]).named_parameters()),
            "missing: layers.0.0.weight, .*not known here: runs",
        ),
        "another-shape": (
            good | {"layers.1.0.weight": torch.ones(4, 5)},
            r"layers.1.0.weight must be \[4, 4\], got shape \[4, 5\]",
        ),
        "another-shape-alone": (
            good | {"layers.2.0.bias": torch.ones(3)},
            r"layers.2.0.bias must be \[2\], got shape \[3\]",
        ),
        "no-tensor": (good | {"layers.1.0.weight": 3}, "layers.1.0.weight must be a tensor, got int"),
        "plain": (nn.Linear(4, 4).state_dict(), "missing: layers.0.0.weight"),
        "deeper": (ResidualStack([4, 4, 4, 4, 2]).state_dict(), "not known here: layers.3.0.weight"),
    }


@pytest.mark.parametrize("case", foreign_states())
@pytest.mark.parametrize("is_within", [False, True], ids=["alone", "within-a-model"])
def test_a_foreign_state_dict_is_refused_and_changes_nothing(case, is_within):
    state, message = foreign_states()[case]
    stack = FusedResidualStack([4, 4, 4, 2])
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    model = nn.Sequential(stack) if is_within else stack
    if is_within:
        state = {f"0.{name}": value for name, value in state.items()}
        message = "" if "shape" not in message else message
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        model.load_state_dict(OrderedDict(state))
    if not is_within or "shape" in case:  # of a model others may have loaded before
        assert all(torch.equal(before[name], value) for name, value in stack.state_dict().items())


def test_a_part_of_a_state_dict_loads_where_that_is_asked_for():
    stack, other = FusedResidualStack([4, 4, 4, 2]), ResidualStack([4, 4, 4, 2]).state_dict()
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    some = {"layers.1.0.weight": other["layers.1.0.weight"], "more": torch.ones(1)}
    found = stack.load_state_dict(some, strict=False)
    assert set(found.missing_keys) == set(other) - {"layers.1.0.weight"}
    assert found.unexpected_keys == ["more"]
    for name, value in stack.state_dict().items():
        assert torch.equal(value, other[name] if name in some else before[name])


def test_meta_and_assign():
    eager = ResidualStack([4, 4, 4, 2], learn_skip_scale=True).double()
    stack = FusedResidualStack([4, 4, 4, 2], learn_skip_scale=True, device="meta")
    stack.load_state_dict(eager.state_dict(), assign=True)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_close(stack(x), eager(x))
    other = FusedResidualStack([4, 4, 4, 2], device="meta").to_empty(device="cpu")
    torch.manual_seed(2)
    other.reset_parameters()
    torch.manual_seed(2)
    assert torch.equal(other.layers[0][0].weight, FusedResidualStack([4, 4, 4, 2]).layers[0][0].weight)


@every_stack
def test_copies_and_files(sizes, options):
    stack = FusedResidualStack(sizes, **options).eval()
    x = torch.randn(3, sizes[0])
    y = stack(x)
    file = io.BytesIO()
    torch.save(stack, file)
    file.seek(0)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.layers[0][0].weight.add_(1)  # its own, seen by its own calls
        assert not torch.equal(other(x), y)
    assert torch.equal(stack(x), y)
    averaged = torch.optim.swa_utils.AveragedModel(stack)
    averaged.update_parameters(stack)
    assert_close(averaged(x), y)


# ------------------------------------------------------------------------------------------------ torch's tools


def test_new_parameters_are_seen(device):
    fused, eager = twins([4, 4, 4, 2], {}, device)
    x = torch.randn(3, 4, device=device)
    fused(x)
    fused.layers[2][0].weight = eager.layers[2][0].weight = nn.Parameter(torch.randn(2, 4, device=device))
    fused.runs["0-1"].weight = nn.Parameter(torch.stack([layer[0].weight.detach() * 2 for layer in eager.layers[:2]]))
    for layer in eager.layers[:2]:
        layer[0].weight.data.mul_(2)
    assert_close(fused(x), eager(x), **SINGLE)
    assert_close(fused.double()(x.double()), eager.double()(x.double()), **SINGLE)


def test_functional_call_and_transforms(device):
    stack, eager = twins([4, 4, 4, 2], {}, device)
    values = {name: torch.randn_like(p) for name, p in stack.named_parameters()}
    x = torch.randn(3, 4, device=device)
    before = stack(x)
    called = torch.func.functional_call(stack, values, (x,))
    eager.load_state_dict(stack.by_layer(values))
    assert_close(called, eager(x), **SINGLE)
    assert torch.equal(stack(x), before)

    def loss(values, row):
        return torch.func.functional_call(stack, values, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    whole = torch.func.grad(loss)(values, x)
    for name, value in whole.items():
        assert_close(each[name].sum(0), value, **SINGLE)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", ["system-a", "system-d", "drop-path", "learned-channels"])
def test_compiled_and_exported(name, backend):
    sizes, options = STACKS[name]
    fused, _ = twins(sizes, options)
    x, g = torch.randn(9, sizes[0]), torch.randn(9, sizes[-1])
    expected = gradients(fused, x, g)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    y = compiled(x)
    found = torch.autograd.grad(y, list(fused.parameters()), g)
    named = fused.by_layer(dict(zip(dict(fused.named_parameters()), found, strict=True)))
    assert_close(y, expected["y"], **SINGLE)
    for one, value in named.items():
        assert_close(value, expected[one], **SINGLE)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(fused.eval(), (x,), dynamic_shapes=({0: rows},))
    assert_close(program.module()(torch.cat([x, x])), fused(torch.cat([x, x])), **SINGLE)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_autocast(backend):
    fused, eager = twins([8, 8, 8, 3], {})
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype
    assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("activation", ["gelu", "sin"])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_gradcheck_and_gradgradcheck(activation, backend):
    options = {"activation": activation, "learn_skip_scale": True, "learn_branch_scale": "channel"}
    stack = FusedResidualStack([4, 4, 4, 2], dtype=torch.float64, **options)
    names, parameters = zip(*stack.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (x,))

    inputs = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True), *parameters)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert torch.autograd.gradcheck(lambda x: stack(x), inputs[:1])
    assert torch.autograd.gradgradcheck(lambda x: stack(x), inputs[:1])


def laplacian(model, x):
    """∇² of the first output, as physics-informed losses take it: by backward of backward."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x)[:, 0].sum(), x, create_graph=True)
    columns = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return sum(columns)


@pytest.mark.parametrize("activation", ["gelu", "sin", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_laplacians_and_their_gradients(activation, dtype, device):
    fused, eager = (
        twin.to(dtype)
        for twin in twins([2] + [64] * 6 + [1], {"activation": activation, "last_activation": "none"}, device)
    )
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 takes the eager formula on a GPU")
    x = torch.randn(20, 2, dtype=dtype, device=device)
    ours, theirs = laplacian(fused, x), laplacian(eager, x)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    assert_close(ours, theirs, **close)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    found = fused.by_layer({name: p.grad for name, p in fused.named_parameters()})
    for name, value in eager.named_parameters():
        if value.grad is None:  # a last bias
            assert found[name] is None or (found[name] == 0).all()
            continue
        assert_close(found[name], value.grad, **close, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        ([], {}, ValueError, r"sizes must be two at least, one layer's input and output, got \[\]"),
        ([3], {}, ValueError, "sizes must be two at least"),
        ([3, 0, 3], {}, ValueError, r"sizes\[1\] must be at least 1, got 0"),
        ([3, -1], {}, ValueError, r"sizes\[1\] must be at least 1, got -1"),
        ([3, 2.0], {}, TypeError, r"sizes\[1\] must be an integer, got 2.0"),
        ([3, True], {}, TypeError, r"sizes\[1\] must be an integer, got True"),
        ([3, "3"], {}, TypeError, r"sizes\[1\] must be an integer, got '3'"),
        ("33", {}, TypeError, "sizes must be a sequence of integers, d₀ to d_L of L layers, got str"),
        (3, {}, TypeError, "sizes must be a sequence of integers, d₀ to d_L of L layers, got int"),
        ([3, 3], {"activation": "elu"}, ValueError, "layer 0: activation must be one of"),
        ([3, 4, 3], {"skip": "identity"}, ValueError, "layer 0: skip='identity' adds the input to the output"),
        ([3, 3], {"skip": "concat"}, ValueError, "layer 0: skip='concat' makes every layer wider"),
        ([3, 3], {"skip": "dense"}, ValueError, "layer 0: skip must be one of"),
        ([3, 3], {"last_activation": "relu"}, ValueError, "last_activation must be 'same' or 'none', got 'relu'"),
        ([3, 3], {"recompute": "always"}, ValueError, "recompute must be True, False or 'auto', got 'always'"),
        (
            [3, 4],
            {"learn_skip_scale": True},
            ValueError,
            "a learned skip_scale needs a skip, and no layer of these sizes",
        ),
        ([3, 3], {"learn_branch_scale": True}, ValueError, "learn_branch_scale must be False, 'scalar' or 'channel'"),
        ([3, 4], {"drop_path": 0.1}, ValueError, "drop_path=0.1 needs a skip"),
        ([3, 3], {"drop_path": 1.0}, ValueError, r"layer 0: drop_path must be a probability in \[0, 1\), got 1.0"),
        ([3, 3, 3], {"drop_path": [0.1]}, ValueError, "drop_path must be 2 values, one for every layer, got 1"),
        ([3, 3, 3], {"skip_scale": [1.0] * 3}, ValueError, "skip_scale must be 2 values, one for every layer, got 3"),
        ([3, 3], {"skip_scale": "1"}, TypeError, "layer 0: skip_scale must be a number, got str"),
    ],
    ids=str,
)
def test_bad_descriptions(sizes, options, error, message):
    with pytest.raises(error, match=message):
        FusedResidualStack(sizes, **options)
    if "recompute" not in options:
        with pytest.raises(error, match=message):
            ResidualStack(sizes, **options)


def test_unknown_options():
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        FusedResidualStack([3, 3], scale=1)
    with pytest.raises(TypeError, match=r"options of a stack are activation, .*, got scale"):
        ResidualStack([3, 3], scale=1)


@pytest.mark.launches_nothing
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 4), ValueError, r"x must be \[..., 3\], the in_features of the first layer, got shape \[2, 4\]"),
        (torch.ones(()), ValueError, r"x must be \[..., 3\]"),
        (torch.ones(3, dtype=torch.int64), TypeError, "x must be of a floating-point dtype"),
        ([1.0, 2.0, 3.0], TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 3, dtype=torch.float64), TypeError, "layer 0: weight must be torch.float64, the dtype of x"),
    ],
    ids=["width", "no-dimension", "integers", "list", "dtype"],
)
def test_bad_inputs(x, error, message, device):
    stack = FusedResidualStack([3, 3, 1], device=device)
    with pytest.raises(error, match=message):
        stack(x.to(device) if isinstance(x, torch.Tensor) else x)


@pytest.mark.launches_nothing
def test_repr_and_explain(device, fused, capsys):
    stack = FusedResidualStack([4] * 40 + [2], skip_scale=0.5, device=device)
    assert "[4, 4, 4, …, 2], skip_scale=0.5" in repr(stack)
    assert "(0-38): Run(weight=[39, 4, 4], bias=[156])" in repr(stack)
    assert {call.backend for call in fusedres.explain(stack, torch.randn(5, 4, device=device))} == {fused}


# ------------------------------------------------------------------------------------------------ stochastic depth


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("width", [6, 20, 140])
@pytest.mark.parametrize(
    "options", [{}, {"learn_branch_scale": "channel"}, {"learn_skip_scale": True}, {"order": "post"}], ids=str
)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_layers_that_the_whole_batch_drops(rows, width, options, backend):
    fused, eager = twins([width] * 41, options | {"drop_path": 0.7})
    x, g = torch.randn(rows, width), torch.randn(rows, width)
    for _ in range(3):
        ours, theirs = gradients(fused, x, g), gradients(eager, x, g)
        idle = sum((theirs[f"layers.{i}.0.weight"] == 0).all().item() for i in range(40))
        assert idle > 0
        for name, value in theirs.items():
            assert_close(ours[name], value, rtol=1e-3, atol=1e-4 * max(1.0, value.abs().max().item()))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_stack_all_of_whose_layers_are_dropped(backend):
    fused, _ = twins([8] * 4, {"drop_path": 0.999})
    x = torch.randn(2, 8, requires_grad=True)
    y = fused(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones(2, 8))
    assert all((p.grad == 0).all() for p in fused.parameters())


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_layer_that_the_whole_batch_drops_is_not_computed(backend):
    def seconds(drop_path):
        stack, _ = twins([256] * 201, {"drop_path": drop_path})
        x = torch.randn(1, 256)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            with torch.no_grad():
                stack(x)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(0.99) < 0.4 * seconds(0.0)  # measured: 0.03
