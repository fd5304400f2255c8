"""The tolerance rule accepts what it should and, above all, can fail."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tolerance import assert_close

ORACLE = np.random.default_rng(0).standard_normal((3, 5, 64))
EPS = {np.float32: 2.0**-23, np.float16: 2.0**-10, ml_dtypes.bfloat16: 2.0**-7}


def close(x: Any, dtype: Any = np.float32, oracle: Any = ORACLE, naive: Any = None) -> None:
    assert_close(x, oracle.astype(dtype) if naive is None else naive, oracle, dtype, "test")


@pytest.mark.parametrize("dtype", EPS)
def test_accepts_a_rounded_oracle(dtype: Any) -> None:
    close(ORACLE.astype(dtype), dtype)


@pytest.mark.parametrize("dtype", EPS)
def test_rejects_one_wrong_element(dtype: Any) -> None:
    x = ORACLE.astype(dtype)
    x[1, 2, 3] = ORACLE[1, 2, 3] + 3 * EPS[dtype] * np.abs(ORACLE).max()
    with pytest.raises(AssertionError, match=r"at \(1, 2, 3\)"):
        close(x, dtype)


def test_bound_is_twice_the_naive_error_plus_one_eps() -> None:
    naive = (ORACLE + 1e-3).astype(np.float32)
    close((ORACLE - 1.99e-3).astype(np.float32), naive=naive)
    with pytest.raises(AssertionError, match="the bound is"):
        close((ORACLE - 2.01e-3).astype(np.float32), naive=naive)


def test_rows_are_judged_by_themselves() -> None:
    oracle = ORACLE.copy()
    oracle[0, 0] *= 1e-3
    x = oracle.astype(np.float32)
    x[0, 0, 0] += 1e-7 * np.abs(oracle).max()  # within the bound of the whole, far outside that of a small row
    with pytest.raises(AssertionError, match=r"in row \(0, 0\)"):
        close(x, oracle=oracle)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_specials_must_be_in_the_same_places(special: float) -> None:
    oracle = ORACLE.copy()
    oracle[0, 1, 2] = special
    x = oracle.astype(np.float32)
    close(x, oracle=oracle)
    for wrong in (0.0, np.nan, np.inf, -np.inf, 3e38):
        if not np.array_equal(wrong, special, equal_nan=True):
            x[0, 1, 2] = wrong
            with pytest.raises(AssertionError, match=r"at \(0, 1, 2\)"):
                close(x, oracle=oracle, naive=oracle.astype(np.float32))


def test_an_extra_nan_is_rejected() -> None:
    x = ORACLE.astype(np.float32)
    x[0, 0, 0] = np.nan
    with pytest.raises(AssertionError, match="NaN at 1 places, expected at 0"):
        close(x)


def test_shape_and_dtype_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        close(ORACLE.astype(np.float32)[:1])
    with pytest.raises(AssertionError, match="dtype"):
        close(ORACLE.astype(np.float16), np.float32)


def test_empty_results_agree_and_zero_is_exact() -> None:
    empty = np.zeros((0, 4))
    close(empty.astype(np.float32), oracle=empty)
    zero = np.zeros((2, 4))
    close(zero.astype(np.float32), oracle=zero)
    with pytest.raises(AssertionError):
        close((zero + 1e-30).astype(np.float32), oracle=zero)


def test_useless_inputs_are_reported() -> None:
    naive = ORACLE.astype(np.float32)
    naive[0, 0, 0] = np.inf
    with pytest.raises(AssertionError, match="cannot be used"):
        close(ORACLE.astype(np.float32), naive=naive)
