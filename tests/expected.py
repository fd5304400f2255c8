"""What a call should give: the oracle, and the plain implementation whose error is the yardstick."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from heed import reference
from heed.reference import Gradients
from specs import AttentionSpec, make_cotangents, make_inputs
from tolerance import assert_agree, assert_close
from varlen_specs import VarlenSpec, make_varlen_cotangents, make_varlen_inputs


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


def expected_varlen(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Expected:
    """The same for flash_mha_varlen, whose arrays are among `options`."""
    options = {name: x for name, x in options.items() if not name.startswith("max_seqlen")}
    out, lse = reference.attention_forward_varlen(q, k, v, **options)
    naive_out, naive_lse = reference.naive_attention_forward_varlen(q, k, v, **options)
    return Expected(out, lse, naive_out, naive_lse)


@functools.lru_cache(maxsize=4)
def expected_of(spec: AttentionSpec, seed: int = 0) -> Expected:
    """The same for a named spec."""
    inputs = make_inputs(spec, seed)
    return expected(inputs.q, inputs.k, inputs.v, **spec.static_options(), **inputs.arrays)


@functools.lru_cache(maxsize=4)
def expected_of_varlen(spec: VarlenSpec, seed: int = 0) -> Expected:
    inputs = make_varlen_inputs(spec, seed)
    return expected_varlen(inputs.q, inputs.k, inputs.v, **spec.static_options(), **inputs.arrays)


# Gradients -----------------------------------------------------------------------------------------------------------

ROUNDINGS = 8
"""The yardstick is the worst of this many plain evaluations, whose roundings fall differently (one is tried first).

Forward and backward are two functions, which need not sum a score in the same order, so P = exp(score - lse) is off by
what both err. And a query that sees one key has gradient 0: <dout, v> - <dout, out> cancels to one rounding error that
its whole row is a multiple of, and which a single evaluation makes 0 by luck.
"""
DRAWS = 4
"""Gradients are tried on this many draws of numbers before they fail: a defect stays, luck does not."""


class ExpectedGradients:
    """The gradients in float64, and by a plain implementation at the inputs' dtype."""

    def __init__(self, forward: Any, backward: Any, cotangents: Any, operands: Any, options: dict[str, Any]) -> None:
        self._forward, self._backward = forward, backward
        self._given = (*cotangents, *operands)
        self._options = options
        dout, dlse = cotangents
        self.oracle: Gradients = backward(dout, *operands, None, None, dlse=dlse, **options)
        self._rng = np.random.default_rng(0)
        self._naive: list[Any] = []
        self._num_evaluations = 0

    def naive(self, num_evaluations: int) -> Gradients:
        """Of each element the worst of that many evaluations."""
        while self._num_evaluations < num_evaluations:
            one = self._evaluate()
            self._naive = [farther(*three) for three in zip(self.oracle, self._naive or one, one, strict=True)]
            self._num_evaluations += 1
        return Gradients(*self._naive)

    def _evaluate(self) -> list[Any]:
        """Forward and backward, each with the axes that it sums over in a random order, and with q, v and dout times
        random factors that the results are divided by.
        """
        dout, dlse, q, k, v = self._given
        rng, scale = self._rng, self._options.get("softmax_scale")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        options = self._options | {"compute_dtype": np.float32, "storage_dtype": q.dtype}
        dout, q, k, v = (x.astype(np.float32) for x in (dout, q, k, v))
        x, y = rng.permutation(q.shape[-1]), rng.permutation(v.shape[-1])
        a, b, c, d = (np.float32(1 + rng.random()) for _ in range(4))
        out, lse = _rounded_otherwise(self._forward, (q, k, v), (x, y, a, b), options | {"softmax_scale": scale})
        x, y = rng.permutation(q.shape[-1]), rng.permutation(v.shape[-1])
        turned = d * dout[..., y], c * q[..., x], k[..., x], v[..., y], out[..., y], lse
        dlse = None if dlse is None else d * dlse
        found = self._backward(*turned, dlse=dlse, **options | {"softmax_scale": scale / c})
        results: list[Any] = [None if x is None else x.astype(np.float32) / d for x in found]
        x, y = np.argsort(x), np.argsort(y)
        return [c * results[0][..., x], results[1][..., x], results[2][..., y], *results[3:]]

    def _dtype_of(self, name: str) -> Any:
        return self._given[2].dtype if name in ("dq", "dk", "dv") else np.dtype(np.float32)

    def _rows(self, num_evaluations: int, *results: Any) -> Iterator[tuple[str, list[Any], Any, Any]]:
        """(name, that gradient of each result, naive, oracle) of each gradient that there is."""
        for name, oracle, naive in zip(Gradients._fields, self.oracle, self.naive(num_evaluations), strict=True):
            found = [getattr(result, name) for result in results]
            assert all((x is None) == (oracle is None) for x in found), f"{name}: got {found}, expected {oracle}"
            if oracle is not None:
                yield name, found, naive, oracle

    def _try_roundings(self, check: Callable[[int], None]) -> None:
        try:
            check(1)
        except AssertionError:
            check(ROUNDINGS)

    def check(self, gradients: Any, what: str) -> None:
        """Asserts the tolerance rule for every gradient; `gradients` has the fields of reference.Gradients."""

        def check(num_evaluations: int) -> None:
            for name, (x,), naive, oracle in self._rows(num_evaluations, gradients):
                assert_close(x, naive, oracle, self._dtype_of(name), f"{what}: {name}")

        self._try_roundings(check)

    def check_agree(self, first: Any, second: Any, what: str) -> None:
        """Asserts that two results are as close to each other as two that obey the rule must be."""

        def check(num_evaluations: int) -> None:
            for name, (x, y), naive, oracle in self._rows(num_evaluations, first, second):
                assert_agree(x, y, naive, oracle, self._dtype_of(name), f"{what}: {name}")

        self._try_roundings(check)


def _rounded_otherwise(forward: Any, operands: Any, by: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """A plain (out, lse) in float32, the axes that it sums over in another order, and q and v times factors that are
    divided out again: by = (order of q's and k's head dim, of v's, q's factor, v's).
    """
    (q, k, v), (x, y, a, b) = operands, by
    scaled = options | {"softmax_scale": options["softmax_scale"] / a}
    out, lse = forward(a * q[..., x], k[..., x], b * v[..., y], **scaled)
    return out.astype(np.float32)[..., np.argsort(y)] / b, lse


@functools.lru_cache(maxsize=4)
def expected_of_few_rows(spec: AttentionSpec, seed: int = 0) -> Expected:
    """`expected_of`, whose yardstick for the LSE is the worst of several plain evaluations: a row has an LSE for each
    query, and where they are few, those of a single evaluation are often exact by luck.
    """
    want, inputs = expected_of(spec, seed), make_inputs(spec, seed)
    q, k, v = (x.astype(np.float32) for x in (inputs.q, inputs.k, inputs.v))
    options = spec.static_options() | inputs.arrays
    scale = options.get("softmax_scale")
    options |= {"softmax_scale": q.shape[-1] ** -0.5 if scale is None else scale}
    options |= {"compute_dtype": np.float32, "storage_dtype": inputs.q.dtype}
    rng = np.random.default_rng(0)
    for _ in range(ROUNDINGS - 1):
        x, y = rng.permutation(q.shape[-1]), rng.permutation(v.shape[-1])
        a, b = (np.float32(1 + rng.random()) for _ in range(2))
        _, lse = _rounded_otherwise(reference.attention_forward, (q, k, v), (x, y, a, b), options)
        want = want._replace(naive_lse=farther(want.lse, want.naive_lse, lse))
    return want


def farther(right: Any, x: Any, y: Any) -> Any:
    """Of each element the one that is farther off."""
    if right is None:
        return None
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(y.astype(np.float64) - right) > np.abs(x.astype(np.float64) - right), y, x)


def expected_gradients(cotangents: Any, operands: Any, **options: Any) -> ExpectedGradients:
    """The oracle and the yardstick for NumPy arrays (dout, dlse or None) and (q, k, v); `options` are flash_mha's."""
    return ExpectedGradients(reference.attention_forward, reference.attention_backward, cotangents, operands, options)


def expected_gradients_varlen(cotangents: Any, operands: Any, **options: Any) -> ExpectedGradients:
    """The same for flash_mha_varlen, whose arrays are among `options`."""
    options = {name: x for name, x in options.items() if not name.startswith("max_seqlen")}
    return ExpectedGradients(
        reference.attention_forward_varlen, reference.attention_backward_varlen, cotangents, operands, options
    )


class GradientCase(NamedTuple):
    """A named spec's call with one draw of numbers, and what it should give."""

    function: str
    operands: tuple[Any, Any, Any]
    cotangents: tuple[Any, Any]
    arrays: dict[str, Any]
    statics: dict[str, Any]
    expected: ExpectedGradients


@functools.lru_cache(maxsize=4)
def gradient_case(spec: AttentionSpec | VarlenSpec, seed: int = 0) -> GradientCase:
    statics = spec.static_options()
    if isinstance(spec, VarlenSpec):
        inputs, cotangents = make_varlen_inputs(spec, seed), make_varlen_cotangents(spec, seed)
        operands = inputs.q, inputs.k, inputs.v
        want = expected_gradients_varlen(cotangents, operands, **statics, **inputs.arrays)
        return GradientCase("flash_mha_varlen", operands, cotangents, inputs.arrays, statics, want)
    inputs, cotangents = make_inputs(spec, seed), make_cotangents(spec, seed)
    operands = inputs.q, inputs.k, inputs.v
    want = expected_gradients(cotangents, operands, **statics, **inputs.arrays)
    return GradientCase("flash_mha", operands, cotangents, inputs.arrays, statics, want)


def judge(check: Callable[[int], None]) -> None:
    """check(seed) asserts something of a result; it may fail on some draws of numbers, but not on all."""
    for seed in range(DRAWS):
        try:
            check(seed)
            return
        except AssertionError:
            if seed == DRAWS - 1:
                raise


def judge_gradients(spec: AttentionSpec | VarlenSpec, check: Callable[[GradientCase], None]) -> None:
    """`judge` for a named spec."""
    judge(lambda seed: check(gradient_case(spec, seed)))
