"""What `fuse_` did, and what it left."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FusedLayer:
    """A layer that now runs as one call: around which linear layer [..., out_features], its formula, in which module.

    In the formula x is what the linear layer takes, P the weight of another one of x, s any other tensor. when: always,
    or in training or evaluation alone. passes: how often the separate operations of a forward read or write all of the
    output [M, out_features], less what the one call does.
    """

    linear: str
    formula: str
    module: str
    when: str
    out_features: int
    passes: int

    def __str__(self) -> str:
        return f"{self.linear}: {self.formula}" + ("" if self.when == "always" else f"   in {self.when}")


@dataclass(frozen=True)
class LeftLayer:
    """A linear layer that runs as before, and why."""

    linear: str
    because: str

    def __str__(self) -> str:
        return f"{self.linear}: {self.because}"


@dataclass(frozen=True)
class FuseReport:
    """The linear layers of a model: those fused, by the modules that now run them, and those left. Prints as a list."""

    fused: tuple[FusedLayer, ...]
    left: tuple[LeftLayer, ...]
    modules: tuple[str, ...]  # those whose forward is another now

    @property
    def numbers_spared(self) -> int:
        """How many numbers per row less a forward moves in evaluation: an estimate, for what no cache holds."""
        return sum(layer.passes * layer.out_features for layer in self.fused if layer.when != "training")

    def __str__(self) -> str:
        linears = {layer.linear for layer in self.fused}
        total = len(linears) + len(self.left)
        if not self.fused:
            lines = [f"none of {total} linear layers fused"]
        else:
            spared = f"a forward in evaluation moves about {self.numbers_spared} numbers per row less through memory"
            lines = [f"{len(linears)} of {total} linear layers fused, in {_counted(self.modules)}; {spared}"]
        for module in self.modules:
            lines.append(f"  {module or 'the model itself'}")
            lines += [f"    {layer}" for layer in self.fused if layer.module == module]
        if self.left:
            lines += ["  left", *(f"    {layer}" for layer in self.left)]
        return "\n".join(lines)


def _counted(modules: tuple[str, ...]) -> str:
    return f"{len(modules)} module{'s' if len(modules) > 1 else ''}"
