"""Layers that follow one another in a model of somebody's: one call of all, which sees whatever becomes of them."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from blocks import WRITINGS, D, Written, agrees, outcome
from torch import nn

import fusedres
from fusedres import reference

pytestmark = pytest.mark.usefixtures("engine")


class Loop(nn.Module):
    """Layers in a loop, as in the write-ups: names of its own, a sum wherever shapes agree."""

    def __init__(self, sizes):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(k, n), nn.GELU()) for k, n in pairwise(sizes))

    def forward(self, x):
        for part in self.parts:
            y = part(x)
            x = x + y if y.shape == x.shape else y
        return x


class Own(nn.Module):
    """Two layers, put together as a function says."""

    def __init__(self, how):
        super().__init__()
        self.fc1, self.fc2, self.other = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.norm, self.how = nn.LayerNorm(D), how

    def forward(self, x):
        return self.how(self, x)


def layers_of(model, x):
    """How many layers each fused call has."""
    return [len(getattr(call.spec, "layers", [call])) for call in fusedres.explain(model, x)]


def policy():
    return nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))


S, G, P, T = "x + gelu(x Wᵀ + b)", "gelu(x Wᵀ + b)", "(x Pᵀ + p) + gelu(x Wᵀ + b)", "tanh(x Wᵀ + b)"
NETWORKS = {  # built how, how wide its input, its layers
    "loop": (lambda: Loop([3, 3, 3, 5, 5, 1]), 3, [S, S, G, S, G]),
    "system-a": (lambda: reference.ShapeGatedStack([3] * 5 + [1]), 3, [S] * 4 + [G]),
    "system-a-without": (lambda: reference.ShapeGatedStack([3] * 5 + [1], use_residual=False), 3, [G] * 5),
    "system-d": (lambda: reference.ProjectionStack([8, 6, 6, 1]), 8, [P, S, P]),
    "blocks": (lambda: nn.Sequential(*(Written(WRITINGS["function"][0]) for _ in range(3))), D, [S] * 3),
    "policy": (policy, D, [T, T, "x Wᵀ + b"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_one_call(name):
    build, width, formulas = NETWORKS[name]
    fused = build()
    eager = deepcopy(fused)
    report = fusedres.fuse_(fused)
    assert [one.formula for one in report.fused if not one.module.endswith("net")] == formulas
    assert layers_of(fused, torch.randn(4, width)) == [len(formulas)]
    for shape in [(7, width), (width,), (2, 3, width), (0, width)]:
        agrees(fused, eager, torch.randn(shape))


def twice(m, x):
    return F.gelu(m.fc2(F.gelu(m.fc1(x))))


def with_a_result_between(m, x):
    h = F.gelu(m.fc1(x))
    return F.gelu(m.fc2(h)) * h


def with_another_activation(m, x):
    return torch.tanh(m.fc2(F.gelu(m.fc1(x))))


def with_a_residual_from_before(m, x):
    return x + F.gelu(m.fc2(F.gelu(m.fc1(x))))


def with_a_norm_between(m, x):
    return F.gelu(m.fc2(m.norm(F.gelu(m.fc1(x)))))


def with_a_change_between(m, x):
    h = F.gelu(m.fc1(x))
    m.total.add_(1)
    return F.gelu(m.fc2(h))


def with_a_product_at_the_end(m, x):
    return m.other(F.gelu(m.fc1(x)))


def with_two_products_at_the_end(m, x):
    h = F.gelu(m.fc1(x))
    return m.other(h), m.fc2(h)


def with_a_weight_made_of_others(m, x):
    return F.gelu(F.linear(F.gelu(m.fc1(x)), m.fc2.weight * 2, m.fc2.bias))


def again_and_again(m, x):
    for _ in range(3):
        x = x + F.gelu(m.fc1(x))
    return x


CALLS = {
    twice: [2],
    with_a_result_between: [1, 1],
    with_another_activation: [1, 1],
    with_a_residual_from_before: [1, 1],
    with_a_norm_between: [1, 1],
    with_a_change_between: [1, 1],
    with_a_product_at_the_end: [2],
    with_two_products_at_the_end: [1],
    with_a_weight_made_of_others: [1],
    again_and_again: [3],
}


@pytest.mark.parametrize("how", CALLS, ids=lambda how: how.__name__)
def test_what_is_one_call_and_what_is_not(how):
    eager = Own(how)
    eager.register_buffer("total", torch.zeros(()))
    fused = deepcopy(eager)
    fusedres.fuse_(fused)
    x = torch.randn(4, D)
    assert layers_of(fused, x) == CALLS[how]
    if how is with_two_products_at_the_end:
        torch.testing.assert_close(fused(x), eager(x))
    else:
        agrees(fused, eager, x)


def as_it_is(m):
    pass


def in_float64(m):
    m.double()


def another_parameter(m):
    m.fc2.weight = nn.Parameter(torch.rand(D, D))


def another_shape(m):
    m.fc2.weight.data = torch.rand(1, D)
    m.fc2.bias.data = torch.rand(1)


def in_place(m):
    with torch.no_grad():
        m.fc1.weight.mul_(2)


def other_data(m):
    m.fc1.weight.data = torch.rand(D, D)


def frozen(m):
    m.fc1.requires_grad_(False)


def without_a_bias(m):
    m.fc1.bias = None


def hooked(m):
    m.fc2.register_forward_hook(lambda module, args, y: 2 * y)


def parametrized(m):
    nn.utils.parametrize.register_parametrization(m.fc1, "weight", nn.Tanh())


def loaded(m):
    state = {name: value.clone() + 1 for name, value in m.state_dict().items()}
    m.load_state_dict(state, assign=True)


CHANGES = [
    as_it_is, in_float64, another_parameter, another_shape, in_place, other_data, frozen, without_a_bias, hooked,
    parametrized, loaded,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_becomes_of_the_layers_is_seen(change):
    eager = Own(twice)
    fused = deepcopy(eager)
    fusedres.fuse_(fused)
    x = torch.randn(4, D)
    agrees(fused, eager, x)
    for model in (fused, eager):
        torch.manual_seed(3)
        change(model)
    agrees(fused, eager, x.to(fused.fc1.bias.dtype if fused.fc1.bias is not None else x.dtype))


def test_training_moves_the_same_parameters():
    eager = Loop([D] * 4)
    fused = deepcopy(eager)
    fusedres.fuse_(fused)
    x = torch.randn(16, D)
    for model in (eager, fused):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_second_derivatives():
    eager = Own(twice).double()
    fused = deepcopy(eager)
    fusedres.fuse_(fused)
    x = torch.randn(3, D, dtype=torch.float64)

    def penalty(model):
        given = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(given).sum(), given, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(model.parameters())[:4])

    torch.testing.assert_close(penalty(fused), penalty(eager))


@pytest.mark.parametrize("of", ["wrapped", "others", "the same"])
def test_parameters_given_from_outside(of):
    eager = Own(twice)
    fused = deepcopy(eager)
    fusedres.fuse_(fused)
    x = torch.randn(4, D)
    for i in range(3):
        given = {name: p.detach() + (0 if of == "the same" else i) for name, p in eager.named_parameters()}
        if of == "wrapped":
            ours, theirs = (
                torch.func.grad(lambda p, m=m: torch.func.functional_call(m, p, x).sum())(given) for m in (fused, eager)
            )
        else:
            ours, theirs = (torch.func.functional_call(m, given, x) for m in (fused, eager))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(fused(x), eager(x))


@pytest.mark.parametrize("of", ["model", "buffers", "outside"])
def test_a_recomputation_goes_as_the_forward_went(of):
    """`checkpoint` refuses where another number of tensors is kept."""
    model = Own(twice)
    if of == "buffers":
        del model.fc2.weight
        model.fc2.register_buffer("weight", torch.rand(D, D))
    eager = deepcopy(model)
    fusedres.fuse_(model)
    x = torch.randn(4, D)

    def gradient(m):
        given = x.clone().requires_grad_()
        parameters = {name: p.detach() * 1 for name, p in m.named_parameters()}
        call = (lambda z: torch.func.functional_call(m, parameters, (z,))) if of == "outside" else m
        y = torch.utils.checkpoint.checkpoint(call, given, use_reentrant=False)
        return torch.autograd.grad(y.sum(), given)[0]

    for _ in range(3):
        torch.testing.assert_close(gradient(model), gradient(eager))


def test_tensors_from_outside_do_not_outlive_their_call():
    model = Own(twice)
    fusedres.fuse_(model)
    given = {name: p.detach() * 1 for name, p in model.named_parameters()}
    refs = [weakref.ref(one) for one in given.values()]
    for _ in range(3):
        torch.func.functional_call(model, given, (torch.randn(4, D),))
    del given
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_nothing_is_kept_of_layers_that_are_frozen():
    model = Loop([D] * 9)
    for part in model.parts[:-1]:
        part.requires_grad_(False)
    alone = Loop([D] * 2)
    kept = {}
    for name, one in (("alone", alone), ("frozen", model)):
        fusedres.fuse_(one)
        sizes = kept[name] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            y = one(x := torch.randn(1000, D))
        x.zero_()
        y.sum().backward()
    assert sum(kept["frozen"]) == sum(kept["alone"])


def test_tensors_may_change_places():
    """Under torch.__future__'s flag .to and load_state_dict swap tensors that nobody else may hold."""
    model = Own(twice)
    fusedres.fuse_(model)
    model(torch.randn(4, D)).sum().backward()
    model.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        assert model(torch.randn(4, D, dtype=torch.float64)).dtype == torch.float64
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("mode", ["autocast", "vmap", "inference", "meta", "mistake"])
def test_calls_of_other_kinds(mode):
    eager = Own(twice)
    fused = deepcopy(eager)
    fusedres.fuse_(fused)
    x = torch.randn(4, D)
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = fused(x), eager(x)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    elif mode == "vmap":
        torch.testing.assert_close(torch.vmap(fused)(x), torch.vmap(eager)(x))
    elif mode == "inference":
        with torch.inference_mode():
            torch.testing.assert_close(fused(x), eager(x))
    elif mode == "meta":
        assert fused.to("meta")(x.to("meta")).shape == (4, D)
    else:
        words = []
        for model in (fused, eager):
            with pytest.raises(RuntimeError) as error:
                model(torch.randn(4, D + 1))
            words.append(str(error.value))
        assert words[0] == words[1]


def test_a_hook_on_one_block_leaves_all_to_their_author():
    model = nn.Sequential(*(Written(WRITINGS["function"][0]) for _ in range(3)))
    eager = deepcopy(model)
    fusedres.fuse_(model)
    seen = []
    handle = model[1].register_forward_hook(lambda module, args, y: seen.append(y))
    agrees(model, eager, torch.randn(4, D))
    assert seen
    handle.remove()
    assert layers_of(model, torch.randn(4, D)) == [3]


def test_one_call_launches_once(launches):
    model = Loop([D] * 9)
    fusedres.fuse_(model)
    x = torch.randn(4, D)
    with torch.no_grad():
        model(x)
    launches.clear()
    outcome(model, x)
    assert len(launches) <= 2  # none of a layer's own
