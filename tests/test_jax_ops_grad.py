"""Gradients of heed.ops under JAX's transformations: jit, vmap, jacobian, scan, checkpoint; what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heed
from jax_grad_cases import same_bits, sums_in_any_order
from jax_op_cases import CASES, Case, axes_of, check_gradients, rows_of

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ROPES = [name for name, case in CASES.items() if case.stem == "rope"]
FIRST_ORDER = [name for name in CASES if name not in ROPES]


# The gradients themselves. Every feature and size is in test_ops_grad.py.


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gradients_of_every_operand(case: Case, dtype: str) -> None:
    operands = case.make(dtype=dtype)
    found = jax.jit(case.gradients)(operands)
    check_gradients(found, case, operands, "jit")
    for name, x in found.items():
        assert (x.dtype, x.shape) == (operands[name].dtype, operands[name].shape), name
    same_bits(case.gradients(operands), found, "eager")
    arrays = jax.tree.map(jnp.asarray, operands)
    with jax.disable_jit():
        same_bits(case.gradients(arrays), found, "no jit")
    for name in case.differentiable:
        rest = {key: operands[key] for key in case.operands}
        _, pull = jax.vjp(lambda x, name=name, rest=rest: case.call({**rest, name: x}), arrays[name])
        (alone,) = pull(tuple(arrays[key] for key in case.cotangents))
        same_bits(alone, found[name], f"{name} alone")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.results) == 2])
def test_either_result_may_go_unused(name: str) -> None:
    case = CASES[name]
    operands = case.make()
    for i, unused in enumerate(case.cotangents):
        spoilt = {**operands, unused: np.zeros_like(operands[unused])}

        def loss(x: Any, i: int = i) -> Any:
            used = case.call({**operands, **x})[1 - i]
            return jnp.vdot(used, operands[case.cotangents[1 - i]])

        found = jax.jit(jax.grad(loss))({key: operands[key] for key in case.differentiable})
        check_gradients(found, case, spoilt, f"without {unused}")


# vmap.


def subsets_of(case: Case) -> list[frozenset[str]]:
    """All subsets of the operands and cotangents, where those of one kind go together."""
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in case.operands}
    if "sinks" in groups:
        groups |= {"sinks": ("sinks", "alibi_slopes")}
        del groups["alibi_slopes"]
    groups["cotangents"] = case.cotangents
    chosen = itertools.product((False, True), repeat=len(groups))
    return [frozenset(itertools.chain(*itertools.compress(groups.values(), which))) for which in chosen][1:]


@every_case
def test_vmap_of_the_gradient_over_any_subset_of_operands(case: Case) -> None:
    """Every mapped row is compared with the gradient on that row alone, on NumPy arrays."""
    size = 3
    names = (*case.operands, *case.cotangents)
    for mapped in subsets_of(case):
        operands = case.make(lead=dict.fromkeys(mapped, (size,)))
        found = jax.jit(jax.vmap(case.gradients, in_axes=(axes_of(mapped, names),)))(operands)
        for i in range(size):
            row = {name: x[i] for name, x in found.items()}
            check_gradients(row, case, rows_of(operands, mapped, i), f"row {i} with {sorted(mapped)} mapped")


@every_case
def test_the_gradient_of_a_vmap_sums_over_rows(case: Case) -> None:
    """What is mapped has a gradient for each row, what is shared has their sum, in some order."""
    size = 3
    for mapped in subsets_of(case):
        if not mapped.isdisjoint(case.cotangents):
            continue  # they are mapped wherever anything is
        lead = dict.fromkeys((*mapped, *case.cotangents), (size,))
        operands = case.make(lead=lead)

        def gradients(operands: Any, lead: Any = lead) -> Any:
            chosen = {name: operands[name] for name in case.differentiable}
            rest = {name: operands[name] for name in case.operands if name not in chosen}
            call = jax.vmap(case.call, in_axes=(axes_of(lead, case.operands),))
            _, pull = jax.vjp(lambda x: call({**rest, **x}), chosen)
            return pull(tuple(operands[name] for name in case.cotangents))[0]

        found = jax.jit(gradients)(operands)
        rows = [case.numpy_gradients(rows_of(operands, lead, i)) for i in range(size)]
        for name in case.differentiable:
            got = np.asarray(found[name])
            if name in lead:
                np.testing.assert_array_equal(got, np.stack([row[name] for row in rows]), err_msg=name)
            else:
                fits = np.any([total == got for total in sums_in_any_order([row[name] for row in rows])], axis=0)
                assert fits.all(), f"{name} with {sorted(lead)} mapped: {int((~fits).sum())} elements are no sum"


@every_case
def test_nested_vmaps_that_map_different_operands(case: Case) -> None:
    sizes = (2, 3)
    names = (*case.operands, *case.cotangents)
    levels = [frozenset(names[::2]), frozenset(names[1::2]) | {names[0]}]
    lead = {name: tuple(n for n, level in zip(sizes, levels, strict=True) if name in level) for name in names}
    operands = case.make(lead=lead)
    call: Any = case.gradients
    for level in reversed(levels):
        call = jax.vmap(call, in_axes=(axes_of(level, names),))
    found = jax.jit(call)(operands)
    for i, j in np.ndindex(*sizes):
        row = rows_of(rows_of(operands, levels[0], i), levels[1], j)
        check_gradients({name: x[i, j] for name, x in found.items()}, case, row, f"row {i}, {j}")


JACOBIANS = {
    "silu_and_mul": "x=float32[1,2,3,4];dout=float32[12,2,3,2]",
    "apply_rope": "q=float32[24,3,2,4];k=float32[1,3,2,4];indptr=int32[1,3]",
    "rms_norm": "x=float32[1,2,3,2];weight=float32[1,2];dout=float32[12,2,3,2]",
    "single_decode": "q=float32[1,1,1,2,4];k=float32[1,1,5,2,4];v=float32[1,1,5,2,4]",
}


@pytest.mark.parametrize("name", JACOBIANS)
def test_jacobian(name: str) -> None:
    """Only the gradient of the result is mapped: one call with one leading axis, everything else of size 1 there."""
    case, problem = CASES[name], JACOBIANS[name]
    small = {"rows": 2, "tokens": 3, "hidden": 2, "q_heads": 2, "head_dim": 4, "head_dim_v": 4, "kv_tokens": 5}
    operands = case.make(**small, sequences=2)
    if "rotary_dim" in case.options:
        case = Case(case.function, case.stem, case.operands, case.results, {"rotary_dim": 2}, case.integers)
    rest = {key: operands[key] for key in case.operands if key not in case.differentiable}

    def call(x: Any) -> Any:
        return case.call({**rest, **x})[0]

    chosen = {key: operands[key] for key in case.differentiable}
    jacobian: Any = jax.jit(jax.jacrev(call))
    assert problem in jacobian.lower(chosen).as_text()
    found = jacobian(chosen)
    shape = np.asarray(call(chosen)).shape
    zeros = {key: np.zeros_like(operands[key]) for key in case.cotangents}
    for index in np.ndindex(*shape):
        one = zeros[case.cotangents[0]].copy()
        one[index] = 1
        row = {key: np.asarray(x)[index] for key, x in found.items()}
        check_gradients(row, case, {**operands, **zeros, case.cotangents[0]: one}, f"row {index}")


# Control flow and rematerialisation.


@every_case
def test_scan_and_map(case: Case) -> None:
    size = 3
    operands = case.make(lead=dict.fromkeys((*case.operands, *case.cotangents), (size,)))
    found = jax.jit(lambda rows: jax.lax.map(case.gradients, rows))(operands)
    for i in range(size):
        row = rows_of(operands, operands, i)
        check_gradients({name: x[i] for name, x in found.items()}, case, row, f"map, row {i}")

    def through_scan(operands: Any) -> Any:
        chosen = {name: operands[name] for name in case.differentiable}
        rest = {name: operands[name] for name in case.operands if name not in chosen}
        scan = lambda x: jax.lax.scan(lambda c, row: (c, case.call(row)), 0, {**rest, **x})[1]  # noqa: E731
        return jax.vjp(scan, chosen)[1](tuple(operands[name] for name in case.cotangents))[0]

    same_bits(jax.jit(through_scan)(operands), found, "scan")


@every_case
def test_checkpoint(case: Case) -> None:
    operands = case.make()
    rest = {name: operands[name] for name in case.operands}

    def loss(x: Any) -> Any:
        results = case.call({**rest, **x})
        return sum(jnp.vdot(jnp.cos(y), operands[name]) for name, y in zip(case.cotangents, results, strict=True))

    chosen = {name: operands[name] for name in case.differentiable}
    want = jax.jit(jax.grad(loss))(chosen)
    for policy in (None, jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable):
        same_bits(jax.jit(jax.grad(jax.checkpoint(loss, policy=policy)))(chosen), want, str(policy))


def test_checkpoint_keeps_what_decode_names() -> None:
    case = CASES["single_decode"]
    operands = case.make()
    chosen = {name: operands[name] for name in case.differentiable}
    names = jax.checkpoint_policies.save_only_these_names("heed_attention_out", "heed_attention_lse")
    for policy, num_calls in ((names, 1), (None, 2)):
        call = jax.checkpoint(lambda x: jnp.sum(case.call({**x, "q": jnp.sin(x["q"])})[0] ** 2), policy=policy)
        text = jax.jit(jax.value_and_grad(call)).lower(chosen).as_text()
        assert text.count(f"custom_call @{case.target}(") == num_calls


def test_what_is_kept_between_the_passes() -> None:
    """Rotations keep positions, norms what was normalised, activations their operand: no more."""
    kept = {
        "silu_and_mul": {"x"},
        "apply_rope": {"indptr", "offsets"},
        "rms_norm": {"x", "weight"},
        "fused_add_rms_norm": {"sum", "weight"},
    }
    for name, names in kept.items():
        case = CASES[name]
        operands = jax.tree.map(jnp.asarray, case.make(sequences=5, tokens=11))
        rest = {key: operands[key] for key in case.operands if key not in case.differentiable}
        chosen = {key: operands[key] for key in case.differentiable}
        _, pull = jax.vjp(lambda x, rest=rest, case=case: case.call({**rest, **x}), chosen)
        by_name = {**operands, **dict(zip(case.results, case.call(operands), strict=True))}
        shapes = sorted(x.shape for x in jax.tree.leaves(pull) if hasattr(x, "shape") and x.ndim > 0)
        assert shapes == sorted(by_name[key].shape for key in names), name


# Types.


@pytest.mark.parametrize("name", ROPES)
def test_integer_operands_have_float0_gradients(name: str) -> None:
    case = CASES[name]
    operands = case.make()
    chosen = {key: operands[key] for key in case.operands if key != "cos_sin_cache"}
    _, pull = jax.vjp(lambda x: case.call({**operands, **x}), chosen)
    (found,) = pull(tuple(operands[key] for key in case.cotangents))
    for key in case.integers:
        assert found[key].dtype == jax.dtypes.float0 and found[key].shape == operands[key].shape


@pytest.mark.parametrize("setting", ["rank_promotion", "dtype_promotion", "x64"])
@every_case
def test_works_under_strict_jax_settings(case: Case, setting: str) -> None:
    contexts: dict[str, Any] = {
        "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
        "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
        "x64": lambda: jax.enable_x64(True),  # type: ignore[attr-defined]
    }
    names = (*case.operands, *case.cotangents)
    mapped = (names[0], *case.cotangents)
    operands = case.make(lead=dict.fromkeys(mapped, (2,)), dtype="bfloat16")
    with contexts[setting]():
        found = jax.jit(jax.vmap(case.gradients, in_axes=(axes_of(mapped, names),)))(operands)
    for i in range(2):
        row = {name: x[i] for name, x in found.items()}
        check_gradients(row, case, rows_of(operands, mapped, i), f"{setting}, row {i}")


# Rotations are linear.


@pytest.mark.parametrize("name", ROPES)
def test_rotations_have_derivatives_of_every_order_and_mode(name: str) -> None:
    case = CASES[name]
    operands = jax.tree.map(jnp.asarray, case.make())
    rest = {key: operands[key] for key in case.operands if key not in "qk"}

    def call(q: Any, k: Any) -> Any:
        return case.call({**rest, "q": q, "k": k})

    q, k = operands["q"], operands["k"]
    dq, dk = operands["dq_rope"], operands["dk_rope"]
    same_bits(jax.jvp(call, (q, k), (dq, dk)), (call(q, k), call(dq, dk)), "jvp")
    same_bits(jax.jit(lambda q: jax.jvp(lambda q: call(q, k)[0], (q,), (dq,))[1])(q), call(dq, k)[0], "jvp of q")
    _, linear = jax.linearize(call, q, k)
    same_bits(linear(dq, dk), call(dq, dk), "linearize")
    transposed = jax.linear_transpose(call, q, k)((dq, dk))
    same_bits(transposed, jax.vjp(call, q, k)[1]((dq, dk)), "linear_transpose")

    def slope(q: Any) -> Any:
        """The gradient of sum(rope(q)^2) / 2, which is q rotated forth and back."""
        return jax.grad(lambda q: jnp.sum(call(q, k)[0] ** 2) / 2)(q)

    (twice,) = jax.vjp(slope, q)[1](dq)
    back = jax.vjp(call, q, k)[1]
    same_bits(twice, back((call(dq, k)[0], jnp.zeros_like(k)))[0], "a derivative of the gradient")
    mapped = jax.vmap(lambda d: jax.jvp(call, (q, k), (d, dk))[1])(jnp.stack([dq, -dq]))
    same_bits([x[1] for x in mapped], [call(-dq, dk)[0], call(dq, dk)[1]], "vmap of jvp")


def test_the_gradient_of_the_table_is_refused() -> None:
    case = CASES["apply_rope_with_cos_sin_cache"]
    operands = jax.tree.map(jnp.asarray, case.make())
    table = operands["cos_sin_cache"]

    def loss(table: Any) -> Any:
        return jnp.sum(case.call({**operands, "cos_sin_cache": table})[0])

    transforms: list[Any] = [
        lambda: jax.grad(loss)(table),
        lambda: jax.jit(jax.grad(loss))(table),
        lambda: jax.grad(jax.jit(loss))(table),
        lambda: jax.grad(jax.checkpoint(loss))(table),
        lambda: jax.vmap(jax.grad(loss))(table[None]),
        lambda: jax.jvp(loss, (table,), (table,)),
        lambda: jax.grad(lambda q, t: loss(t) + jnp.sum(q), argnums=1)(operands["q"], table),
    ]
    for transform in transforms:
        with pytest.raises(NotImplementedError, match=r"with respect to cos_sin_cache, expected .* q and k only"):
            transform()
    stopped = jax.grad(lambda table: loss(jax.lax.stop_gradient(table)) + jnp.sum(table))(table)
    np.testing.assert_array_equal(stopped, np.ones_like(table))


# What is not there.


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_second_derivatives_are_refused_with_the_reason(name: str) -> None:
    case = CASES[name]
    operands = jax.tree.map(jnp.asarray, case.make())
    first = case.differentiable[0]

    def loss(x: Any) -> Any:
        return jnp.sum(case.call({**operands, first: x})[0] ** 2)

    def slope(x: Any) -> Any:
        return jnp.sum(jax.grad(loss)(x) ** 2)

    x = operands[first]
    message = r"heed\.(ops\.)?\w+: got a derivative of its gradient, expected first derivatives only"
    for transform in (
        lambda: jax.grad(slope)(x),
        lambda: jax.jit(jax.grad(slope))(x),
        lambda: jax.grad(jax.checkpoint(slope))(x),
        lambda: jax.jvp(jax.grad(loss), (x,), (x,)),
    ):
        with pytest.raises(NotImplementedError, match=message):
            transform()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(loss, (x,), (x,))


@every_case
def test_gradients_may_be_lowered_for_gpus_that_are_not_here(case: Case) -> None:
    """One program for both platforms has a workspace that is large enough for either."""
    traced = jax.jit(case.gradients).trace(case.make())
    for platforms in (("cuda",), ("cpu", "cuda")):
        assert "custom_call @heed." in traced.lower(lowering_platforms=platforms).as_text()
    with pytest.raises(heed.UnsupportedError, match="heed has no kernels for the platform tpu"):
        traced.lower(lowering_platforms=("cpu", "tpu"))
