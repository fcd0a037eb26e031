"""Other people's models, with random weights: fused and eager agree in output and every gradient."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from blocks import agrees

import fusedres

pytestmark = pytest.mark.usefixtures("engine")


def mixer():
    from mlp_mixer_pytorch import MLPMixer

    model = MLPMixer(image_size=16, channels=3, patch_size=4, dim=32, depth=2, num_classes=5, dropout=0.1)
    return model, (torch.randn(2, 3, 16, 16),), {}


def gpt2():
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=1,
        attn_implementation="eager",
    )  # fmt: skip
    return GPT2Model(config), (torch.randint(0, 50, (2, 7)),), {}


def gpt2_without_dropout():
    model, args, _ = gpt2()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return model, args, {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}


def vit():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
    )  # fmt: skip
    return ViTModel(config), (torch.randn(2, 3, 16, 16),), {}


def tabular_resnet():
    from rtdl_revisiting_models import ResNet

    options = {"d_hidden": None, "d_hidden_multiplier": 2.0, "dropout1": 0.1, "dropout2": 0.0}
    return ResNet(d_in=8, d_out=2, n_blocks=3, d_block=16, **options), (torch.randn(12, 8),), {}


# the model, and its fused layers: by what they compute in evaluation, how many
MODELS = {
    mixer: {"gelu(x Wᵀ + b)": 2, "s + x Wᵀ + b": 2},
    gpt2: {"gelu_tanh(x Wᵀ + b)": 2, "s + x Wᵀ + b": 2},
    gpt2_without_dropout: {"gelu_tanh(x Wᵀ + b)": 2, "s + x Wᵀ + b": 2},
    vit: {"gelu(x Wᵀ + b)": 2, "s + x Wᵀ + b": 2, "tanh(x Wᵀ + b)": 1},
    tabular_resnet: {"relu(x Wᵀ + b)": 3, "s + x Wᵀ + b": 3},
}


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_real_model_is_fused_and_agrees(build, is_training):
    model, args, kwargs = build()
    model.train(is_training)
    eager, states = deepcopy(model), list(model.state_dict())
    report = fusedres.fuse_(model)
    counts: dict[str, int] = {}
    for layer in report.fused:
        if layer.when != "training":
            counts[layer.formula] = counts.get(layer.formula, 0) + 1
    assert counts == MODELS[build]
    agrees(model, eager, *args, **kwargs)
    model.eval()
    assert len(fusedres.explain(model, *args, **kwargs)) == sum(counts.values())
    assert list(model.state_dict()) == states
    eager.load_state_dict(model.state_dict())
    fusedres.unfuse_(model)
    assert [type(part) for part in model.modules()] == [type(part) for part in eager.modules()]


def test_what_is_left_of_gpt2_has_its_reasons():
    model, *_ = gpt2()
    left = {layer.linear: layer.because for layer in fusedres.fuse_(model).left}
    assert set(left) == {f"h.{i}.attn.{name}" for i in range(2) for name in ("c_attn", "c_proj")}
    assert all(because.startswith("in h.") for because in left.values())


def test_gpt2_generates_the_same_tokens():
    """With a cache, by a call of its own kind; generate looks at forward's signature."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=1)
    eager = GPT2LMHeadModel(config).eval()
    fused = deepcopy(eager)
    assert fusedres.fuse_(fused).fused
    prompt = torch.randint(2, 50, (2, 4))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(fused.generate(prompt, **options), eager.generate(prompt, **options))


def test_transformers_own_checkpointing_still_checkpoints():
    model, args, _ = gpt2_without_dropout()
    eager = deepcopy(model)
    fusedres.fuse_(model)
    for one in (model, eager):
        one.gradient_checkpointing_enable()
        one.train()
    agrees(model, eager, *args)
