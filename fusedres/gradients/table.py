"""Readouts as text and as rows: for a terminal, CSV, JSON and TensorBoard."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .readout import GradientProfile
    from .statistics import Statistics

# of a line of CSV; halves and path of inputs alone
COLUMNS = ("step", "loss", "kind", "name", "count", "mean_abs", "rms", "max_abs", "zero", "non_finite")
HALVES = ("branch_norm", "skip_norm", "cosine", "identity_path")


def of_profile(profile: GradientProfile) -> str:
    """One line per weight: mean |∂L/∂W|, and whether its layer takes a skip; then one per layer's input."""
    width = max(map(len, [*profile.mean_abs, *profile.inputs, "weight"]))
    loss = "" if profile.loss is None else f"loss {profile.loss:.3e}, "
    lines = [f"{loss}{profile.skips}", f"{'weight':{width}}  mean |∂L/∂W|  skip"]
    for name, mean in profile.mean_abs.items():
        lines.append(f"{name:{width}}  {mean:12.3e}  {'taken' if profile.takes_skip(name) else '-'}")
    if profile.inputs:
        head = f"{'‖∂L/∂x‖':>10}  {'by branch':>10}  {'by skip':>10}  {'cosine':>7}  {'Πλ alone':>10}"
        lines.append(f"{'input of':{width}}  {head}")
    for name, one in profile.inputs.items():
        branch, skip, cosine = (
            ("-", "-", "-")
            if one.halves is None
            else (f"{one.halves.branch:.3e}", f"{one.halves.skip:.3e}", f"{one.halves.cosine:.3f}")
        )
        path = "-" if one.identity_path is None else f"{one.identity_path:.3e}"
        line = f"{name:{width}}  {one.statistics.norm:10.3e}  {branch:>10}  {skip:>10}  {cosine:>7}  {path:>10}"
        lost = one.statistics.non_finite
        lines.append(f"{line}  {lost:.1%} not finite" if lost else line)
    return "\n".join(lines)


def lines(profile: GradientProfile) -> Iterator[dict[str, Any]]:
    """A dictionary per gradient, as CSV has them: of parameters, then of layers' inputs."""

    def line(kind: str, name: str, statistics: Statistics) -> dict[str, Any]:
        first = {"step": profile.step, "loss": profile.loss, "kind": kind, "name": name}
        return first | {column: getattr(statistics, column) for column in COLUMNS[4:]}

    for name, one in profile.parameters.items():
        yield line("parameter", name, one)
    for name, gradient in profile.inputs.items():
        halves = gradient.halves or (None, None, None)
        ways = dict(zip(HALVES, [*halves, gradient.identity_path], strict=True))
        yield line("input", name, gradient.statistics) | ways


def write_csv(profiles: Iterable[GradientProfile], path: str | PathLike[str]) -> None:
    """A line per step and gradient; what there is not stays empty."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *HALVES], restval="")
        writer.writeheader()
        for profile in profiles:
            writer.writerows(lines(profile))


def write_jsonl(profiles: Iterable[GradientProfile], path: str | PathLike[str]) -> None:
    """A line of JSON per step, each what `to_dict` gives."""
    with open(path, "w") as file:
        file.writelines(json.dumps(profile.to_dict()) + "\n" for profile in profiles)


def write_tensorboard(profiles: Iterable[GradientProfile], writer: Any) -> None:
    """Scalars and histograms into a `torch.utils.tensorboard.SummaryWriter`, or what has its methods.

    gradients/…, per parameter and per layer's input, what `Statistics` has; halves/… the norms through branch and skip,
    their cosine and the identity path; and the histogram of log₂|g|.
    """
    for profile in profiles:
        if profile.loss is not None:
            writer.add_scalar("loss", profile.loss, profile.step)
        found = [("parameter", name, one) for name, one in profile.parameters.items()]
        found += [("input", name, one.statistics) for name, one in profile.inputs.items()]
        for kind, name, one in found:
            for what in ("mean_abs", "rms", "norm", "max_abs", "zero", "non_finite"):
                writer.add_scalar(f"gradients/{kind}/{name}/{what}", getattr(one, what), profile.step)
            if one.octaves:
                _add_histogram(writer, f"log2/{kind}/{name}", one.octaves, profile.step)
        for name, input_ in profile.inputs.items():
            halves = {} if input_.halves is None else input_.halves._asdict()
            for what, value in (halves | {"identity_path": input_.identity_path}).items():
                if value is not None:
                    writer.add_scalar(f"halves/{name}/{what}", value, profile.step)


def _add_histogram(writer: Any, tag: str, octaves: dict[int, int], step: int) -> None:
    edges = range(min(octaves), max(octaves) + 1)
    counts = [octaves.get(e, 0) for e in edges]
    middles = [e + 0.5 for e in edges]
    total = sum(counts)
    weighted = sum(m * n for m, n in zip(middles, counts, strict=True))
    squares = sum(m * m * n for m, n in zip(middles, counts, strict=True))
    writer.add_histogram_raw(
        tag,
        min=edges[0],
        max=edges[-1] + 1,
        num=total,
        sum=weighted,
        sum_squares=squares,
        bucket_limits=[e + 1 for e in edges],
        bucket_counts=counts,
        global_step=step,
    )


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None for what JSON has no number for."""
    return {name: _finite(one) for name, one in values.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return finite(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
