"""Every mistake a caller can make is told in the caller's words: what was expected, from where, and what came."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import FusedResidualLinear, reference
from fusedres.functional import residual_linear

N, K = 4, 6


def operands(**changed: object) -> dict[str, object]:
    return {"x": torch.ones(3, K), "weight": torch.ones(N, K), "bias": torch.ones(N), **changed}


# id: what is given, the error's type, and the words of its message
CALLS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "x-is-a-list": ({"x": [1.0, 2.0]}, TypeError, "x must be a tensor, got list"),
    "x-is-an-array": ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    "x-of-integers": (
        {"x": torch.ones(3, K, dtype=torch.int64)},
        TypeError,
        "x must be of a floating-point dtype, got torch.int64",
    ),
    "x-complex": (
        {"x": torch.ones(3, K, dtype=torch.complex64)},
        TypeError,
        "x must be of a floating-point dtype, got torch.complex64",
    ),
    "x-of-another-width": (
        {"x": torch.ones(3, 5)},
        ValueError,
        "x must be [..., 6], the in_features of weight [4, 6], got shape [3, 5]",
    ),
    "x-without-dimensions": (
        {"x": torch.tensor(1.0)},
        ValueError,
        "x must be [..., 6], the in_features of weight [4, 6], got shape []",
    ),
    "weight-is-a-list": ({"weight": [[1.0]]}, TypeError, "weight must be a tensor, got list"),
    "weight-of-integers": (
        {"weight": torch.ones(N, K, dtype=torch.int8)},
        TypeError,
        "weight must be of a floating-point dtype, got torch.int8",
    ),
    "weight-of-three-dimensions": (
        {"weight": torch.ones(1, N, K)},
        ValueError,
        "weight must be [out_features, in_features], got shape [1, 4, 6]",
    ),
    "weight-of-another-dtype": (
        {"weight": torch.ones(N, K, dtype=torch.float16)},
        TypeError,
        "weight must be torch.float32, the dtype of x, got torch.float16",
    ),
    "weight-elsewhere": (
        {"weight": torch.ones(N, K, device="meta")},
        ValueError,
        "weight must be on cpu, where x is, got meta",
    ),
    "bias-of-another-width": (
        {"bias": torch.ones(K)},
        ValueError,
        "bias must be [4], one per output feature, got shape [6]",
    ),
    "bias-of-two-dimensions": (
        {"bias": torch.ones(1, N)},
        ValueError,
        "bias must be [4], one per output feature, got shape [1, 4]",
    ),
    "bias-is-a-flag": ({"bias": True}, TypeError, "bias must be a tensor, got bool"),
    "bias-elsewhere": ({"bias": torch.ones(N, device="meta")}, ValueError, "bias must be on cpu, where x is, got meta"),
    "residual-of-the-input's-shape": (
        {"residual": torch.ones(3, K)},
        ValueError,
        "residual must be [3, 4], the shape of the output, got shape [3, 6]",
    ),
    "residual-that-would-broadcast": (
        {"residual": torch.ones(N)},
        ValueError,
        "residual must be [3, 4], the shape of the output, got shape [4]",
    ),
    "residual-of-another-dtype": (
        {"residual": torch.ones(3, N, dtype=torch.float64)},
        TypeError,
        "residual must be torch.float32, the dtype of x, got torch.float64",
    ),
    "residual-elsewhere": (
        {"residual": torch.ones(3, N, device="meta")},
        ValueError,
        "residual must be on cpu, where x is, got meta",
    ),
    "residual-is-a-number": ({"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
    "residual-of-other-rows-with-concat": (
        {"residual": torch.ones(2, 7), "skip": "concat"},
        ValueError,
        "residual must be [3, 7], the leading shape of x, got shape [2, 7]",
    ),
    "residual-is-a-list-with-concat": (
        {"residual": [1.0], "skip": "concat"},
        TypeError,
        "residual must be a tensor, got list",
    ),
    "residual-beside-a-skip": (
        {"residual": torch.ones(3, N), "skip": None},
        ValueError,
        "residual is itself the skip: leave skip='auto' (or 'concat'), got skip=None",
    ),
    "identity-of-unequal-sizes": (
        {"skip": "identity"},
        ValueError,
        "skip='identity' adds the input to the output, so in_features and out_features must agree, got 6 and 4",
    ),
    "unknown-skip": (
        {"skip": "dense"},
        ValueError,
        "skip must be one of 'auto', 'identity', 'projection', 'concat', None, got 'dense'",
    ),
    "projection-without-weight": (
        {"skip": "projection"},
        ValueError,
        "skip='projection' needs projection_weight [out_features, in_features], got None",
    ),
    "projection-beside-another-skip": (
        {"projection_weight": torch.ones(N, K), "skip": "concat"},
        ValueError,
        "projection_weight is the skip of skip='projection' and cannot go with skip='concat'",
    ),
    "projection-beside-a-residual": (
        {"projection_weight": torch.ones(N, K), "residual": torch.ones(3, N)},
        ValueError,
        "projection_weight is the skip of skip='projection' and cannot go with a residual",
    ),
    "projection-of-another-shape": (
        {"projection_weight": torch.ones(K, N)},
        ValueError,
        "projection_weight must be [4, 6], the shape of weight, got shape [6, 4]",
    ),
    "projection-of-another-dtype": (
        {"projection_weight": torch.ones(N, K).half()},
        TypeError,
        "projection_weight must be torch.float32, the dtype of x, got torch.float16",
    ),
    "projection-bias-alone": (
        {"projection_bias": torch.ones(N)},
        ValueError,
        "projection_bias needs projection_weight, got None",
    ),
    "projection-bias-of-another-width": (
        {"projection_weight": torch.ones(N, K), "projection_bias": torch.ones(K)},
        ValueError,
        "projection_bias must be [4], one per output feature, got shape [6]",
    ),
    "unknown-activation": (
        {"activation": "mish"},
        ValueError,
        "activation must be one of 'gelu', 'relu', 'silu', 'tanh', 'sin', 'none', got 'mish'",
    ),
    "activation-is-a-function": ({"activation": torch.relu}, ValueError, "activation must be one of 'gelu', 'relu'"),
    "internal-activation-name": ({"activation": "gelu_tanh"}, ValueError, "activation must be one of 'gelu', 'relu'"),
    "unknown-approximation": (
        {"approximate": "erf"},
        ValueError,
        "approximate must be 'none' or 'tanh', got 'erf'",
    ),
    "approximated-relu": (
        {"approximate": "tanh", "activation": "relu"},
        ValueError,
        "approximate='tanh' is an approximation of gelu, got activation='relu'",
    ),
    "unknown-order": ({"order": "middle"}, ValueError, "order must be 'pre' or 'post', got 'middle'"),
    "post-with-concat": (
        {"order": "post", "skip": "concat"},
        ValueError,
        "order='post' activates a sum of skip and branch, and skip='concat' has none; use order='pre'",
    ),
    "drop-path-of-one": (
        {"drop_path": 1.0, "skip": "concat"},
        ValueError,
        "drop_path must be a probability in [0, 1), got 1.0",
    ),
    "drop-path-negative": ({"drop_path": -0.1}, ValueError, "drop_path must be a probability in [0, 1), got -0.1"),
    "drop-path-nan": ({"drop_path": float("nan")}, ValueError, "drop_path must be a probability in [0, 1), got nan"),
    "drop-path-in-words": ({"drop_path": "0.1"}, TypeError, "drop_path must be a number, got str"),
    "drop-path-is-a-tensor": ({"drop_path": torch.tensor(0.1)}, TypeError, "drop_path must be a number, got Tensor"),
    "drop-path-is-a-flag": ({"drop_path": True}, TypeError, "drop_path must be a number, got bool"),
    "drop-path-without-a-skip": (
        {"drop_path": 0.1, "skip": None},
        ValueError,
        "drop_path=0.1 needs a skip: without one a dropped row would be lost; give the layer a skip, or drop_path=0",
    ),
    "skip-scale-without-a-skip": (
        {"skip_scale": torch.tensor(1.0)},
        ValueError,
        "a learned skip_scale needs a skip, and this layer has none (sizes differ, or skip=None)",
    ),
    "skip-scale-per-channel": (
        {"skip_scale": torch.ones(N), "residual": torch.ones(3, N)},
        ValueError,
        "skip_scale must be [], a learned scalar, got shape [4]",
    ),
    "skip-scale-of-another-dtype": (
        {"skip_scale": torch.tensor(1.0, dtype=torch.float64), "residual": torch.ones(3, N)},
        TypeError,
        "skip_scale must be torch.float32, the dtype of x, got torch.float64",
    ),
    "skip-scale-in-words": ({"skip_scale": "one"}, TypeError, "skip_scale must be a number, got str"),
    "skip-scale-is-a-flag": ({"skip_scale": True}, TypeError, "skip_scale must be a number, got bool"),
    "branch-scale-of-another-width": (
        {"branch_scale": torch.ones(K)},
        ValueError,
        "branch_scale must be [], one for all, or [4], one per output feature, got shape [6]",
    ),
    "branch-scale-of-two-dimensions": (
        {"branch_scale": torch.ones(1, N)},
        ValueError,
        "branch_scale must be [], one for all, or [4], one per output feature, got shape [1, 4]",
    ),
    "branch-scale-of-another-dtype": (
        {"branch_scale": torch.ones(N, dtype=torch.float64)},
        TypeError,
        "branch_scale must be torch.float32, the dtype of x, got torch.float64",
    ),
    "branch-scale-elsewhere": (
        {"branch_scale": torch.ones((), device="meta")},
        ValueError,
        "branch_scale must be on cpu, where x is, got meta",
    ),
    "branch-scale-is-a-list": ({"branch_scale": [1.0]}, TypeError, "branch_scale must be a number, got list"),
}


@pytest.mark.parametrize("layer", [residual_linear, reference.residual_linear], ids=["functional", "reference"])
@pytest.mark.parametrize(("given", "kind", "words"), CALLS.values(), ids=CALLS)
def test_a_wrong_call(given, kind, words, layer):
    with pytest.raises(kind, match=re.escape(words)):
        layer(**operands(**given))


LAYERS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "identity-of-unequal-sizes": ({"skip": "identity"}, ValueError, "must agree, got 6 and 4; use skip='projection'"),
    "unknown-skip": (
        {"skip": "none"},
        ValueError,
        "skip must be one of 'auto', 'identity', 'projection', 'concat', None, got 'none'",
    ),
    "activation-is-a-list": ({"activation": ["gelu"]}, ValueError, "activation must be one of 'gelu'"),
    "unknown-activation": ({"activation": "GELU"}, ValueError, "activation must be one of 'gelu'"),
    "approximated-silu": ({"activation": "silu", "approximate": "tanh"}, ValueError, "approximate='tanh' is an approx"),
    "unknown-order": ({"order": "Pre"}, ValueError, "order must be 'pre' or 'post', got 'Pre'"),
    "post-with-concat": ({"order": "post", "skip": "concat"}, ValueError, "skip='concat' has none"),
    "drop-path-too-large": ({"drop_path": 1, "skip": "concat"}, ValueError, "a probability in [0, 1), got 1"),
    "drop-path-without-a-skip": ({"drop_path": 0.2}, ValueError, "drop_path=0.2 needs a skip"),
    "learned-skip-scale-without-a-skip": ({"learn_skip_scale": True}, ValueError, "learned skip_scale needs a skip"),
    "learned-skip-scale-in-words": (
        {"learn_skip_scale": "scalar"},
        ValueError,
        "learn_skip_scale must be True or False, got 'scalar'",
    ),
    "learned-branch-scale-is-true": (
        {"learn_branch_scale": True},
        ValueError,
        "learn_branch_scale must be False, 'scalar' or 'channel', got True",
    ),
    "learned-branch-scale-unknown": (
        {"learn_branch_scale": "vector"},
        ValueError,
        "learn_branch_scale must be False, 'scalar' or 'channel', got 'vector'",
    ),
    "scale-in-words": ({"skip_scale": "one"}, TypeError, "skip_scale must be a number, got str"),
    "scale-is-a-tensor": ({"branch_scale": torch.tensor(1.0)}, TypeError, "branch_scale must be a number, got Tensor"),
}


@pytest.mark.parametrize(("options", "kind", "words"), LAYERS.values(), ids=LAYERS)
def test_a_wrong_layer(options, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        FusedResidualLinear(K, N, **options)


@pytest.mark.backends("triton", "cpu")
def test_a_wrong_value_is_told_after_an_equal_right_one(device):
    """Validated options are remembered, and True == 1.0."""
    x, weight = torch.ones(2, K, device=device), torch.ones(K, K, device=device)
    residual_linear(x, weight, skip_scale=1.0)
    with pytest.raises(TypeError, match="skip_scale must be a number, got bool"):
        residual_linear(x, weight, skip_scale=True)


@pytest.mark.backends("triton", "cpu")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer, x: layer(x[:, :5]), "x must be [..., 6]"),
        (lambda layer, x: layer(x.long()), "x must be of a floating-point dtype"),
        (lambda layer, x: layer(x.double()), "weight must be torch.float64, the dtype of x, got torch.float32"),
        (lambda layer, x: layer(x, x[:, :5]), "residual must be [3, 6]"),
    ],
    ids=["width", "integers", "dtype", "residual"],
)
def test_a_layer_works_after_an_error(call, words, device):
    layer, x = FusedResidualLinear(K).to(device), torch.randn(3, K, device=device)
    state, expected = torch.random.get_rng_state(), layer(x)
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        call(layer, x)
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.random.get_rng_state(), state), "an error draws no random numbers"


@pytest.mark.backends("triton", "cpu")
def test_an_error_inside_a_context_leaves_it(device):
    layer, x = FusedResidualLinear(K).to(device), torch.randn(3, K, device=device)
    for context in (fusedres.eager, fusedres.batch_invariant):
        with pytest.raises(ValueError, match="in_features"), context():
            layer(x[:, :5])
    call = fusedres.explain(layer, x)[0]
    assert call.backend != "eager"
    assert not call.spec.batch_invariant


@pytest.mark.backends("triton", "cpu")
def test_an_error_inside_explain_leaves_it(device):
    layer, x = FusedResidualLinear(K).to(device), torch.randn(3, K, device=device)
    with pytest.raises(ValueError, match="in_features"):
        fusedres.explain(layer, x[:, :5])
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks
    assert len(fusedres.explain(layer, x)) == 1


def test_integers_stay_an_error_under_autocast(device):
    with torch.autocast(device, torch.float16), pytest.raises(TypeError, match=r"bias must be .* got torch\.int64"):
        residual_linear(
            torch.ones(3, K, device=device),
            torch.ones(K, K, device=device),
            torch.ones(K, dtype=torch.int64, device=device),
        )


def test_double_input_meets_single_weights_under_autocast(device):
    """Autocast leaves float64 alone, so that nothing is cast, and the dtypes have to agree."""
    with torch.autocast(device, torch.float16), pytest.raises(TypeError, match=r"weight must be torch\.float64"):
        residual_linear(torch.ones(3, K, device=device).double(), torch.ones(K, K, device=device))


@pytest.mark.parametrize(
    ("backend", "dtype", "words"),
    [
        ("triton", torch.float64, "torch.float64: the kernels accumulate in float32"),
        pytest.param(
            "cpu",
            torch.float16,
            "torch.float16: the CPU engine has no kernels for torch.float16",
            marks=pytest.mark.launches_nothing,
        ),
    ],
    indirect=["backend"],
    ids=str,
)
def test_the_operator_says_why_it_cannot(dtype, words, device):
    """Called directly, past the dispatcher, in a dtype that only the formula takes."""
    x: Tensor = torch.ones(2, K, device=device, dtype=dtype)
    from fusedres.kernels.spec import LayerSpec, Operands

    with pytest.raises(RuntimeError, match=re.escape(words)):
        torch.ops.fusedres.residual_linear(*Operands(x, x[:1].expand(K, K)), *LayerSpec(skip="identity"), False)
