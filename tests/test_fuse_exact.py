"""Code in which a recording goes wrong if it is not careful: a fused model does what it did, to the bit of its effects.

Each case is a forward and what is done to the model after it was fused; output, gradients, what it was given, its
attributes and buffers are those of a model that was not fused.
"""

from __future__ import annotations

import contextlib
import gc
import random
import weakref
from collections import OrderedDict
from copy import deepcopy
from enum import Enum

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blocks import D
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres

pytestmark = pytest.mark.usefixtures("engine")


class Mode(Enum):
    SUM, PLAIN = 1, 2


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Gives(nn.Module):
    """Gives x on, or nothing, or changes what it is given."""

    def __init__(self, how="x"):
        super().__init__()
        self.how = how

    def forward(self, x, acc=None):
        if acc is not None:
            acc.append(1)
        if self.how == "in place":
            x.view(-1)[0] = 7
        return None if self.how == "nothing" else x


class Counts(nn.Module):
    """Counts its calls in a dict that it shares."""

    def __init__(self, shared):
        super().__init__()
        self.of_all = shared

    def forward(self, x):
        self.of_all["n"] = self.of_all["n"] + 1
        return x


class Case(nn.Module):
    """What forwards make use of."""

    gain = 1.0
    rates_of_all = [2.0]  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(D, D)
        self.drop, self.child, self.steps = nn.Dropout(0.3), Gives(), nn.Sequential(nn.Linear(D, D), nn.ReLU())
        self.one, self.wide = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.rand(5, D))
        self.phi, self.cfg, self.stats, self.rng = F.relu, {"scale": 2.0}, {"n": 0}, random.Random(3)
        self.rates, self.kept, self.nested = [{"scale": 2.0}], [1.0], [(1,)]
        self.shared = {"n": 1.0}
        self.counter, self.norms, self.two = Counts(self.shared), nn.ModuleList(), nn.ModuleList([nn.Linear(D, D)])
        self.register_buffer("seen", torch.zeros(()))


def case(how):
    """A model with this forward."""
    return type(how.__name__, (Case,), {"forward": how, "rates_of_all": [2.0]})()


def changes_its_input(m, x):
    x += torch.relu(m.fc(x))
    return x


def changes_a_view(m, x):
    x = x.clone()
    h = x.view(-1, 2)
    h *= 2
    return x + torch.relu(m.fc(x))


def changes_a_name_of_it(m, x):
    y = torch.relu(m.fc(x))
    k = y
    y += x
    return y + k


def counts(m, x):
    m.stats["n"] += 1
    return x + torch.relu(m.fc(x))


def draws_its_own(m, x):
    return x + torch.relu(m.fc(x)) if m.rng.random() < 0.5 else x


def draws_from_numpy(m, x):
    return x + torch.relu(m.fc(x)) if np.random.rand() < 0.5 else x


def asks_gradients(m, x):
    return x + torch.relu(m.fc(x)) if torch.is_grad_enabled() else x - torch.relu(m.fc(x))


def reverses(m, x):
    return x + torch.relu(m.fc(Reversed.apply(x)))


def without_autocast(m, x):
    with torch.autocast("cpu", enabled=False):
        return x + torch.relu(m.fc(x))


def checkpointed(m, x):
    return x + checkpoint(m.steps, x, use_reentrant=False)


def asks_type(m, x):
    return x + torch.relu(m.fc(x)) if type(x) is torch.Tensor else x


def asks_is_tensor(m, x):
    return x + torch.relu(m.fc(x)) if torch.is_tensor(x) else x


def asks_mode(m, x, mode=Mode.SUM):
    return x + torch.relu(m.fc(x)) if mode is Mode.SUM else torch.relu(m.fc(x))


def asks_same(m, x, y):
    return x + torch.relu(m.fc(y)) if x is y else torch.relu(m.fc(y))


def asks_a_dict(m, x, given):
    r = given.get("r")
    return x + torch.relu(m.fc(x)) if r is None else r + torch.relu(m.fc(x))


def asks_a_child(m, x):
    g = m.child(x)
    return torch.relu(m.fc(x)) if g is None else g + torch.relu(m.fc(x))


def asks_an_attribute(m, x):
    return x + torch.relu(m.fc(x)) if hasattr(x, "tag") else torch.relu(m.fc(x))


def matches(m, x):
    match x:
        case torch.Tensor():
            return x + torch.relu(m.fc(x))
        case _:
            return x


def catches(m, x):
    try:
        return x + torch.relu(m.fc(x[:, :3]))
    except RuntimeError:
        return x - torch.relu(m.fc(x))


def reads_lists(m, x):
    return x + m.cfg["scale"] * torch.relu(m.fc(x))


def reads_objects(m, x):
    return x + m.rates[0]["scale"] * torch.relu(m.fc(x))


def reads_the_class(m, x):
    return x + m.gain * torch.relu(m.fc(x))


def reads_a_childs(m, x):
    return x + F.dropout(torch.relu(m.fc(x)), 0.0) * (1 - m.drop.p)


def calls_a_childs_forward(m, x):
    return x + torch.relu(m.fc(m.child.forward(x)))


def gives_a_list(m, x):
    acc = []
    h = m.child(x, acc)
    return h + torch.relu(m.fc(h)) * len(acc)


def broadcasts_a_parameter(m, x):
    h = torch.relu(m.fc(x)) + m.wide
    return h + x if h.shape == x.shape else h


def called_between(m, x):
    z = m.fc(x)
    m.child(x)
    return z + x


def a_dict_of_its_kind(m, x):
    return OrderedDict(y=x + torch.relu(m.fc(x)))


def twice_the_same(m, x):
    h = torch.relu(m.fc(x))
    return torch.cat([h + h, torch.cat([h, h], -1)], -1)


def of_no_input(m, n=None):
    return m.wide + torch.relu(m.fc(m.wide))


def by_keywords(m, x):
    return x + torch.relu(F.linear(input=x, weight=m.fc.weight, bias=m.fc.bias))


def by_shape(m, x):
    return x + torch.relu(m.steps[0](x)) * m.fc.weight.shape[0]


def by_dtype(m, x):
    return x + torch.relu(m.fc(x.to(m.fc.weight.dtype)))


def reads_what_a_child_changed(m, x):
    h = m.counter(x)
    return h + torch.relu(m.fc(x)) * m.shared["n"]


def keeps_its_list(m, x):
    return {"y": x + torch.relu(m.fc(x)), "kept": m.kept}


def catches_all(m, x):
    try:
        return x + torch.relu(m.fc(x)) if x.mean() > -9 else x
    except:  # noqa: E722
        return x


def reads_an_empty_list(m, x):
    for norm in m.norms:
        x = norm(x)
    return x + torch.relu(m.fc(x))


def reads_from_a_list(m, x):
    return x + torch.relu(F.linear(x, m.two[0].weight, m.two[0].bias))


def calls_dropouts_forward(m, x):
    return x + m.drop.forward(torch.relu(m.fc(x)))


def reads_its_classes(m, x):
    return x + m.rates_of_all[0] * torch.relu(m.fc(x))


def reads_nested(m, x):
    return (
        x
        + torch.full((D,), m.nested[0][0], dtype=None).float() / torch.full((D,), m.nested[0][0]).element_size()
        + (torch.relu(m.fc(x)))
    )


def reads_dict(m, x):
    return x + m.__dict__["rates"][0]["scale"] * torch.relu(m.fc(x))


def scaled(m, x):
    return x + m.one * torch.relu(m.fc(x))


def clamped(m, x):
    return x + m.fc(x).clamp(-0.1, 0.1)


def clamped_below(m, x):
    return x + m.fc(x).clamp(min=0)


def nearly_relu(m, x):
    return x + (torch.relu(m.fc(x)) + 1e-12).log()


def sigmoid_in_place(m, x):
    z = m.fc(x)
    t = z.sigmoid_()
    return x + z * t


def plain(m, x):
    return x + torch.relu(m.fc(x))


def in_steps(m, x):
    return x + m.steps(x)


def nothing(m):
    pass


def attribute(name, value):
    return lambda m: setattr(m, name, value)


def of_the_class(m):
    getattr(type(m), "fused_from", type(m)).gain = 3.0


def classes_rate(m):
    m.rates_of_all[0] = 5.0


def zero_bias(m):
    with torch.no_grad():
        m.fc.weight.zero_(), m.fc.bias.zero_()


def without_a_bias(m):
    m.fc.bias = None


def another_bias(m):
    m.fc.bias = nn.Parameter(torch.ones(D))


CASES = [
    (changes_its_input, nothing),
    (changes_a_view, nothing),
    (changes_a_name_of_it, nothing),
    (counts, nothing),
    (draws_its_own, nothing),
    (draws_from_numpy, nothing),
    (asks_gradients, nothing),
    (reverses, nothing),
    (without_autocast, nothing),
    (checkpointed, nothing),
    (asks_type, nothing),
    (asks_is_tensor, nothing),
    (asks_mode, nothing),
    (asks_a_child, lambda m: setattr(m.child, "how", "nothing")),
    (asks_an_attribute, nothing),
    (matches, nothing),
    (catches, nothing),
    (reads_lists, lambda m: m.cfg.update(scale=5.0)),
    (reads_lists, lambda m: m.cfg.update(scale=True)),
    (reads_objects, lambda m: m.rates[0].update(scale=5.0)),
    (reads_the_class, attribute("gain", 3.0)),
    (reads_the_class, of_the_class),
    (reads_a_childs, lambda m: setattr(m.drop, "p", 0.9)),
    (calls_a_childs_forward, lambda m: setattr(m.child, "forward", lambda x: 2 * x)),
    (gives_a_list, nothing),
    (broadcasts_a_parameter, nothing),
    (called_between, lambda m: setattr(m.child, "how", "in place")),
    (a_dict_of_its_kind, nothing),
    (twice_the_same, nothing),
    (by_keywords, nothing),
    (by_keywords, lambda m: nn.utils.parametrize.register_parametrization(m.fc, "weight", nn.Tanh())),
    (reads_what_a_child_changed, nothing),
    (catches_all, nothing),
    (reads_an_empty_list, lambda m: m.norms.append(nn.LayerNorm(D))),
    (reads_from_a_list, lambda m: m.two.__setitem__(0, nn.Linear(D, D))),
    (calls_dropouts_forward, lambda m: setattr(m.drop, "p", 0.9)),
    (reads_its_classes, classes_rate),
    (reads_nested, lambda m: setattr(m, "nested", [(1.0,)])),
    (reads_dict, lambda m: m.rates[0].update(scale=5.0)),
    (by_dtype, lambda m: m.double()),
    (by_shape, lambda m: setattr(m.fc, "weight", nn.Parameter(torch.rand(1, D)))),
    (scaled, lambda m: m.one.data.mul_(3)),
    (scaled, lambda m: setattr(m, "one", nn.Parameter(torch.rand(D)))),
    (scaled, lambda m: setattr(m, "one", nn.Parameter(torch.rand(1, dtype=torch.float64)))),
    (clamped, nothing),
    (clamped_below, zero_bias),
    (nearly_relu, nothing),
    (sigmoid_in_place, nothing),
    (plain, without_a_bias),
    (plain, another_bias),
    (plain, lambda m: setattr(m.fc, "weight", nn.Parameter(torch.rand(1, D)))),
    (in_steps, lambda m: m.steps.append(nn.Tanh())),
    (in_steps, lambda m: m.steps.insert(1, nn.Tanh())),
]


def done(model, change, x, grad):
    """All that a call leaves behind, or the error that it ends with."""
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    change(model)
    try:
        return left_behind(model, x, grad)
    except RuntimeError as error:
        return {"error": str(error)}


def left_behind(model, x, grad):
    given = x.clone().requires_grad_(grad)
    held = given * 1
    found = {}
    with torch.set_grad_enabled(grad):
        y = model(held)
        found["kind"] = type(y)
        y = y["y"] if isinstance(y, dict) else y
        found["y"] = y.detach().clone()
        found["requires"] = y.requires_grad
        if grad:
            parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
            values = torch.autograd.grad(y.square().sum(), [given, *parameters.values()], allow_unused=True)
            found |= dict(zip(["dx", *parameters], values, strict=True))
    found["given"] = held.detach()
    found["attributes"] = {n: v for n, v in vars(model).items() if n in ("stats", "cfg", "number", "gain")}
    return found | dict(model.named_buffers())


def same(ours, theirs, rtol=1e-5):
    if "by an inplace operation" in theirs.get("error", ""):  # eager keeps a result that the engine does not need
        return
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert ours[name] == value, name


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no-gradients"])
@pytest.mark.parametrize(("how", "change"), CASES, ids=[f"{how.__name__}-{i}" for i, (how, _) in enumerate(CASES)])
def test_a_fused_model_does_what_it_did(how, change, grad):
    eager = case(how)
    fused = deepcopy(eager)
    numpys = np.random.get_state()[1].copy()
    with torch.set_grad_enabled(not grad):  # what is found in one mode is not taken for the other
        fusedres.fuse_(fused)
    assert (np.random.get_state()[1] == numpys).all()
    x = torch.randn(5, D)
    for module_change in (nothing, change):
        for shape in (x, x[:1]):
            with contextlib.ExitStack() as stack:
                if how is without_autocast:
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                rtol = 1e-4 if how is nearly_relu else 1e-5  # 1 / z of small z has z's own rounding, magnified
                same(done(fused, module_change, shape, grad), done(eager, module_change, shape, grad), rtol)


@pytest.mark.parametrize(
    ("how", "calls"),
    [
        (asks_mode, [("x",), ("x", Mode.PLAIN), ("x", Mode.SUM)]),
        (asks_same, [("x", "y"), ("x", "x")]),
        (asks_a_dict, [("x", {}), ("x", {"r": 1})]),
        (of_no_input, [(), (3,)]),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_each_call_by_its_own_arguments(how, calls):
    eager = case(how)
    fused = deepcopy(eager)
    fusedres.fuse_(fused)
    tensors = {"x": torch.randn(5, D), "y": torch.randn(5, D)}

    def real(one):
        if isinstance(one, dict):
            return dict.fromkeys(one, tensors["y"])
        return tensors[one] if isinstance(one, str) else one

    for call in calls * 2:
        given = [real(one) for one in call]
        torch.testing.assert_close(fused(*given), eager(*given))


FUSED = {
    changes_its_input: "relu(x Wᵀ + b)",
    changes_a_view: "x + relu(x Wᵀ + b)",
    changes_a_name_of_it: "relu(x Wᵀ + b)",
    asks_gradients: "x + relu(x Wᵀ + b)",
    reads_lists: "x + 2 relu(x Wᵀ + b)",
    reads_the_class: "x + relu(x Wᵀ + b)",
    reads_a_childs: "x + 0.7 relu(x Wᵀ + b)",
    asks_a_child: "s + relu(x Wᵀ + b)",
    twice_the_same: "relu(x Wᵀ + b)",
    by_keywords: "x + relu(x Wᵀ + b)",
    by_dtype: "s + relu(x Wᵀ + b)",
    reads_an_empty_list: "x + relu(x Wᵀ + b)",
    reads_from_a_list: None,
    calls_dropouts_forward: "x + relu(x Wᵀ + b)",
    reads_nested: "s + relu(x Wᵀ + b)",
    reads_its_classes: "x + 2 relu(x Wᵀ + b)",
    scaled: "x + a relu(x Wᵀ + b)",
    nearly_relu: "relu(x Wᵀ + b)",
    plain: "x + relu(x Wᵀ + b)",
    of_no_input: "s + relu(x Wᵀ + b)",
}


@pytest.mark.parametrize("how", [*dict.fromkeys([*(how for how, _ in CASES), asks_same, asks_a_dict, of_no_input])])
def test_what_is_fused_of_them(how):
    """What is fused for nothing would prove nothing above, and no code that a recording misjudges is fused at all."""
    report = fusedres.fuse_(case(how))
    formulas = {layer.linear: layer.formula for layer in report.fused}
    assert formulas.get("fc") == FUSED.get(how)
    assert formulas["steps.0"] == ("x + relu(x Wᵀ + b)" if how is in_steps else "relu(x Wᵀ + b)")


@pytest.mark.parametrize(
    ("how", "because"),
    [
        (reverses, "its forward calls an autograd.Function"),
        (checkpointed, "its forward checkpoints a part of itself"),
        (asks_is_tensor, "its forward asks what a value is"),
        (reads_objects, "its forward reads reads_objects.rates, an object that may change inside"),
        (catches, "its forward catches exceptions"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_why_the_others_are_left(how, because):
    assert because in fusedres.fuse_(case(how)).left[0].because


def test_a_list_that_a_forward_returns_is_the_models_own():
    model = case(keeps_its_list)
    fusedres.fuse_(model)
    assert model(torch.randn(3, D))["kept"] is model.kept


def test_a_function_in_the_place_of_another_is_never_taken_for_it():
    """Nor can it get the other's address, by which it is known: that one is kept."""
    model = case(lambda m, x: x + m.phi(m.fc(x)))
    fusedres.fuse_(model)
    x, before = torch.randn(3, D), []
    for i in range(12):
        model.phi = lambda z, i=i: z * i
        before.append(weakref.ref(model.phi))
        torch.testing.assert_close(model(x), x + i * model.fc(x))
    gc.collect()
    assert all(one() is not None for one in before)


def test_braces_in_names():
    model = case(plain)
    model.register_parameter("a{b}", nn.Parameter(torch.ones(1)))
    setattr(model, "c{d", 3)
    fusedres.fuse_(model)
    x = torch.randn(3, D)
    torch.testing.assert_close(model(x), x + torch.relu(model.fc(x)))


def test_a_parameter_where_none_was():
    eager = case(plain)
    eager.fc.bias = None
    fused = deepcopy(eager)
    assert fusedres.fuse_(fused).fused[0].formula == "x + relu(x Wᵀ)"
    x = torch.randn(5, D)
    for change in (nothing, another_bias):
        same(done(fused, change, x, True), done(eager, change, x, True))


def test_a_call_of_a_kind_met_before_is_recorded_no_more():
    model = case(plain)
    fusedres.fuse_(model)
    made = model._fused_plans.made
    for _ in range(2):
        for is_training in (True, False):
            model.train(is_training)(torch.randn(3, D))
    assert model._fused_plans.made == made


def test_a_replica_that_is_called_first():
    eager = case(plain)
    fusedres.fuse_(eager)
    replica = eager._replicate_for_data_parallel()
    replica._modules = dict(replica._modules)
    replica._modules["fc"] = nn.Linear(D, D)
    x = torch.randn(3, D)
    torch.testing.assert_close(replica(x), x + torch.relu(replica.fc(x)))
    torch.testing.assert_close(eager(x), x + torch.relu(eager.fc(x)))


class Stored(nn.Module):
    """Keeps what it has met in containers, which a recording puts back as they were."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(D, D)
        self.queue, self.table = [torch.ones(2), torch.ones(2)], {"n": 0, "k": 5}

    def forward(self, x):
        tables = [getattr(self, name) for name in ("tab" + "le", "que" + "ue")]  # no name of which it can be known
        return self.kept(tables, x + torch.relu(self.fc(x)))

    def kept(self, tables, y):
        tables[0].update(n=tables[0]["n"] + 1)
        tables[1].pop(0)
        tables[1].append(y.detach())
        return y


def test_containers_are_as_they_were():
    model = Stored()
    queue = list(model.queue)
    fusedres.fuse_(model)
    assert model.table == {"n": 0, "k": 5}
    assert len(model.queue) == 2
    assert all(a is b for a, b in zip(model.queue, queue, strict=True))
    model(torch.randn(3, D))
    assert model.table["n"] == 1


def test_a_slice_of_a_fused_sequential_is_a_new_module():
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
    x = torch.randn(3, D)
    expected = model[:2](x)
    fusedres.fuse_(model)
    torch.testing.assert_close(model[:2](x), expected)


def test_what_fusing_cannot_do_is_a_reason_and_no_error():
    lazy = nn.Sequential(nn.LazyLinear(D), nn.ReLU())
    fusedres.fuse_(lazy)
    assert lazy(torch.randn(3, 5)).shape == (3, D)

    class Registered(nn.Module):
        kinds: list = []  # noqa: RUF012

        def __init_subclass__(cls, *, key, **options):
            super().__init_subclass__(**options)
            cls.kinds.append(key)

    class Mine(Registered, key="mine"):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(D, D)

        def forward(self, x):
            return x + torch.relu(self.fc(x))

    report = fusedres.fuse_(Mine())
    assert "Registered has an __init_subclass__, which a class over it would call" in report.left[0].because
    assert Registered.kinds == ["mine"]
