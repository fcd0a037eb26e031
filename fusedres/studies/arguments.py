"""What the options of several studies share."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .values import MOST, Integer


def number(
    parser: argparse.ArgumentParser, name: str, default: int, text: str, least: int = 1, most: int = MOST
) -> None:
    """Adds an option that takes an integer from `least` to `most`."""
    shown = f"{text} [%(default)s]" if most == MOST else f"{text}, {most} at most [%(default)s]"
    parser.add_argument(name, metavar="N", type=Integer(least, most), default=default, help=shown)


def seeds(options: argparse.Namespace, count: int | None = None) -> range:
    """The seeds of a study: as many as asked for, from the first one on."""
    return range(options.seed, options.seed + (options.seeds if count is None else count))


def one_thread(device: torch.device) -> None:
    """On a CPU: so little work is done sooner than a second thread has come, where others work too."""
    if device.type == "cpu":
        torch.set_num_threads(1)


def facts(options: argparse.Namespace, device: torch.device, *names: str) -> dict[str, Any]:
    """Of these options and of the machine: what a reader needs to run a study again."""
    chosen = {name: getattr(options, name) for name in ("seed", "seeds", *names)}
    return {"device": str(device), "threads": torch.get_num_threads(), **chosen}
