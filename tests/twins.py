"""Models in pairs, made from the same draws."""

from __future__ import annotations

import torch


def twins(fused, eager, *arguments, device="cpu"):
    """Both from the same draws."""
    torch.manual_seed(0)
    first = fused(*arguments).to(device)
    torch.manual_seed(0)
    return first, eager(*arguments).to(device)
