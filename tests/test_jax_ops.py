"""heed.ops under JAX's transformations: vmap, scan, abstract evaluation. Gradients: test_jax_ops_grad.py."""

from __future__ import annotations

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heed
from heed import ops
from jax_op_cases import CASES, SIZES, Case, axes_of, check, rows_of

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def operands_of(case: Case, made: dict[str, Any]) -> dict[str, Any]:
    """Without cotangents."""
    return {name: made[name] for name in case.operands}


# vmap.


@every_case
def test_vmap_over_any_subset_of_operands(case: Case) -> None:
    """Every mapped row is compared with the call on that row alone, for every subset that there is."""
    size = 3
    for chosen in itertools.product((False, True), repeat=len(case.operands)):
        mapped = frozenset(itertools.compress(case.operands, chosen))
        if not mapped:
            continue
        operands = operands_of(case, case.make(lead=dict.fromkeys(mapped, (size,))))
        results = jax.jit(jax.vmap(case.call, in_axes=(axes_of(mapped, case.operands),)))(operands)
        for i in range(size):
            what = f"row {i} with {sorted(mapped)} mapped"
            check([x[i] for x in results], case, rows_of(operands, mapped, i), what)


@every_case
@pytest.mark.parametrize("axis, out_axis", [(-1, 1), (1, -1)])
def test_vmap_axes_may_be_anywhere(case: Case, axis: int, out_axis: int) -> None:
    size = 3
    operands = operands_of(case, case.make(lead=dict.fromkeys(case.operands, (size,))))
    moved = {name: jnp.moveaxis(x, 0, axis) for name, x in operands.items()}
    results = jax.vmap(case.call, in_axes=axis, out_axes=out_axis)(moved)
    for i in range(size):
        row = [np.moveaxis(np.asarray(x), out_axis, 0)[i] for x in results]
        check(row, case, rows_of(operands, case.operands, i), f"row {i}")


@every_case
def test_nested_vmaps_that_map_different_operands(case: Case) -> None:
    sizes = (2, 3, 2)
    names = list(case.operands)
    levels = [frozenset(names[i::3] or names[:1]) for i in range(2)] + [frozenset(names)]  # outermost first
    lead = {name: tuple(n for n, level in zip(sizes, levels, strict=True) if name in level) for name in names}
    operands = operands_of(case, case.make(lead=lead))
    call: Any = case.call
    for level in reversed(levels):
        call = jax.vmap(call, in_axes=(axes_of(level, names),))
    results = jax.jit(call)(operands)
    for index in np.ndindex(*sizes):
        row: dict[str, Any] = operands
        for level, i in zip(levels, index, strict=True):
            row = rows_of(row, level, i)
        check([x[index] for x in results], case, row, f"row {index}")


SHARED = {
    "apply_rope": ("q", "q=float32[5,7,4,8];k=float32[1,7,2,8];indptr=int32[1,4];offsets=int32[1,3]"),
    "apply_rope_with_cos_sin_cache": ("pos_ids", "k=float32[1,7,2,8];pos_ids=int32[5,7];cos_sin_cache=float32[1,16,6]"),
    "fused_add_rms_norm": ("x", "x=float32[5,3,7,5];weight=float32[1,5];residual=float32[1,3,7,5];rows=2"),
    "rms_norm": ("weight", "x=float32[1,3,7,5];weight=float32[5,5];rows=2"),
    "single_decode": ("q", "q=float32[5,4,8];k=float32[1,11,2,8];v=float32[1,11,2,12];sinks=float32[1,4]"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_vmap_copies_nothing(name: str) -> None:
    """An operand that is not mapped reaches the kernel once, with a leading axis of size 1."""
    case, (mapped, problem) = CASES[name], SHARED[name]
    operands = operands_of(case, case.make(lead={mapped: (5,)}))
    call = jax.jit(jax.vmap(case.call, in_axes=(axes_of((mapped,), case.operands),)))
    assert problem in call.lower(operands).as_text()


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3, 2)], ids=str)
def test_any_number_of_leading_axes(lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, residual = (rng.standard_normal((*lead, 10)).astype(np.float32) for _ in range(2))
    weight = rng.standard_normal(10).astype(np.float32)
    calls: list[Any] = [
        lambda x, residual, weight: ops.gelu_and_mul(x),
        lambda x, residual, weight: ops.rms_norm(x, weight),
        lambda x, residual, weight: ops.fused_add_rms_norm(x, residual, weight),
    ]
    for call in calls:
        got = jax.tree.leaves(jax.jit(call)(x, residual, weight))
        want = jax.tree.leaves(call(x, residual, weight))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)
        mapped = jax.vmap(call, in_axes=(None, None, 0))(x, residual, np.stack([weight, -weight]))
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(call(x, residual, -weight)), strict=True):
            np.testing.assert_array_equal(np.asarray(a[1]), b)


@every_case
def test_empty_calls(case: Case) -> None:
    for name in ("tokens", "rows", "kv_tokens"):
        made = case.make(**{name: 0})
        operands = operands_of(case, made)
        check(jax.jit(case.call)(operands), case, operands, f"no {name}")
        empty = jax.tree.map(lambda x: x[None][:0], operands)
        results = jax.vmap(case.call)(empty)
        assert all(x.shape == (0, *y.shape) for x, y in zip(results, case.numpy_results(operands), strict=True))


# Control flow.


@every_case
def test_scan_map_cond_and_checkpoint(case: Case) -> None:
    size = 3
    operands = operands_of(case, case.make(lead=dict.fromkeys(case.operands, (size,))))
    mapped = jax.tree.map(jnp.asarray, operands)

    def step(carry: Any, row: Any) -> Any:
        return carry + 1, case.call(row)

    results = {
        "scan": jax.jit(lambda rows: jax.lax.scan(step, jnp.int32(0), rows)[1])(mapped),
        "map in batches": jax.lax.map(case.call, mapped, batch_size=2),
        "cond": jax.vmap(
            lambda x: jax.lax.cond(True, case.call, lambda x: case.call(jax.tree.map(jnp.negative, x)), x)
        )(mapped),
        "checkpoint": jax.jit(jax.vmap(jax.checkpoint(case.call)))(mapped),
    }
    for name, found in results.items():
        for i in range(size):
            check([x[i] for x in found], case, rows_of(operands, case.operands, i), f"{name}, row {i}")


# Abstract evaluation and call styles.


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_same_inputs_give_the_same_bits_under_every_call_style(case: Case, dtype: str) -> None:
    operands = operands_of(case, case.make(dtype=dtype))
    arrays = jax.tree.map(jnp.asarray, operands)
    first = next(iter(operands))
    styles = {
        "eager": case.call(arrays),
        "jit": jax.jit(case.call)(operands),
        "compiled ahead": jax.jit(case.call).lower(arrays).compile()(arrays),
        "other operands in NumPy": case.call({**operands, first: arrays[first]}),
    }
    with jax.disable_jit():
        styles["no jit"] = case.call(arrays)
    shapes = jax.eval_shape(case.call, operands)
    for name, results in styles.items():
        assert all(isinstance(x, jax.Array) for x in results), name
        assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in shapes], name
        check(results, case, operands, name)


def test_abstract_evaluation_runs_nothing() -> None:
    """Shapes far beyond memory have their types in no time."""
    shape = jax.ShapeDtypeStruct
    x = shape((1 << 20, 1 << 20, 8192), jnp.bfloat16)
    assert jax.eval_shape(ops.silu_and_mul, x).shape == (1 << 20, 1 << 20, 4096)
    assert jax.eval_shape(ops.rms_norm, x, shape((8192,), jnp.bfloat16)).shape == x.shape
    q, k = shape((1 << 24, 64, 128), jnp.bfloat16), shape((1 << 24, 8, 128), jnp.bfloat16)
    rotated = jax.eval_shape(ops.apply_rope_pos_ids, q, k, shape((1 << 24,), jnp.int32))
    assert [x.shape for x in rotated] == [q.shape, k.shape]
    out, lse = jax.eval_shape(lambda q, k: ops.single_decode(q, k, k, return_lse=True), shape((64, 128), q.dtype), k)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((64, 128), jnp.bfloat16, (64,), jnp.float32)


@every_case
def test_the_jaxpr_is_one_readable_equation(case: Case) -> None:
    jaxpr = jax.make_jaxpr(case.call)(operands_of(case, case.make()))
    (equation,) = jaxpr.jaxpr.eqns
    while "call_jaxpr" in equation.params:  # what is differentiable, around the equation
        (equation,) = equation.params["call_jaxpr"].jaxpr.eqns
    assert equation.primitive.name == f"heed_{case.stem}"
    assert not jaxpr.effects


def test_static_options_are_part_of_every_cache_key() -> None:
    rope = CASES["apply_rope"].make()
    decode = CASES["single_decode"].make()
    x = CASES["silu_and_mul"].make()["x"]
    weight = np.ones(x.shape[-1], np.float32)
    variants: list[list[Any]] = [
        [lambda f=f: f(jnp.asarray(x)) for f in (ops.silu_and_mul, ops.gelu_and_mul, ops.gelu_tanh_and_mul)],
        [lambda eps=eps: ops.rms_norm(jnp.asarray(x), weight, eps) for eps in (1e-6, 0.1)],
        [
            lambda options=options: ops.apply_rope(
                jnp.asarray(rope["q"]), rope["k"], rope["indptr"], rope["offsets"], **options
            )[0]
            for options in ({}, {"rotary_dim": 4}, {"interleave": True}, {"rope_scale": 3.0}, {"rope_theta": 7.0})
        ],
        [
            lambda options=options: ops.single_decode(jnp.asarray(decode["q"]), decode["k"], decode["v"], **options)
            for options in ({}, {"window_left": 2}, {"logits_soft_cap": 0.5}, {"sm_scale": 2.0}, {"rope_scale": 1.0})
        ],
    ]
    for calls in variants:
        results = [np.asarray(call()) for call in (*calls, *calls)]
        for i, j in itertools.combinations(range(len(calls)), 2):
            assert not np.array_equal(results[i], results[j]), (i, j)
        for i in range(len(calls)):
            np.testing.assert_array_equal(results[i], results[i + len(calls)])


# Dtypes and JAX's modes.


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("name", ["apply_rope", "apply_rope_with_cos_sin_cache"])
def test_positions_of_any_integer_dtype(name: str, dtype: str) -> None:
    case = CASES[name]
    operands = operands_of(case, case.make())
    with jax.enable_x64(True):  # type: ignore[attr-defined]
        arrays = {key: jnp.asarray(x.astype(dtype) if key in case.integers else x) for key, x in operands.items()}
        assert all(arrays[key].dtype == dtype for key in case.integers)
        for call in (case.call, jax.jit(case.call)):
            check(call(arrays), case, operands, dtype)


def test_traced_positions_out_of_range_are_clamped() -> None:
    """Nothing is read or written out of bounds, and what is inside is right."""
    case = CASES["apply_rope_with_cos_sin_cache"]
    operands = operands_of(case, case.make())
    wild = np.array([-5, 3, 10**6, 0, 15, 16, -(2**31)], np.int32)
    clamped = {**operands, "pos_ids": np.clip(wild, 0, SIZES["positions"] - 1)}
    check(jax.jit(case.call)({**operands, "pos_ids": wild}), case, clamped, "pos_ids")

    case = CASES["apply_rope"]
    operands = operands_of(case, case.make())
    last = {**operands, "indptr": np.array([0, 2, 2, 7], np.int32)}
    beyond = {**operands, "indptr": np.array([-3, 2, 2, 2**30], np.int32)}
    for got in jax.jit(case.call)(beyond):
        assert got.shape[0] == 7 and np.isfinite(got).all()
    for got, want in zip(jax.jit(case.call)(beyond), case.numpy_results(last), strict=True):
        np.testing.assert_array_equal(np.asarray(got)[2:], want[2:])  # the last sequence begins inside


@pytest.mark.parametrize("setting", ["rank_promotion", "dtype_promotion", "x64"])
@every_case
def test_works_under_strict_jax_settings(case: Case, setting: str) -> None:
    contexts: dict[str, Any] = {
        "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
        "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
        "x64": lambda: jax.enable_x64(True),  # type: ignore[attr-defined]
    }
    first = next(iter(case.operands))
    operands = operands_of(case, case.make(lead={first: (2,)}, dtype="bfloat16"))
    with contexts[setting]():
        results = jax.jit(jax.vmap(case.call, in_axes=(axes_of((first,), case.operands),)))(operands)
    for i in range(2):
        check([x[i] for x in results], case, rows_of(operands, (first,), i), f"{setting}, row {i}")


@every_case
def test_float64_is_refused_rather_than_rounded(case: Case) -> None:
    operands = operands_of(case, case.make())
    for name in case.differentiable:
        with pytest.raises(TypeError, match=rf"{name}: got .*float64"):
            case.call({**jax.tree.map(jnp.asarray, operands), name: operands[name].astype(np.float64)})


def test_a_traced_static_is_refused_by_name() -> None:
    made = CASES["apply_rope"].make()
    with pytest.raises(TypeError, match=r"rope_theta: got a JAX value .*static_argnames=\('rope_theta',\)"):
        jax.jit(lambda theta: ops.apply_rope(made["q"], made["k"], made["indptr"], made["offsets"], rope_theta=theta))(
            1e4
        )


# Platforms.


@every_case
def test_a_platform_without_kernels_is_refused_while_lowering(case: Case) -> None:
    traced = jax.jit(case.call).trace(operands_of(case, case.make()))
    traced.lower(lowering_platforms=("cpu",))
    with pytest.raises(heed.UnsupportedError, match=r"ops\.\w+: heed has no kernels for the platform tpu"):
        traced.lower(lowering_platforms=("cpu", "tpu"))


@every_case
def test_a_program_may_be_lowered_for_gpus_that_are_not_here(case: Case) -> None:
    """Kernels are chosen here; the process that runs the program compiles and loads them."""
    traced = jax.jit(case.call).trace(operands_of(case, case.make()))
    for platforms in (("cuda",), ("cpu", "cuda")):
        assert f"@{case.target}" in traced.lower(lowering_platforms=platforms).as_text()


@every_case
def test_a_forced_backend_that_cannot_run_here_is_refused_while_lowering(case: Case) -> None:
    operands = jax.tree.map(jnp.asarray, operands_of(case, case.make()))
    options = {**case.options, "backend": "sm80"}
    for call in (case.function, jax.jit(case.function, static_argnames=tuple(options))):
        with pytest.raises(heed.UnsupportedError) as caught:
            call(**operands, **options)
        assert caught.value.reasons


# All three kernels of a layer in one program.


def test_ops_compose_in_one_program() -> None:
    rng = np.random.default_rng(0)
    heads, kv_heads, dim, length = 4, 2, 8, 5
    x = rng.standard_normal((length, heads * dim)).astype(np.float32)
    w = [rng.standard_normal((heads * dim, n)).astype(np.float32) / 6 for n in (heads * dim, kv_heads * dim, 12)]
    weight = np.ones(heads * dim, np.float32)
    indptr, offsets = np.array([0, length], np.int32), np.array([0], np.int32)

    def layer(x: Any) -> Any:
        """Every op's result, with what it was made from."""
        normed = ops.rms_norm(x, weight)
        q, k = (normed @ w[0]).reshape(length, heads, dim), (normed @ w[1]).reshape(length, kv_heads, dim)
        rotated = ops.apply_rope(q, k, indptr, offsets)
        out = ops.single_decode(rotated[0][-1], rotated[1], k)
        added = ops.fused_add_rms_norm(x[-1], out.reshape(-1), weight)
        gates = added[0] @ w[2]
        return normed, q, k, rotated, out, added, gates, ops.silu_and_mul(gates)

    lowered = jax.jit(layer).lower(x)
    assert {case.target for case in CASES.values()} <= set(re.findall(r"heed\.\w+\.v1", lowered.as_text()))
    normed, q, k, rotated, out, added, gates, result = jax.tree.map(np.asarray, lowered.compile()(x))
    want = [
        ops.rms_norm(x, weight),
        *ops.apply_rope(q, k, indptr, offsets),
        ops.single_decode(rotated[0][-1], rotated[1], k),
        *ops.fused_add_rms_norm(x[-1], out.reshape(-1), weight),
        ops.silu_and_mul(gates),
    ]
    for a, b in zip((normed, *rotated, out, *added, result), want, strict=True):
        np.testing.assert_array_equal(a, b)
