"""Plans measured on a GPU, which `bench/tune.py` leaves in tiles/<gpu>.json with date and versions."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .kernels import config
from .kernels.config import Plan

FOLDER = Path(__file__).parent / "tiles"
FORMS = {
    form.__name__: form
    for form in (
        config.Tile,
        config.PersistentTile,
        config.StackTile,
        config.SplitTile,
        config.Elementwise,
        config.Separate,
        config.Inside,
        config.Together,
        config.Plan,
    )
}


class Measured(NamedTuple):
    """The fastest plan of a layer on a GPU, and for "forward" or "training" the times where eager is faster."""

    plan: Plan
    because: str
    eager: dict[str, str]


def plan(gpu: str, N: int, K: int, mode: str, is_skinny: bool) -> Measured | None:
    """What was measured on this GPU for a layer of this size, or None; mode is fp32, tf32, fp16 or bf16."""
    return _plans(gpu).get((N, K, mode, is_skinny))


@lru_cache(maxsize=16)
def has_eager(gpu: str) -> bool:
    """Whether eager PyTorch is faster for any layer on this GPU."""
    return any(found.eager for found in _plans(gpu).values())


def file(gpu: str) -> Path:
    """tiles/nvidia-h100-80gb-hbm3.json for NVIDIA H100 80GB HBM3."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@lru_cache(maxsize=16)
def _plans(gpu: str) -> dict[tuple[int, int, str, bool], Measured]:
    path = file(gpu)
    if not gpu or not path.is_file():
        return {}
    record = json.loads(path.read_text())
    because = f"measured on {gpu}, {record['date']}"
    return {
        (row["N"], row["K"], row["mode"], row["is_skinny"]): Measured(decoded(row["plan"]), because, row["eager"])
        for row in record["layers"]
    }


def encoded(form: Any) -> Any:
    """A plan as JSON has it: every tuple as its fields and its name."""
    if not isinstance(form, tuple):
        return form
    fields = form._asdict().items()  # type: ignore[attr-defined]
    return {"form": type(form).__name__, **{name: encoded(value) for name, value in fields}}


def decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    fields = {name: decoded(inner) for name, inner in value.items() if name != "form"}
    return FORMS[value["form"]](**fields)
