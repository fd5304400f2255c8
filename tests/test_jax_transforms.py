"""flash_mha under JAX's transformations: vmap, scan, checkpoint, abstract evaluation. Gradients: test_jax_grad.py."""

from __future__ import annotations

import importlib
import itertools
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heed
from expected import expected
from heed import _versions
from jax_cases import OPERANDS, OPTIONS, attend, check, make_operands


def rows_of(operands: dict[str, np.ndarray], mapped: frozenset[str], index: int) -> dict[str, np.ndarray]:
    return {name: x[index] if name in mapped else x for name, x in operands.items()}


# vmap.


@pytest.mark.parametrize("first", ["q", "k", "v", "q+k", "k+v", "q+v", "q+k+v", ""])
def test_vmap_over_any_subset_of_operands(first: str) -> None:
    """Every mapped row is compared with the call on that row alone: all 127 subsets, 16 per test."""
    size = 3
    for others in itertools.product((False, True), repeat=4):
        chosen = itertools.compress(OPERANDS[3:], others)
        mapped = frozenset(filter(None, [*first.split("+"), *chosen]))
        if not mapped:
            continue
        operands = make_operands(lead=dict.fromkeys(mapped, (size,)))
        out, lse = jax.vmap(attend, in_axes=({name: 0 if name in mapped else None for name in operands},))(operands)
        for i in range(size):
            check(out[i], lse[i], rows_of(operands, mapped, i), f"row {i} with {sorted(mapped)} mapped")


@pytest.mark.parametrize("q_axis, k_axis, out_axis", [(1, 2, 3), (-1, -2, -1), (4, 0, 2), (2, None, 1)])
def test_vmap_axes_may_be_anywhere(q_axis: int, k_axis: int | None, out_axis: int) -> None:
    size = 3
    operands = make_operands(lead={"q": (size,), "v": (size,)} | ({} if k_axis is None else {"k": (size,)}))
    q, k, v = (jnp.asarray(operands[name]) for name in "qkv")
    q_moved = jnp.moveaxis(q, 0, q_axis)
    k_moved = k if k_axis is None else jnp.moveaxis(k, 0, k_axis)

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return heed.flash_mha(q, k, v, **OPTIONS)

    out = jax.vmap(call, in_axes=(q_axis, k_axis, 0), out_axes=out_axis)(q_moved, k_moved, v)
    out = np.moveaxis(np.asarray(out), out_axis, 0)
    for i in range(size):
        row = {"q": operands["q"][i], "k": operands["k"] if k_axis is None else operands["k"][i], "v": operands["v"][i]}
        check(out[i], None, row, f"row {i}")


def test_vmap_of_28_query_heads_on_4_kv_heads() -> None:
    """The shape on which packing a mapped axis in the wrong order was first noticed elsewhere."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, 1, 64, 28, 64)).astype(np.float32)
    k, v = (rng.standard_normal((3, 1, 64, 4, 64)).astype(np.float32) for _ in range(2))
    out, lse = jax.vmap(lambda q, k, v: heed.flash_mha(q, k, v, is_causal=True, return_lse=True))(q, k, v)
    for i in range(3):
        expected(q[i], k[i], v[i], is_causal=True).check(out[i], lse[i], f"row {i}")


def test_nested_vmaps_that_map_different_operands() -> None:
    sizes = (2, 3, 2)
    lead = {"q": (2, 3), "k": (3, 2), "v": (2,), "alibi_slopes": (2, 2), "q_segment_ids": (2,)}
    in_axes = (  # outermost first; an operand's axes are taken in this order
        {"q": 0, "alibi_slopes": 0, "q_segment_ids": 0},
        {"q": 0, "k": 0},
        {"k": 0, "v": 0, "alibi_slopes": 0},
    )
    operands = make_operands(lead=lead)
    call: Any = attend
    for level in reversed(in_axes):
        call = jax.vmap(call, in_axes=({name: level.get(name) for name in OPERANDS},))
    out, lse = jax.jit(call)(operands)
    assert out.shape[:3] == lse.shape[:3] == sizes
    for index in np.ndindex(*sizes):
        row = operands
        for level, i in zip(in_axes, index, strict=True):
            row = rows_of(row, frozenset(level), i)
        check(out[index], lse[index], row, f"row {index}")


def test_up_to_eight_vmaps_nest() -> None:
    operands = {name: x for name, x in make_operands(batch=1).items() if name in ("q", "k", "v")}

    def nested(depth: int) -> Any:
        call: Any = lambda q: heed.flash_mha(q, operands["k"], operands["v"], **OPTIONS)  # noqa: E731
        for _ in range(depth):
            call = jax.vmap(call)
        return call(jnp.stack([operands["q"], -operands["q"]]).reshape((2,) + (1,) * (depth - 1) + operands["q"].shape))

    out = nested(8)
    for i, sign in enumerate((1, -1)):
        check(out[(i,) + (0,) * 7], None, operands | {"q": sign * operands["q"]}, f"row {i}")
    with pytest.raises(ValueError, match="rank"):
        nested(9)


def test_vmap_copies_nothing() -> None:
    """An operand that is not mapped reaches the kernel once, with a leading axis of size 1."""
    operands = make_operands(lead={"q": (5,)})
    text = jax.jit(jax.vmap(attend, in_axes=({name: 0 if name == "q" else None for name in operands},)))
    lowered = text.lower(operands).as_text()
    assert "q=float32[5,2,9,4,8];k=float32[1,2,11,2,8];v=float32[1,2,11,2,12];sinks=float32[1,4]" in lowered
    (line,) = (line for line in lowered.splitlines() if "custom_call @heed.attention_fwd" in line)
    assert "tensor<1x2x11x2x8xf32>" in line and "tensor<5x2x11x2x8xf32>" not in lowered


def test_vmap_with_an_axis_name_and_of_size_one() -> None:
    operands = make_operands(lead=dict.fromkeys(OPERANDS, (1,)))
    out, lse = jax.vmap(lambda x: jax.tree.map(lambda y: jax.lax.psum(y, "rows"), attend(x)), axis_name="rows")(
        operands
    )
    check(out[0], lse[0], rows_of(operands, frozenset(OPERANDS), 0), "the only row")


# Control flow.


def test_scan_and_map() -> None:
    size = 4
    operands = make_operands(lead=dict.fromkeys(("q", "k", "v"), (size,)))
    mapped = {name: jnp.asarray(operands[name]) for name in ("q", "k", "v")}
    fixed = {name: x for name, x in operands.items() if name not in mapped}

    def step(carry: jax.Array, row: dict[str, jax.Array]) -> Any:
        out, lse = attend(fixed | row)
        return carry + 1, (out, lse)

    results = {
        "scan": jax.jit(lambda rows: jax.lax.scan(step, jnp.int32(0), rows)[1])(mapped),
        "map": jax.lax.map(lambda row: attend(fixed | row), mapped),
        "map in batches": jax.lax.map(lambda row: attend(fixed | row), mapped, batch_size=2),
        "vmap of scan": jax.vmap(lambda row: jax.lax.scan(step, jnp.int32(0), jax.tree.map(lambda x: x[None], row))[1])(
            mapped
        ),
    }
    for name, (out, lse) in results.items():
        for i in range(size):
            row = rows_of(operands, frozenset(mapped), i)
            out_i, lse_i = (x[i, 0] if name == "vmap of scan" else x[i] for x in (out, lse))
            check(out_i, lse_i, row, f"{name}, row {i}")


def test_cond_while_and_checkpoint() -> None:
    operands = make_operands()
    out, lse = jax.jit(lambda p, x: jax.lax.cond(p, attend, lambda x: attend({**x, "q": -x["q"]}), x))(True, operands)
    check(out, lse, operands, "cond")
    out, lse = jax.jit(jax.checkpoint(attend))(operands)
    check(out, lse, operands, "checkpoint")

    def again(q: Any) -> Any:
        return attend({**operands, "q": q})[0][..., : q.shape[-1]]

    looped = jax.jit(lambda q: jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, again(s[1])), (0, q))[1])
    np.testing.assert_array_equal(looped(operands["q"]), again(again(operands["q"])))


# Abstract evaluation.


def test_abstract_evaluation_runs_nothing() -> None:
    """Shapes far beyond memory have their types in no time."""
    shape = jax.ShapeDtypeStruct
    operands = {
        "q": shape((4096, 65536, 64, 128), jnp.bfloat16),
        "k": shape((4096, 131072, 8, 128), jnp.bfloat16),
        "v": shape((4096, 131072, 8, 256), jnp.bfloat16),
        "sinks": shape((64,), jnp.float32),
    }
    out, lse = jax.eval_shape(attend, operands)
    assert (out.shape, out.dtype) == ((4096, 65536, 64, 256), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((4096, 64, 65536), jnp.float32)
    mapped = jax.tree.map(lambda x: shape((7, *x.shape), x.dtype), operands)
    assert [x.shape for x in jax.eval_shape(jax.vmap(attend), mapped)] == [(7, *out.shape), (7, *lse.shape)]


def test_the_jaxpr_is_one_readable_equation() -> None:
    operands = make_operands()
    jaxpr = jax.make_jaxpr(attend)(operands)
    (rule,) = jaxpr.jaxpr.eqns  # what is differentiable, around the equation
    (equation,) = rule.params["call_jaxpr"].jaxpr.eqns
    assert equation.primitive.name == "heed_attention_fwd"
    text = str(jaxpr)
    assert "heed_attention_fwd[" in text and "is_causal=True" in text and "sinks" in text
    assert not jaxpr.effects


def test_the_same_inputs_give_the_same_bits_under_every_call_style() -> None:
    operands = make_operands()
    eager = attend(operands)
    arrays = jax.tree.map(jnp.asarray, operands)
    styles = {
        "eager on JAX arrays": attend(arrays),
        "jit": jax.jit(attend)(operands),
        "compiled ahead": jax.jit(attend).lower(arrays).compile()(arrays),
        "one operand in NumPy": attend({**arrays, "k": operands["k"]}),
        "no jit": None,
    }
    with jax.disable_jit():
        styles["no jit"] = attend(arrays)
    for name, results in styles.items():
        assert results is not None and all(isinstance(x, jax.Array) for x in results), name
        for got, want in zip(results, eager, strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=name)


def test_static_options_are_part_of_every_cache_key() -> None:
    q, k, v = (jnp.asarray(make_operands()[name]) for name in "qkv")
    jitted = jax.jit(heed.flash_mha, static_argnames=("is_causal", "softcap", "causal_align"))
    variants: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_align": "top_left"},
        {"softcap": 0.5},
        {"is_causal": True, "softcap": 0.5},
    ]
    for call in (heed.flash_mha, jitted):
        results = [np.asarray(call(q, k, v, **options)) for options in (*variants, *variants)]
        for i, j in itertools.combinations(range(len(variants)), 2):
            assert not np.array_equal(results[i], results[j]), (variants[i], variants[j])
        for i in range(len(variants)):
            np.testing.assert_array_equal(results[i], results[i + len(variants)])


def test_a_donated_operand_does_not_disturb_the_result() -> None:
    operands = make_operands()
    q, k, v = (operands["q"], operands["k"], operands["v"][..., :8])
    want = np.asarray(heed.flash_mha(jnp.asarray(q), k, v, **OPTIONS))
    donating = jax.jit(lambda q, k, v: heed.flash_mha(q, k, v, **OPTIONS), donate_argnums=0)
    np.testing.assert_array_equal(np.asarray(donating(jnp.array(q), k, v)), want)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64"])
def test_segment_ids_of_any_integer_dtype(dtype: str) -> None:
    operands = make_operands()
    ids = {name: operands[name].astype(dtype) for name in OPERANDS[5:]}
    with jax.enable_x64(True):  # type: ignore[attr-defined]
        arrays = jax.tree.map(jnp.asarray, {**operands, **ids})
        assert arrays["q_segment_ids"].dtype == dtype
        for call in (attend, jax.jit(attend), lambda x: attend({**x, **ids})):
            out, lse = call(arrays)
            check(out, lse, operands, dtype)


def test_a_float64_numpy_operand_is_refused_rather_than_rounded() -> None:
    operands = make_operands()
    with pytest.raises(TypeError, match=r"v: .*float64"):
        attend({**jax.tree.map(jnp.asarray, operands), "v": operands["v"].astype(np.float64)})


# Around gradients.


def test_gradients_around_the_call_need_none_of_its_own() -> None:
    operands = make_operands()
    out = jax.lax.stop_gradient(attend(operands)[0])
    assert jax.grad(lambda s: (s * out).sum())(2.0) == pytest.approx(float(out.sum()))

    def loss(q: jax.Array, w: jax.Array) -> Any:
        return (attend({**operands, "q": jax.lax.stop_gradient(q)})[0] * w).sum()

    w = jnp.ones_like(out)
    call = jax.jit(jax.grad(loss, argnums=1))
    assert "attention_bwd" not in call.lower(jnp.asarray(operands["q"]), w).as_text()
    np.testing.assert_array_equal(call(jnp.asarray(operands["q"]), w), out)


# Platforms.


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_a_platform_without_kernels_is_refused_while_lowering(platform: str) -> None:
    traced = jax.jit(attend).trace(make_operands())
    traced.lower(lowering_platforms=("cpu",))
    for platforms in ((platform,), ("cpu", platform)):
        with pytest.raises(heed.UnsupportedError, match=platform) as caught:
            traced.lower(lowering_platforms=platforms)
        assert caught.value.reasons


def test_a_program_may_be_lowered_for_gpus_that_are_not_here() -> None:
    """Kernels are chosen here; the process that runs the program compiles and loads them."""
    traced = jax.jit(attend).trace(make_operands())
    for platforms in (("cuda",), ("cpu", "cuda")):
        assert "@heed.attention_fwd.v1" in traced.lower(lowering_platforms=platforms).as_text()


def test_a_forced_backend_that_cannot_run_here_is_refused_while_lowering() -> None:
    operands = make_operands()
    q, k, v = (jnp.asarray(operands[name]) for name in "qkv")
    for call in (
        heed.flash_mha,
        jax.jit(lambda *x, backend: heed.flash_mha(*x, backend=backend), static_argnames="backend"),
    ):
        with pytest.raises(heed.UnsupportedError) as caught:
            call(q, k, v, backend="sm90")
        assert caught.value.reasons


# The module.


def test_registration_survives_a_reload() -> None:
    operands = make_operands()
    names = sorted(name for name in sys.modules if name == "heed._jax_attention" or name.startswith("heed._jax."))
    saved = {name: sys.modules[name] for name in names}
    try:
        for _ in range(2):
            for name in names:
                importlib.reload(sys.modules[name])
            out, lse = jax.jit(lambda x: attend(x))(operands)
            check(out, lse, operands, "after a reload")
    finally:
        sys.modules.update(saved)


def test_calls_from_many_threads() -> None:
    operands = make_operands(batch=3, q_len=40, kv_len=40)
    want = [np.asarray(x) for x in attend(operands)]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(20):
                call = attend if index % 2 else jax.jit(attend)
                for got, expected_result in zip(call(operands), want, strict=True):
                    np.testing.assert_array_equal(np.asarray(got), expected_result)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("package", ["jax", "jaxlib", "jax-tvm-ffi"])
def test_an_old_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    from importlib import metadata

    real = metadata.version
    old = {"jax": "0.9.2", "jaxlib": "0.4.38", "jax-tvm-ffi": "0.1.2rc1"}[package]
    monkeypatch.setattr(metadata, "version", lambda name: old if name == package else real(name))
    with pytest.raises(ImportError, match=rf"heed: {package} is {old}, expected 0\.\d+(\.\d+)? or newer.*pip install"):
        _versions.check_versions()


def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    for version in ("0.10", "0.10.0", "0.10.2.dev20260101+cpu", "0.12.0.1", "1.0"):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        monkeypatch.setattr(_versions, "MINIMUM_VERSIONS", {"jax": (0, 10)})
        _versions.check_versions()

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    _versions.check_versions()  # NumPy users need no JAX
    with pytest.raises(ImportError, match="jax is not installed"):
        _versions.check_versions(required=True)


def test_a_backend_that_serves_nowhere_is_refused_while_tracing() -> None:
    x = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
    for trace in (jax.eval_shape, lambda f, *args: jax.make_jaxpr(f)(*args)):
        with pytest.raises(heed.UnsupportedError, match="sm90_attention_fwd") as raised:
            trace(lambda q: heed.flash_mha(q, q, q, backend="sm90"), x)
        assert set(raised.value.reasons) == {"sm90_attention_fwd", "sm80_attention_fwd", "cpu_attention_fwd"}


def test_segment_ids_beyond_int32_stay_apart() -> None:
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (1, 4, 1, 8), jnp.float32)
        wide = jnp.array([[0, 0, 2**32, 2**32]], jnp.int64)
        got = heed.flash_mha(x, x, x, segment_ids=wide)
        want = heed.flash_mha(x, x, x, segment_ids=jnp.array([[0, 0, 1, 1]], jnp.int32))
    assert (got == want).all()


def test_structured_numpy_operand_is_named() -> None:
    x = jnp.ones((1, 4, 1, 8), jnp.float32)
    with pytest.raises(TypeError, match="k: got dtype"):
        heed.flash_mha(x, np.zeros((1, 4, 1, 8), [("a", "<f4")]), x)
