"""Bad input: each row raises its type before anything runs, and the message names the argument, got and expected.

Every row runs on NumPy arrays, on JAX arrays, under `jax.jit` and under `jax.eval_shape`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import heed

flash_mha: Any = heed.flash_mha  # the tests hand it what its annotations exclude

MODES = ("numpy", "jax", "jit", "eval_shape")
PLACED = MODES[:-1]  # abstract shapes have no platform, so only a call that will run can lack its kernel


@dataclasses.dataclass(frozen=True)
class Bad:
    """One bad call. `change` maps the arguments of a good call to those of the bad one."""

    name: str
    error: type[Exception]
    change: Callable[[dict[str, Any]], dict[str, Any]]
    says: tuple[str, ...]  # regular expressions that the message must contain
    modes: tuple[str, ...] = MODES
    x64: bool = False


def good() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((2, 6, 4, 16)).astype(np.float32),
        "k": rng.standard_normal((2, 8, 2, 16)).astype(np.float32),
        "v": rng.standard_normal((2, 8, 2, 12)).astype(np.float32),
    }


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def replace(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: arguments | changes


def cast(dtype: Any, *names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: arguments | {name: arguments[name].astype(dtype) for name in names or ("q", "k", "v")}


I32 = np.int32
IDS = (zeros(2, 6, dtype=I32), zeros(2, 8, dtype=I32))
ROWS = [
    # Ranks and shapes.
    Bad("q rank 3", ValueError, replace(q=zeros(6, 4, 16)),
        ("^q", r"\[6, 4, 16\]", "batch.*q_len.*num_q_heads.*head_dim")),
    Bad("k rank 3", ValueError, replace(k=zeros(8, 2, 16)),
        ("^k", r"\[8, 2, 16\]", "batch.*kv_len.*num_kv_heads.*head_dim")),
    Bad("v rank 5", ValueError, replace(v=zeros(1, 2, 8, 2, 12)), ("^v", r"\[1, 2, 8, 2, 12\]", "rank 4|4 axes")),
    Bad("q rank 0", ValueError, replace(q=np.zeros((), np.float32)), ("^q", "rank 0|0 axes", "rank 4|4 axes")),
    Bad("all rank 5", ValueError, lambda a: {n: x[None] for n, x in a.items()},
        ("^q", r"\[1, 2, 6, 4, 16\]", "rank 4|4 axes")),
    Bad("head_dim 0", ValueError, replace(q=zeros(2, 6, 4, 0), k=zeros(2, 8, 2, 0)), ("^q", "head_dim 0", "1 to 256")),
    Bad("head_dim 257", ValueError, replace(q=zeros(2, 6, 4, 257), k=zeros(2, 8, 2, 257)), ("^q", "257", "1 to 256")),
    Bad("head_dim_v 0", ValueError, replace(v=zeros(2, 8, 2, 0)), ("^v", "head_dim_v 0", "1 to 256")),
    Bad("head_dim_v 257", ValueError, replace(v=zeros(2, 8, 2, 257)), ("^v", "257", "1 to 256")),
    Bad("head_dim_v 512", ValueError, replace(q=zeros(2, 6, 4, 64), k=zeros(2, 8, 2, 64), v=zeros(2, 8, 2, 512)),
        ("^v", "512", "1 to 256")),
    Bad("head_dim differs", ValueError, replace(k=zeros(2, 8, 2, 24)), ("^k", "24", "16", "q")),
    Bad("heads 4 over 3", ValueError, replace(k=zeros(2, 8, 3, 16), v=zeros(2, 8, 3, 12)),
        ("num_q_heads 4", "multiple", "3")),
    Bad("heads 4 over 8", ValueError, replace(k=zeros(2, 8, 8, 16), v=zeros(2, 8, 8, 12)),
        ("num_q_heads 4", "multiple", "8")),
    Bad("kv heads 0", ValueError, replace(k=zeros(2, 8, 0, 16), v=zeros(2, 8, 0, 12)),
        ("^k", "num_kv_heads 0", "1 or more")),
    Bad("q heads 0", ValueError, replace(q=zeros(2, 6, 0, 16)), ("^q", "num_q_heads 0", "1 or more")),
    Bad("kv heads differ", ValueError, replace(v=zeros(2, 8, 4, 12)), ("^v", "num_kv_heads 4", "num_kv_heads 2", "k")),
    Bad("batch of k", ValueError, replace(k=zeros(3, 8, 2, 16), v=zeros(3, 8, 2, 12)),
        ("^k", "batch 3", "batch 2", "q")),
    Bad("batch of k is 1", ValueError, replace(k=zeros(1, 8, 2, 16)), ("^k", "batch 1", "batch 2", "q")),
    Bad("batch of v", ValueError, replace(v=zeros(3, 8, 2, 12)), ("^v", "batch 3", "batch 2")),
    Bad("kv_len of v", ValueError, replace(v=zeros(2, 9, 2, 12)), ("^v", "kv_len 9", "kv_len 8", "k")),
    # Dtypes and kinds of arrays.
    Bad("float64", TypeError, cast(np.float64), ("^q", "float64", "float32, float16 or bfloat16"), x64=True),
    Bad("int32", TypeError, cast(np.int32), ("^q", "int32", "float32, float16 or bfloat16")),
    Bad("int8", TypeError, cast(np.int8), ("^q", "int8", "float32, float16 or bfloat16")),
    Bad("uint16 is not bfloat16", TypeError, cast(np.uint16), ("^q", "uint16", "float32, float16 or bfloat16")),
    Bad("bool", TypeError, cast(np.bool_), ("^q", "bool", "float32, float16 or bfloat16")),
    Bad("complex64", TypeError, cast(np.complex64), ("^q", "complex64", "float32, float16 or bfloat16")),
    Bad("float8", TypeError, cast(ml_dtypes.float8_e4m3fn), ("^q", "float8_e4m3fn", "float32, float16 or bfloat16")),
    Bad("k float16", TypeError, cast(np.float16, "k"), ("^k", "float16", "float32", "q")),
    Bad("v bfloat16", TypeError, cast(ml_dtypes.bfloat16, "v"), ("^v", "bfloat16", "float32", "q")),
    Bad("k float64", TypeError, cast(np.float64, "k"), ("^k", "float64", "float32"), x64=True),
    Bad("big endian", TypeError, cast(">f4"), ("^q", ">f4", "native"), ("numpy",)),
    Bad("q is a list", TypeError, replace(q=[[1.0]]), ("^q", "list", "array"), ("numpy",)),
    Bad("q is a scalar", TypeError, replace(q=1.5), ("^q", "float", "array"), ("numpy",)),
    Bad("k is None", TypeError, replace(k=None), ("^k", "None", "array")),
    Bad("structured", TypeError, replace(q=np.zeros((2, 6, 4, 16), [("x", "f4")])), ("^q", "expected"), ("numpy",)),
    Bad("object", TypeError, replace(q=np.zeros((2, 6, 4, 16), object)), ("^q", "object", "expected"), ("numpy",)),
    # Scale, cap, window, flags.
    Bad("scale NaN", ValueError, replace(softmax_scale=float("nan")), ("^softmax_scale", "nan", "finite")),
    Bad("scale inf", ValueError, replace(softmax_scale=float("inf")), ("^softmax_scale", "inf", "finite")),
    Bad("scale beyond float32", ValueError, replace(softmax_scale=1e300), ("^softmax_scale", "finite|float32")),
    Bad("scale beyond float64", ValueError, replace(softmax_scale=10**400), ("^softmax_scale", "1000", "finite")),
    Bad("scale text", TypeError, replace(softmax_scale="1"), ("^softmax_scale", "'1'", "float")),
    Bad("scale bool", TypeError, replace(softmax_scale=True), ("^softmax_scale", "True", "float")),
    Bad("scale complex", TypeError, replace(softmax_scale=1j), ("^softmax_scale", "complex", "float")),
    Bad("scale array", TypeError, replace(softmax_scale=np.ones(2)), ("^softmax_scale", "array|ndarray", "float")),
    Bad("softcap NaN", ValueError, replace(softcap=float("nan")), ("^softcap", "nan", "finite")),
    Bad("softcap inf", ValueError, replace(softcap=float("inf")), ("^softcap", "inf", "finite")),
    Bad("softcap negative", ValueError, replace(softcap=-1.0), ("^softcap", "-1", "0.*positive")),
    Bad("softcap text", TypeError, replace(softcap="30"), ("^softcap", "'30'", "float")),
    Bad("window -2 left", ValueError, replace(window_size=(-2, 0)), ("^window_size", r"\(-2, 0\)", "-1")),
    Bad("window -7 right", ValueError, replace(window_size=(3, -7)), ("^window_size", r"\(3, -7\)", "-1")),
    Bad("window -7 right, causal", ValueError, replace(window_size=(3, -7), is_causal=True),
        ("^window_size", "-7", "-1")),
    Bad("window int", TypeError, replace(window_size=5), ("^window_size", "5", "pair")),
    Bad("window None", TypeError, replace(window_size=None), ("^window_size", "None", "pair")),
    Bad("window of 1", ValueError, replace(window_size=(5,)), ("^window_size", r"\(5,\)", "pair")),
    Bad("window of 3", ValueError, replace(window_size=(1, 2, 3)), ("^window_size", r"\(1, 2, 3\)", "pair")),
    Bad("window floats", TypeError, replace(window_size=(1.0, 2.0)), ("^window_size", "1.0", "integer")),
    Bad("window None side", TypeError, replace(window_size=(None, 2)), ("^window_size", "None", "integer")),
    Bad("window bool", TypeError, replace(window_size=(True, 2)), ("^window_size", "True", "integer")),
    Bad("window beyond 64 bits", ValueError, replace(window_size=(2**70, 0)), ("window", "expected|at most")),
    Bad("is_causal int", TypeError, replace(is_causal=1), ("^is_causal", "1", "True or False")),
    Bad("is_causal None", TypeError, replace(is_causal=None), ("^is_causal", "None", "True or False")),
    Bad("is_causal array", TypeError, replace(is_causal=np.ones(2, bool)), ("^is_causal", "expected", "True or False")),
    Bad("return_lse int", TypeError, replace(return_lse=1), ("^return_lse", "1", "True or False")),
    Bad("deterministic text", TypeError, replace(deterministic="yes"), ("^deterministic", "'yes'", "True or False")),
    Bad("causal_align unknown", ValueError, replace(causal_align="bottom_left"),
        ("^causal_align", "'bottom_left'", "'bottom_right'.*'top_left'")),
    Bad("causal_align None", TypeError, replace(causal_align=None), ("^causal_align", "None", "'top_left'")),
    # Segments, sinks, slopes.
    Bad("one segment_ids, two lengths", ValueError, replace(segment_ids=IDS[0]), ("segment_ids", r"6", "kv_len 8")),
    Bad("segment_ids batch", ValueError, replace(segment_ids=(zeros(3, 6, dtype=I32), zeros(3, 8, dtype=I32))),
        ("q_segment_ids", r"\[3, 6\]", "batch 2")),
    Bad("segment_ids length", ValueError, replace(segment_ids=(IDS[0], zeros(2, 9, dtype=I32))),
        ("kv_segment_ids", "kv_len 9", "kv_len 8")),
    Bad("segment_ids rank", ValueError, replace(segment_ids=(zeros(6, dtype=I32), IDS[1])),
        ("q_segment_ids", r"\[6\]", "batch.*q_len")),
    Bad("segment_ids float", TypeError, replace(segment_ids=(zeros(2, 6), IDS[1])),
        ("q_segment_ids", "float32", "int32|integer")),
    Bad("segment_ids bool", TypeError, replace(segment_ids=(IDS[0], zeros(2, 8, dtype=bool))),
        ("kv_segment_ids", "bool", "int32|integer")),
    Bad("segment_ids half a pair", ValueError, replace(segment_ids=(IDS[0], None)),
        ("segment_ids", "expected", "pair")),
    Bad("segment_ids triple", ValueError, replace(segment_ids=(*IDS, IDS[0])), ("segment_ids", "3", "pair")),
    Bad("segment_ids list of ints", ValueError, replace(segment_ids=[0, 0, 0, 0, 0, 1]),
        ("segment_ids", "expected", "pair"),
        ("numpy",)),
    Bad("segment_ids out of range", ValueError,
        replace(segment_ids=(np.full((2, 6), 2**31, np.int64), zeros(2, 8, dtype=np.int64))),
        ("q_segment_ids", str(2**31), "int32"), ("numpy",)),
    Bad("segment_ids uint32 out of range", ValueError,
        replace(segment_ids=(IDS[0], np.full((2, 8), 2**32 - 1, np.uint32))),
        ("kv_segment_ids", str(2**32 - 1), "int32"),
        ("numpy",)),
    Bad("segment_ids below range", ValueError,
        replace(segment_ids=(np.full((2, 6), -(2**31) - 1, np.int64), IDS[1])),
        ("q_segment_ids", str(-(2**31) - 1), "int32"), ("numpy",)),
    Bad("sinks length", ValueError, replace(sinks=zeros(2)), ("^sinks", r"\[2\]|num_q_heads 2", "num_q_heads 4")),
    Bad("sinks rank", ValueError, replace(sinks=zeros(1, 4)), ("^sinks", r"\[1, 4\]", "num_q_heads")),
    Bad("sinks float16", TypeError, replace(sinks=zeros(4, dtype=np.float16)), ("^sinks", "float16", "float32")),
    Bad("sinks float64", TypeError, replace(sinks=zeros(4, dtype=np.float64)),
        ("^sinks", "float64", "float32"), x64=True),
    Bad("sinks int", TypeError, replace(sinks=zeros(4, dtype=I32)), ("^sinks", "int32", "float32")),
    Bad("sinks list", TypeError, replace(sinks=[0.0] * 4), ("^sinks", "list", "array"), ("numpy",)),
    Bad("alibi length", ValueError, replace(alibi_slopes=zeros(5)), ("^alibi_slopes", "5", "num_q_heads 4")),
    Bad("alibi rank", ValueError, replace(alibi_slopes=zeros(2, 4)), ("^alibi_slopes", r"\[2, 4\]", "num_q_heads")),
    Bad("alibi bfloat16", TypeError, replace(alibi_slopes=zeros(4, dtype=ml_dtypes.bfloat16)),
        ("^alibi_slopes", "bfloat16", "float32")),
    # Backends.
    Bad("backend unknown", ValueError, replace(backend="tpu"), ("^backend", "'tpu'", "'cpu'.*'sm80'.*'sm90'")),
    Bad("backend int", TypeError, replace(backend=90), ("^backend", "90", "'cpu'")),
    Bad("backend sm90 without a GPU", heed.UnsupportedError, replace(backend="sm90"),
        ("sm90_attention_fwd", "needs an NVIDIA .*GPU"), PLACED),
    Bad("backend sm80 without a GPU", heed.UnsupportedError, replace(backend="sm80"),
        ("sm80_attention_fwd", "needs an NVIDIA .*GPU"), PLACED),
]  # fmt: skip

ARRAYS = ("q", "k", "v", "sinks", "alibi_slopes", "segment_ids", "cu_seqlens_q", "cu_seqlens_k", "seqused_k",
          "x", "weight", "residual", "indptr", "offsets", "pos_ids", "cos_sin_cache")  # fmt: skip


def invoke(mode: str, arguments: dict[str, Any], function: Any = heed.flash_mha) -> Any:
    if mode == "numpy":
        return function(**arguments)
    import jax
    import jax.numpy as jnp

    # None and lists are not arrays: they stay as they are, as in a user's call.
    def is_arrays(value: Any) -> bool:
        return isinstance(value, np.ndarray) or (
            isinstance(value, tuple) and all(isinstance(x, np.ndarray) for x in value)
        )

    with jax.default_device(jax.devices("cpu")[0]):
        arrays = {name: value for name, value in arguments.items() if name in ARRAYS and is_arrays(value)}
        rest = {name: value for name, value in arguments.items() if name not in arrays}
        arrays = jax.tree.map(jnp.asarray, arrays)
        if mode == "jax":
            return function(**arrays, **rest)
        transform = jax.jit(lambda a: function(**a, **rest))
        return transform(arrays) if mode == "jit" else jax.eval_shape(transform, arrays)


@pytest.mark.parametrize("mode", MODES)
def test_the_good_call_is_good(mode: str) -> None:
    assert invoke(mode, good()).shape == (2, 6, 4, 12)


@pytest.mark.parametrize(
    ("row", "mode"), [pytest.param(row, mode, id=f"{row.name}-{mode}") for row in ROWS for mode in row.modes]
)
def test_bad_input(row: Bad, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_row(row, mode, monkeypatch, good(), heed.flash_mha)


def check_row(row: Bad, mode: str, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], function: Any) -> None:
    """The row's change of the good arguments must be refused as it says."""
    if mode == "numpy":  # nothing may run
        monkeypatch.setattr("heed._arrays.DLPackOps.run", lambda _, name, *__: pytest.fail(f"{name} ran"))
    arguments = row.change(arguments)
    if row.x64 and mode != "numpy":
        jax = pytest.importorskip("jax")
        enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
        with enable_x64(True), pytest.raises(row.error) as caught:
            invoke(mode, arguments, function)
    else:
        with pytest.raises(row.error) as caught:
            invoke(mode, arguments, function)
    assert type(caught.value) is row.error, f"got {caught.value!r}"
    message = str(caught.value).removeprefix(f"{function.__name__}: ")
    for pattern in row.says:
        assert re.search(pattern, message, re.DOTALL), f"{pattern!r} is not in: {message}"


@pytest.mark.parametrize("backend", ["sm80", "sm90"])
@pytest.mark.parametrize("mode", PLACED)
def test_unsupported_error_lists_every_candidate(mode: str, backend: str) -> None:
    with pytest.raises(heed.UnsupportedError) as caught:
        invoke(mode, good() | {"backend": backend})
    reasons = caught.value.reasons
    assert isinstance(caught.value, ValueError)
    assert set(reasons) >= {"cpu_attention_fwd", "sm80_attention_fwd", "sm90_attention_fwd"} and all(reasons.values())
    for name, reason in reasons.items():
        assert name in str(caught.value) and reason in str(caught.value)


STATIC = {
    "softmax_scale": 0.5,
    "is_causal": True,
    "window_size": (3, 3),
    "softcap": 2.0,
    "return_lse": True,
    "deterministic": True,
}


@pytest.mark.parametrize("name", STATIC)
def test_a_traced_static_argument_names_static_argnames(name: str) -> None:
    jax = pytest.importorskip("jax")
    arguments = good()
    for transform in (jax.jit, lambda f: lambda *a: jax.eval_shape(f, *a)):
        with pytest.raises(TypeError) as caught:
            transform(lambda q, k, v, value: flash_mha(q, k, v, **{name: value}))(*arguments.values(), STATIC[name])
        message = str(caught.value)
        assert name in message and "static_argnames" in message


def test_a_concrete_jax_scalar_is_not_a_static_argument() -> None:
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(TypeError, match=r"softmax_scale.*static_argnames"):
        flash_mha(**good(), softmax_scale=jnp.float32(0.5))


def test_keyword_only_arguments_are_keyword_only() -> None:
    arguments = good()
    with pytest.raises(TypeError, match="positional"):
        flash_mha(*arguments.values(), None, False, (-1, -1), None)  # type: ignore[misc]
    with pytest.raises(TypeError, match="dropout"):
        flash_mha(**arguments, dropout=0.1)


def test_sizes_beyond_64_bits_are_refused() -> None:
    jax = pytest.importorskip("jax")
    shape = jax.ShapeDtypeStruct((2**31, 2**31 - 1, 64, 64), np.float32)
    with pytest.raises(ValueError, match=r"^[qk]: got shape .*expected at most"):
        jax.eval_shape(flash_mha, shape, shape, shape)
