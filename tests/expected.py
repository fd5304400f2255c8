"""What a call of flash_mha should give: the oracle, and the plain implementation whose error is the yardstick."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from heed import reference
from specs import AttentionSpec, make_inputs
from tolerance import assert_close


class Expected(NamedTuple):
    """out and lse: in float64, and by a plain implementation at the inputs' dtype (lse float32)."""

    out: np.ndarray
    lse: np.ndarray
    naive_out: np.ndarray
    naive_lse: np.ndarray

    def check(self, out: Any, lse: Any, what: str) -> None:
        """Asserts the tolerance rule for out and, unless it is None, for lse."""
        assert_close(out, self.naive_out, self.out, self.naive_out.dtype, f"{what}: out")
        if lse is not None:
            assert_close(lse, self.naive_lse, self.lse, np.float32, f"{what}: lse")

    def rows(self, rows: Any) -> Expected:
        """Some query rows only."""
        return Expected(
            self.out[..., rows, :, :], self.lse[..., rows], self.naive_out[..., rows, :, :], self.naive_lse[..., rows]
        )


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Expected:
    """The oracle and the yardstick for NumPy inputs; `options` are those of flash_mha that matter to the result.

    A plain implementation can be exact by luck, above all in a row that sees few keys, and an error of zero measures
    nothing. So there are four, which differ only in the order in which they round: features in another order, tokens
    backwards, the scale folded into q, sums as a loop takes them. Element by element the worst one counts.
    """
    out, lse = reference.attention_forward(q, k, v, **options)
    naive_out, naive_lse = reference.naive_attention_forward(q, k, v, **options)
    shuffled = np.random.default_rng(0).permutation(q.shape[-1])
    for other_out, other_lse in (
        _backwards(q, k, v, **options),
        _backwards(q[..., shuffled], k[..., shuffled], v, **options),
        reference.naive_attention_forward(q, k, v, sum_in_order=True, **options),
    ):
        naive_out, naive_lse = _worse(naive_out, other_out, out), _worse(naive_lse, other_lse, lse)
    return Expected(out, lse, naive_out, naive_lse)


@functools.lru_cache(maxsize=4)
def expected_of(spec: AttentionSpec, seed: int = 0) -> Expected:
    """The same for a named spec."""
    inputs = make_inputs(spec, seed)
    return expected(inputs.q, inputs.k, inputs.v, **spec.static_options(), **inputs.arrays)


def _backwards(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same attention with all tokens reversed, which swaps the two alignments and the two sides of the window."""
    flip = functools.partial(np.flip, axis=(-3, -1))
    scale = options.pop("softmax_scale", None)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    left, right = options.pop("window_size", (-1, -1))
    right = 0 if options.pop("is_causal", False) else right
    align = options.pop("causal_align", "bottom_right")
    ids = options.pop("segment_ids", None)
    if ids is not None:
        ids = ids if isinstance(ids, (tuple, list)) else (ids, ids)
        ids = tuple(np.flip(x, axis=-1) for x in ids)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = q.astype(np.float32) * np.float32(scale)
    out, lse = reference.attention_forward(
        flip(scaled), flip(k), np.flip(v, axis=-3),
        softmax_scale=1.0, window_size=(right, left), segment_ids=ids, compute_dtype=np.float32, storage_dtype=q.dtype,
        causal_align="top_left" if align == "bottom_right" else "bottom_right", **options,
    )  # fmt: skip
    return np.flip(out, axis=-3), np.flip(lse, axis=-1)


def _worse(a: np.ndarray, b: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        b_is_worse = np.abs(b.astype(np.float64) - oracle) > np.abs(a.astype(np.float64) - oracle)
    return np.where(b_is_worse, b, a)
