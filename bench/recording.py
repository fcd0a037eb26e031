"""What recording gradients costs: a step of training with every step recorded, against the same without.

    python bench/recording.py [--device cpu] [--rows 4096] [--budget-s 20] [--json FILE]

8 residual layers of width 256 and SGD: as a stack, as modules by themselves, and in plain PyTorch, seen by hooks. Two
like models by turns in one process, of which one is recorded; a third, that was, tells what is left of it afterwards.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from timing import host, in_turns
from torch import Tensor, nn

from fusedres import FusedResidualLinear, FusedResidualStack
from fusedres.gradients import Recorder

WIDTH, DEPTH = 256, 8


class Block(nn.Module):
    """x + gelu(x Wᵀ + b), as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gelu = nn.Linear(WIDTH, WIDTH), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gelu(self.linear(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "stack": lambda: FusedResidualStack([WIDTH] * (DEPTH + 1)),
    "layers": lambda: nn.Sequential(*(FusedResidualLinear(WIDTH) for _ in range(DEPTH))),
    "plain PyTorch": lambda: nn.Sequential(*(Block() for _ in range(DEPTH))),
}


class Training:
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x, self.recorder = model, x, Recorder(model, keep=16)
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def step(self, is_recorded: bool) -> None:
        loss = self.model(self.x).square().mean()
        loss.backward()
        if is_recorded:
            self.recorder.step(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(name: str, device: str, rows: int, budget_s: float) -> dict[str, object]:
    torch.manual_seed(0)
    x = torch.randn(rows, WIDTH, device=device)
    never, now, before = (Training(MODELS[name]().to(device), x) for _ in range(3))
    with before.recorder:
        before.step(True)
    with ExitStack() as stack:
        stack.enter_context(now.recorder)
        steps = {
            "never": partial(never.step, False),
            "recorded": partial(now.step, True),
            "before": partial(before.step, False),
        }
        times = in_turns(steps, budget_s)
    assert now.recorder.records[-1].inputs, "nothing was recorded"
    never_ms = times["never"].median
    return {
        "model": name,
        "milliseconds": {which: t._asdict() for which, t in times.items()},
        "recording_costs": times["recorded"].median / never_ms - 1,
        "afterwards_costs": times["before"].median / never_ms - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--budget-s", type=float, default=20.0, help="of each model [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = []
    for name in MODELS:
        one = measure(name, options.device, options.rows, options.budget_s)
        found.append(one)
        milliseconds = one["milliseconds"]["never"]["median"]  # type: ignore[index]
        print(
            f"{name:<14}{options.rows:>6} rows: a step of {milliseconds:8.2f} ms, "
            f"recorded {one['recording_costs']:+.1%}, no more recorded {one['afterwards_costs']:+.1%}",
            flush=True,
        )
    if options.json:
        facts = {"kind": "recording", **host(), "width": WIDTH, "depth": DEPTH, "rows": options.rows, "found": found}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
