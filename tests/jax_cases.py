"""Small calls of flash_mha and flash_mha_varlen with every operand, shared by the JAX tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import heed

OPERANDS = ("q", "k", "v", "sinks", "alibi_slopes", "q_segment_ids", "kv_segment_ids")
VARLEN_OPERANDS = ("q", "k", "v", "sinks", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")
OPTIONS: dict[str, Any] = {"is_causal": True, "window_size": (7, -1), "softcap": 20.0}
"""Options that every case uses, so that a rule that drops one shows."""


def make_operands(
    batch: int = 2,
    q_len: int = 9,
    kv_len: int = 11,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    lead: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """All seven operands in float32 and int32; `lead` gives some of them leading axes."""
    rng = np.random.default_rng(seed)
    lead = lead or {}

    def normal(name: str, *shape: int) -> np.ndarray:
        return rng.standard_normal((*lead.get(name, ()), *shape)).astype(np.float32)

    def ids(name: str, *shape: int) -> np.ndarray:
        return rng.integers(0, 2, (*lead.get(name, ()), *shape)).astype(np.int32)

    return {
        "q": normal("q", batch, q_len, q_heads, head_dim),
        "k": normal("k", batch, kv_len, kv_heads, head_dim),
        "v": normal("v", batch, kv_len, kv_heads, head_dim + 4),
        "sinks": normal("sinks", q_heads),
        "alibi_slopes": np.abs(normal("alibi_slopes", q_heads)),
        "q_segment_ids": ids("q_segment_ids", batch, q_len),
        "kv_segment_ids": ids("kv_segment_ids", batch, kv_len),
    }


def make_varlen_operands(
    batch: int = 3,
    total_q: int = 19,
    total_k: int = 41,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    lead: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """All eight operands of flash_mha_varlen; `lead` gives some of them leading axes."""
    rng = np.random.default_rng(seed)
    lead = lead or {}

    def normal(name: str, *shape: int) -> np.ndarray:
        return rng.standard_normal((*lead.get(name, ()), *shape)).astype(np.float32)

    def lengths(name: str, high: int, size: int) -> np.ndarray:
        return rng.integers(0, high, (*lead.get(name, ()), size), endpoint=True).astype(np.int32)

    return {
        "q": normal("q", total_q, q_heads, head_dim),
        "k": normal("k", total_k, kv_heads, head_dim),
        "v": normal("v", total_k, kv_heads, head_dim + 4),
        "sinks": normal("sinks", q_heads),
        "alibi_slopes": np.abs(normal("alibi_slopes", q_heads)),
        "cu_seqlens_q": np.sort(lengths("cu_seqlens_q", total_q, batch + 1), axis=-1),
        "cu_seqlens_k": np.sort(lengths("cu_seqlens_k", total_k, batch + 1), axis=-1),
        "seqused_k": lengths("seqused_k", 20, batch),
    }


def keywords(operands: Mapping[str, Any]) -> dict[str, Any]:
    """The operands as flash_mha takes them: segment ids are a pair."""
    found = {name: operands[name] for name in OPERANDS[:5] if name in operands}
    if "q_segment_ids" in operands:
        found["segment_ids"] = (operands["q_segment_ids"], operands["kv_segment_ids"])
    return found


def attend(operands: Mapping[str, Any]) -> Any:
    """(out, lse) of flash_mha, or of flash_mha_varlen if there are lengths: a function of the operands alone."""
    if "cu_seqlens_q" in operands:
        flash_mha_varlen: Any = heed.flash_mha_varlen
        return flash_mha_varlen(**operands, **OPTIONS, return_lse=True)
    return heed.flash_mha(**keywords(operands), **OPTIONS, return_lse=True)


def check(out: Any, lse: Any, operands: Mapping[str, np.ndarray], what: str) -> None:
    """Asserts that out and lse are, to the bit, those of the same call on NumPy arrays (which conformance tests check).

    Every batch row and head is computed by itself and in the same order, however calls are batched or divided.
    """
    want_out, want_lse = attend({name: np.asarray(x) for name, x in operands.items()})
    assert type(want_out) is np.ndarray
    np.testing.assert_array_equal(np.asarray(out), want_out, err_msg=f"{what}: out")
    if lse is not None:
        np.testing.assert_array_equal(np.asarray(lse), want_lse, err_msg=f"{what}: lse")
