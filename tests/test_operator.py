"""The layer as PyTorch sees it: registered, compiled, exported, transformed, and differentiated again."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from layers import Case, Shape
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import FusedResidualLinear, checks, dispatch, functional, ops, plain_layer, reference
from fusedres.kernels.spec import Gradients, LayerSpec, Operands, Wanted

pytestmark = pytest.mark.backends("triton", "cpu")

SQUARE, OBLONG = Shape((5,), 6, 6), Shape((5,), 4, 6)
LAYERS = {
    "identity": Case(SQUARE),
    "residual-passes-g-through": Case(OBLONG, skip="residual"),
    "residual-scaled": Case(OBLONG, skip="residual", skip_scale="scalar", branch_scale=0.5),
    "projection": Case(OBLONG, skip="projection"),
    "concat": Case(OBLONG, skip="concat"),
    "concat-learned": Case(OBLONG, skip="concat", skip_scale="scalar", branch_scale="channel"),
    "no-skip": Case(OBLONG, skip=None, activation="silu"),
    "post-reads-the-skip-again": Case(OBLONG, order="post", skip="projection", skip_scale="scalar", activation="tanh"),
    "learned-scalars": Case(SQUARE, skip_scale="scalar", branch_scale="scalar"),
    "learned-per-channel": Case(SQUARE, branch_scale="channel", activation="sin"),
    "drop-path-has-a-seed": Case(SQUARE, drop_path=0.5),
    "recompute-keeps-nothing": Case(SQUARE, recompute=True),
    "linear-needs-no-z": Case(SQUARE, activation="none", bias=False),
    "leading-dimensions": Case(Shape((2, 3), 6, 6), approximate="tanh"),
    "one-sample": Case(Shape((), 6, 6)),
}
every_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)

# Two computations in single precision of numbers near one, through at most three derivatives.
SINGLE = {"rtol": 1e-4, "atol": 2e-5}
SAME_BITS = {"rtol": 0.0, "atol": 0.0}


class Log(TorchDispatchMode):
    """Remembers the names of the operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


WAYS_IN = {"plain-function": nullcontext, "registered-operator": Log}  # by a context
OPERATOR = "GeneratedBackwardFor_fusedres_residual_linear_defaultBackward"
every_way_in = pytest.mark.parametrize("way", WAYS_IN)


def node_of(way: str, case: Case, backend: str) -> str:
    """The name of the node that autograd then records, or what it ends with."""
    if way == "registered-operator":
        return OPERATOR
    return "ResidualNetwork>" if backend == "cpu" and case.skip != "concat" else "_LayerBackward"


def described(case: Case, device: str) -> tuple[dict[str, Tensor], Operands, LayerSpec]:
    tensors = case.tensors(device)
    scales = {"skip_scale": 1.0, "branch_scale": 1.0} | case.numbers()
    scales |= {name: tensors[name] for name in scales if name in tensors}
    given = Operands(**{name: t for name, t in tensors.items() if name not in scales})
    chosen = {"approximate": "none", "training": True} | case.options()
    options = tuple(
        chosen[n] for n in ("activation", "approximate", "order", "skip", "drop_path", "training", "recompute")
    )
    operands, spec = checks.described(given, *scales.values(), options, False)
    if spec.drop_path > 0:
        operands = operands._replace(seed=torch.tensor(12345))
    return tensors, operands, spec


def call(layer: Callable[..., Tensor], case: Case, tensors: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)
    return layer(**tensors, **case.options(), **case.numbers())


def weighted_sum(y: Tensor) -> Tensor:
    """A scalar whose gradient tells the elements of y apart, and whose second derivative is not zero."""
    weights = torch.linspace(-1, 1, max(y.numel(), 1), dtype=y.dtype, device=y.device)[: y.numel()]
    return (y * (weights.reshape(y.shape) + y)).sum()


# ---------------------------------------------------------------------------------------------- registered


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "drop"])
@every_layer
def test_opcheck_forward(case, keep, device):
    _, operands, spec = described(case, device)
    torch.library.opcheck(torch.ops.fusedres.residual_linear, (*operands, *spec, keep))


def utils_for(case: Case) -> tuple[str, ...]:
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # torch 2.11 cannot trace torch.func.vjp of a linear layer of more than two dimensions, which is what the double
    # backward is; torch.compile has no double backward in any version, so that nobody else comes by there
    is_too_much = TorchVersion(torch.__version__) < (2, 12) and len(case.shape.leading) > 1
    return every[:-1] if is_too_much else every


@every_layer
def test_opcheck_backward(case, device):
    _, operands, spec = described(case, device)
    y, z, s = torch.ops.fusedres.residual_linear(*operands, *spec, True)
    wanted = [t is not None for t in operands[: len(Wanted._fields)]]
    arguments = (torch.randn_like(y).requires_grad_(), z.detach(), s.detach(), *operands, *spec, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch warns of outputs that share memory
        torch.library.opcheck(torch.ops.fusedres.residual_linear_backward, arguments, test_utils=utils_for(case))


@pytest.mark.parametrize("layout", [lambda g: g[0, 0].expand(g.shape), lambda g: g.t().contiguous().t()])
def test_opcheck_backward_of_a_strided_gradient(layout, device):
    _, operands, spec = described(LAYERS["residual-scaled"], device)
    y, z, s = torch.ops.fusedres.residual_linear(*operands, *spec, True)
    wanted = [t is not None for t in operands[: len(Wanted._fields)]]
    g = layout(torch.randn_like(y))
    torch.library.opcheck(
        torch.ops.fusedres.residual_linear_backward, (g, z.detach(), s.detach(), *operands, *spec, wanted)
    )


def test_opcheck_backward_of_a_part(device):
    """Only what is wanted is computed; the rest comes back empty."""
    _, operands, spec = described(LAYERS["projection"], device)
    y, z, s = torch.ops.fusedres.residual_linear(*operands, *spec, True)
    wanted = Wanted(True, False, True, False, False, True, False, False)
    arguments = (torch.randn_like(y), z.detach(), s.detach(), *operands, *spec, list(wanted))
    torch.library.opcheck(torch.ops.fusedres.residual_linear_backward, arguments)
    found = torch.ops.fusedres.residual_linear_backward(*arguments)
    assert [t.numel() > 0 for t in found] == list(wanted)


def test_opcheck_seed():
    # it draws another number every time, so that comparing outputs (test_aot_dispatch_dynamic) cannot apply
    torch.library.opcheck(torch.ops.fusedres.draw_seed, (), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.launches_nothing
def test_the_operators_take_an_empty_batch(device):
    _, operands, spec = described(Case(Shape((0,), 4, 6), skip="projection"), device)
    y, z, s = torch.ops.fusedres.residual_linear(*operands, *spec, True)
    assert y.shape == (0, 4)
    found = torch.ops.fusedres.residual_linear_backward(
        y, z, s, *operands, *spec, [t is not None for t in operands[: len(Wanted._fields)]]
    )
    assert found[1].shape == (4, 6)
    assert not found[1].any()


# ---------------------------------------------------------------------------------------------- compiled

BATCHES = (5, 3, 70, 9, 12)  # 70 rows are of the other tile class
MODULES: dict[str, Callable[[], nn.Module]] = {
    "one-layer": lambda: FusedResidualLinear(6),
    "stack-of-three": lambda: nn.Sequential(
        FusedResidualLinear(6, 8), FusedResidualLinear(8), FusedResidualLinear(8, 4, skip="projection")
    ),
    "drop-path": lambda: FusedResidualLinear(6, drop_path=0.5),
    "learned-scales": lambda: FusedResidualLinear(6, learn_skip_scale=True, learn_branch_scale="channel"),
    "concat-recompute": lambda: FusedResidualLinear(6, 4, skip="concat", recompute=True),
    "post": lambda: FusedResidualLinear(6, order="post", activation="relu"),
}


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Compilation anew: torch's caches on disk know the operator, and not whose kernels stood behind it."""
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def train_step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)
    y = module(x)
    found = torch.autograd.grad(weighted_sum(y), (x, *parameters))
    return {"y": y.detach(), **dict(zip(("x", *names), found, strict=True))}


def check_compiled(module: nn.Module, backend: str, dtype: torch.dtype, device: str, rule: dict) -> None:
    counter = CompileCounterWithBackend(backend)
    module = module.to(device, dtype)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for rows in BATCHES:
        x = torch.randn(rows, 6, device=device, dtype=dtype)
        expected, found = train_step(module, x), train_step(compiled, x)
        for (name, value), other in zip(expected.items(), found.values(), strict=True):
            assert_close(other, value, **rule, msg=lambda text, name=name, rows=rows: f"{name}, {rows} rows: {text}")
    assert counter.frame_count <= 2, "more than one recompile over five batch sizes"


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_compiled_training(make, device, dynamo):
    check_compiled(make(), "aot_eager", torch.float32, device, SAME_BITS)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_compiled_training_in_float64(make, device, dynamo):
    check_compiled(make(), "aot_eager", torch.float64, device, {"rtol": 1e-12, "atol": 1e-12})


@pytest.mark.launches_nothing
def test_compiled_training_within_eager(device, dynamo):
    with fusedres.eager():
        check_compiled(MODULES["drop-path"](), "aot_eager", torch.float32, device, SINGLE)


def test_compiled_by_inductor(device, dynamo):
    if device == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    stack = nn.Sequential(*MODULES["stack-of-three"](), FusedResidualLinear(4, drop_path=0.5))
    check_compiled(stack, "inductor", torch.float32, device, SINGLE)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_with_one_tensor_twice(dtype, backend, device, dynamo):
    """torch 2.11 loses half of the gradient of a compiled autograd.Function given one tensor twice (pytorch#183604)."""
    weight = torch.randn(6, 6, device=device, dtype=dtype)

    def slope(layer):
        x = torch.linspace(-1, 1, 24, device=device, dtype=dtype).reshape(4, 6).requires_grad_()
        return torch.autograd.grad(weighted_sum(layer(x, weight, None, x)), x)[0]

    expected = slope(reference.residual_linear)
    compiled = torch.compile(functional.residual_linear, fullgraph=True, backend=backend)
    assert_close(slope(compiled), expected, **SINGLE)
    assert_close(slope(functional.residual_linear), expected, **SINGLE)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", torch.float16), ("cpu", torch.bfloat16)], indirect=["backend"], ids=str
)
def test_compiled_under_autocast(backend, dtype, device, dynamo):
    # a learned scale stays in float32, and the C++ engine computes in one dtype
    learned = False if backend == "cpu" else "scalar"
    module = FusedResidualLinear(6, 4, skip="projection", learn_branch_scale=learned).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, device=device)
    with torch.autocast(device, dtype):
        expected, found = train_step(module, x), train_step(compiled, x)
    assert expected["y"].dtype == dtype
    assert_close(list(found.values()), list(expected.values()), **SAME_BITS)


def test_compiling_is_quiet(device, dynamo):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(FusedResidualLinear(6, drop_path=0.5).to(device), fullgraph=True, backend="aot_eager")(
            torch.randn(3, 6, device=device)
        )
    assert not [w for w in caught if "fusedres" in str(w.message) or "lru_cache" in str(w.message)]


@pytest.mark.launches_nothing
@pytest.mark.parametrize(
    "transform",
    [grad, lambda f: vmap(grad(f), (None, 0)), lambda f: jacrev(f, 1)],
    ids=["grad", "per-sample-gradients", "jacrev"],
)
def test_compiled_transforms(transform, device, dynamo):
    """torch.func refuses registered operators, so that a compiled transform takes the formula, and says so."""
    weight, x = torch.randn(6, 6, device=device), torch.randn(4, 6, device=device)
    transformed = transform(lambda w, x: weighted_sum(functional.residual_linear(x, w)))
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    assert_close(compiled(weight, x), transformed(weight, x), **SINGLE)


# ---------------------------------------------------------------------------------------------- exported


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_export_with_a_dynamic_batch(dtype, strict, backend, device):
    module = nn.Sequential(*MODULES["stack-of-three"](), FusedResidualLinear(4, drop_path=0.5)).to(device, dtype)
    example = torch.randn(5, 6, device=device, dtype=dtype)
    exported = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    has_kernels = backend == "cpu" or dtype == torch.float32
    assert targets.count("fusedres.residual_linear.default") == (4 if has_kernels else 0)
    program = exported.module()
    for rows in (2, 9, 70):
        x = torch.randn(rows, 6, device=device, dtype=dtype)
        torch.manual_seed(3)
        expected = module(x)
        torch.manual_seed(3)
        # without gradients, as programs run, the C++ compiler may contract φ's last sum otherwise: one rounding
        rule = SAME_BITS if dtype == torch.float32 else {"rtol": 1e-14, "atol": 1e-14}
        assert_close(program(x), expected, **rule)


def test_traced_by_make_fx(device):
    weight, x = torch.randn(6, 6, device=device), torch.randn(5, 6, device=device)
    traced = make_fx(lambda x, weight: functional.residual_linear(x, weight), tracing_mode="symbolic")(x, weight)
    assert "fusedres.residual_linear.default" in {str(node.target) for node in traced.graph.nodes}
    other = torch.randn(70, 6, device=device)
    assert_close(traced(other, weight), functional.residual_linear(other, weight), **SAME_BITS)


# ---------------------------------------------------------------------------------------------- torch.func


def scalar_of(layer: Callable[..., Tensor], case: Case, names: list[str]) -> Callable[..., Tensor]:
    return lambda *values: weighted_sum(call(layer, case, dict(zip(names, values, strict=True))))


@pytest.mark.parametrize("mode", [nullcontext, Log], ids=["no-mode", "dispatch-mode"])
@every_layer
def test_grad(case, mode, device):
    tensors = case.tensors(device)
    names, values = list(tensors), tuple(t.detach() for t in tensors.values())
    every = tuple(range(len(names)))
    with mode():
        found = grad(scalar_of(functional.residual_linear, case, names), every)(*values)
    assert_close(found, grad(scalar_of(reference.residual_linear, case, names), every)(*values), **SINGLE)


@pytest.mark.parametrize("mode", [nullcontext, Log], ids=["no-mode", "dispatch-mode"])
@pytest.mark.parametrize(
    "transform", [jacrev, lambda f: jacrev(jacrev(f)), lambda f: grad(lambda x: f(x).square().sum())]
)
@pytest.mark.parametrize("case", [LAYERS["identity"], LAYERS["concat-learned"]], ids=["identity", "concat-learned"])
def test_jacobians(case, transform, mode, device):
    tensors = {name: t.detach() for name, t in case.tensors(device).items()}

    def of(layer):
        return transform(lambda x: call(layer, case, {**tensors, "x": x}))(tensors["x"][:2])

    with mode():
        found = of(functional.residual_linear)
    assert_close(found, of(reference.residual_linear), **SINGLE)


def test_vjp_runs_the_kernels(device, fused):
    module = FusedResidualLinear(6).to(device)
    x = torch.randn(3, 6, device=device)
    calls = fusedres.explain(lambda x: vjp(module, x), x)
    assert calls[0].backend == fused


@pytest.mark.parametrize("mode", [nullcontext, Log], ids=["no-mode", "dispatch-mode"])
def test_per_sample_gradients(mode, device):
    module = FusedResidualLinear(6, 4, skip="projection", learn_branch_scale="channel").to(device)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(5, 6, device=device)

    def loss(parameters, sample):
        return weighted_sum(functional_call(module, parameters, (sample,)))

    with mode():
        found = vmap(grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        names, values = zip(*module.named_parameters(), strict=True)
        for name, one in zip(names, torch.autograd.grad(weighted_sum(module(sample)), values), strict=True):
            assert_close(found[name][i], one, **SINGLE)


def test_an_ensemble_of_weights(device):
    modules = [FusedResidualLinear(6, learn_skip_scale=True).to(device) for _ in range(3)]
    parameters, buffers = stack_module_state(modules)
    x = torch.randn(4, 6, device=device)

    def one(parameters, buffers, x):
        return functional_call(modules[0], (parameters, buffers), (x,))

    together = vmap(one, (0, 0, None))(parameters, buffers, x)
    assert_close(together, torch.stack([module(x) for module in modules]), **SINGLE)
    found = torch.autograd.grad(weighted_sum(together[1]), parameters["weight"])[0]
    assert_close(found[1], torch.autograd.grad(weighted_sum(modules[1](x)), modules[1].weight)[0], **SINGLE)
    assert not found[0].any()


def test_vmap_over_any_dimension(device):
    x, weight = torch.randn(6, 4, 3, device=device), torch.randn(6, 6, device=device)
    found = vmap(functional.residual_linear, (2, None), out_dims=1)(x.transpose(0, 1), weight)
    assert_close(found, functional.residual_linear(x.permute(1, 2, 0), weight), **SINGLE)


@pytest.mark.launches_nothing
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap_draws_as_it_is_told(randomness, device):
    x, weight = torch.ones(8, 20, 6, device=device), torch.randn(6, 6, device=device)
    y = vmap(lambda x: functional.residual_linear(x, weight, drop_path=0.5), randomness=randomness)(x)
    dropped = (y == x).all(-1)
    assert dropped.any()
    assert not dropped.all()
    assert (dropped == dropped[0]).all() == (randomness == "same")


@pytest.mark.launches_nothing
def test_vmap_refuses_to_draw(device):
    x, weight = torch.ones(8, 20, 6, device=device), torch.randn(6, 6, device=device)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: functional.residual_linear(x, weight, drop_path=0.5))(x)


def test_a_batch_of_gradients(device):
    """torch.autograd's own vmap (is_grads_batched), older than torch.func."""
    x, weight = torch.randn(4, 6, device=device), torch.randn(6, 6, device=device)
    found = torch.autograd.functional.jacobian(lambda w: functional.residual_linear(x, w), weight, vectorize=True)
    expected = torch.autograd.functional.jacobian(lambda w: reference.residual_linear(x, w), weight)
    assert_close(found, expected, **SINGLE)


# ---------------------------------------------------------------------------------------------- again


ALL_SUMS = [
    (order, skip)
    for order in ("pre", "post")
    for skip in ("identity", "residual", "projection", "concat", None)
    if (order, skip) != ("post", "concat")
]
every_formula = pytest.mark.parametrize(("order", "skip"), ALL_SUMS)
every_activation = pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "relu", "silu", "tanh", "sin", "none"])


def tiny(order: str, skip: str | None, activation: str) -> Case:
    name, approximate = ("gelu", "tanh") if activation == "gelu-tanh" else (activation, "none")
    shape = Shape((2,), 2, 2) if skip == "identity" else Shape((2,), 3, 2)
    return Case(
        shape,
        torch.float64,
        activation=name,
        approximate=approximate,
        order=order,
        skip=skip,
        skip_scale="scalar" if skip else 1.0,
        branch_scale="channel",
    )


@every_formula
@every_activation
def test_gradcheck_in_float64(activation, order, skip, device):
    """On the CPU through the kernels. Triton leaves float64 to the formula; the next tests tie its kernels to that."""
    case = tiny(order, skip, activation)
    tensors = case.tensors(device)
    names, values = list(tensors), tuple(tensors.values())

    def layer(*values):
        return call(functional.residual_linear, case, dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(layer, values)
    assert torch.autograd.gradgradcheck(layer, values)


@pytest.fixture
def kernels_in_float64(backend, monkeypatch) -> None:
    """Triton's launchers replaced by the formula, so that what stands around them can be checked in float64."""
    if backend == "cpu":
        return

    def forward(operands: Operands, spec: LayerSpec, keep: bool):
        y = reference.layer(Operands(*(None if t is None else t.detach() for t in operands)), spec)
        z = torch.nn.functional.linear(operands.x, operands.weight, operands.bias).flatten(0, -2).detach()
        keeps_z, keeps_s = ops._kept(operands, spec, keep)
        return y, z if keeps_z else None, z * 2 if keeps_s else None

    def backward(g, operands, z, s, spec, wanted):
        operands = Operands(*(None if t is None else t.detach() for t in operands))
        # in a thread of its own, since autograd is off in the one that an operator's implementation runs in
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(ops._reference_gradients, g.detach(), operands, spec, wanted).result()
        return ops._spread(found, wanted)

    monkeypatch.setattr(ops, "_forward", forward)
    monkeypatch.setattr(ops, "_backward", backward)


@every_way_in
@pytest.mark.parametrize(
    ("order", "skip", "drop_path"),
    [(order, skip, p) for order, skip in ALL_SUMS for p in (0.0, 0.5) if skip or not p],  # no skip, no drop_path
)
def test_gradgradcheck_of_every_way_in(order, skip, drop_path, way, device, kernels_in_float64):
    case = tiny(order, skip, "silu")
    tensors, operands, spec = described(case, device)
    seed = torch.tensor(3)
    spec = spec._replace(drop_path=drop_path)
    node = {"plain-function": "_LayerBackward", "registered-operator": OPERATOR}[way]

    def layer(*values):
        named = dict(zip(tensors, values, strict=True))
        return ops.residual_linear(operands._replace(**named, seed=seed if drop_path else None), spec)

    with WAYS_IN[way]():
        assert layer(*tensors.values()).grad_fn.name() == node
        assert torch.autograd.gradcheck(layer, tuple(tensors.values()))
        assert torch.autograd.gradgradcheck(layer, tuple(tensors.values()))


def derivatives(layer: Callable[..., Tensor], case: Case, tensors: dict[str, Tensor], order: int) -> list[Tensor]:
    """y, and the gradients of every tensor, of those gradients, and so on."""
    y = call(layer, case, tensors)
    found = [y]
    total = weighted_sum(y)
    for depth in range(order):
        gradients = torch.autograd.grad(
            total, list(tensors.values()), create_graph=depth < order - 1, materialize_grads=True
        )
        found += gradients
        total = sum(weighted_sum(g) for g in gradients)
    return found


@every_way_in
@every_layer
def test_second_derivatives(case, way, backend, device):
    tensors = case.tensors(device)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    with WAYS_IN[way]():
        assert call(functional.residual_linear, case, tensors).grad_fn.name().endswith(node_of(way, case, backend))
        found = derivatives(functional.residual_linear, case, tensors, order=2)
    for ours, truth in zip(found, derivatives(reference.residual_linear, case, wide, order=2), strict=True):
        scale = truth.abs().max().clamp_min(1)  # sums of many terms
        assert_close(ours.double() / scale, truth / scale, **SINGLE)


@every_way_in
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("activation", ["gelu", "sin", "tanh"])
def test_third_derivatives(activation, recompute, way, device):
    case = Case(Shape((2,), 3, 3), activation=activation, recompute=recompute, skip_scale="scalar")
    tensors = case.tensors(device)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    with WAYS_IN[way]():
        found = derivatives(functional.residual_linear, case, tensors, order=3)
    for ours, truth in zip(found, derivatives(reference.residual_linear, case, wide, order=3), strict=True):
        scale = truth.abs().max().clamp_min(1)
        assert_close(ours.double() / scale, truth / scale, **SINGLE)


def test_gradient_penalty_trains_every_parameter(device):
    def penalty(dtype):
        torch.manual_seed(2)
        stack = nn.Sequential(FusedResidualLinear(6, activation="silu"), FusedResidualLinear(6, 1)).to(device, dtype)
        x = torch.linspace(-1, 1, 24, device=device, dtype=dtype).reshape(4, 6).requires_grad_()
        slope = torch.autograd.grad(stack(x).sum(), x, create_graph=True)[0]
        (slope.norm(dim=1) - 1).square().mean().backward()
        return [p.grad for p in stack.parameters()]

    for ours, truth in zip(penalty(torch.float32)[:-1], penalty(torch.float64)[:-1], strict=True):
        assert truth.any()
        assert_close(ours.double(), truth, **SINGLE)


def test_laplacian(device):
    """As in a loss of a partial differential equation: Σ ∂²y/∂x², itself differentiated."""

    def of(dtype):
        torch.manual_seed(2)
        stack = nn.Sequential(FusedResidualLinear(2, 8, activation="sin"), FusedResidualLinear(8, 1, activation="none"))
        stack = stack.to(device, dtype)
        x = torch.linspace(-1, 1, 10, device=device, dtype=dtype).reshape(5, 2).requires_grad_()
        slope = torch.autograd.grad(stack(x).sum(), x, create_graph=True)[0]
        laplacian = sum(torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return laplacian, torch.autograd.grad(laplacian.square().sum(), stack[0].weight)[0]

    for ours, truth in zip(of(torch.float32), of(torch.float64), strict=True):
        assert_close(ours.double(), truth, **SINGLE)


# ---------------------------------------------------------------------------------------------- forward mode


def through_dual_tensors(layer, x):
    with forward_ad.dual_level():
        return layer(forward_ad.make_dual(x, x))


@pytest.mark.launches_nothing  # within fusedres.eager()
@pytest.mark.parametrize("route", [nullcontext, fusedres.eager, Log], ids=["fused", "eager", "dispatch-mode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "forward",
    [
        lambda layer, x: jvp(layer, (x,), (x,)),
        lambda layer, x: jacfwd(layer)(x),
        lambda layer, x: hessian(lambda x: layer(x).sum())(x),
        through_dual_tensors,
    ],
    ids=["jvp", "jacfwd", "hessian", "dual-tensors"],
)
def test_forward_mode_is_refused(forward, dtype, route, device):
    module = FusedResidualLinear(6).to(device, dtype)
    x = torch.randn(2, 6, device=device, dtype=dtype)
    with route(), pytest.raises(NotImplementedError, match=r"forward-mode.*reverse mode.*fusedres\.reference"):
        forward(module, x)
    assert module(x).shape == (2, 6)  # and nothing is left behind


@pytest.mark.launches_nothing
def test_the_reference_offered_instead_has_forward_mode(device):
    x, weight = torch.randn(2, 6, device=device), torch.randn(6, 6, device=device)
    _, tangent = jvp(lambda x: reference.residual_linear(x, weight), (x,), (torch.ones_like(x),))
    assert tangent.any()


def test_hessians_by_reverse_mode_alone(device):
    weight, x = torch.randn(6, 6, device=device), torch.randn(6, device=device)
    found = torch.autograd.functional.hvp(lambda x: functional.residual_linear(x, weight).sum(), x, torch.ones_like(x))
    expected = torch.autograd.functional.hvp(
        lambda x: reference.residual_linear(x, weight).sum(), x, torch.ones_like(x)
    )
    assert_close(found, expected, **SINGLE)


# ---------------------------------------------------------------------------------------------- who is watching


def test_a_dispatch_mode_sees_the_operators_by_name(device):
    module = FusedResidualLinear(6, drop_path=0.5).to(device)
    with Log() as log:
        module(torch.randn(3, 6, device=device)).sum().backward()
    assert log.seen.count("fusedres::residual_linear") == 1
    assert log.seen.count("fusedres::residual_linear_backward") == 1


def test_a_dispatch_mode_around_backward_alone_sees_it(device):
    y = FusedResidualLinear(6).to(device)(torch.randn(3, 6, device=device)).sum()
    with Log() as log:
        y.backward()
    assert "fusedres::residual_linear_backward" in log.seen


@every_layer
def test_fake_tensors(case, device):
    """Shapes, dtypes and strides without computing: what memory planners and AOT tracing read."""
    tensors = case.tensors(device)
    y = call(functional.residual_linear, case, tensors)
    gradients = torch.autograd.grad(y.sum(), list(tensors.values()))
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(t) for name, t in tensors.items()}
        fake_y = call(functional.residual_linear, case, fakes)
        fake_gradients = torch.autograd.grad(fake_y.sum(), list(fakes.values()))
    for real, fake in zip((y, *gradients), (fake_y, *fake_gradients), strict=True):
        assert (real.shape, real.dtype, real.device) == (fake.shape, fake.dtype, fake.device)


def test_a_tensor_subclass(device):
    """TwoTensor runs every operator on each of its two tensors."""
    x, weight = torch.randn(4, 6, device=device), torch.randn(6, 6, device=device)
    both = TwoTensor(x, 2 * x).requires_grad_()
    y = functional.residual_linear(both, TwoTensor(weight, weight.clone()))
    assert type(y) is TwoTensor
    slope = torch.autograd.grad(weighted_sum(y), both)[0]
    for part, alone in ((lambda t: t.a, x), (lambda t: t.b, 2 * x)):
        alone = alone.clone().requires_grad_()
        expected = functional.residual_linear(alone, weight)
        assert_close(part(y), expected.detach(), **SAME_BITS)
        assert_close(part(slope), torch.autograd.grad(weighted_sum(expected), alone)[0], **SAME_BITS)


class Named(Tensor):
    """A subclass by __torch_function__ alone, as user code writes them."""


def test_a_subclass_that_wraps_functions(device):
    x, weight = torch.randn(4, 6, device=device), torch.randn(6, 6, device=device)
    y = functional.residual_linear(x.as_subclass(Named), weight)
    assert type(y) is Named
    assert_close(y.as_subclass(Tensor), functional.residual_linear(x, weight), **SAME_BITS)


# ---------------------------------------------------------------------------------------------- the private flags


def test_the_flags_exist_and_tell_calls_apart():
    """Private to torch: where a new version lacks one, dispatch and functional still answer, but let us know here."""
    assert torch._C._len_torch_dispatch_stack() == 0
    with Log():
        assert torch._C._len_torch_dispatch_stack() == 1
    assert not torch._C._are_functorch_transforms_active()
    seen = []
    grad(lambda x: (seen.append(torch._C._are_functorch_transforms_active()), x.sum())[1])(torch.ones(2))
    assert seen == [True]
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
    assert callable(torch._C._functorch.get_interpreter_stack)
    assert callable(torch._C._functorch.is_legacy_batchedtensor)


@every_layer
def test_without_a_flag_the_general_way_is_taken(case, device, monkeypatch):
    tensors = case.tensors(device)
    values = list(tensors.values())
    expected = call(functional.residual_linear, case, tensors)
    slopes = torch.autograd.grad(weighted_sum(expected), values)
    for flag, answer, node in (
        ("modes_in_force", lambda: 1, OPERATOR),
        ("transforms_are_active", lambda: True, "_TransformableLayerBackward"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, flag, answer)
            patch.setattr(plain_layer, flag, answer)
            y = call(functional.residual_linear, case, tensors)
            assert y.grad_fn.name() == node
            assert_close(y, expected, **SAME_BITS)
            assert_close(torch.autograd.grad(weighted_sum(y), values), slopes, **SINGLE)


# ---------------------------------------------------------------------------------------------- inputs


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "rows-apart": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]] if t.dim() else t,
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].reshape(t.shape) if t.dim() else t,
    "expanded": lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
    "flipped": lambda t: t.flip(-1) if t.dim() else t,
}


@pytest.mark.parametrize("gradient", LAYOUTS.values(), ids=[f"gradient-{name}" for name in LAYOUTS])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("skip", ["residual", "projection", "concat"])
def test_any_strides(skip, layout, gradient, device):
    case = Case(Shape((2, 3), 5, 6), skip=skip, skip_scale="scalar", branch_scale="channel")
    leaves = list(case.tensors(device).values())

    def of(layer):
        tensors = dict(zip(case.tensors(device), map(layout, leaves), strict=True))
        y = call(layer, case, tensors)
        g = gradient(torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape))
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    assert_close(of(functional.residual_linear), of(reference.residual_linear), **SINGLE)


EMPTY = {
    "no-rows": Shape((0,), 4, 6),
    "no-rows-in-the-middle": Shape((2, 0), 4, 6),
    "no-outputs": Shape((3,), 0, 6),
    "no-inputs": Shape((3,), 4, 0),
}


@pytest.mark.launches_nothing
@pytest.mark.parametrize("skip", ["residual", "projection", "concat", None])
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_empty_tensors_as_in_torch(shape, skip, device):
    case = Case(shape, skip=skip, skip_scale="scalar" if skip else 1.0, branch_scale="channel")
    tensors = case.tensors(device)
    y = call(functional.residual_linear, case, tensors)
    expected = call(reference.residual_linear, case, tensors)
    assert_close(y, expected, **SAME_BITS)
    for name, g in zip(tensors, torch.autograd.grad(y.sum(), list(tensors.values())), strict=True):
        assert g.shape == tensors[name].shape
        if 0 in shape.leading:
            assert not g.any()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (1, 2, 1, 3)], ids=len)
def test_leading_dimensions(leading, device):
    case = Case(Shape(leading, 6, 6), branch_scale="channel")
    tensors = case.tensors(device)
    values = list(tensors.values())
    found, expected = (call(f, case, tensors) for f in (functional.residual_linear, reference.residual_linear))
    assert_close(found, expected, **SINGLE)
    assert_close(
        torch.autograd.grad(weighted_sum(found), values), torch.autograd.grad(weighted_sum(expected), values), **SINGLE
    )


@every_layer
def test_two_runs_give_the_same_bits(case, device):
    tensors = case.tensors(device)

    def run():
        y = call(functional.residual_linear, case, tensors)
        return y, *torch.autograd.grad(weighted_sum(y), list(tensors.values()))

    assert_close(run(), run(), **SAME_BITS)


def test_gradients_are_asked_for_one_by_one(device):
    """What is not asked for is not computed, and what is asked for does not depend on it."""
    case = Case(OBLONG, skip="projection", skip_scale="scalar", branch_scale="channel", order="post")
    tensors = case.tensors(device)
    together = torch.autograd.grad(
        weighted_sum(call(functional.residual_linear, case, tensors)), list(tensors.values())
    )
    for name, expected in zip(tensors, together, strict=True):
        alone = {other: t.detach().requires_grad_(other == name) for other, t in tensors.items()}
        found = torch.autograd.grad(weighted_sum(call(functional.residual_linear, case, alone)), alone[name])[0]
        assert_close(found, expected, **SAME_BITS)


@every_way_in
def test_a_residual_gets_the_gradient_itself(way, device):
    """Where nothing scales it or stands behind it: no kernel has to copy it."""
    x, residual = (torch.randn(3, 6, device=device, requires_grad=True) for _ in range(2))
    g = torch.randn(3, 6, device=device)
    with WAYS_IN[way]():
        y = functional.residual_linear(x, torch.randn(6, 6, device=device), None, residual)
        assert torch.autograd.grad(y, residual, g)[0].data_ptr() == g.data_ptr()


@pytest.mark.backends("triton")  # the engine's own node asks in C++ (tests/test_plain_layer.py)
def test_unwanted_gradients_are_not_computed(device, monkeypatch):
    asked: list[Wanted] = []
    backward = ops._backward

    def spy(g, operands, z, s, spec, wanted) -> Gradients:
        asked.append(wanted)
        return backward(g, operands, z, s, spec, wanted)

    monkeypatch.setattr(ops, "_backward", spy)
    module = FusedResidualLinear(6).to(device)
    module.weight.requires_grad_(False)
    module(torch.randn(3, 6, device=device)).sum().backward()
    assert asked == [Wanted(False, False, True, False, False, False, False, False)]
    assert module.weight.grad is None
