"""Gradients of flash_mha under vmap, over any subset of operands, and Jacobians."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest

import heed
from jax_cases import OPERANDS, OPTIONS, attend
from jax_grad_cases import (
    BACKWARD,
    COTANGENTS,
    DIFFERENTIABLE,
    axes_of,
    check_gradients,
    check_sums,
    gradients,
    make_case,
    problems,
    rows_of,
)

ALL = (*OPERANDS, *COTANGENTS)

GROUPS = {
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "per head": ("sinks", "alibi_slopes"),
    "ids": ("q_segment_ids", "kv_segment_ids"),
    "cotangents": COTANGENTS,
}


@pytest.mark.parametrize("first", ["q", "k", "v", "q+k", "k+v", "q+v", "q+k+v", ""])
def test_vmap_of_the_gradient_over_any_subset_of_operands(first: str) -> None:
    """Every mapped row is compared with the oracle on that row alone: all 63 subsets of the groups, 8 per test."""
    size = 3
    for others in itertools.product((False, True), repeat=3):
        groups = [*filter(None, first.split("+")), *itertools.compress(list(GROUPS)[3:], others)]
        mapped = frozenset(name for group in groups for name in GROUPS[group])
        if not mapped:
            continue
        operands = make_case(lead=dict.fromkeys(mapped, (size,)))
        found = jax.vmap(gradients, in_axes=(axes_of(mapped, ALL),))(operands)
        for i in range(size):
            row = {name: x[i] for name, x in found.items()}
            check_gradients(row, rows_of(operands, mapped, i), f"row {i} with {groups} mapped")


@pytest.mark.parametrize("mapped", [("q",), ("q", "q_segment_ids"), ("k", "v"), ("q", "sinks"), ("v",)], ids="+".join)
def test_the_gradient_of_a_vmap_sums_over_rows(mapped: tuple[str, ...]) -> None:
    """What is mapped has a gradient for each row, what is shared has their sum."""
    size = 3
    lead = dict.fromkeys((*mapped, *COTANGENTS), (size,))
    operands = make_case(lead=lead)
    rest = {name: x for name, x in operands.items() if name in OPERANDS[5:]}
    chosen = {name: operands[name] for name in DIFFERENTIABLE}

    def call(x: Any) -> Any:
        return jax.vmap(attend, in_axes=(axes_of(mapped, OPERANDS),))({**rest, **x})

    _, pull = jax.vjp(call, chosen)
    (found,) = pull((operands["dout"], operands["dlse"]))
    rows = [rows_of(operands, lead, i) for i in range(size)]
    for i, row in enumerate(rows):
        check_gradients({name: found[name][i] for name in chosen if name in mapped}, row, f"row {i}")
    check_sums({name: found[name] for name in chosen if name not in mapped}, rows, "shared")


def test_vmap_of_28_query_heads_on_4_kv_heads() -> None:
    """The shape on which packing a mapped axis in the wrong order was first noticed elsewhere: gradients permuted."""
    rng = np.random.default_rng(0)
    q, dout = (rng.standard_normal((3, 1, 64, 28, 64)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((3, 1, 64, 4, 64)).astype(np.float32) for _ in range(2))

    def call(q: Any, k: Any, v: Any, dout: Any) -> Any:
        return jax.vjp(lambda *x: heed.flash_mha(*x, **OPTIONS), q, k, v)[1](dout)

    found = jax.jit(jax.vmap(call))(q, k, v, dout)
    for i in range(3):
        row = {"q": q[i], "k": k[i], "v": v[i], "dout": dout[i], "dlse": np.zeros((1, 28, 64), np.float32)}
        check_gradients({name: x[i] for name, x in zip("qkv", found, strict=True)}, row, f"row {i}")


def test_nested_vmaps_that_map_different_operands() -> None:
    sizes = (2, 3, 2)
    lead = {"q": (2, 3), "k": (3, 2), "v": (2,), "alibi_slopes": (2, 2), "q_segment_ids": (2,), "dout": (3,)}
    in_axes = (  # outermost first; an operand's axes are taken in this order
        {"q": 0, "alibi_slopes": 0, "q_segment_ids": 0},
        {"q": 0, "k": 0, "dout": 0},
        {"k": 0, "v": 0, "alibi_slopes": 0},
    )
    operands = make_case(lead=lead)
    call: Any = gradients
    for level in reversed(in_axes):
        call = jax.vmap(call, in_axes=({name: level.get(name) for name in ALL},))
    found = jax.jit(call)(operands)
    for index in np.ndindex(*sizes):
        row = operands
        for level, i in zip(in_axes, index, strict=True):
            row = rows_of(row, frozenset(level), i)
        check_gradients({name: x[index] for name, x in found.items()}, row, f"row {index}")


def test_vmap_copies_no_operand() -> None:
    """An operand that is not mapped reaches the kernel once, with a leading axis of size 1. Gradients have all rows."""
    operands = make_case(lead={"q": (5,)})
    lowered = jax.jit(jax.vmap(gradients, in_axes=(axes_of(("q",), ALL),))).lower(operands).as_text()
    (problem,) = problems(lowered)
    assert "q=float32[5,2,9,4,8];k=float32[1,2,11,2,8];v=float32[1,2,11,2,12];sinks=float32[1,4]" in problem
    assert "out=float32[5,2,9,4,12];lse=float32[5,2,4,9];dout=float32[1,2,9,4,12];dlse=float32[1,2,4,9]" in problem
    (line,) = (line for line in lowered.splitlines() if f"custom_call @{BACKWARD}" in line)
    results = line.rpartition("->")[2]
    assert "tensor<5x2x11x2x8xf32>" in results and "tensor<5x2x4xf32>" in results


def test_jacobian() -> None:
    """Only the gradient of out is mapped: one call with a leading axis of 4096, everything else of size 1."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 4, 16, 32)).astype(np.float32) for _ in range(3))
    options: dict[str, Any] = {"is_causal": True}
    jacobian: Any = jax.jit(jax.jacobian(lambda *x: heed.flash_mha(*x, **options), argnums=(0, 1, 2)))
    (problem,) = problems(jacobian.lower(q, k, v).as_text())
    assert "q=float32[1,2,4,16,32]" in problem and "dout=float32[4096,2,4,16,32]" in problem
    found = [np.asarray(x) for x in jacobian(q, k, v)]
    assert all(x.shape == (2, 4, 16, 32, 2, 4, 16, 32) for x in found)
    out, lse = heed.flash_mha(q, k, v, return_lse=True, **options)
    for index in np.ndindex(out.shape):
        dout = np.zeros_like(out)
        dout[index] = 1.0
        want = heed.flash_mha_bwd(dout, q, k, v, out, lse, **options)
        for name, x, y in zip("qkv", found, want[:3], strict=True):
            np.testing.assert_array_equal(x[index], y, err_msg=f"row {index}: {name}")
