"""What a call of flash_mha should give: the oracle, and the plain implementation whose error is the yardstick."""

from __future__ import annotations

import functools
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
    """The oracle and the yardstick for NumPy inputs; `options` are those of flash_mha that matter to the result."""
    out, lse = reference.attention_forward(q, k, v, **options)
    naive_out, naive_lse = reference.naive_attention_forward(q, k, v, **options)
    return Expected(out, lse, naive_out, naive_lse)


@functools.lru_cache(maxsize=4)
def expected_of(spec: AttentionSpec, seed: int = 0) -> Expected:
    """The same for a named spec."""
    inputs = make_inputs(spec, seed)
    return expected(inputs.q, inputs.k, inputs.v, **spec.static_options(), **inputs.arrays)
