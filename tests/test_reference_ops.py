"""The oracles of heed.ops against JAX in float64: its own functions, and its derivatives of the definitions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from heed import reference_ops

jax = pytest.importorskip("jax")
jnp = jax.numpy

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def assert_same(found: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(want), rtol=1e-9, atol=1e-12)


def gradients(function: Any, cotangents: Any, *operands: Any) -> Any:
    """JAX's, of the definition in float64."""
    _, pull = jax.vjp(functools.partial(function, compute_dtype=np.float64), *map(jnp.asarray, operands))
    return pull(cotangents)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(activation: str) -> None:
    x, dout = RNG.standard_normal((5, 14)) * 3, RNG.standard_normal((5, 7))
    theirs = {
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    }[activation]
    out = reference_ops.act_and_mul(x, activation)
    assert out.dtype == np.float64
    assert_same(out, theirs(x[:, :7]) * x[:, 7:])
    of_definition = gradients(functools.partial(reference_ops.act_and_mul, activation=activation), dout, x)
    assert_same(reference_ops.act_and_mul_backward(x, dout, activation), of_definition[0])


ROPE_OPTIONS: list[dict[str, Any]] = [
    {}, {"interleave": True}, {"rotary_dim": 4}, {"rope_scale": 3.0, "rope_theta": 50.0},
    {"rotary_dim": 6, "interleave": True, "llama31": (1.0, 4.0, 32.0), "rope_scale": 8.0},
]  # fmt: skip


@pytest.mark.parametrize("options", ROPE_OPTIONS, ids=str)
def test_rotations_turn_complex_numbers(options: dict[str, Any]) -> None:
    q, k = RNG.standard_normal((6, 4, 10)), RNG.standard_normal((6, 2, 10))
    indptr, offsets = np.array([1, 3, 3, 5]), np.array([100, 3, 7])
    given = indptr, offsets
    rotated = reference_ops.apply_rope(q, k, *given, **options)
    dim = options.get("rotary_dim", 10)
    positions = np.array([0, 100, 101, 7, 8, 0])
    frequency = reference_ops.rope_frequencies(
        dim, options.get("rope_scale", 1.0), options.get("rope_theta", 1e4), options.get("llama31")
    )
    turn = np.exp(1j * positions[:, None] * frequency)[:, None, :]
    for x, y in zip((q, k), rotated, strict=True):
        pick = [np.s_[..., :dim:2], np.s_[..., 1:dim:2]] if options.get("interleave") else [
            np.s_[..., : dim // 2], np.s_[..., dim // 2 : dim],
        ]  # fmt: skip
        z = (x[pick[0]] + 1j * x[pick[1]]) * turn
        assert_same(y[1:5][pick[0]], z[1:5].real)
        assert_same(y[1:5][pick[1]], z[1:5].imag)
        assert np.array_equal(y[[0, 5]], x[[0, 5]]) and np.array_equal(y[..., dim:], x[..., dim:])
    for x, y in zip((q, k), reference_ops.apply_rope(*rotated, *given, inverse=True, **options), strict=True):
        assert_same(y, x)

    def definition(q: Any, k: Any, compute_dtype: Any) -> Any:
        return reference_ops.apply_rope(q, k, *given, compute_dtype=compute_dtype, **options)

    cotangents = RNG.standard_normal(q.shape), RNG.standard_normal(k.shape)
    back = reference_ops.apply_rope(*cotangents, *given, inverse=True, **options)
    for x, y in zip(back, gradients(definition, cotangents, q, k), strict=True):
        assert_same(x, y)


def test_a_table_of_the_same_angles_gives_the_same() -> None:
    q, k = RNG.standard_normal((6, 4, 10)), RNG.standard_normal((6, 2, 10))
    ids = np.array([3, 0, 9, 9, 1, 2])
    angles = np.arange(10)[:, None] * reference_ops.rope_frequencies(8)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    first = reference_ops.apply_rope(q, k, pos_ids=ids, cos_sin_cache=table, interleave=True)
    second = reference_ops.apply_rope(q, k, pos_ids=ids, rotary_dim=8, interleave=True)
    for x, y in zip(first, second, strict=True):
        assert_same(x, y)


def test_frequencies_of_llama31() -> None:
    """The published rule, frequency by frequency."""
    plain = reference_ops.rope_frequencies(128, 1.0, 5e5)
    found = reference_ops.rope_frequencies(128, 8.0, 5e5, (1.0, 4.0, 8192.0))
    for frequency, x in zip(plain, found, strict=True):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            assert_same(x, frequency)
        elif wavelength > 8192:
            assert_same(x, frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            assert_same(x, (1 - smooth) * frequency / 8 + smooth * frequency)


def test_norms() -> None:
    x, weight = RNG.standard_normal((3, 4, 9)), RNG.standard_normal(9)
    dout, dsum = RNG.standard_normal((2, 3, 4, 9))
    out, total = reference_ops.rms_norm(x, weight, 1e-3)
    assert_same(out, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * weight)
    assert np.array_equal(total, x)
    found = reference_ops.rms_norm_backward(x, weight, dout, dsum, 1e-3)
    want = gradients(functools.partial(reference_ops.rms_norm, eps=1e-3), (dout, dsum), x, weight)
    for one, other in zip(found, want, strict=True):
        assert_same(one, other)
    residual = RNG.standard_normal(x.shape).astype(np.float16)
    out, total = reference_ops.rms_norm(x.astype(np.float16), weight.astype(np.float16), residual=residual)
    assert np.array_equal(total, (x.astype(np.float16).astype(np.float64) + residual).astype(np.float16))


DECODE_OPTIONS: list[dict[str, Any]] = [
    {}, {"window_left": 2, "logits_soft_cap": 3.0, "sm_scale": 0.7}, {"rope_scale": 2.0}, {"kv_layout": "HND"},
    {"kv_layout": "HND", "rope_theta": 100.0, "window_left": 0},
]  # fmt: skip


@pytest.mark.parametrize("options", DECODE_OPTIONS, ids=str)
def test_decode(options: dict[str, Any]) -> None:
    q, k, v = RNG.standard_normal((4, 8)), RNG.standard_normal((7, 2, 8)), RNG.standard_normal((7, 2, 5))
    sinks, slopes = RNG.standard_normal((2, 4))
    keys, values = k, v
    if "rope_scale" in options or "rope_theta" in options:
        rope = {"rope_scale": options.get("rope_scale", 1.0), "rope_theta": options.get("rope_theta", 1e4)}
        rows = q[None]
        turned = reference_ops.apply_rope(rows, rows, pos_ids=np.array([6]), **rope)[0][0]
        keys = reference_ops.apply_rope(k, k, pos_ids=np.arange(7), **rope)[0]
    else:
        turned = q
    if options.get("kv_layout") == "HND":
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
    arrays = {"sinks": sinks, "alibi_slopes": slopes}
    out, lse = reference_ops.single_decode(q, k, v, **arrays, **options)
    for head in range(4):  # one head after the other, in words of the definition
        scores = keys[:, head // 2] @ turned[head] * options.get("sm_scale", 8**-0.5)
        if "logits_soft_cap" in options:
            scores = 3.0 * np.tanh(scores / 3.0)
        scores = scores - slopes[head] * (6 - np.arange(7))
        if "window_left" in options:
            scores[np.arange(7) < 6 - options["window_left"]] = -np.inf
        total = np.exp(scores).sum() + np.exp(sinks[head])
        assert_same(lse[head], np.log(total))
        assert_same(out[head], np.exp(scores) / total @ values[:, head // 2])

    def definition(q: Any, k: Any, v: Any, sinks: Any, alibi_slopes: Any, compute_dtype: Any) -> Any:
        return reference_ops.single_decode(
            q, k, v, sinks=sinks, alibi_slopes=alibi_slopes, compute_dtype=compute_dtype, **options
        )

    dout, dlse = RNG.standard_normal((4, 5)), RNG.standard_normal(4)
    found = reference_ops.single_decode_backward(dout, q, k, v, dlse=dlse, **arrays, **options)
    for x, y in zip(found, gradients(definition, (dout, dlse), q, k, v, sinks, slopes), strict=True):
        assert_same(x, y)


def test_an_empty_cache() -> None:
    q, k = np.ones((4, 8)), np.ones((0, 2, 8))
    out, lse = reference_ops.single_decode(q, k, k)
    assert not out.any() and np.isneginf(lse).all()
    out, lse = reference_ops.single_decode(q, k, k, sinks=np.arange(4.0), rope_theta=1e4)
    assert not out.any() and np.array_equal(lse, np.arange(4.0))
