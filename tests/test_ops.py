"""heed.ops: every named call through every face and platform against the oracle, and what the functions promise."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import heed
from heed import ops, reference_ops
from small_op_faces import FACES, call_of, case_of, expected, face_of
from small_op_specs import BENCHMARKS, BY_NAME, CONFORMANCE, OpCase, OpSpec, RopeSpec
from tolerance import assert_agree, assert_close

apply_rope: Any = ops.apply_rope  # mypy would match unpacked options with every parameter
single_decode: Any = ops.single_decode


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("spec", CONFORMANCE, ids=lambda spec: spec.name)
def test_spec(spec: OpSpec, face: str) -> None:
    case, wants = case_of(spec)
    results = face_of(face)(case)
    assert len(results) == len(wants)
    for want, x in zip(wants, results, strict=True):
        want.check(x, spec.name)


def run(case: OpCase) -> list[np.ndarray]:
    return call_of(case)(case.arrays)


# Results do not depend on how the arrays lie in memory, or on when.


def strided(x: np.ndarray) -> np.ndarray:
    """The same numbers in memory with holes and turned axes."""
    wide = np.full((*(size + 2 for size in x.shape[::-1]), 2), 77, x.dtype)
    view = wide[(*(slice(1, size + 1) for size in x.shape[::-1]), 1)].transpose()
    view[...] = x
    return view


def reversed_rows(x: np.ndarray) -> np.ndarray:
    """The same numbers with a negative stride along the first axis."""
    return x[::-1].copy()[::-1]


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


SOME = ["silu_float32", "gelu_tanh_bfloat16", "silu_h59", "rope_gaps", "rope_interleaved_float16", "rope_cache_options",
        "norm_float32", "norm_add_h1021", "norm_add_bfloat16", "decode_float32", "decode_everything",
        "decode_everything_f32", "decode_d59"]  # fmt: skip


@pytest.mark.parametrize("change", [strided, reversed_rows, read_only])
@pytest.mark.parametrize("name", SOME)
def test_any_memory_layout(name: str, change: Any) -> None:
    case, wants = case_of(BY_NAME[name])
    arrays = {key: change(x) for key, x in case.arrays.items()}
    for want, x in zip(wants, run(OpCase(case.function, arrays, case.statics)), strict=True):
        want.check(x, f"{name} {change.__name__}")


@pytest.mark.parametrize("name", SOME)
def test_inputs_stay_as_they_are_and_results_repeat(name: str) -> None:
    case, _ = case_of(BY_NAME[name])
    before = {key: x.copy() for key, x in case.arrays.items()}
    first = run(case)
    for _ in range(5):
        for x, y in zip(first, run(case), strict=True):
            assert x.tobytes() == y.tobytes()
    assert all(x.tobytes() == case.arrays[key].tobytes() for key, x in before.items())


@pytest.mark.parametrize("name", ["rope_gaps", "rope_pos_ids_float32", "rope_cache_float32"])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.uint32, np.int16])
def test_integers_of_any_width(name: str, dtype: Any) -> None:
    case, _ = case_of(BY_NAME[name])
    small = {key: x % 40 if key in ("offsets", "pos_ids") else x for key, x in case.arrays.items()}
    cast = {key: x.astype(dtype) if x.dtype == np.int32 else x for key, x in small.items()}
    for x, y in zip(*(run(OpCase(case.function, arrays, case.statics)) for arrays in (small, cast)), strict=True):
        assert np.array_equal(x, y)


# Activations.


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_gate_of_a_16_bit_dtype(activation: str, dtype: Any) -> None:
    """All 2^16 numbers as gates, NaN and infinities among them, beside 1: within one rounding of the true value."""
    gates = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(256, 256)
    x = np.concatenate([gates, np.ones_like(gates)], axis=-1)
    (out,) = run(OpCase(f"{activation}_and_mul", {"x": x}, {}))
    oracle = reference_ops.act_and_mul(x, activation).reshape(-1)
    naive = reference_ops.naive_act_and_mul(x, activation).reshape(-1)
    order = np.argsort(np.nan_to_num(np.abs(oracle), nan=0.0, posinf=0.0), kind="stable")
    rows = order.reshape(-1, 16)  # results of like size in a row, which has a bound of its own
    assert_close(out.reshape(-1)[rows], naive[rows], oracle[rows], dtype, activation)


# Rotary embeddings.


@pytest.mark.parametrize("interleave", [False, True])
def test_what_is_not_rotated_is_copied_bit_for_bit(interleave: bool) -> None:
    spec = RopeSpec("copied", gaps=3, rotary_dim=16, head_dim=40, interleave=interleave)
    case, _ = case_of(spec)
    q, k = (case.arrays[name] for name in "qk")
    q[0, 0, 0] = k[1, 1, -1] = np.nan
    inside = reference_ops.rope_positions(spec.num_tokens, case.arrays["indptr"], case.arrays["offsets"])[1]
    for x, y in zip((q, k), run(case), strict=True):
        assert x[~inside].tobytes() == y[~inside].tobytes()
        assert x[..., 16:].tobytes() == y[..., 16:].tobytes()
        assert not np.array_equal(x[inside][..., :16], y[inside][..., :16])
    q[0, 0, 0] = k[1, 1, -1] = 0


def test_ways_to_give_positions_agree() -> None:
    """indptr with offsets, positions by token, and a table made of the same angles."""
    case, wants = case_of(BY_NAME["rope_float32"])
    q, k, indptr, offsets = case.arrays.values()
    positions, _ = reference_ops.rope_positions(len(q), indptr, offsets)
    angles = np.arange(4200)[:, None] * reference_ops.rope_frequencies(64)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    first = ops.apply_rope(q, k, indptr, offsets)
    second = ops.apply_rope_pos_ids(q, k, positions)
    third = ops.apply_rope_with_cos_sin_cache(q, k, positions, table)
    for want, x, y, z in zip(wants, first, second, third, strict=True):
        for other in (y, z):
            assert_agree(x, other, want.naive, want.oracle, np.float32, want.name)


def test_rotating_keeps_lengths_and_depends_on_distance_only() -> None:
    rng = np.random.default_rng(3)
    q, k = np.repeat(rng.standard_normal((2, 1, 1, 64)).astype(np.float32), 40, axis=1)
    q_rope, k_rope = (x[:, 0].astype(np.float64) for x in ops.apply_rope_pos_ids(q, k, np.arange(40)))
    np.testing.assert_allclose(np.linalg.norm(q_rope, axis=-1), np.linalg.norm(q[0, 0]), rtol=1e-6)
    products = q_rope @ k_rope.T
    for offset in (-30, 0, 7):
        assert np.ptp(np.diagonal(products, offset)) < 1e-4
    assert np.ptp(products[0]) > 0.1


def test_options_of_rope_are_not_ignored() -> None:
    case, _ = case_of(BY_NAME["rope_float32"])
    arrays = list(case.arrays.values())
    changes: list[dict[str, Any]] = [
        {}, {"rotary_dim": 32}, {"interleave": True}, {"rope_scale": 2.0}, {"rope_theta": 1e5},
    ]  # fmt: skip
    results = [apply_rope(*arrays, **change)[0] for change in changes]
    llama31: list[dict[str, Any]] = [
        {}, {"rope_scale": 2.0}, {"rope_theta": 1e4}, {"low_freq_factor": 2.0}, {"high_freq_factor": 8.0},
        {"old_context_len": 4096.0},
    ]  # fmt: skip
    function: Any = ops.apply_llama31_rope
    results += [function(*arrays, **change)[0] for change in llama31]
    for i, x in enumerate(results):
        for y in results[:i]:
            assert not np.array_equal(x, y)
    by_position = apply_rope(*arrays, 32, True, 2.0, 1e5)
    by_name = apply_rope(*arrays, rotary_dim=32, interleave=True, rope_scale=2.0, rope_theta=1e5)
    assert all(np.array_equal(x, y) for x, y in zip(by_position, by_name, strict=True))


def test_llama31_blends_between_plain_and_divided_frequencies() -> None:
    case, _ = case_of(BY_NAME["rope_float32"])
    arrays = list(case.arrays.values())
    plain = ops.apply_rope(*arrays, rope_theta=5e5)[0]
    divided = ops.apply_rope(*arrays, rope_theta=5e5, rope_scale=8.0)[0]
    short = ops.apply_llama31_rope(*arrays, old_context_len=1e9)[0]  # every frequency makes many turns: all stay
    long = ops.apply_llama31_rope(*arrays, old_context_len=1e-3)[0]  # none makes a turn: all are divided
    np.testing.assert_allclose(short, plain, atol=1e-5)
    np.testing.assert_allclose(long, divided, atol=1e-5)
    both = ops.apply_llama31_rope(*arrays)[0]
    assert not np.allclose(both, plain, atol=1e-3) and not np.allclose(both, divided, atol=1e-3)


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_on_a_device_are_clamped(platform: str) -> None:
    """Lengths and positions that nobody could check lead nowhere outside the arrays."""
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 12, 2, 16)).astype(np.float32)
    table = rng.standard_normal((5, 16)).astype(np.float32)
    device = jax.devices(platform)[0]
    put = lambda *arrays: jax.device_put(arrays, device)  # noqa: E731
    wild = np.array([-5, 3, 1, 2**31 - 1, -(2**31), 100], np.int32)
    for x in jax.jit(ops.apply_rope)(*put(q, k, wild, np.full(5, 2**31 - 1, np.int32))):
        assert np.isfinite(np.asarray(x)).all()
    ids = np.array([-(2**31), -1, 0, 4, 5, 2**31 - 1] * 2, np.int32)
    found = jax.jit(ops.apply_rope_with_cos_sin_cache)(*put(q, k, ids, table))
    arrays = {"q": q, "k": k, "pos_ids": ids.clip(0, 4), "cos_sin_cache": table}
    for want, x in zip(expected(OpCase("apply_rope_with_cos_sin_cache", arrays, {})), found, strict=True):
        want.check(np.asarray(x), "clamped")
    sane, _ = ops.apply_rope_pos_ids(*put(q, k, np.arange(12, dtype=np.int32)))
    assert np.isfinite(np.asarray(sane)).all()


# Norms.


def test_the_returned_sum_is_the_sum() -> None:
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        rng = np.random.default_rng(1)
        x, residual = rng.standard_normal((2, 5, 33)).astype(dtype)
        weight = np.ones(33, dtype)
        normed, total = ops.fused_add_rms_norm(x, residual, weight)
        assert np.array_equal(total, (x.astype(np.float32) + residual.astype(np.float32)).astype(dtype))
        assert np.array_equal(normed, ops.rms_norm(total, weight))
        assert not np.array_equal(normed, ops.rms_norm(total, weight, 0.5))
        assert not np.array_equal(normed, ops.rms_norm(total, (weight * 2).astype(dtype)))


def test_zero_rows_are_zero() -> None:
    assert not ops.rms_norm(np.zeros((3, 8), np.float32), np.ones(8, np.float32)).any()


# Decode.


@pytest.mark.parametrize("name", ["decode_float32", "decode_float16", "decode_everything_f32", "decode_long"])
def test_decode_is_attention_of_one_row(name: str) -> None:
    case, wants = case_of(BY_NAME[name])
    arrays, statics = dict(case.arrays), dict(case.statics)
    rope = [statics.pop("rope_scale", None), statics.pop("rope_theta", None)]
    q, k, v = (arrays.pop(key) for key in "qkv")
    if any(value is not None for value in rope):
        scale, theta = (value or default for value, default in zip(rope, (1.0, 1e4), strict=True))
        options = {"rope_scale": scale, "rope_theta": theta}
        q = ops.apply_rope_pos_ids(q[None], q[None], np.array([len(k) - 1]), **options)[0][0]
        k = ops.apply_rope_pos_ids(k, k, np.arange(len(k)), **options)[0]
    flash: Any = heed.flash_mha
    out, lse = flash(
        q[None, None],
        k[None],
        v[None],
        softmax_scale=statics.get("sm_scale"),
        window_size=(statics.get("window_left", -1), -1),
        softcap=statics.get("logits_soft_cap"),
        return_lse=True,
        **arrays,
    )
    for want, x, y in zip(wants, run(case), (out[0, 0], lse[0, :, 0]), strict=True):
        assert_agree(x, y, want.naive, want.oracle, want.dtype, f"{name}: {want.name}")


def test_equivalent_spellings_of_decode_agree() -> None:
    case, _ = case_of(BY_NAME["decode_d24"])
    q, k, v = case.arrays.values()

    def same(first: dict[str, Any], second: dict[str, Any]) -> None:
        for x, y in zip(*(single_decode(q, k, v, return_lse=True, **one) for one in (first, second)), strict=True):
            assert np.array_equal(x, y), f"{first} against {second}"

    same({}, {"sm_scale": 24**-0.5})
    same({}, {"logits_soft_cap": 0.0})
    same({}, {"window_left": -1})
    same({}, {"window_left": 69})
    same({}, {"backend": "cpu"})
    same({"rope_scale": 1}, {"rope_theta": 1e4})
    same({"rope_scale": 2.0}, {"rope_scale": 2, "rope_theta": 10000})
    same({"kv_layout": "NHD"}, {})
    hnd = single_decode(q, *(x.swapaxes(0, 1) for x in (k, v)), kv_layout="HND")
    assert np.array_equal(hnd, single_decode(q, k, v))
    assert np.array_equal(single_decode(q, k, v), single_decode(q, k, v, return_lse=True)[0])


def test_options_of_decode_are_not_ignored() -> None:
    case, _ = case_of(BY_NAME["decode_d24"])
    q, k, v = (x.astype(np.float32) for x in case.arrays.values())
    heads = np.linspace(0.1, 1, 4).astype(np.float32)
    changes: list[dict[str, Any]] = [
        {}, {"window_left": 5}, {"logits_soft_cap": 0.5}, {"sm_scale": 0.9}, {"rope_theta": 1e4}, {"rope_theta": 1e2},
        {"rope_scale": 3.0}, {"alibi_slopes": heads}, {"sinks": heads},
    ]  # fmt: skip
    results = [single_decode(q, k, v, return_lse=True, **change) for change in changes]
    for i, (x, x_lse) in enumerate(results):
        for y, y_lse in results[:i]:
            assert not np.array_equal(x, y) and not np.array_equal(x_lse, y_lse)


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_query_gives_the_same_alone_and_in_any_batch(platform: str) -> None:
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(5)
    q = rng.standard_normal((5, 8, 64)).astype(np.float16)
    k, v = rng.standard_normal((2, 5, 700, 2, 64)).astype(np.float16)

    def decode(q: Any, k: Any, v: Any) -> Any:
        return single_decode(q, k, v, return_lse=True, batch_invariant=True)

    operands = jax.device_put((q, k, v), jax.devices(platform)[0])
    together = [np.asarray(x) for x in jax.jit(jax.vmap(decode))(*operands)]
    for i in range(5):
        for x, y in zip(jax.jit(decode)(*(one[i] for one in operands)), together, strict=True):
            assert np.array_equal(np.asarray(x), y[i])


# The whole interface.


def test_nothing_else_is_public() -> None:
    names = {name for name, value in vars(ops).items() if not name.startswith("_") and hasattr(value, "__wrapped__")}
    assert names == set(ops.__all__)
    assert {case_of(spec)[0].function for spec in CONFORMANCE} == names


@pytest.mark.parametrize("name", ["silu_float32", "rope_float32", "rope_cache_float32", "norm_add_float32"])
def test_explain_says_which_kernel(name: str) -> None:
    case, _ = case_of(BY_NAME[name])
    function = getattr(ops, case.function)
    found = heed.explain(function, **case.arrays, **case.statics)
    stem = found.problem.partition(".")[0]
    assert found.function == f"ops.{case.function}" and found.target == "cpu" and found.chosen == f"cpu_{stem}"
    assert f"cpu_{stem}" in str(found)
    elsewhere = heed.explain(function, **case.arrays, **case.statics, target="sm_90a")
    assert elsewhere.chosen == f"sm80_{stem}", elsewhere
    forced = heed.explain(function, **case.arrays, **case.statics, target="sm_90a", backend="cpu")
    assert not forced.is_served and "sm80" in str(forced.reasons)


def test_explain_needs_no_arrays() -> None:
    jax = pytest.importorskip("jax")
    q = jax.ShapeDtypeStruct((32, 128), np.float16)
    k = jax.ShapeDtypeStruct((8192, 8, 128), np.float16)
    found = heed.explain(ops.single_decode, q, k, k, target="sm_90a")
    assert found.chosen == "sm80_attention_decode" and found.workspace_bytes >= 0
    with pytest.raises(ValueError, match=r"^q: got shape"):
        heed.explain(ops.single_decode, k, k, k)


def test_specs_have_names_of_their_own() -> None:
    assert len(BY_NAME) == len(CONFORMANCE) + len(BENCHMARKS)


@pytest.mark.parametrize("name", ["silu_float32", "gelu_bfloat16", "norm_float32", "norm_float16", "rope_cache_float32",
                                  "decode_float32", "decode_bfloat16"])  # fmt: skip
def test_a_result_that_is_a_few_roundings_off_is_found(name: str) -> None:
    """That what is compared with, the worst of several plain evaluations, leaves no room for a defect."""
    case, wants = case_of(BY_NAME[name])
    for want, x in zip(wants[:1], run(case), strict=False):
        eps = float(ml_dtypes.finfo(want.dtype).eps)
        for factor in (1 - 8 * eps, 1 + 8 * eps):
            with pytest.raises(AssertionError, match=r"bound is"):
                want.check((want.oracle * factor).astype(want.dtype), name)
        with pytest.raises(AssertionError):
            want.check(np.roll(x, 1, axis=-1), name)
