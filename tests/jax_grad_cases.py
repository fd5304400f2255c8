"""Gradients of the calls in jax_cases.py, and what they should be: shared by the JAX tests of gradients."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import heed
from jax_cases import OPTIONS, attend, make_operands, make_varlen_operands

DIFFERENTIABLE = ("q", "k", "v", "sinks", "alibi_slopes")
COTANGENTS = ("dout", "dlse")
FORWARD, BACKWARD = "heed.attention_fwd.v1", "heed.attention_bwd.v1"


def with_cotangents(
    operands: Mapping[str, np.ndarray], lead: Mapping[str, tuple[int, ...]] | None = None, seed: int = 1
) -> dict[str, np.ndarray]:
    """The operands, and gradients of out and lse to start from; `lead` gives some of those leading axes."""
    rng = np.random.default_rng(seed)
    lead = lead or {}
    rank = 3 if "cu_seqlens_q" in operands else 4
    q, v = (operands[name].shape[-rank:] for name in "qv")
    dout = rng.standard_normal((*lead.get("dout", ()), *q[:-1], v[-1])).astype(operands["q"].dtype)
    dlse = rng.standard_normal((*lead.get("dlse", ()), *q[:-3], q[-2], q[-3])).astype(np.float32)
    return {**operands, "dout": dout, "dlse": dlse}


def make_case(lead: Mapping[str, tuple[int, ...]] | None = None, **sizes: Any) -> dict[str, np.ndarray]:
    """Every operand of flash_mha and both cotangents; `lead` gives some of them leading axes."""
    return with_cotangents(make_operands(lead=lead, **sizes), lead)


def make_varlen_case(lead: Mapping[str, tuple[int, ...]] | None = None, **sizes: Any) -> dict[str, np.ndarray]:
    """The same for flash_mha_varlen."""
    return with_cotangents(make_varlen_operands(lead=lead, **sizes), lead)


def operands_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case without its cotangents."""
    return {name: x for name, x in case.items() if name not in COTANGENTS}


def gradients(operands: Mapping[str, Any]) -> dict[str, Any]:
    """The gradients of attend by the names of its operands: a function of operands and cotangents alone."""
    chosen = {name: x for name, x in operands.items() if name in DIFFERENTIABLE}
    rest = {name: x for name, x in operands.items() if name not in (*DIFFERENTIABLE, *COTANGENTS)}
    _, pull = jax.vjp(lambda x: attend({**rest, **x}), chosen)
    (found,) = pull((operands["dout"], operands["dlse"]))
    return found


def rows_of(operands: Mapping[str, Any], mapped: Any, index: int) -> dict[str, Any]:
    """One row's operands, where some are mapped."""
    return {name: x[index] if name in mapped else x for name, x in operands.items()}


def axes_of(mapped: Any, names: Iterable[str]) -> dict[str, int | None]:
    """in_axes of a function of named operands."""
    return {name: 0 if name in mapped else None for name in names}


def numpy_gradients(operands: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The gradients of the same call on NumPy arrays, which conformance tests check. No leading axes."""
    arrays = {name: np.asarray(x) for name, x in operands.items()}
    options = {name: arrays.get(name) for name in ("sinks", "alibi_slopes", "dlse")} | OPTIONS
    if "q_segment_ids" in arrays:
        options["segment_ids"] = (arrays["q_segment_ids"], arrays["kv_segment_ids"])
    function: Any = heed.flash_mha_bwd
    if "cu_seqlens_q" in arrays:
        options |= {name: arrays.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")}
        function = heed.flash_mha_varlen_bwd
    results = attend(operands_of(arrays))
    found = function(*(arrays[name] for name in ("dout", "q", "k", "v")), *results, **options)
    assert all(x is None or type(x) is np.ndarray for x in found)
    return {name: x for name, x in zip(DIFFERENTIABLE, found, strict=True) if x is not None}


def check_gradients(got: Mapping[str, Any], operands: Mapping[str, Any], what: str) -> None:
    """Asserts that the gradients of one call are those of the same call on NumPy arrays.

    To the bit: every batch row and KV head is computed by itself and in the same order, however calls are batched or
    divided. Gradients of per-head values are sums over the batch, which may be added up in any order.
    """
    per_head = {name: x for name, x in got.items() if name not in ("q", "k", "v")}
    want = numpy_gradients(operands)
    assert set(got) <= set(want), what
    for name, x in got.items():
        if name not in per_head:
            np.testing.assert_array_equal(np.asarray(x), want[name], err_msg=f"{what}: gradient of {name}")
    if per_head:
        check_sums(per_head, batch_rows(operands), what)


def batch_rows(operands: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls on one row of the batch each. Packed sequences are one call."""
    if "cu_seqlens_q" in operands:
        return [dict(operands)]
    return [
        {name: x if name in ("sinks", "alibi_slopes") else x[b : b + 1] for name, x in operands.items()}
        for b in range(operands["q"].shape[0])
    ]


def check_sums(got: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], what: str) -> None:
    """Asserts that each gradient is the sum of those of several calls on NumPy arrays: in some order, to the bit."""
    parts = [numpy_gradients(call) for call in calls]
    assert set(got) <= set(parts[0]), what
    for name, x in got.items():
        x = np.asarray(x)
        fits = [total.astype(x.dtype) == x for total in sums_in_any_order([part[name] for part in parts])]
        wrong = ~np.any(fits, axis=0)
        assert not wrong.any(), (
            f"{what}: gradient of {name}: {int(wrong.sum())} of {wrong.size} elements are no sum of those of "
            f"{len(calls)} calls; got {x[wrong][:4]}"
        )


def check_divided(got: Mapping[str, Any], operands: Mapping[str, Any], ways: int, what: str) -> None:
    """The gradients of a call whose query heads are divided `ways` ways: parts of a KV head's gradient are summed."""
    q_heads, kv_heads = operands["q"].shape[-2], operands["k"].shape[-2]
    if ways <= kv_heads:
        check_gradients(got, operands, what)
        return
    check_gradients({name: x for name, x in got.items() if name not in ("k", "v")}, operands, what)
    size = q_heads // ways
    heads_of = {"q": -2, "dout": -2, "dlse": -2, "sinks": -1, "alibi_slopes": -1}
    for h in range(kv_heads):
        parts = []
        for first in range(h * q_heads // kv_heads, (h + 1) * q_heads // kv_heads, size):
            part = {name: x[..., h : h + 1, :] if name in ("k", "v") else x for name, x in operands.items()}
            for name, axis in heads_of.items():
                if name in part:
                    part[name] = np.take(part[name], range(first, first + size), axis=axis)
            parts.append(part)
        check_sums({name: np.asarray(got[name])[..., h : h + 1, :] for name in ("k", "v")}, parts, f"{what}, head {h}")


def sums_in_any_order(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The float32 sums of arrays for every way to put the brackets: one of two arrays, 3 of three, 15 of four."""
    if len(parts) == 1:
        return [parts[0].astype(np.float32)]
    sums = []
    first, others = parts[0], parts[1:]
    for chosen in itertools.product((False, True), repeat=len(others)):
        if not all(chosen):
            left = [first, *itertools.compress(others, chosen)]
            right = list(itertools.compress(others, [not x for x in chosen]))
            sums += [x + y for x in sums_in_any_order(left) for y in sums_in_any_order(right)]
    return sums


def same_bits(got: Any, want: Any, what: str) -> None:
    """Asserts that two trees of arrays hold the same numbers."""
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    assert [path for path, _ in got] == [path for path, _ in want], what
    for (path, x), (_, y) in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=f"{what}: {jax.tree_util.keystr(path)}")


def problems(text: str) -> list[str]:
    """The backward problems that a lowered program's calls carry."""
    return re.findall(r'"(attention_bwd\.v1;[^"]*)"', text)
