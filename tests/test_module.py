"""FusedResidualLinear is an nn.Linear in every respect that a user relies on."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import FusedResidualLinear, ops

pytestmark = pytest.mark.backends("triton", "cpu")

SINGLE = {"rtol": 1e-4, "atol": 2e-5}  # two computations in single precision of numbers near one
SAME_BITS = {"rtol": 0.0, "atol": 0.0}

OPTIONS: dict[str, dict] = {
    "plain": {},
    "no-bias": {"bias": False},
    "other-size": {"out_features": 4},
    "projection": {"out_features": 4, "skip": "projection"},
    "projection-no-bias": {"out_features": 4, "skip": "projection", "bias": False},
    "concat": {"out_features": 4, "skip": "concat"},
    "no-skip": {"skip": None},
    "post-relu": {"order": "post", "activation": "relu"},
    "tanh-gelu": {"approximate": "tanh"},
    "fixed-scales": {"skip_scale": 0.5, "branch_scale": 2.0},
    "learned-scales": {"learn_skip_scale": True, "learn_branch_scale": "channel", "branch_scale": 0.0},
    "learned-scalar": {"learn_branch_scale": "scalar", "branch_scale": 0.1},
    "drop-path-recompute": {"drop_path": 0.25, "recompute": True},
}
every_layer = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def named(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def outcome(module: Callable[..., Tensor], x: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and every gradient, under one seed."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    found = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()])
    return {"y": y.detach(), **dict(zip(("x", *parameters), found, strict=True))}


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], rule: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, **rule, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------- parameters


def test_plain_parameters_are_those_of_a_linear_layer():
    layer = FusedResidualLinear(6, 4)
    assert isinstance(layer, nn.Linear)
    assert {name: p.shape for name, p in layer.named_parameters()} == {"weight": (4, 6), "bias": (4,)}
    assert FusedResidualLinear(6, 4, bias=False).bias is None
    assert (FusedResidualLinear(6).in_features, FusedResidualLinear(6).out_features) == (6, 6)


def test_all_parameters():
    layer = FusedResidualLinear(6, 4, skip="projection", learn_skip_scale=True, learn_branch_scale="channel")
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (4, 6),
        "bias": (4,),
        "skip_scale": (),
        "branch_scale": (4,),
        "projection.weight": (4, 6),
        "projection.bias": (4,),
    }
    assert FusedResidualLinear(6, learn_branch_scale="scalar").branch_scale.shape == ()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("sizes", [(6, 6), (6, 4)], ids=["square", "oblong"])
def test_state_dicts_load_strictly_both_ways(sizes, bias, device):
    linear, layer = nn.Linear(*sizes, bias, device), FusedResidualLinear(*sizes, bias, device=device)
    layer.load_state_dict(linear.state_dict(), strict=True)
    x = torch.randn(3, 6, device=device)
    branch = torch.nn.functional.gelu(linear(x))
    assert_close(layer(x), x + branch if sizes[0] == sizes[1] else branch, **SINGLE)
    layer.reset_parameters()
    linear.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(linear.weight, layer.weight)


def test_a_missing_parameter_is_told():
    with pytest.raises(RuntimeError, match=r"Missing key.*skip_scale"):
        FusedResidualLinear(6, learn_skip_scale=True).load_state_dict(nn.Linear(6, 6).state_dict())


@every_layer
def test_one_seed_initialises_as_a_linear_layer(options):
    torch.manual_seed(3)
    layer = FusedResidualLinear(6, **options)
    after = torch.rand(())
    torch.manual_seed(3)
    linears = [nn.Linear(6, options.get("out_features", 6), options.get("bias", True))]
    if options.get("skip") == "projection":
        linears.append(nn.Linear(6, 4, options.get("bias", True)))
    assert torch.equal(torch.rand(()), after), "learned scales draw nothing"
    for ours, theirs in zip((layer, layer.projection), linears, strict=False):
        assert torch.equal(ours.weight, theirs.weight)
        assert (ours.bias is None) == (theirs.bias is None)
        assert ours.bias is None or torch.equal(ours.bias, theirs.bias)


@every_layer
def test_reset_parameters(options):
    torch.manual_seed(3)
    layer = FusedResidualLinear(6, **options)
    expected = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7.0)
    torch.manual_seed(3)
    layer.reset_parameters()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_learned_scales_start_where_they_are_told(device):
    layer = FusedResidualLinear(
        6, skip_scale=0.5, learn_skip_scale=True, branch_scale=0.0, learn_branch_scale="channel", device=device
    )
    assert layer.skip_scale.item() == 0.5
    assert not layer.branch_scale.any()
    x = torch.randn(3, 6, device=device)
    assert_close(layer(x), 0.5 * x, **SAME_BITS)
    found = outcome(layer, x, named(layer))
    assert found["branch_scale"].any(), "a branch closed at first must be able to open"


@every_layer
def test_from_the_meta_device(options, device):
    layer = FusedResidualLinear(6, **options, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device=device)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    other = FusedResidualLinear(6, **options, device=device)
    for name, value in other.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    assert torch.isfinite(layer(torch.randn(3, 6, device=device))).all()


def test_computes_shapes_on_the_meta_device():
    layer = FusedResidualLinear(6, 4, skip="projection", device="meta")
    y = layer(torch.empty(2, 3, 6, device="meta", requires_grad=True))
    assert (y.shape, y.device.type) == ((2, 3, 4), "meta")
    y.sum().backward()
    assert layer.weight.grad.shape == (4, 6)


def test_skip_init():
    layer = nn.utils.skip_init(FusedResidualLinear, 6, learn_branch_scale="scalar")
    assert layer.weight.device.type == "cpu"


@pytest.mark.launches_nothing
def test_dtype_and_device_arguments(device):
    layer = FusedResidualLinear(6, 4, skip="projection", learn_skip_scale=True, device=device, dtype=torch.float16)
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float16, device)}


def resaved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), resaved],
    ids=["deepcopy", "pickle", "torch-save"],
)
@every_layer
def test_copies(options, copied, device):
    layer = FusedResidualLinear(6, **options).to(device)
    other = copied(layer)
    x = torch.randn(3, 6, device=device)
    check_same(outcome(other, x, named(other)), outcome(layer, x, named(layer)), SAME_BITS)
    with torch.no_grad():
        other.weight.zero_()
    assert layer.weight.any()


def test_state_dict_through_a_file(tmp_path, device):
    layer = FusedResidualLinear(6, learn_branch_scale="channel", branch_scale=0.3).to(device)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = FusedResidualLinear(6, learn_branch_scale="channel").to(device)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(3, 6, device=device)
    assert torch.equal(other(x), layer(x))


@every_layer
def test_its_repr_makes_it_again(options):
    layer = FusedResidualLinear(6, **options)
    again = eval(repr(layer), {"FusedResidualLinear": FusedResidualLinear}) if layer.projection is None else None
    if again is None:  # nn.Module prints its children below; what stands before them are our arguments
        again = eval(f"FusedResidualLinear({layer.extra_repr()})")
    assert repr(again) == repr(layer)
    assert (again.drop_path, again.recompute, again.order) == (layer.drop_path, layer.recompute, layer.order)
    assert again.state_dict().keys() == layer.state_dict().keys()


def test_repr_of_plain_options():
    assert repr(FusedResidualLinear(6, 4)) == (
        "FusedResidualLinear(in_features=6, out_features=4, bias=True, activation='gelu', skip='auto')"
    )


def test_what_its_skip_means():
    assert FusedResidualLinear(6).resolved_skip == "identity"
    assert FusedResidualLinear(6, 4).resolved_skip == "none"
    assert FusedResidualLinear(6, 4, skip="projection").resolved_skip == "projection"
    assert FusedResidualLinear(6, 4, skip="concat").resolved_skip == "concat"
    assert FusedResidualLinear(6, skip=None).resolved_skip == "none"


# ---------------------------------------------------------------------------------------------- use


def test_weights_shared_by_two_layers(device):
    first, second = FusedResidualLinear(6).to(device), FusedResidualLinear(6).to(device)
    second.weight = first.weight
    stack = nn.Sequential(first, second)
    assert len(list(stack.parameters())) == 3
    x = torch.randn(3, 6, device=device)
    found = outcome(stack, x, named(stack))
    with fusedres.eager():
        check_same(found, outcome(stack, x, named(stack)), SINGLE)


def test_weights_shared_with_a_linear_layer(device):
    encoder, decoder = FusedResidualLinear(6).to(device), nn.Linear(6, 6).to(device)
    decoder.weight = encoder.weight
    stack = nn.Sequential(encoder, decoder)
    x = torch.randn(3, 6, device=device)
    found = outcome(stack, x, named(stack))
    with fusedres.eager():
        check_same(found, outcome(stack, x, named(stack)), SINGLE)


@pytest.mark.parametrize(
    "parametrized", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrizations_of_the_weight(parametrized, device):
    layer = parametrized(FusedResidualLinear(6)).to(device).eval()  # training would advance spectral_norm's iteration
    assert parametrize.is_parametrized(layer, "weight")
    x = torch.randn(3, 6, device=device)
    found = outcome(layer, x, named(layer))
    with fusedres.eager():
        check_same(found, outcome(layer, x, named(layer)), SINGLE)
    parametrize.remove_parametrizations(layer, "weight")
    assert_close(layer(x), found["y"], **SINGLE)


def test_pruning(device):
    layer = prune.l1_unstructured(FusedResidualLinear(6).to(device), "weight", amount=0.5)
    layer(torch.randn(3, 6, device=device)).sum().backward()
    assert (layer.weight_orig.grad[layer.weight_mask == 0] == 0).all()


def test_hooks(device):
    layer, seen = FusedResidualLinear(6).to(device), []
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    layer.register_forward_hook(lambda module, inputs, y: seen.append(("forward", y.shape)))
    layer.register_full_backward_pre_hook(lambda module, g: seen.append(("backward-pre", g[0].shape)))
    layer.register_full_backward_hook(lambda module, dx, g: seen.append(("backward", dx[0].shape)))
    layer.weight.register_hook(lambda g: 3 * g)
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", p.shape)))
    x = torch.randn(3, 6, device=device)
    layer(x.requires_grad_()).sum().backward()
    assert set(seen) == {("forward", (3, 6)), ("backward-pre", (3, 6)), ("backward", (3, 6)), ("accumulated", (6, 6))}
    plain = copy.copy(layer)
    expected = fusedres.functional.residual_linear(2 * x, plain.weight, plain.bias)
    assert_close(layer.weight.grad, torch.autograd.grad(expected.sum(), layer.weight)[0], **SINGLE)


@pytest.mark.parametrize("frozen", ["weight", "bias", "projection.weight", "branch_scale", "x"])
def test_frozen_parts_get_no_gradient(frozen, device):
    layer = FusedResidualLinear(6, 4, skip="projection", learn_branch_scale="channel").to(device)
    x = torch.randn(3, 6, device=device, requires_grad=True)
    leaves = {"x": x, **named(layer)}
    expected = dict(zip(leaves, torch.autograd.grad(layer(x).sum(), leaves.values()), strict=True))
    leaves[frozen].requires_grad_(False)
    layer(x).sum().backward()
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, expected[name], **SAME_BITS)


def test_an_input_gradient_through_a_frozen_layer(device):
    layer = FusedResidualLinear(6).to(device).requires_grad_(False)
    x = torch.randn(3, 6, device=device, requires_grad=True)
    found = torch.autograd.grad(layer(x).sum(), x)[0]
    with fusedres.eager():
        assert_close(found, torch.autograd.grad(layer(x).sum(), x)[0], **SINGLE)


def test_nothing_is_recorded_where_nothing_is_learned(device):
    layer = FusedResidualLinear(6).to(device)
    x = torch.randn(3, 6, device=device)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert not layer.requires_grad_(False)(x).requires_grad


def test_stochastic_depth_in_training_alone(device):
    layer = FusedResidualLinear(6, drop_path=0.5).to(device)
    x = torch.randn(40, 6, device=device)
    dropped = (layer(x) == x).all(1)
    assert dropped.any()
    assert not dropped.all()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    state = torch.random.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.random.get_rng_state(), state), "evaluation draws nothing"


def test_a_seed_drops_the_same_rows_on_every_route(device):
    layer = FusedResidualLinear(6, drop_path=0.5).to(device)
    x = torch.randn(40, 6, device=device)

    def dropped(module, x):
        torch.manual_seed(5)
        return (module(x) == x).all(1)

    fused = dropped(layer, x)
    with fusedres.eager():
        assert torch.equal(dropped(layer, x), fused)
    assert torch.equal(dropped(copy.deepcopy(layer).double(), x.double()), fused)


def test_a_residual_at_the_call(device):
    layer = FusedResidualLinear(6, 4).to(device)
    x, residual = torch.randn(3, 6, device=device), torch.randn(3, 4, device=device)
    assert_close(layer(x, residual), layer(x) + residual, **SINGLE)
    assert_close(layer(x, residual=residual), layer(x, residual), **SAME_BITS)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.float16), ("triton", torch.float64), ("cpu", torch.bfloat16), ("cpu", torch.float64)],
    indirect=["backend"],
    ids=str,
)
def test_dtype_conversions(dtype, device):
    layer = FusedResidualLinear(6, learn_skip_scale=True).to(device).to(dtype)
    y = layer(torch.randn(3, 6, device=device, dtype=dtype))
    y.sum().backward()
    assert {y.dtype} | {p.grad.dtype for p in layer.parameters()} == {dtype}


def test_gradients_accumulate(device):
    layer = FusedResidualLinear(6, learn_branch_scale="channel").to(device)
    x = torch.randn(3, 6, device=device)
    layer(x).sum().backward()
    once = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer(x).sum().backward()
    for name, p in layer.named_parameters():
        assert_close(p.grad, 2 * once[name], **SINGLE)


def test_backward_twice(device):
    layer = FusedResidualLinear(6).to(device)
    y = layer(torch.randn(3, 6, device=device)).sum()
    first = torch.autograd.grad(y, layer.weight, retain_graph=True)[0]
    assert_close(torch.autograd.grad(y, layer.weight)[0], first, **SAME_BITS)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, layer.weight)


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_a_saved_tensor_changed_in_place_is_noticed(changed, device):
    layer = FusedResidualLinear(6).to(device)
    x = torch.randn(3, 6, device=device)
    y = layer(x)
    with torch.no_grad():
        (x if changed == "x" else layer.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=len)
def test_the_output_may_be_changed_in_place(leading, device):
    layer = FusedResidualLinear(6).to(device)
    x = torch.randn(*leading, 6, device=device)
    expected = torch.autograd.grad(layer(x).relu().sum(), layer.weight)[0]
    assert_close(torch.autograd.grad(layer(x).relu_().sum(), layer.weight)[0], expected, **SAME_BITS)


def test_a_residual_given_as_gradient_is_not_shared(device):
    """g is handed to the residual as it is: what comes after must not write into it twice."""
    x = torch.randn(3, 6, device=device)
    residual = torch.zeros(3, 6, device=device, requires_grad=True)
    g = torch.ones(3, 6, device=device)
    layer = FusedResidualLinear(6).to(device)
    layer(x, residual).backward(g)
    layer(x, residual).backward(g)
    assert_close(residual.grad, torch.full((3, 6), 2.0, device=device))
    assert_close(g, torch.ones(3, 6, device=device))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_activation_checkpointing(recompute, reentrant, device):
    """With stochastic depth: the recomputation drops the rows that the first computation did."""
    layer = FusedResidualLinear(6, drop_path=0.5, recompute=recompute).to(device)
    x = torch.randn(12, 6, device=device)
    expected = outcome(layer, x, named(layer))
    torch.manual_seed(1)
    x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    (y * torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    check_same(found, expected, SAME_BITS)


def test_recompute_keeps_less(backend, device, request):
    def kept(**options) -> int:
        """Bytes besides the parameters."""
        layer = FusedResidualLinear(6, **options).to(device)
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            layer(x)
        return sum(saved.values()) - sum(saved.get(p.data_ptr(), 0) for p in layer.parameters())

    x = torch.randn(3, 6, device=device)
    if backend == "cpu":
        assert kept() > x.nbytes, "x, and φ' in blocks"
    else:
        assert kept() == x.nbytes, "where all of backward is one kernel"
        request.getfixturevalue("in_pieces")
        assert kept() == 2 * x.nbytes, "x and φ'"
    always = x.nbytes + (8 * 17 if backend == "cpu" else 0)  # what the engine's node knows of its layer
    assert kept(recompute=True) == always
    assert kept(activation="none") == always, "a linear branch needs no z"


def test_saved_tensors_on_disk(tmp_path, device):
    layer, x = FusedResidualLinear(6).to(device), torch.randn(3, 6, device=device)
    expected = outcome(layer, x, named(layer))

    def pack(tensor: Tensor) -> str:
        name = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.pt")
        torch.save(tensor, name)
        return name

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.load):
        check_same(outcome(layer, x, named(layer)), expected, SAME_BITS)


def test_anomaly_mode_names_the_layer(device):
    layer, x = FusedResidualLinear(6).to(device), torch.full((3, 6), float("nan"), device=device)
    with (
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match=r"_LayerBackward|ResidualNetwork"),
        pytest.warns(UserWarning, match=r"Error detected in .*(_LayerBackward|ResidualNetwork)"),
    ):
        layer(x.requires_grad_()).sum().backward()


# ---------------------------------------------------------------------------------------------- autocast

AUTOCAST: dict[str, tuple[dict, torch.dtype, str]] = {
    "fp32-identity": ({}, torch.float32, "float32"),
    "fp32-no-skip": ({"out_features": 4}, torch.float32, "low"),
    "fp32-projection": ({"out_features": 4, "skip": "projection"}, torch.float32, "low"),
    "fp32-concat": ({"out_features": 4, "skip": "concat"}, torch.float32, "float32"),
    "fp32-post": ({"order": "post", "activation": "tanh"}, torch.float32, "float32"),
    "fp32-per-channel": ({"skip": None, "learn_branch_scale": "channel"}, torch.float32, "float32"),
    "fp32-learned-scalars": (
        {"out_features": 4, "skip": "projection", "learn_skip_scale": True, "learn_branch_scale": "scalar"},
        torch.float32,
        "low",
    ),
    "low-identity": ({}, torch.float16, "low"),
    "low-concat": ({"out_features": 4, "skip": "concat"}, torch.float16, "low"),
    "low-identity-learned": ({"learn_skip_scale": True}, torch.float16, "low"),
    "drop-path-recompute": ({"drop_path": 0.5, "recompute": True}, torch.float32, "float32"),
}


@pytest.mark.launches_nothing  # the C++ engine computes in one dtype, see test_cpu.py
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("options", "dtype", "expected"), AUTOCAST.values(), ids=AUTOCAST)
def test_autocast_as_the_unfused_code(options, dtype, expected, low, device):
    """bfloat16 takes the formula in Triton's interpreter, and the kernels on a GPU."""
    layer = FusedResidualLinear(6, **options).to(device)
    dtype = low if dtype == torch.float16 else dtype
    x = torch.randn(5, 6, device=device, dtype=dtype)
    with torch.autocast(device, low):
        found = outcome(layer, x, named(layer))
        with fusedres.eager():
            eager = outcome(layer, x, named(layer))
    assert found["y"].dtype == (low if expected == "low" else torch.float32)
    for name, value in eager.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].dtype == {"y": found["y"].dtype, "x": dtype}.get(name, torch.float32), name
        assert_close(found[name], value, rtol=4 * torch.finfo(low).eps, atol=8 * torch.finfo(low).eps)


def test_autocast_switched_off_inside(device):
    layer, x = FusedResidualLinear(6, 4).to(device), torch.randn(3, 6, device=device)
    with torch.autocast(device, torch.float16), torch.autocast(device, enabled=False):
        assert torch.equal(layer(x), layer(x))
        assert layer(x).dtype == torch.float32


def test_autocast_leaves_float64(device):
    layer, x = FusedResidualLinear(6, 4).to(device).double(), torch.randn(3, 6, device=device).double()
    with torch.autocast(device, torch.float16):
        assert layer(x).dtype == torch.float64


@pytest.mark.launches_nothing
def test_a_backward_outside_autocast(device):
    layer, x = FusedResidualLinear(6).to(device), torch.randn(3, 6, device=device)
    with torch.autocast(device, torch.float16):
        y = layer(x)
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.launches_nothing
def test_second_derivatives_under_autocast(device):
    layer = FusedResidualLinear(6).to(device)
    x = torch.randn(3, 6, device=device, requires_grad=True)

    def of():
        with torch.autocast(device, torch.float16):
            y = layer(x).square().sum()
        slope = torch.autograd.grad(y, x, create_graph=True)[0]
        return torch.autograd.grad(slope.square().sum(), layer.weight)[0]

    found = of()
    with fusedres.eager():
        assert_close(found, of(), rtol=2e-2, atol=2e-2 * found.abs().max().item())


# ---------------------------------------------------------------------------------------------- training


def test_a_network_trains_as_its_eager_twin(device):
    torch.manual_seed(0)
    net = nn.Sequential(
        FusedResidualLinear(4, 8),
        FusedResidualLinear(8, learn_branch_scale="scalar", branch_scale=0.0),
        FusedResidualLinear(8, 3, skip="projection"),
    ).to(device)
    twin = copy.deepcopy(net)
    x, target = torch.randn(10, 4, device=device), torch.randn(10, 3, device=device)
    losses: dict[str, list[float]] = {"fused": [], "eager": []}
    for name, network in (("fused", net), ("eager", twin)):
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        for _ in range(8):
            optimizer.zero_grad()
            if name == "eager":
                with fusedres.eager():
                    loss = (network(x) - target).square().mean()
            else:
                loss = (network(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["fused"][-1] < losses["fused"][0]
    assert losses["fused"] == pytest.approx(losses["eager"], rel=1e-4)


@pytest.mark.backends("triton")  # the engine's own node asks in C++ (tests/test_plain_layer.py)
def test_work_is_not_wasted_on_a_frozen_weight(device, monkeypatch):
    asked = []
    backward = ops._backward
    monkeypatch.setattr(ops, "_backward", lambda *a: asked.append(a[-1]) or backward(*a))
    stack = nn.Sequential(FusedResidualLinear(6), FusedResidualLinear(6)).to(device)
    stack[1].requires_grad_(False)
    stack(torch.randn(3, 6, device=device)).sum().backward()
    second, first = asked
    assert (second.x, second.weight, second.bias) == (True, False, False)
    assert (first.x, first.weight, first.bias) == (False, True, True)
