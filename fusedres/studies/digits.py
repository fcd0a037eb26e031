"""Scanned digits, 8 × 8, that come with scikit-learn: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TRAINED = 1437  # digits to train with, of 1797


class Digits(NamedTuple):
    """Images [n, 64] from 0 to 1 and labels [n] to train with; a fifth of all held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load(seed: int, device: torch.device) -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, held_out = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    return Digits(*(part.to(device) for rows in (train, held_out) for part in (images[rows], labels[rows])))


def batches(n: int, size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Rows of whole batches, in an order of their own for every seed."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    yield from order[: n // size * size].to(device).split(size)
