"""Fused modules in the hands of what trains: precision, checkpoints, transforms, copies, optimisers, loaders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pairs import (
    CLOSE,
    OPERATORS,
    SINGLE,
    WIDTH,
    Rows,
    by_name,
    every_kind,
    fused_module,
    gradients,
    layer_or_stack,
    pair,
)
from test_operator import Log
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader

from fusedres import FusedResidualLinear, FusedResidualStack
from fusedres.reference import ShapeGatedStack

pytestmark = pytest.mark.backends("cpu")

SAME_BITS = {"rtol": 0.0, "atol": 0.0}
DOUBLE = CLOSE[torch.float64]


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], rule: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, **rule, msg=lambda text, name=name: f"{name}: {text}")


def twin_gradients(plain: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in plain.named_parameters()}


def loss_of(y: Tensor) -> Tensor:
    """Whose gradient tells the elements of y apart."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) + y.square()).mean()


# ---------------------------------------------------------------------------------------------- precision


def autocast_pair(kind: str, last: int) -> tuple[nn.Module, nn.Module]:
    """WIDTH to last columns, without parameters that promote: in the end only a skip does."""
    plain = ShapeGatedStack([WIDTH, last] if kind == "layer" else [WIDTH, WIDTH, WIDTH, last])
    if kind == "stack":
        return FusedResidualStack.from_eager(plain), plain
    fused = FusedResidualLinear(WIDTH, last)
    fused.load_state_dict(plain.layers[0][0].state_dict())
    return nn.ModuleList([nn.ModuleList([fused])]), plain  # named as the plain one


@pytest.mark.launches_nothing  # operands of unlike dtypes, see tests/test_cpu.py for like ones
@pytest.mark.parametrize("x_dtype", ["float32", "low"])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [WIDTH, 4])
@layer_or_stack
def test_autocast_gives_the_dtypes_of_unfused_code(kind, last, low, x_dtype, backend):
    fused, plain = autocast_pair(kind, last)
    call = fused if kind == "stack" else fused[0][0]
    x = torch.randn(5, WIDTH, dtype=torch.float32 if x_dtype == "float32" else low)
    found = []
    for model in (call, plain):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", low):
            y = model(given)
        loss_of(y.float()).backward()
        found.append({"y": y.detach(), "dx": given.grad})
    assert found[1]["y"].dtype == (torch.float32 if last == WIDTH and x_dtype == "float32" else low)
    close = {"rtol": 8 * torch.finfo(low).eps, "atol": 8 * torch.finfo(low).eps}
    own = gradients(fused) if kind == "stack" else {f"layers.{n}": p.grad for n, p in fused.named_parameters()}
    check_same(found[0] | own, found[1] | twin_gradients(plain), close)  # dtypes included


@every_kind
def test_a_gradient_scaler_changes_no_bit_and_leaves_out_a_step_that_overflows(kind, backend):
    """A power of two scales exactly; one step's loss is infinite."""
    trained = []
    for is_scaled in (False, True):
        fused, _ = pair(kind)
        optimizer = torch.optim.SGD(fused.parameters(), 0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=is_scaled)
        torch.manual_seed(1)
        for step in range(6):
            x = torch.randn(9, WIDTH)
            if step == 3:
                if not is_scaled:
                    continue
                x[4, 2] = float("inf")
            optimizer.zero_grad()
            scaler.scale(loss_of(fused(x))).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert not is_scaled or scaler.get_scale() == 2.0**9
        trained.append({name: p.detach() for name, p in fused.named_parameters()})
    check_same(trained[1], trained[0], SAME_BITS)


# ---------------------------------------------------------------------------------------------- checkpoints


def outcome(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    loss_of(y).backward()
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@layer_or_stack
def test_activation_checkpointing(kind, reentrant, backend):
    """With stochastic depth: the rows that were dropped are dropped again."""
    module, x = fused_module(kind, drop_path=0.5), torch.randn(12, WIDTH)
    expected = outcome(module, module, x)
    check_same(outcome(partial(checkpoint, module, use_reentrant=reentrant), module, x), expected, SAME_BITS)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE], ids=str)
@layer_or_stack
def test_selective_checkpointing_by_the_operators_name(kind, policy, backend):
    module, x = fused_module(kind, drop_path=0.5), torch.randn(12, WIDTH)
    operator = getattr(torch.ops.fusedres, OPERATORS[kind]).default
    expected = outcome(module, module, x)

    def chosen(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if op is operator else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, chosen)
    with Log() as log:
        found = outcome(partial(checkpoint, module, use_reentrant=False, context_fn=contexts), module, x)
    check_same(found, expected, SAME_BITS)
    times = 1 if policy == CheckpointPolicy.MUST_SAVE else 2
    assert log.seen.count(f"fusedres::{OPERATORS[kind]}") == times


# ---------------------------------------------------------------------------------------------- torch.func


def states(kind: str) -> tuple[nn.Module, dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    """(fused, its parameters, plain, its parameters), detached."""
    fused, plain = pair(kind)
    own, theirs = ({name: p.detach() for name, p in module.named_parameters()} for module in (fused, plain))
    return fused, own, plain, theirs


def loss_at(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: loss_of(functional_call(module, parameters, (x,)))


def per_sample(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Batched tensors by the names of the twin."""
    rows = [
        by_name(module, {name: t[i] for name, t in tensors.items()}) for i in range(len(next(iter(tensors.values()))))
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@every_kind
def test_functional_gradients(kind, backend):
    fused, own, plain, theirs = states(kind)
    x = torch.randn(5, WIDTH)
    check_same(by_name(fused, grad(loss_at(fused))(own, x)), grad(loss_at(plain))(theirs, x), SINGLE)
    samples = [vmap(grad(loss_at(module)), (None, 0))(state, x) for module, state in ((fused, own), (plain, theirs))]
    check_same(per_sample(fused, samples[0]), samples[1], SINGLE)
    pulled = []
    for module, state in ((fused, own), (plain, theirs)):
        y, pull = vjp(lambda state, x, module=module: functional_call(module, state, (x,)), state, x)
        dstate, dx = pull(torch.ones_like(y))
        pulled.append({"y": y, "dx": dx, **by_name(module, dstate)})
    check_same(*pulled, SINGLE)
    for module in (fused, plain):
        module.requires_grad_(False)
    assert_close(*(jacrev(module)(x[:2]) for module in (fused, plain)), **SINGLE)
    assert_close(*(vmap(jacrev(module))(x) for module in (fused, plain)), **SINGLE)


@every_kind
def test_an_ensemble(kind, backend):
    modules = [pair(kind)[0] for _ in range(3)]
    for i, module in enumerate(modules):
        with torch.no_grad():
            for value in module.parameters():
                value.mul_(1 + 0.3 * i)
    stacked, buffers = stack_module_state(modules)
    x = torch.randn(4, WIDTH)
    together = vmap(lambda p, b, x: functional_call(modules[0], (p, b), (x,)), (0, 0, None))(stacked, buffers, x)
    for i, module in enumerate(modules):
        assert_close(together[i], module(x), **SINGLE)
    found = torch.autograd.grad(loss_of(together[1]), list(stacked.values()))
    expected = torch.autograd.grad(loss_of(modules[1](x)), list(modules[1].parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours[1], theirs, **SINGLE)
        assert not ours[0].any()


# ---------------------------------------------------------------------------------------------- copies


@every_kind
def test_moving_averages(kind, backend):
    """Of a module in use, itself in use between updates."""
    models = pair(kind, torch.float64)
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7)) for model in models]
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    for model, average in zip(models, averages, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
            average.update_parameters(model)
            with torch.no_grad():
                average(x)
    fused, plain = averages
    check_same(by_name(fused.module), dict(plain.module.named_parameters()), DOUBLE)
    assert_close(fused(x), plain(x), **DOUBLE)
    assert not torch.equal(fused(x), models[0](x))


@every_kind
def test_a_copy_of_a_module_in_use_is_its_own(kind, backend):
    module, x = fused_module(kind), torch.randn(5, WIDTH)
    y = module(x)
    other = copy.deepcopy(module)
    torch.optim.SGD(module.parameters(), 0.5).step(lambda: loss_of(module(x)).backward())
    assert torch.equal(other(x), y)
    assert not torch.equal(module(x), y)
    loss_of(other(x)).backward()
    assert not set(map(id, other.parameters())) & set(map(id, module.parameters()))


@pytest.fixture
def swapping() -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@every_kind
def test_parameters_that_change_places(kind, assign, backend, swapping):
    """torch.utils.swap_tensors wants nobody else to hold a parameter: not the engine, that a call has bound it to."""
    fused, plain = pair(kind)
    within, identities = nn.Sequential(fused), [*map(id, fused.parameters())]
    x = torch.randn(5, WIDTH)
    loss_of(within(x)).backward()
    for module in (within, fused):
        module.double()
        assert_close(module(x.double()), plain.double()(x.double()), **DOUBLE)
    other, _ = pair(kind)
    state = {name: 2 * value for name, value in other.state_dict().items()}
    fused.load_state_dict(state, assign=assign)
    plain.load_state_dict(state, assign=assign)
    x = x.to(next(plain.parameters()).dtype)
    assert_close(fused(x), plain(x), **CLOSE[x.dtype])
    assert [*map(id, fused.parameters())] == identities


# ---------------------------------------------------------------------------------------------- parametrizations


class Halved(nn.Module):
    """A weight's half, as users write parametrizations."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return 2 * weight


def halved(linear: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(linear, "weight", Halved())


@pytest.mark.parametrize("parametrized", [parametrizations.weight_norm, parametrizations.spectral_norm, halved])
@layer_or_stack
def test_parametrizations(kind, parametrized, backend):
    """Of a layer, and of a stack's that stands by itself; trained a little."""
    fused, plain = pair(kind)
    layers = [model if kind == "layer" else model.layers[-1][0] for model in (fused, plain)]
    for layer in layers:
        torch.manual_seed(3)  # spectral_norm draws
        parametrized(layer)
    x = torch.randn(5, WIDTH)
    for model in (fused, plain):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
    assert_close(fused(x), plain(x), **SINGLE)
    check_same(by_name(fused), dict(plain.named_parameters()), SINGLE)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    assert_close(fused.eval()(x), plain.eval()(x), **SINGLE)


def test_a_parametrized_run(backend):
    """One parametrization of a run is one of each of its layers, where it goes number by number."""
    fused, plain = pair("stack")
    halved(fused.runs["0-1"])
    for layer in plain.layers[:2]:
        halved(layer[0])
    x = torch.randn(5, WIDTH)
    assert_close(fused(x), plain(x), **SINGLE)
    for model in (fused, plain):
        loss_of(model(x)).backward()
    found = fused.runs["0-1"].parametrizations.weight.original.grad
    for i, layer in enumerate(plain.layers[:2]):
        assert_close(found[i], layer[0].parametrizations.weight.original.grad, **SINGLE)


# ---------------------------------------------------------------------------------------------- steps


@every_kind
def test_clipped_gradients(kind, backend):
    fused, plain = pair(kind)
    x = torch.randn(5, WIDTH)

    def clipped(clip: Callable[..., Any], limit: float, **options: Any) -> list[Tensor | None]:
        found = []
        for model in (fused, plain):
            model.zero_grad()
            (10 * loss_of(model(x))).backward()
            found.append(clip(model.parameters(), limit, **options))
        check_same(gradients(fused), twin_gradients(plain), SINGLE)
        return found

    for norm in (1.0, 2.0, float("inf")):
        norms = clipped(clip_grad_norm_, 0.1, norm_type=norm)
        assert_close(*norms, **SINGLE)
        assert norms[0] > 0.1
    clipped(clip_grad_value_, 0.01)
    assert max(g.abs().max() for g in gradients(fused).values()) == torch.tensor(0.01)


OPTIMISERS = {
    "sgd": partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.05),
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1, amsgrad=True),
}


@pytest.mark.parametrize("form", ["fused", "foreach", "plain"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@every_kind
def test_optimisers_train_as_eager_s(kind, optimiser, form, backend):
    """In double precision, since Adam divides by what may be small."""
    fused, plain = pair(kind, torch.float64)
    x, target = torch.randn(2, 20, WIDTH, dtype=torch.float64)
    for model in (fused, plain):
        how = {"foreach": form == "foreach", "fused": form == "fused"}
        steps = OPTIMISERS[optimiser](model.parameters(), **how)
        for _ in range(10):
            steps.zero_grad()
            (model(x) - target).square().mean().backward()
            steps.step()
    check_same(by_name(fused), dict(plain.named_parameters()), {"rtol": 1e-8, "atol": 1e-9})
    start = by_name(pair(kind, torch.float64)[0])
    assert all((p - start[name]).abs().max() > 1e-3 for name, p in plain.named_parameters())


# ---------------------------------------------------------------------------------------------- loaders


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
@every_kind
def test_a_dataset_that_calls_a_fused_module(kind, start, backend, two_threads):
    """In a loader's workers, after their parent has used the engine on threads."""
    module = fused_module(kind)
    large = torch.randn(20_000, WIDTH, requires_grad=True)
    loss_of(module(large)).backward()
    rows = Rows(module)
    workers = 2 if start == "fork" else 1  # which imports torch anew
    loader = DataLoader(rows, batch_size=4, num_workers=workers, multiprocessing_context=start, timeout=100)
    found = torch.cat(list(loader))
    assert torch.equal(found, torch.stack([rows[i] for i in range(len(rows))]))
