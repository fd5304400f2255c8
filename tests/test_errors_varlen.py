"""Bad input of flash_mha_varlen: each row raises its type before anything runs, and the message says what is wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import heed
from test_errors import I32, MODES, PLACED, Bad, check_row, invoke, replace, zeros

flash_mha_varlen: Any = heed.flash_mha_varlen  # the tests hand it what its annotations exclude
NUMPY = ("numpy",)  # only there are values known; elsewhere they are clamped


def good() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((6, 4, 16)).astype(np.float32),
        "k": rng.standard_normal((8, 2, 16)).astype(np.float32),
        "v": rng.standard_normal((8, 2, 12)).astype(np.float32),
        "cu_seqlens_q": np.array([0, 2, 6], np.int32),
        "cu_seqlens_k": np.array([0, 5, 8], np.int32),
        "seqused_k": np.array([5, 1], np.int32),
    }


def ints(*values: int, dtype: Any = I32) -> np.ndarray:
    return np.array(values, dtype)


ROWS = [
    # Ranks and shapes.
    Bad("q rank 4", ValueError, replace(q=zeros(1, 6, 4, 16)),
        ("^q", r"\[1, 6, 4, 16\]", "rank 3", "total_q.*num_q_heads.*head_dim")),
    Bad("q rank 2", ValueError, replace(q=zeros(6, 16)), ("^q", r"\[6, 16\]", "total_q.*num_q_heads.*head_dim")),
    Bad("k rank 4", ValueError, replace(k=zeros(1, 8, 2, 16)), ("^k", r"\[1, 8, 2, 16\]", "total_k.*num_kv_heads")),
    Bad("v rank 2", ValueError, replace(v=zeros(8, 12)), ("^v", r"\[8, 12\]", "total_k.*num_kv_heads.*head_dim_v")),
    Bad("total_k of v", ValueError, replace(v=zeros(9, 2, 12)), ("^v", "total_k 9", "total_k 8", "k")),
    Bad("head_dim 257", ValueError, replace(q=zeros(6, 4, 257), k=zeros(8, 2, 257)), ("^q", "257", "1 to 256")),
    Bad("head_dim differs", ValueError, replace(k=zeros(8, 2, 24)), ("^k", "24", "16", "q")),
    Bad("heads 4 over 3", ValueError, replace(k=zeros(8, 3, 16), v=zeros(8, 3, 12)), ("num_q_heads 4", "multiple")),
    Bad("q heads 0", ValueError, replace(q=zeros(6, 0, 16)), ("^q", "num_q_heads 0", "1 or more")),
    Bad("sinks length", ValueError, replace(sinks=zeros(2)), ("^sinks", "num_q_heads 2", "num_q_heads 4")),
    Bad("alibi rank", ValueError, replace(alibi_slopes=zeros(2, 4)), ("^alibi_slopes", r"\[2, 4\]", "num_q_heads")),
    Bad("cu_seqlens_q rank 0", ValueError, replace(cu_seqlens_q=zeros(dtype=I32)), ("^cu_seqlens_q", "rank 0|shape")),
    Bad("cu_seqlens_q rank 2", ValueError, replace(cu_seqlens_q=zeros(1, 3, dtype=I32)),
        ("^cu_seqlens_q", r"\[1, 3\]", "rank 1", "batch.*1")),
    Bad("cu_seqlens_q of size 0", ValueError, replace(cu_seqlens_q=zeros(0, dtype=I32), cu_seqlens_k=None),
        ("^cu_seqlens_q", "0", "batch.*1|at least 1")),
    Bad("cu_seqlens_k longer", ValueError, replace(cu_seqlens_k=ints(0, 5, 8, 8)), ("^cu_seqlens_k", "4", "3")),
    Bad("seqused_k longer", ValueError, replace(seqused_k=ints(5, 1, 0)), ("^seqused_k", "batch 3", "batch 2")),
    Bad("seqused_k as long as cu_seqlens", ValueError, replace(seqused_k=ints(5, 1, 0), cu_seqlens_k=None),
        ("^seqused_k", "batch 3", "batch 2", "cu_seqlens_q")),
    Bad("seqused_k rank 0", ValueError, replace(seqused_k=zeros(dtype=I32)), ("^seqused_k", "batch")),
    # Dtypes and kinds of arrays.
    Bad("float64", TypeError, replace(q=zeros(6, 4, 16, dtype=np.float64)),
        ("^q", "float64", "float32, float16 or bfloat16"), x64=True),
    Bad("k float16", TypeError, replace(k=zeros(8, 2, 16, dtype=np.float16)), ("^k", "float16", "float32", "q")),
    Bad("sinks bfloat16", TypeError, replace(sinks=zeros(4, dtype=ml_dtypes.bfloat16)),
        ("^sinks", "bfloat16", "float32")),
    Bad("cu_seqlens_q float", TypeError, replace(cu_seqlens_q=zeros(3)), ("^cu_seqlens_q", "float32", "integer")),
    Bad("cu_seqlens_k bool", TypeError, replace(cu_seqlens_k=zeros(3, dtype=bool)),
        ("^cu_seqlens_k", "bool", "integer")),
    Bad("seqused_k float16", TypeError, replace(seqused_k=zeros(2, dtype=np.float16)),
        ("^seqused_k", "float16", "integer")),
    Bad("cu_seqlens_q None", TypeError, replace(cu_seqlens_q=None), ("^cu_seqlens_q", "None", r"\[batch \+ 1\]")),
    Bad("q None", TypeError, replace(q=None), ("^q", "None", "array")),
    Bad("cu_seqlens_q list", TypeError, replace(cu_seqlens_q=[0, 2, 6]), ("^cu_seqlens_q", "list", "array"), NUMPY),
    Bad("seqused_k int", TypeError, replace(seqused_k=5), ("^seqused_k", "int", "array"), NUMPY),
    Bad("cu_seqlens_q masked", TypeError, replace(cu_seqlens_q=np.ma.masked_array([0, 9, 6], [0, 1, 0])),
        ("^cu_seqlens_q", "masked"), NUMPY),
    # Values of lengths that the host knows.
    Bad("cu_seqlens_q negative", ValueError, replace(cu_seqlens_q=ints(-1, 2, 6)),
        ("^cu_seqlens_q", "-1", "0 or more"), NUMPY),
    Bad("cu_seqlens_q decreases", ValueError, replace(cu_seqlens_q=ints(0, 5, 4)),
        ("^cu_seqlens_q", "4 after 5 at index 2", "do not decrease"), NUMPY),
    Bad("cu_seqlens_q decreases, unsigned", ValueError, replace(cu_seqlens_q=ints(0, 5, 4, dtype=np.uint8)),
        ("^cu_seqlens_q", "4 after 5"), NUMPY),
    Bad("cu_seqlens_q beyond q", ValueError, replace(cu_seqlens_q=ints(0, 2, 7)),
        ("^cu_seqlens_q", "7", "at most 6", "rows of q"), NUMPY),
    Bad("cu_seqlens_q beyond int32", ValueError, replace(cu_seqlens_q=ints(0, 2, 2**32, dtype=np.int64)),
        ("^cu_seqlens_q", str(2**32), "at most 6"), NUMPY),
    Bad("cu_seqlens_q beyond k", ValueError, replace(q=zeros(20, 4, 16), cu_seqlens_q=ints(0, 2, 9), cu_seqlens_k=None),
        ("^cu_seqlens_q", "9", "at most 8", "rows of k", "no cu_seqlens_k"), NUMPY),
    Bad("cu_seqlens_k beyond k", ValueError, replace(cu_seqlens_k=ints(0, 2, 9)),
        ("^cu_seqlens_k", "9", "at most 8", "rows of k"), NUMPY),
    Bad("cu_seqlens_k decreases", ValueError, replace(cu_seqlens_k=ints(4, 3, 8)),
        ("^cu_seqlens_k", "3 after 4"), NUMPY),
    Bad("no sequences, out of range", ValueError,
        replace(cu_seqlens_q=ints(7), cu_seqlens_k=ints(0), seqused_k=zeros(0, dtype=I32)),
        ("^cu_seqlens_q", "7", "at most 6"), NUMPY),
    Bad("seqused_k negative", ValueError, replace(seqused_k=ints(5, -1)),
        ("^seqused_k", "-1", "sequence 1", "0 or more"), NUMPY),
    Bad("max_seqlen_q too small", ValueError, replace(max_seqlen_q=3),
        ("^max_seqlen_q", "3", "at least 4", "sequence 1"), NUMPY),
    Bad("max_seqlen_k too small", ValueError, replace(max_seqlen_k=4),
        ("^max_seqlen_k", "4", "at least 5", "sequence 0"), NUMPY),
    Bad("max_seqlen_k too small for q's lengths", ValueError,
        replace(max_seqlen_k=0, cu_seqlens_k=None, seqused_k=None),
        ("^max_seqlen_k", "0", "at least 4", "sequence 1"), NUMPY),
    # Static arguments.
    Bad("max_seqlen_q -2", ValueError, replace(max_seqlen_q=-2), ("^max_seqlen_q", "-2", "-1")),
    Bad("max_seqlen_k -7", ValueError, replace(max_seqlen_k=-7), ("^max_seqlen_k", "-7", "-1")),
    Bad("max_seqlen_q None", TypeError, replace(max_seqlen_q=None), ("^max_seqlen_q", "None", "integer")),
    Bad("max_seqlen_q float", TypeError, replace(max_seqlen_q=4.0), ("^max_seqlen_q", "4.0", "integer")),
    Bad("max_seqlen_k bool", TypeError, replace(max_seqlen_k=True), ("^max_seqlen_k", "True", "integer")),
    Bad("max_seqlen_k array", TypeError, replace(max_seqlen_k=np.array([4])), ("^max_seqlen_k", "integer")),
    Bad("max_seqlen_q beyond 64 bits", ValueError, replace(max_seqlen_q=2**70), ("^max_seqlen_q", "64 bits")),
    Bad("scale NaN", ValueError, replace(softmax_scale=float("nan")), ("^softmax_scale", "nan", "finite")),
    Bad("window of 1", ValueError, replace(window_size=(5,)), ("^window_size", r"\(5,\)", "pair")),
    Bad("window -2", ValueError, replace(window_size=(-2, 0)), ("^window_size", r"\(-2, 0\)", "-1")),
    Bad("causal_align", ValueError, replace(causal_align="left"), ("^causal_align", "'left'")),
    Bad("is_causal int", TypeError, replace(is_causal=1), ("^is_causal", "1", "True or False")),
    Bad("segment_ids", TypeError, replace(segment_ids=zeros(6, dtype=I32)), ("unexpected keyword", "segment_ids")),
    Bad("backend unknown", ValueError, replace(backend="tpu"), ("^backend", "'tpu'")),
    Bad("backend sm90 without a GPU", heed.UnsupportedError, replace(backend="sm90"),
        ("sm90_attention_fwd", "needs an NVIDIA .*GPU"), PLACED),
    Bad("backend sm80 without a GPU", heed.UnsupportedError, replace(backend="sm80"),
        ("sm80_attention_fwd", "needs an NVIDIA .*GPU"), PLACED),
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_the_good_call_is_good(mode: str) -> None:
    assert invoke(mode, good(), flash_mha_varlen).shape == (6, 4, 12)
    assert invoke(mode, good() | {"max_seqlen_q": 4, "max_seqlen_k": 5}, flash_mha_varlen).shape == (6, 4, 12)
    assert invoke(mode, good() | {"seqused_k": ints(9, 9)}, flash_mha_varlen).shape == (6, 4, 12)


@pytest.mark.parametrize(
    ("row", "mode"), [pytest.param(row, mode, id=f"{row.name}-{mode}") for row in ROWS for mode in row.modes]
)
def test_bad_input(row: Bad, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_row(row, mode, monkeypatch, good(), flash_mha_varlen)


@pytest.mark.parametrize("row", [row for row in ROWS if row.modes == NUMPY and row.error is ValueError],
                         ids=lambda row: row.name)  # fmt: skip
def test_lengths_in_numpy_are_checked_beside_jax_arrays_and_tracers_too(row: Bad) -> None:
    jax = pytest.importorskip("jax")
    arguments = row.change(good())
    rest = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
    floats = {name: jax.numpy.asarray(arguments[name]) for name in ("q", "k", "v")}
    for call in (lambda x: flash_mha_varlen(**x, **rest), jax.jit(lambda x: flash_mha_varlen(**x, **rest))):
        with pytest.raises(ValueError, match=row.says[0]):
            call(floats)


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k", "softmax_scale", "is_causal"])
def test_a_traced_static_argument_names_static_argnames(name: str) -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=rf"{name}[\s\S]*static_argnames"):
        jax.jit(lambda x, value: flash_mha_varlen(**x, **{name: value}))(good(), 5)


def test_kinds_do_not_mix() -> None:
    class Other:
        def __dlpack__(self, **_: Any) -> Any: ...

    with pytest.raises(TypeError, match=r"different kinds.*cu_seqlens_q is"):
        flash_mha_varlen(**(good() | {"cu_seqlens_q": Other()}))


def test_sizes_beyond_64_bits_are_refused() -> None:
    jax = pytest.importorskip("jax")
    shape = jax.ShapeDtypeStruct((2**62, 64, 64), np.float32)
    lengths = jax.ShapeDtypeStruct((3,), np.int32)
    with pytest.raises(ValueError, match=r"^[qk]: got shape .*expected at most"):
        jax.eval_shape(flash_mha_varlen, shape, shape, shape, lengths)


def test_a_forced_backend_lists_every_candidate() -> None:
    with pytest.raises(heed.UnsupportedError, match=r"^flash_mha_varlen: no kernel serves") as caught:
        flash_mha_varlen(**good(), backend="sm90")
    assert set(caught.value.reasons) >= {"cpu_attention_fwd", "sm80_attention_fwd", "sm90_attention_fwd"}
