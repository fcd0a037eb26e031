"""Other people's models, as they are, fused in place, compiled, and compiled by the backend of this project.

    python bench/models.py [--model mixer …] [--device cpu] [--threads N] [--json FILE]

A forward in evaluation without gradients, and a forward + backward in training, dropout as authors set it. Outputs
are compared with eager's first. `convolutions` has nothing to fuse: there the backend is to be Inductor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import host, in_turns
from torch import Tensor, nn

import fusedres

WAYS = ("eager", "fused", "compile", "backend")


class Model(NamedTuple):
    """A model, its input, and the input's shape in words."""

    module: nn.Module
    x: Tensor
    shape: str


def mixer() -> Model:
    from mlp_mixer_pytorch import MLPMixer

    module = MLPMixer(image_size=64, channels=3, patch_size=8, dim=256, depth=4, num_classes=10)
    return Model(module, torch.randn(16, 3, 64, 64), "16 images of 64 × 64, width 256, 4 blocks")


def gpt2() -> Model:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_layer=4, n_embd=256, n_head=4, vocab_size=1000, n_positions=128, bos_token_id=1, eos_token_id=1
    )
    return Model(GPT2Model(config), torch.randint(0, 1000, (8, 128)), "8 × 128 tokens, width 256, 4 blocks")


def vit() -> Model:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, image_size=64, patch_size=8
    )
    return Model(ViTModel(config), torch.randn(16, 3, 64, 64), "16 images of 64 × 64, width 192, 4 blocks")


def tabular() -> Model:
    from rtdl_revisiting_models import ResNet

    options = {"d_hidden": None, "d_hidden_multiplier": 2.0, "dropout1": 0.15, "dropout2": 0.0}
    module = ResNet(d_in=32, d_out=1, n_blocks=4, d_block=192, **options)
    return Model(module, torch.randn(1024, 32), "1024 rows, width 192, 4 blocks")


def policy() -> Model:
    from fusedres.reference import ShapeGatedStack

    return Model(ShapeGatedStack([64] * 17), torch.randn(1, 64), "1 row, 16 layers of width 64, x + gelu(z)")


def single() -> Model:
    return Model(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(1, 64), "1 row, one layer of width 64, relu(z)"
    )


def convolutions() -> Model:
    layers = [part for _ in range(4) for part in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    return Model(
        nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *layers), torch.randn(8, 3, 32, 32), "8 images of 32 × 32"
    )


MODELS: dict[str, Callable[[], Model]] = {
    one.__name__: one for one in (mixer, gpt2, vit, tabular, policy, single, convolutions)
}


def result(y: Any) -> Tensor:
    return getattr(y, "last_hidden_state", y)


def measure(name: str, device: str, budget_s: float) -> dict[str, Any]:
    torch._dynamo.reset()  # it compiles one function, such as nn.Sequential's, for so many models alone
    torch.manual_seed(0)
    eager, x, shape = MODELS[name]()
    eager, x = eager.to(device), x.to(device)
    modules = {"eager": eager, "fused": deepcopy(eager), "compile": deepcopy(eager), "backend": deepcopy(eager)}
    report = fusedres.fuse_(modules["fused"])
    calls: dict[str, Callable[..., Any]] = {way: modules[way] for way in ("eager", "fused")}
    if not report.fused:
        del calls["fused"]
    calls["compile"] = torch.compile(modules["compile"])
    calls["backend"] = torch.compile(modules["backend"], backend="fusedres")

    def forward(way: str) -> Tensor:
        with torch.no_grad():
            return result(calls[way](x))

    def training(way: str) -> Tensor:
        y = result(calls[way](x))
        y.backward(torch.ones_like(y))
        for parameter in modules[way].parameters():
            parameter.grad = None
        return y

    found: dict[str, Any] = {}
    for mode, run in (("forward", forward), ("training", training)):
        for module in modules.values():
            module.train(mode == "training")
        for way in calls:
            y = run(way)
            if mode == "forward":
                torch.testing.assert_close(y, run("eager"), rtol=1e-3, atol=1e-4)
        times = in_turns({way: (lambda way=way, run=run: run(way)) for way in calls}, budget_s)
        found[mode] = {way: time._asdict() for way, time in times.items()}
    return {"model": name, "what": shape, "device": device, "layers": len(report.fused), "milliseconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget-s", type=float, default=8.0, help="of each model and mode")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.model:
        row = measure(name, options.device, options.budget_s)
        rows.append(row)
        for mode, times in row["milliseconds"].items():
            said = ", ".join(f"{way} {time['median']:.3f}" for way, time in times.items())
            print(f"{name:<14}{mode:<10}{said} ms", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"kind": "models", **host(), "threads": options.threads, "rows": rows}) + "\n"
        )


if __name__ == "__main__":
    main()
