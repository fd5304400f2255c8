"""What each axis of each tensor of a call is, which axes may be sharded, and why the others may not."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """The axes of every tensor of one kind of call.

    function: the public function that the call is one of.
    trailing: each tensor's axes after the leading ones. Leading axes come from `vmap`, are named lead0, lead1, ..., and
        may have size 1 in an operand.
    whole: the axes that cannot be sharded, and why not.
    instead: what to shard in their place.
    halves: axes of results that are half as large as another axis.
    heads_are_tied: whether a query head needs its KV head where it is. Otherwise both divide as they please.
    """

    function: str
    trailing: Mapping[str, tuple[str, ...]]
    whole: Mapping[str, str]
    instead: str
    halves: Mapping[str, str] = field(default_factory=dict)
    heads_are_tied: bool = True

    def num_lead(self, name: str, rank: int) -> int:
        return rank - len(self.trailing[name])

    def names(self, name: str, rank: int) -> tuple[str, ...]:
        return tuple(f"lead{i}" for i in range(self.num_lead(name, rank))) + self.trailing[name]

    def is_shardable(self, axis: str) -> bool:
        return axis not in self.whole

    def size(self, shapes: Mapping[str, Sequence[int]], name: str, axis: str) -> int:
        """The size of an axis of one of the tensors."""
        return shapes[name][self.trailing[name].index(axis) - len(self.trailing[name])]

    def heads(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """How many query and KV heads there are: one each in a call without heads."""
        return (self.size(shapes, "q", "q_heads"), self.size(shapes, "k", "kv_heads")) if self.has_heads else (1, 1)

    @functools.cached_property
    def has_heads(self) -> bool:
        return any("q_heads" in axes for axes in self.trailing.values())

    @functools.cached_property
    def divisible(self) -> tuple[str, ...]:
        """The axes that may be sharded, but for leading ones and heads."""
        every = dict.fromkeys(axis for axes in self.trailing.values() for axis in axes)
        return tuple(axis for axis in every if axis not in self.whole and axis not in ("q_heads", "kv_heads"))

    def refuse_axis(self, name: str, axis: str, shape: Sequence[int], how: str) -> ValueError:
        """The error for an axis that cannot stay sharded. `how`: "4 ways", or "over" mesh axes."""
        position = self.names(name, len(shape)).index(axis)
        what = (
            f"{self.function}: {name}: got axis {position} ({axis}, size {shape[position]}) sharded {how}, expected it "
            f"whole. {self.whole[axis]}, and heed never gathers an input silently. "
        )
        gather = "gather on purpose with jax.lax.with_sharding_constraint (jax.sharding.reshard under an explicit mesh)"
        if name in ("dout", "dlse", "dsum"):
            result = name.removeprefix("d")
            gather += f": {name} is the gradient of {result}, and follows a constraint that {result} is put under"
        return ValueError(f"{what}Shard {self.instead} instead, or {gather}.")

    def refuse_heads(self, num_q_heads: int, num_kv_heads: int, ways: int) -> ValueError:
        return ValueError(
            f"{self.function}: got {num_q_heads} query heads sharded {ways} ways over {num_kv_heads} KV heads, "
            f"expected a number of shards that divides {num_kv_heads} (or a multiple of it that divides "
            f"{num_q_heads}): otherwise a shard's query heads span parts of several KV heads' groups."
        )


def kv_head_shards(num_q_heads: int, num_kv_heads: int, ways: int) -> int | None:
    """How many ways the KV heads are split when the query heads are split `ways` ways.

    Fewer than `ways` means that neighbouring shards share KV heads (each has one). None: a shard's query heads would
    not begin and end with its KV heads, so that no grouping of the shard's own heads is right.
    """
    group = num_q_heads // num_kv_heads
    if -(-num_q_heads // ways) == group * -(-num_kv_heads // ways):
        return ways
    if num_q_heads % ways == 0 and ways % num_kv_heads == 0:
        return num_kv_heads
    return None
