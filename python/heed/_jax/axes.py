"""What each axis of each tensor of an attention call is, which axes may be sharded, and why the others may not."""

from __future__ import annotations

from collections.abc import Sequence

from heed._problem import OPERAND_NAMES

TRAILING_AXES: dict[str, tuple[str, ...]] = {
    "q": ("batch", "q_tokens", "q_heads", "head_dim_qk"),
    "k": ("batch", "kv_tokens", "kv_heads", "head_dim_qk"),
    "v": ("batch", "kv_tokens", "kv_heads", "head_dim_v"),
    "sinks": ("q_heads",),
    "alibi_slopes": ("q_heads",),
    "q_segment_ids": ("batch", "q_tokens"),
    "kv_segment_ids": ("batch", "kv_tokens"),
    "out": ("batch", "q_tokens", "q_heads", "head_dim_v"),
    "lse": ("batch", "q_heads", "q_tokens"),
}
"""Axes after the leading ones. Leading axes come from `vmap`, are named lead0, lead1, ..., and may have size 1."""


def num_lead_axes(name: str, rank: int) -> int:
    return rank - len(TRAILING_AXES[name])


def axis_names(name: str, rank: int) -> tuple[str, ...]:
    return tuple(f"lead{i}" for i in range(num_lead_axes(name, rank))) + TRAILING_AXES[name]


def is_shardable(axis: str) -> bool:
    """Rows of the batch and heads do not interact. Tokens do, and a head's elements are summed over."""
    return not axis.endswith("_tokens") and not axis.startswith("head_dim")


def present_operands(present: Sequence[bool]) -> tuple[str, ...]:
    return tuple(name for name, is_present in zip(OPERAND_NAMES, present, strict=True) if is_present)


def refuse_axis(name: str, axis: str, shape: Sequence[int], how: str) -> ValueError:
    """The error for an axis that attention cannot keep sharded. `how`: "4 ways", or "over" mesh axes."""
    position = axis_names(name, len(shape)).index(axis)
    what = f"flash_mha: {name}: got axis {position} ({axis}, size {shape[position]}) sharded {how}, expected it whole. "
    if axis.endswith("_tokens"):
        why = (
            "Every query attends to keys on all devices, so a sharded token axis needs ring attention, which this "
            "version of heed does not have, and heed never gathers an input silently. "
        )
    else:
        why = "Scores sum over the whole head dim, and heed never gathers an input silently. "
    return ValueError(
        f"{what}{why}Shard the batch or the heads instead, or gather on purpose with "
        "jax.lax.with_sharding_constraint (jax.sharding.reshard under an explicit mesh)."
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


def refuse_heads(num_q_heads: int, num_kv_heads: int, ways: int) -> ValueError:
    return ValueError(
        f"flash_mha: got {num_q_heads} query heads sharded {ways} ways over {num_kv_heads} KV heads, expected a number "
        f"of shards that divides {num_kv_heads} (or a multiple of it that divides {num_q_heads}): otherwise a shard's "
        "query heads span parts of several KV heads' groups."
    )
