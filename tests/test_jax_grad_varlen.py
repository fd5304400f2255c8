"""Gradients of flash_mha_varlen under JAX's transformations."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heed
from jax_cases import OPTIONS, VARLEN_OPERANDS, attend
from jax_grad_cases import (
    BACKWARD,
    COTANGENTS,
    DIFFERENTIABLE,
    axes_of,
    check_gradients,
    check_sums,
    gradients,
    make_varlen_case,
    operands_of,
    problems,
    rows_of,
    same_bits,
)

ALL = (*VARLEN_OPERANDS, *COTANGENTS)
LENGTHS = VARLEN_OPERANDS[5:]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_gradients_of_every_operand(heads: tuple[int, int]) -> None:
    operands = make_varlen_case(q_heads=heads[0], kv_heads=heads[1])
    found = gradients(operands)
    check_gradients(found, operands, "eager")
    same_bits(jax.jit(gradients)(operands), found, "jit")
    arrays = jax.tree.map(jnp.asarray, operands)
    same_bits(gradients({**arrays, **{name: operands[name] for name in LENGTHS}}), found, "lengths in NumPy")
    # Rows of q outside every sequence, and keys of none, have gradient 0.
    first, last = operands["cu_seqlens_q"][[0, -1]]
    assert not np.asarray(found["q"])[:first].any() and not np.asarray(found["q"])[last:].any()
    first, last = operands["cu_seqlens_k"][[0, -1]]
    for name in "kv":
        assert not np.asarray(found[name])[:first].any() and not np.asarray(found[name])[last:].any(), name


def test_the_problem_is_that_of_the_forward_pass() -> None:
    operands = make_varlen_case()
    rest = operands_of(operands)
    variants: list[dict[str, Any]] = [{}, {"max_seqlen_q": 19, "max_seqlen_k": 41, "deterministic": True}]
    for options in variants:

        def loss(q: Any, options: Any = options) -> Any:
            function: Any = heed.flash_mha_varlen
            return function(**{**rest, "q": q}, **OPTIONS, **options).sum()

        (problem,) = problems(jax.jit(jax.grad(loss)).lower(operands["q"]).as_text())
        assert "cu_seqlens_q=int32[4];cu_seqlens_k=int32[4];seqused_k=int32[3];out=float32[19,4,12];lse=" in problem
        assert problem.endswith(
            f";max_seqlen={'19,41' if options else '-1,-1'};softcap=0x1.4000000000000p+4"
            f";deterministic={int(bool(options))};backend=auto"
        )


GROUPS = {
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "per head": ("sinks", "alibi_slopes"),
    "q lengths": ("cu_seqlens_q",),
    "k lengths": ("cu_seqlens_k", "seqused_k"),
    "cotangents": COTANGENTS,
}


@pytest.mark.parametrize("first", ["q", "k", "v", "q+k", "k+v", "q+v", "q+k+v", ""])
def test_vmap_of_the_gradient_over_any_subset_of_operands(first: str) -> None:
    """Every mapped row is compared with the call on that row alone: all 127 subsets of the groups, 16 per test."""
    size = 2
    for others in itertools.product((False, True), repeat=4):
        chosen = [*filter(None, first.split("+")), *itertools.compress(list(GROUPS)[3:], others)]
        mapped = frozenset(name for group in chosen for name in GROUPS[group])
        if not mapped:
            continue
        operands = make_varlen_case(lead=dict.fromkeys(mapped, (size,)))
        found = jax.vmap(gradients, in_axes=(axes_of(mapped, ALL),))(operands)
        for i in range(size):
            row = {name: x[i] for name, x in found.items()}
            check_gradients(row, rows_of(operands, mapped, i), f"row {i} with {chosen} mapped")


@pytest.mark.parametrize("mapped", [("q",), ("q", "cu_seqlens_q"), ("seqused_k",)], ids="+".join)
def test_the_gradient_of_a_vmap_sums_over_rows(mapped: tuple[str, ...]) -> None:
    size = 3
    lead = dict.fromkeys((*mapped, *COTANGENTS), (size,))
    operands = make_varlen_case(lead=lead)
    lengths = {name: operands[name] for name in LENGTHS}
    chosen = {name: operands[name] for name in DIFFERENTIABLE}

    def call(x: Any) -> Any:
        return jax.vmap(attend, in_axes=(axes_of(mapped, VARLEN_OPERANDS),))({**lengths, **x})

    (found,) = jax.vjp(call, chosen)[1]((operands["dout"], operands["dlse"]))
    rows = [rows_of(operands, lead, i) for i in range(size)]
    for i, row in enumerate(rows):
        check_gradients({name: found[name][i] for name in chosen if name in mapped}, row, f"row {i}")
    check_sums({name: found[name] for name in chosen if name not in mapped}, rows, "shared")


def test_vmap_copies_no_operand() -> None:
    operands = make_varlen_case(lead={"dout": (5,)})
    lowered = jax.jit(jax.vmap(gradients, in_axes=(axes_of(("dout",), ALL),))).lower(operands).as_text()
    (problem,) = problems(lowered)
    assert "q=float32[1,19,4,8];k=float32[1,41,2,8];v=float32[1,41,2,12];sinks=float32[1,4]" in problem
    assert "out=float32[1,19,4,12];lse=float32[1,4,19];dout=float32[5,19,4,12];dlse=float32[1,4,19]" in problem
    (line,) = (line for line in lowered.splitlines() if f"custom_call @{BACKWARD}" in line)
    assert "tensor<5x41x2x8xf32>" in line.rpartition("->")[2] and "tensor<5x4xf32>" in line.rpartition("->")[2]


def test_scan_over_lengths_and_checkpoint() -> None:
    operands = make_varlen_case(lead=dict.fromkeys(("cu_seqlens_q", "seqused_k", "dout"), (3,)))
    mapped = {name: jnp.asarray(operands[name]) for name in ("cu_seqlens_q", "seqused_k", "dout")}
    fixed = {name: x for name, x in operands.items() if name not in mapped}
    found = jax.jit(lambda rows: jax.lax.scan(lambda _, row: (0, gradients(fixed | row)), 0, rows)[1])(mapped)
    for i in range(3):
        check_gradients({name: x[i] for name, x in found.items()}, rows_of(operands, mapped, i), f"row {i}")
    row = rows_of(operands, mapped, 0)
    rest = {name: row[name] for name in LENGTHS}
    chosen = {name: jnp.asarray(row[name]) for name in DIFFERENTIABLE}
    policy = jax.checkpoint_policies.save_only_these_names("heed_attention_out", "heed_attention_lse")
    for kept in (jax.checkpoint(attend), jax.checkpoint(attend, policy=policy)):
        (found,) = jax.vjp(lambda x, kept=kept: kept({**rest, **x}), chosen)[1]((row["dout"], row["dlse"]))
        check_gradients(found, row, "checkpoint")


def test_lengths_have_float0_gradients() -> None:
    operands = operands_of(make_varlen_case())
    _, pull = jax.vjp(attend, operands)
    found = pull(jax.tree.map(jnp.ones_like, attend(operands)))[0]
    for name in LENGTHS:
        assert found[name].dtype == jax.dtypes.float0 and found[name].shape == operands[name].shape


@pytest.mark.parametrize("dtype", ["int16", "int64", "uint32"])
def test_lengths_of_any_integer_dtype(dtype: str) -> None:
    operands = make_varlen_case()
    with jax.enable_x64(True):  # type: ignore[attr-defined]
        arrays = jax.tree.map(
            jnp.asarray, {name: x.astype(dtype) if name in LENGTHS else x for name, x in operands.items()}
        )
        check_gradients(jax.jit(gradients)(arrays), operands, dtype)


def test_second_derivatives_are_refused_with_the_reason() -> None:
    operands = make_varlen_case()
    rest = operands_of(operands)

    def loss(q: Any) -> Any:
        return jnp.sum(attend({**rest, "q": q})[0] ** 2)

    for transform in (jax.grad(lambda q: jax.grad(loss)(q).sum()), jax.hessian(loss)):
        with pytest.raises(NotImplementedError, match=r"heed\.flash_mha_varlen: got a derivative of its gradient"):
            transform(jnp.asarray(operands["q"]))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(loss, (operands["q"],), (operands["q"],))


def test_flash_mha_varlen_bwd_gives_the_gradients_too() -> None:
    operands = make_varlen_case()
    out, lse = attend(operands_of(operands))
    want = gradients(operands)
    names = [name for name in ALL if name not in ("q", "k", "v", "dout")]

    def call(x: dict[str, Any], out: Any, lse: Any) -> Any:
        function: Any = heed.flash_mha_varlen_bwd
        return function(x["dout"], x["q"], x["k"], x["v"], out, lse, **{name: x[name] for name in names}, **OPTIONS)

    arrays = jax.tree.map(jnp.asarray, operands)
    results = (jnp.asarray(out), jnp.asarray(lse))
    for name, found in {"eager": call(arrays, *results), "jit": jax.jit(call)(arrays, *results)}.items():
        same_bits(dict(zip(DIFFERENTIABLE, found, strict=True)), want, name)
