"""`fusedres bench`: a stack against its eager twin on this machine, as a first look.

Both take turns, so that what the machine does meanwhile falls on both; the median and the quartiles of a turn are said.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from ..studies.values import Integer
from . import device, models
from .arguments import Answer, Parser

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FULL = "a first look; the full benchmarks are in bench/ of the repository: pytest bench/ --benchmark"
ROUNDS, FEWEST = 200, 9  # of turns at most, and at least
LEAST_S = 1e-3  # of a turn, which is of as many calls as that takes


def options(parser: Parser, rest: Sequence[str]) -> None:
    models.add_stack(parser, sizes=[64] * 17, rows=4096)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile of the eager twin too, which takes a while"
    )
    parser.add_argument("--seconds", metavar="S", type=Integer(1), default=4, help="of each kind of call [%(default)s]")


def run(options: argparse.Namespace) -> Answer:
    import torch

    from ..gradients import compare_gradients

    fused, x = models.stack(options, device.chosen(options))
    eager = fused.to_eager()
    contestants: dict[str, Any] = {"fused": fused, "eager": eager}
    if options.compile:
        contestants["compiled"] = torch.compile(fused.to_eager())
    comparison = compare_gradients(fused, eager, x)  # a wrong answer's time says nothing
    calls = models.ran(models.explained(fused, x))
    print(models.ran_text(calls))
    for objection in comparison.objections:
        print(objection)
    where = torch.cuda.get_device_name(x.device) if x.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; {list(x.shape)} {x.dtype}; ms: median (quartiles), and how many times fused's")
    times = {}
    for kind, call in (("forward", _forward), ("forward + backward", _both)):
        times[kind] = _timed({name: _bound(call, model, x) for name, model in contestants.items()}, x, options.seconds)
        _print(kind, times[kind])
    print(FULL)
    facts = {"where": where, "shape": list(x.shape), "dtype": str(x.dtype), "fused_calls": calls, "note": FULL}
    return Answer(comparison.exit_code, facts | {"agrees": comparison.agrees, "milliseconds": times})


def _forward(model: nn.Module, x: Tensor) -> None:
    import torch

    with torch.no_grad():
        model(x)


def _both(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def _bound(call: Callable[[nn.Module, Tensor], None], model: nn.Module, x: Tensor) -> Callable[[], None]:
    return lambda: call(model, x)


def _timed(calls: dict[str, Callable[[], None]], x: Tensor, seconds: float) -> dict[str, dict[str, Any]]:
    """Milliseconds of a call of each, from turns as long as the clock needs."""
    for _ in range(3):  # compiles, allocates
        for call in calls.values():
            call()
    counts = {name: max(1, int(LEAST_S / max(_seconds(call, 1, x.device), 1e-9))) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(ROUNDS):
        if turn >= FEWEST and time.perf_counter() > end:
            break
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:  # none always goes first
            found[name].append(1e3 * _seconds(calls[name], counts[name], x.device) / counts[name])
    return {
        name: {"median": median(one), "quartiles": quantiles(one, n=4)[::2], "turns": len(one)}
        for name, one in found.items()
    }


def _seconds(call: Callable[[], None], n: int, where: torch.device) -> float:
    import torch

    def now() -> float:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return time.perf_counter()

    begin = now()
    for _ in range(n):
        call()
    return now() - begin


def _print(kind: str, times: dict[str, dict[str, Any]]) -> None:
    for name, one in times.items():
        low, high = one["quartiles"]
        ratio = one["median"] / times["fused"]["median"]
        print(f"{kind:18}  {name:8}  {one['median']:9.4g} ({low:.4g} to {high:.4g})  {ratio:6.2f}")
