"""What the options of several studies share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch


def positive(text: str) -> int:
    """An integer of at least 1; ArgumentTypeError otherwise."""
    return at_least(1)(text)


def at_least(least: int) -> Callable[[str], int]:
    """Reads an integer not below `least`; ArgumentTypeError, or ValueError where there is no integer."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return integer


def number(parser: argparse.ArgumentParser, name: str, default: int, text: str, least: int = 1) -> None:
    """Adds an option that takes an integer not below `least`."""
    parser.add_argument(name, metavar="N", type=at_least(least), default=default, help=f"{text} [%(default)s]")


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
