"""A stack by the names of eager: draws, conversions, one layer of a run, state dicts."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from networks import SINGLE
from stacks import SIZES_A, every_stack, twins
from torch import nn
from torch.testing import assert_close

from fusedres import FusedResidualStack, gradient_profile
from fusedres.reference import ProjectionStack, ResidualStack, ShapeGatedStack, Sin

pytestmark = pytest.mark.backends("triton", "cpu")


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
