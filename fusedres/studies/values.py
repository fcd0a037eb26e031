"""Values that options may have, of studies and of the command line above them; each says what is wrong in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST = 2**31 - 1  # of any count; of a seed too, so that as many again after it stay below 2**32, scikit-learn's end


class NothingToMeasure(Exception):
    """What was drawn, with these options, has none of what is to be measured: which, and what to change."""


@dataclass(frozen=True)
class Integer:
    """A whole number from `least` to `most`."""

    least: int
    most: int = MOST

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if value < self.least:
            raise argparse.ArgumentTypeError(f"must be at least {self.least}, got {value}")
        if value > self.most:
            raise argparse.ArgumentTypeError(f"must be at most {self.most}, got {value}")
        return value


@dataclass(frozen=True)
class Positive:
    """A number above 0, `most` at most."""

    most: float

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not 0 < value <= self.most:  # nor NaN
            raise argparse.ArgumentTypeError(f"must be above 0 and at most {self.most:g}, got {value:g}")
        return value


@dataclass(frozen=True)
class Widths:
    """128,64 or 128: what one word says of the widths d₀ … d_L."""

    most: int = MOST

    def __call__(self, text: str) -> list[int]:
        return [Integer(1, self.most)(word) for word in text.split(",")]


class Joined(argparse.Action):
    """The lists of several words as one list, of `fewest` values at least, which `what` are."""

    def __init__(self, *arguments: Any, fewest: int = 1, what: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fewest, self.what = fewest, what

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        joined = [value for part in values for value in part]
        if len(joined) < self.fewest:
            raise argparse.ArgumentError(self, f"must be at least {self.fewest}, {self.what}, got {_listed(joined)}")
        setattr(namespace, self.dest, joined)


def _listed(values: Sequence[int]) -> str:
    return " ".join(map(str, values))
