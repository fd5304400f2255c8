"""Packed sequences of very uneven length, and equal ones with the same work: what balance is measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedRow:
    """Sequences of these lengths, packed along the token axis."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    is_causal: bool

    @property
    def label(self) -> str:
        kind = "causal" if self.is_causal else "full"
        return f"{len(self.lengths)} sequences, {self.name}, D {self.head_dim}, {self.heads}/{self.heads}, {kind}"

    @property
    def flops(self) -> float:
        full = 4.0 * sum(s * s for s in self.lengths) * self.heads * self.head_dim
        return full / 2 if self.is_causal else full

    @property
    def offsets(self) -> list[int]:
        """cu_seqlens: where each sequence begins, and the end of the last."""
        return [0, *np.cumsum(self.lengths).tolist()]


def uneven_lengths(count: int = 16, shortest: int = 64, longest: int = 8192) -> tuple[int, ...]:
    """Lengths from the shortest to the longest in equal ratios, in an order that is neither rising nor falling."""
    lengths = [round(shortest * (longest / shortest) ** (i / (count - 1))) for i in range(count)]
    order = np.random.default_rng(0).permutation(count)
    return tuple(lengths[i] for i in order)


def equal_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """As many equal sequences with the same number of query-key pairs."""
    return (round(math.sqrt(sum(s * s for s in lengths) / len(lengths))),) * len(lengths)
