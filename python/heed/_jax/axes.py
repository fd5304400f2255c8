"""What each axis of each tensor of an attention call is, which axes may be sharded, and why the others may not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from heed._problem import function_of


@dataclass(frozen=True)
class Layout:
    """The axes of every tensor of one kind of call.

    trailing: axes after the leading ones. Leading axes come from `vmap`, are named lead0, lead1, ..., and may have
    size 1 in an operand.
    """

    function: str
    trailing: Mapping[str, tuple[str, ...]]

    def num_lead(self, name: str, rank: int) -> int:
        return rank - len(self.trailing[name])

    def names(self, name: str, rank: int) -> tuple[str, ...]:
        return tuple(f"lead{i}" for i in range(self.num_lead(name, rank))) + self.trailing[name]

    def refuse_axis(self, name: str, axis: str, shape: Sequence[int], how: str) -> ValueError:
        """The error for an axis that attention cannot keep sharded. `how`: "4 ways", or "over" mesh axes."""
        position = self.names(name, len(shape)).index(axis)
        what = (
            f"{self.function}: {name}: got axis {position} ({axis}, size {shape[position]}) sharded {how}, expected it "
            "whole. "
        )
        if axis.endswith("_tokens"):
            why = (
                "Every query attends to keys on all devices, so a sharded token axis needs ring attention, which this "
                "version of heed does not have, and heed never gathers an input silently. "
            )
        elif axis in _LENGTH_AXES:
            why = "Every device needs the lengths of all sequences, and heed never gathers an input silently. "
        else:
            why = "Scores sum over the whole head dim, and heed never gathers an input silently. "
        instead = "the batch or the heads" if "batch" in self.trailing["q"] else "the heads"
        gather = "gather on purpose with jax.lax.with_sharding_constraint (jax.sharding.reshard under an explicit mesh)"
        if name in ("dout", "dlse"):
            result = name.removeprefix("d")
            gather += f": {name} is the gradient of {result}, and follows a constraint that {result} is put under"
        return ValueError(f"{what}{why}Shard {instead} instead, or {gather}.")

    def refuse_heads(self, num_q_heads: int, num_kv_heads: int, ways: int) -> ValueError:
        return ValueError(
            f"{self.function}: got {num_q_heads} query heads sharded {ways} ways over {num_kv_heads} KV heads, "
            f"expected a number of shards that divides {num_kv_heads} (or a multiple of it that divides "
            f"{num_q_heads}): otherwise a shard's query heads span parts of several KV heads' groups."
        )


_LENGTH_AXES = ("boundaries", "sequences")


def _with_gradients(forward: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The tensors of the backward pass too. A gradient looks like what it is one of, but for those of per-head values,
    which are given for each row of the batch; the workspace is as much memory for each row and head."""
    per_head = ("batch", "q_heads") if "batch" in forward["q"] else ("q_heads",)
    gradients = {f"d{name}": forward[name] for name in ("q", "k", "v", "out", "lse")}
    return forward | gradients | {"dsinks": per_head, "dalibi_slopes": per_head, "workspace": (*per_head, "workspace")}


_DENSE = Layout(
    "flash_mha",
    _with_gradients(
        {
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
    ),
)
_VARLEN = Layout(
    "flash_mha_varlen",
    _with_gradients(
        {
            "q": ("q_tokens", "q_heads", "head_dim_qk"),
            "k": ("kv_tokens", "kv_heads", "head_dim_qk"),
            "v": ("kv_tokens", "kv_heads", "head_dim_v"),
            "sinks": ("q_heads",),
            "alibi_slopes": ("q_heads",),
            "cu_seqlens_q": ("boundaries",),
            "cu_seqlens_k": ("boundaries",),
            "seqused_k": ("sequences",),
            "out": ("q_tokens", "q_heads", "head_dim_v"),
            "lse": ("q_heads", "q_tokens"),
        }
    ),
)


def layout_of(operands: Collection[str]) -> Layout:
    """The axes of the call that has these operands."""
    return _VARLEN if function_of(operands) == _VARLEN.function else _DENSE


def is_shardable(axis: str) -> bool:
    """Rows of the batch and heads do not interact. Tokens do, and a head's elements are summed over."""
    is_whole = axis.endswith("_tokens") or axis.startswith("head_dim") or axis in _LENGTH_AXES
    return not (is_whole or axis == "workspace")


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
