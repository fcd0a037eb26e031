"""What fuse_ leaves alone, and says so: forwards that a recording cannot show, and linear layers that are not plain."""

from __future__ import annotations

import random
import re
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from blocks import WRITINGS, D, Written, agrees
from torch import nn
from torch.nn.utils import parametrize

import fusedres


def left(model):
    return {layer.linear: layer.because for layer in fusedres.fuse_(model).left}


class Own(nn.Module):
    """A block x + relu(fc(x)) with something in its forward that makes a difference to a recording."""

    def __init__(self, how):
        super().__init__()
        self.fc, self.norm, self.lstm = nn.Linear(D, D), nn.BatchNorm1d(D), nn.LSTM(D, D)
        self.calls, self.seen = 0, []
        self.register_buffer("total", torch.zeros(()))
        self.how = how

    def forward(self, x):
        y = self.how(self, x)
        return x + torch.relu(self.fc(x if y is None else y))


def counts(m, x):
    m.calls += 1


def remembers(m, x):
    m.seen.append(x)


def updates(m, x):
    nn.Module.__setattr__(m, "calls", 1)
    nn.Module.__setattr__(m, "more", 2)


def draws_by_choice(m, x):
    return x * random.choice([1.0, 2.0])


def draws(m, x):
    return x if random.random() < 2 else None


def draws_a_tensor(m, x):
    return x * torch.bernoulli(torch.full((D,), 0.5))


def without_gradients(m, x):
    with torch.no_grad():
        return x * 2


def in_other_precision(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return x * 2


def asks_a_value(m, x):
    return x if x.sum() > 0 else -x


def asks_rows(m, x):
    return x if x.shape[0] > 1 else x * 2


def asks_kind(m, x):
    y = m.lstm(x)
    return y[0] if isinstance(y, tuple) else y


def catches(m, x):
    try:
        return x if x.sum() > 0 else -x
    except Exception:
        return x


def asks_for_gradients(m, x):
    return x * 2 if x.requires_grad else x


FORWARDS = {
    counts: "its forward changes what outlives a call, or a part of something, in counts",
    remembers: r"its forward changes Own\.seen",
    updates: r"its forward changes Own\.calls, Own\.more",
    draws: "its forward draws from random",
    draws_by_choice: "its forward changes a random state",
    without_gradients: "its forward enters a context",
    in_other_precision: "its forward enters a context",
    asks_a_value: "its forward decides something by the values of a tensor",
    asks_rows: "its forward decides something by the values of a tensor, or by sizes that only a call tells",
    asks_kind: "its forward asks what a value is that only a call decides",
    catches: "its forward catches exceptions",
    asks_for_gradients: "its forward asks for requires_grad of a value that only a call decides",
}


@pytest.mark.parametrize("how", FORWARDS, ids=lambda how: how.__name__)
def test_a_forward_that_a_recording_cannot_show_is_left_as_it_was(how):
    model = Own(how)
    before, states = dict(vars(model)), (random.getstate(), torch.get_rng_state())
    found = left(model)
    assert len(found) == 1
    assert re.match("in the model itself: " + FORWARDS[how], found["fc"]), found
    assert vars(model) == before
    assert type(model) is Own
    assert (model.calls, model.seen) == (0, [])
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    model(torch.randn(4, D))


def test_gradients_are_as_they_were_where_a_forward_turns_them_off():
    def turns_off(m, x):
        y = x * 2
        torch.set_grad_enabled(False)
        return y

    try:
        found = left(Own(turns_off))
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert "its forward switches gradients" in found["fc"]


def buffers_change(m, x):
    m.total.add_(x.detach().sum())


def normalises(m, x):
    return m.norm(x)


def draws_by_size(m, x):
    return x * (torch.rand(x.shape) < 0.5)


@pytest.mark.parametrize(
    "how", [buffers_change, normalises, draws_by_size, draws_a_tensor], ids=lambda how: how.__name__
)
@pytest.mark.usefixtures("engine")
def test_what_a_recording_shows_is_done_at_every_call(how):
    torch.manual_seed(3)
    eager = Own(how)
    fused = deepcopy(eager)
    assert [layer.linear for layer in fusedres.fuse_(fused).fused] == ["fc"]
    for _ in range(3):
        x = torch.randn(6, D)
        outcomes = []
        for model in (fused, eager):
            torch.manual_seed(4)
            outcomes.append(model(x))
        torch.testing.assert_close(*outcomes)
    for (name, ours), theirs in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


class MyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def of_kind(kind):
    block = nn.Sequential(nn.Linear(D, D), nn.ReLU())
    if kind == "subclass":
        block[0] = MyLinear(D, D)
    elif kind == "parametrized":
        parametrize.register_parametrization(block[0], "weight", Doubled())
    elif kind == "hooked":
        block[0].register_forward_hook(lambda module, args, y: y + 1)
    elif kind == "hooked-activation":
        block[1].register_forward_pre_hook(lambda module, args: None)
    elif kind == "backward-hooked":
        block[0].register_full_backward_hook(lambda module, gx, gy: None)
    elif kind == "replaced-forward":
        block[0].forward = lambda x: F.linear(x, block[0].weight)
    elif kind == "quantised":
        block = torch.ao.quantization.quantize_dynamic(block, {nn.Linear})
    elif kind == "compiled":
        block[0].compile(backend="eager")
    return block


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("subclass", f"{__name__}.MyLinear computes in its own way"),
        ("parametrized", "its weight is parametrized"),
        ("hooked", "it has hooks, which are to be called"),
        ("backward-hooked", "it has hooks, which are to be called"),
        ("replaced-forward", "its forward was replaced"),
        ("quantised", "torch.ao.nn.quantized.dynamic.modules.linear.Linear is quantised"),
        ("compiled", "it is compiled by itself"),
        ("hooked-activation", "no activation and no addition follows it that a fused layer has"),
    ],
)
def test_a_linear_layer_that_is_not_plain_is_left_alone(kind, reason):
    model = of_kind(kind)
    x = torch.randn(3, D)
    expected = model(x)
    assert left(model) == {"0": reason}
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore")
def test_lora_is_left_alone():
    peft = pytest.importorskip("peft", reason="the LoRA of peft is a test dependency")
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    x = torch.randn(3, D)
    expected = adapted(x)
    report = fusedres.fuse_(adapted)
    assert [layer.linear.split(".")[-1] for layer in report.fused] == ["2"]
    assert any("LoRA" in layer.because for layer in report.left)
    torch.testing.assert_close(adapted(x), expected)


@pytest.mark.usefixtures("engine")
def test_hooks_that_come_later_are_called():
    model = Written(WRITINGS["mlp"][0])
    eager = deepcopy(model)
    fusedres.fuse_(model)
    x, seen = torch.randn(3, D), []
    handles = [
        model.fc1.register_forward_hook(lambda module, args, y: seen.append("forward")),
        model.act.register_forward_pre_hook(lambda module, args: seen.append("pre")),
        model.fc2.register_full_backward_hook(lambda module, gx, gy: seen.append("backward")),
    ]
    model(x).sum().backward()
    assert seen == ["forward", "pre", "backward"]
    for handle in handles:
        handle.remove()
    assert len(fusedres.explain(model, x)) == 2
    with nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__)):
        model(x)
    assert "Linear" in seen
    agrees(model, eager, x)


@pytest.mark.usefixtures("engine")
def test_hooks_on_the_fused_module_itself_stay_with_it():
    model, seen = Written(WRITINGS["function"][0]), []
    model.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    assert fusedres.fuse_(model).fused
    assert len(fusedres.explain(model, torch.randn(3, D))) == 1
    assert seen == [(3, D)]


def test_networks_of_fused_layers_are_not_fused_again():
    model = nn.Sequential(
        fusedres.FusedResidualLinear(D),
        fusedres.FusedResidualStack([D] * 3),
        fusedres.FusedResidualMLP(D),
        nn.Linear(D, 2),
    )
    before = [type(module) for module in model.modules()]
    assert list(left(model)) == ["3"]
    assert [type(module) for module in model.modules()] == before


@pytest.mark.usefixtures("engine")
def test_values_that_are_shared_or_changed_are_not_moved():
    """A product that is read twice, an input that is changed in between: eager's order is kept."""

    def read_twice(m, x):
        z = m.fc(x)
        return torch.relu(z) + z

    def changed_between(m, x):
        x = x * 1
        z = m.fc(x)
        x.mul_(3)
        return z + x

    def changed_in_place(m, x):
        x = x.clone()
        x += torch.relu(m.fc(x))
        return x

    for how in (read_twice, changed_between, changed_in_place):
        model = Own(lambda m, x: None)
        model.__class__ = type("Block", (Own,), {"forward": how})
        eager, x = deepcopy(model), torch.randn(3, D)
        fusedres.fuse_(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x), eager(x))
