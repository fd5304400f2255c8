"""The one tolerance rule. No test compares a kernel's floating-point result with a reference in any other way.

A result may be no more than twice as wrong as a plain implementation at the same dtype (plus one rounding): over the
whole output, and, with twice that bound, on every row by itself, so that large rows do not hide errors in small ones.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def assert_close(x: Any, naive: Any, oracle: Any, dtype: Any, what: str) -> None:
    """Raises AssertionError unless `x` is as good as the rule asks.

    x       the result under test, of dtype `dtype`
    naive   the same function by a plain implementation at that dtype
    oracle  the same function of the same inputs in float64
    what    names the result in the message
    A row is everything along the last axis.
    """
    dtype = np.dtype(dtype)
    x, naive, oracle = np.asarray(x), np.asarray(naive), np.asarray(oracle, dtype=np.float64)
    assert x.dtype == dtype, f"{what}: dtype is {x.dtype}, expected {dtype}"
    assert x.shape == oracle.shape, f"{what}: shape is {x.shape}, expected {oracle.shape}"
    assert naive.shape == oracle.shape, f"{what}: the naive result has shape {naive.shape}, the oracle {oracle.shape}"
    _assert_close(x.astype(np.float64), naive.astype(np.float64), oracle, dtype, what)


def assert_agree(x: Any, y: Any, naive: Any, oracle: Any, dtype: Any, what: str) -> None:
    """Raises AssertionError unless two results are as close to each other as two that obey the rule must be.

    Each may be off by the rule's bound, in either direction, so half of their difference may be.
    """
    x, y, naive, oracle = (np.asarray(array).astype(np.float64) for array in (x, y, naive, oracle))
    with np.errstate(invalid="ignore"):
        half = np.where(np.isfinite(x) & np.isfinite(y), oracle + (x - y) / 2, x)
    _assert_close(half, naive, oracle, np.dtype(dtype), what)


def _assert_close(x: np.ndarray, naive: np.ndarray, oracle: np.ndarray, dtype: np.dtype[Any], what: str) -> None:
    _assert_same_specials(x, oracle, what)
    _assert_same_specials(naive, oracle, f"{what} (the naive result: these inputs cannot be used)")

    finite = np.isfinite(oracle)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(x - oracle), 0.0)
        noise = np.where(finite, np.abs(naive - oracle), 0.0)
    size = np.where(finite, np.abs(oracle), 0.0)
    eps = float(ml_dtypes.finfo(dtype).eps)

    bound = 2 * noise.max(initial=0.0) + eps * size.max(initial=0.0)
    worst = error.max(initial=0.0)
    if worst > bound:
        at = np.unravel_index(int(error.argmax()), error.shape)
        raise AssertionError(
            f"{what}: |x - oracle| is {worst:.4g} at {_index(at)} (x {x[at]:.8g}, oracle {oracle[at]:.8g}), "
            f"the bound is {bound:.4g}; {int((error > bound).sum())} of {error.size} elements exceed it"
        )
    if error.ndim == 0:
        return
    row_bound = 2 * (2 * noise.max(axis=-1, initial=0.0) + eps * size.max(axis=-1, initial=0.0))
    row_error = error.max(axis=-1, initial=0.0)
    bad = row_error > row_bound
    if bad.any():
        at = np.unravel_index(int(np.argmax(np.where(bad, row_error - row_bound, -1.0))), bad.shape)
        raise AssertionError(
            f"{what}: in row {_index(at)} |x - oracle| is {row_error[at]:.4g}, the row's bound is {row_bound[at]:.4g}; "
            f"{int(bad.sum())} of {bad.size} rows exceed theirs"
        )


def _assert_same_specials(x: np.ndarray, oracle: np.ndarray, what: str) -> None:
    for name, is_special in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        got, expected = is_special(x), is_special(oracle)
        if not np.array_equal(got, expected):
            at = np.unravel_index(int(np.argmax(got != expected)), got.shape)
            raise AssertionError(
                f"{what}: {name} at {int(got.sum())} places, expected at {int(expected.sum())}; "
                f"at {_index(at)} x is {x[at]}, the oracle {oracle[at]}"
            )


def _index(at: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in at)
