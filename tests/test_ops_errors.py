"""Bad calls of heed.ops: each row raises its type before anything runs, and names the argument, got and expected.

Every row runs on NumPy arrays, on JAX arrays, under `jax.jit` and under `jax.eval_shape`, as in test_errors.py.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import heed
from conftest import to_torch
from heed import ops
from test_errors import MODES, PLACED, Bad, cast, check_row, invoke, replace, zeros

I32 = np.int32
NUMPY = ("numpy",)
RNG = np.random.default_rng(0)


def floats(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


GOOD: dict[str, dict[str, Any]] = {
    "silu_and_mul": {"x": floats(3, 8)},
    "apply_rope": {
        "q": floats(6, 4, 16),
        "k": floats(6, 2, 16),
        "indptr": np.array([0, 2, 6], I32),
        "offsets": np.array([5, 9], I32),
    },
    "apply_rope_pos_ids": {"q": floats(6, 4, 16), "k": floats(6, 2, 16), "pos_ids": np.arange(6, dtype=I32)},
    "apply_rope_with_cos_sin_cache": {
        "q": floats(6, 4, 16),
        "k": floats(6, 2, 16),
        "pos_ids": np.arange(6, dtype=I32),
        "cos_sin_cache": floats(10, 12),
    },
    "rms_norm": {"x": floats(3, 8), "weight": floats(8)},
    "fused_add_rms_norm": {"x": floats(3, 8), "residual": floats(3, 8), "weight": floats(8)},
    "single_decode": {"q": floats(4, 16), "k": floats(9, 2, 16), "v": floats(9, 2, 12)},
}
GOOD["gelu_and_mul"] = GOOD["gelu_tanh_and_mul"] = GOOD["silu_and_mul"]
GOOD["apply_llama31_rope"] = GOOD["apply_rope"]

_FLOATS = "float32, float16 or bfloat16"

ACTIVATION = [
    Bad("odd last axis", ValueError, replace(x=zeros(3, 7)), ("^x", r"\[3, 7\]|\b7\b", "even")),
    Bad("empty last axis", ValueError, replace(x=zeros(3, 0)), ("^x", r"\[3, 0\]|\b0\b", "expected")),
    Bad("rank 0", ValueError, replace(x=np.zeros((), np.float32)), ("^x", "rank 0|shape \\[\\]", "expected")),
    Bad("float64", TypeError, cast(np.float64, "x"), ("^x", "float64", _FLOATS), x64=True),
    Bad("int32", TypeError, cast(I32, "x"), ("^x", "int32", _FLOATS)),
    Bad("float8", TypeError, cast(ml_dtypes.float8_e4m3fn, "x"), ("^x", "float8_e4m3fn", _FLOATS)),
    Bad("None", TypeError, replace(x=None), ("^x", "None", "array")),
    Bad("list", TypeError, replace(x=[[1.0, 2.0]]), ("^x", "list", "array"), NUMPY),
    Bad("big endian", TypeError, cast(">f4", "x"), ("^x", ">f4", "native"), NUMPY),
    Bad("backend unknown", ValueError, replace(backend="gpu"), ("^backend", "'gpu'", "'cpu'")),
    Bad("backend int", TypeError, replace(backend=80), ("^backend", "80", "'cpu'")),
    Bad("sm80 without a GPU", heed.UnsupportedError, replace(backend="sm80"),
        ("sm80_act_and_mul", "needs an NVIDIA .*GPU", "cpu_act_and_mul"), PLACED),
]  # fmt: skip

ROPE_COMMON = [
    Bad("q rank 4", ValueError, replace(q=zeros(1, 6, 4, 16)), ("^q", r"\[1, 6, 4, 16\]", "rank 3")),
    Bad("q rank 2", ValueError, replace(q=zeros(6, 16)), ("^q", r"\[6, 16\]", "rank 3")),
    Bad("k rank 2", ValueError, replace(k=zeros(6, 16)), ("^k", r"\[6, 16\]", "expected")),
    Bad("tokens of k", ValueError, replace(k=zeros(7, 2, 16)), ("^k", "7", "6")),
    Bad("head_dim of k", ValueError, replace(k=zeros(6, 2, 8)), ("^k", "8", "16")),
    Bad("head_dim 0", ValueError, replace(q=zeros(6, 4, 0), k=zeros(6, 2, 0)), ("^q", "head_dim 0", "1 to 256")),
    Bad("head_dim 258", ValueError, replace(q=zeros(6, 4, 258), k=zeros(6, 2, 258)), ("^q", "258", "1 to 256")),
    Bad("no q heads", ValueError, replace(q=zeros(6, 0, 16)), ("^q", "num_q_heads 0", "1 or more")),
    Bad("no kv heads", ValueError, replace(k=zeros(6, 0, 16)), ("^k", "num_kv_heads 0", "1 or more")),
    Bad("q float64", TypeError, cast(np.float64, "q", "k"), ("^q", "float64", _FLOATS), x64=True),
    Bad("k float16", TypeError, cast(np.float16, "k"), ("^k", "float16", "float32")),
    Bad("k None", TypeError, replace(k=None), ("^k", "None", "array")),
    Bad("interleave int", TypeError, replace(interleave=1), ("^interleave", "1", "True or False")),
    Bad("backend unknown", ValueError, replace(backend="tpu"), ("^backend", "'tpu'", "'cpu'")),
]  # fmt: skip
ROPE_FREQUENCIES = [
    Bad("rotary_dim 0", ValueError, replace(rotary_dim=0), ("^rotary_dim", "0", "even")),
    Bad("rotary_dim -2", ValueError, replace(rotary_dim=-2), ("^rotary_dim", "-2", "even")),
    Bad("rotary_dim odd", ValueError, replace(rotary_dim=7), ("^rotary_dim", "7", "even")),
    Bad("rotary_dim 18", ValueError, replace(rotary_dim=18), ("^rotary_dim", "18", "16")),
    Bad("rotary_dim float", TypeError, replace(rotary_dim=8.0), ("^rotary_dim", "8.0", "integer")),
    Bad("rotary_dim bool", TypeError, replace(rotary_dim=True), ("^rotary_dim", "True", "integer")),
    Bad("head_dim odd", ValueError, replace(q=zeros(6, 4, 15), k=zeros(6, 2, 15)), ("^rotary_dim", "15", "even")),
    Bad("scale 0", ValueError, replace(rope_scale=0.0), ("^rope_scale", "0", "positive")),
    Bad("scale negative", ValueError, replace(rope_scale=-1.0), ("^rope_scale", "-1", "positive")),
    Bad("scale NaN", ValueError, replace(rope_scale=float("nan")), ("^rope_scale", "nan", "finite|positive")),
    Bad("scale text", TypeError, replace(rope_scale="1"), ("^rope_scale", "'1'", "float")),
    Bad("theta 0", ValueError, replace(rope_theta=0), ("^rope_theta", "0", "positive")),
    Bad("theta inf", ValueError, replace(rope_theta=float("inf")), ("^rope_theta", "inf", "finite|positive")),
    Bad("theta None", TypeError, replace(rope_theta=None), ("^rope_theta", "None", "float")),
]  # fmt: skip
ROPE_SEQUENCES = [
    Bad("indptr None", TypeError, replace(indptr=None), ("^indptr", "None", "array")),
    Bad("offsets None", TypeError, replace(offsets=None), ("^offsets", "None", "array")),
    Bad("indptr float", TypeError, cast(np.float32, "indptr"), ("^indptr", "float32", "int32|integer")),
    Bad("offsets bool", TypeError, cast(np.bool_, "offsets"), ("^offsets", "bool", "int32|integer")),
    Bad("indptr rank 2", ValueError, replace(indptr=zeros(1, 3, dtype=I32)), ("^indptr", r"\[1, 3\]", "expected")),
    Bad("indptr empty", ValueError, replace(indptr=zeros(0, dtype=I32)), ("^indptr", r"\[0\]", "expected")),
    Bad("offsets length", ValueError, replace(offsets=zeros(3, dtype=I32)), ("^offsets", "3", "2")),
    Bad("indptr decreases", ValueError, replace(indptr=np.array([0, 5, 3], I32)), ("^indptr", "3 after 5", "decrease"),
        NUMPY),
    Bad("indptr negative", ValueError, replace(indptr=np.array([-1, 2, 6], I32)), ("^indptr", "-1", "0 or more"),
        NUMPY),
    Bad("indptr too long", ValueError, replace(indptr=np.array([0, 2, 7], I32)), ("^indptr", "7", "at most 6"), NUMPY),
    Bad("offsets beyond int32", ValueError, replace(offsets=np.array([0, 2**31], np.int64)),
        ("^offsets", str(2**31), "int32"), NUMPY),
]  # fmt: skip
LLAMA31 = [
    Bad("low 0", ValueError, replace(low_freq_factor=0.0), ("^low_freq_factor", "0", "positive")),
    Bad("low text", TypeError, replace(low_freq_factor="1"), ("^low_freq_factor", "'1'", "float")),
    Bad("high NaN", ValueError, replace(high_freq_factor=float("nan")), ("^high_freq_factor", "nan", "expected")),
    Bad("high below low", ValueError, replace(low_freq_factor=4.0, high_freq_factor=1.0),
        ("^high_freq_factor", "1", "low_freq_factor")),
    Bad("high is low", ValueError, replace(high_freq_factor=1.0), ("^high_freq_factor", "1", "low_freq_factor")),
    Bad("context 0", ValueError, replace(old_context_len=0), ("^old_context_len", "0", "positive")),
    Bad("sm80 without a GPU", heed.UnsupportedError, replace(backend="sm80"),
        ("sm80_rope", "needs an NVIDIA .*GPU", "cpu_rope"), PLACED),
]  # fmt: skip
POS_IDS = [
    Bad("pos_ids None", TypeError, replace(pos_ids=None), ("^pos_ids", "None", "array")),
    Bad("pos_ids float", TypeError, cast(np.float32, "pos_ids"), ("^pos_ids", "float32", "int32|integer")),
    Bad("pos_ids length", ValueError, replace(pos_ids=zeros(5, dtype=I32)), ("^pos_ids", "5", "6")),
    Bad("pos_ids rank", ValueError, replace(pos_ids=zeros(6, 1, dtype=I32)), ("^pos_ids", r"\[6, 1\]", "expected")),
]
CACHE = [
    Bad("cache None", TypeError, replace(cos_sin_cache=None), ("^cos_sin_cache", "None", "array")),
    Bad("cache float16", TypeError, cast(np.float16, "cos_sin_cache"), ("^cos_sin_cache", "float16", "float32")),
    Bad("cache float64", TypeError, cast(np.float64, "cos_sin_cache"), ("^cos_sin_cache", "float64", "float32"),
        x64=True),
    Bad("cache rank", ValueError, replace(cos_sin_cache=zeros(1, 10, 12)),
        ("^cos_sin_cache", r"\[1, 10, 12\]", "expected")),
    Bad("cache odd", ValueError, replace(cos_sin_cache=zeros(10, 11)), ("^cos_sin_cache", "11", "even")),
    Bad("cache too wide", ValueError, replace(cos_sin_cache=zeros(10, 18)), ("^cos_sin_cache", "18", "head_dim 16")),
    Bad("cache empty", ValueError, replace(cos_sin_cache=zeros(0, 12)), ("^cos_sin_cache", r"\[0, 12\]", "at least 1"),
        MODES[1:]),
    Bad("position too far", ValueError, replace(pos_ids=np.array([0, 1, 10, 2, 3, 4], I32)),
        ("^pos_ids", "10 at index 2", "0 to 9"), NUMPY),
    Bad("position negative", ValueError, replace(pos_ids=np.array([0, 1, 1, 2, -3, 4], np.int64)),
        ("^pos_ids", "-3 at index 4", "0 to 9"), NUMPY),
]  # fmt: skip
NORM = [
    Bad("weight length", ValueError, replace(weight=zeros(7)), ("^weight", "7", "8")),
    Bad("weight rank 2", ValueError, replace(weight=zeros(1, 8)), ("^weight", r"\[1, 8\]", "rank 1")),
    Bad("weight rank 0", ValueError, replace(weight=np.zeros((), np.float32)), ("^weight", "rank 0", "rank 1")),
    Bad("x rank 0", ValueError, replace(x=np.zeros((), np.float32)), ("^x", r"rank 0|\[\]", "expected")),
    Bad("hidden 0", ValueError, lambda a: {name: zeros(*x.shape[:-1], 0) for name, x in a.items()},
        ("^x", r"\b0\b", "1 or more")),
    Bad("x float64", TypeError, cast(np.float64, "x"), ("^x", "float64", _FLOATS), x64=True),
    Bad("weight float16", TypeError, cast(np.float16, "weight"), ("^weight", "float16", "float32")),
    Bad("weight None", TypeError, replace(weight=None), ("^weight", "None", "array")),
    Bad("x None", TypeError, replace(x=None), ("^x", "None", "array")),
    Bad("eps negative", ValueError, replace(eps=-1e-6), ("^eps", "-", "0")),
    Bad("eps NaN", ValueError, replace(eps=float("nan")), ("^eps", "nan", "finite|0")),
    Bad("eps inf", ValueError, replace(eps=float("inf")), ("^eps", "inf", "finite")),
    Bad("eps text", TypeError, replace(eps="1e-6"), ("^eps", "'1e-6'", "float")),
]  # fmt: skip
RESIDUAL = [
    Bad("residual shape", ValueError, replace(residual=zeros(4, 8)), ("^residual", "4", "3")),
    Bad("residual broadcast", ValueError, replace(residual=zeros(1, 8)), ("^residual", r"\b1\b", "3")),
    Bad("residual rank", ValueError, replace(residual=zeros(8)), ("^residual", r"\[8\]", "expected")),
    Bad("residual bfloat16", TypeError, cast(ml_dtypes.bfloat16, "residual"), ("^residual", "bfloat16", "float32")),
    Bad("residual None", TypeError, replace(residual=None), ("^residual", "None", "array")),
    Bad("sm80 without a GPU", heed.UnsupportedError, replace(backend="sm80"),
        ("sm80_rms_norm", "needs an NVIDIA .*GPU", "cpu_rms_norm"), PLACED),
]  # fmt: skip
DECODE = [
    Bad("q rank 3", ValueError, replace(q=zeros(1, 4, 16)), ("^q", r"\[1, 4, 16\]", "rank 2")),
    Bad("q rank 1", ValueError, replace(q=zeros(16)), ("^q", r"\[16\]", "rank 2")),
    Bad("k rank 2", ValueError, replace(k=zeros(9, 16)), ("^k", r"\[9, 16\]", "expected")),
    Bad("v rank 4", ValueError, replace(v=zeros(1, 9, 2, 12)), ("^v", r"\[1, 9, 2, 12\]", "expected")),
    Bad("head_dim of k", ValueError, replace(k=zeros(9, 2, 24)), ("^k", "24", "16")),
    Bad("kv_len of v", ValueError, replace(v=zeros(8, 2, 12)), ("^v", "8", "9")),
    Bad("heads of v", ValueError, replace(v=zeros(9, 1, 12)), ("^v", "1", "2")),
    Bad("heads 4 over 3", ValueError, replace(k=zeros(9, 3, 16), v=zeros(9, 3, 12)),
        ("num_q_heads 4", "multiple", "3")),
    Bad("no kv heads", ValueError, replace(k=zeros(9, 0, 16), v=zeros(9, 0, 12)),
        ("^k", "num_kv_heads 0", "1 or more")),
    Bad("no q heads", ValueError, replace(q=zeros(0, 16)), ("^q", "num_q_heads 0", "1 or more")),
    Bad("head_dim 257", ValueError, replace(q=zeros(4, 257), k=zeros(9, 2, 257)), ("^q", "257", "1 to 256")),
    Bad("head_dim_v 257", ValueError, replace(v=zeros(9, 2, 257)), ("^v", "257", "1 to 256")),
    Bad("head_dim_v 0", ValueError, replace(v=zeros(9, 2, 0)), ("^v", "0", "1 to 256")),
    Bad("HND as NHD", ValueError, replace(kv_layout="HND"), ("num_kv_heads 9|num_q_heads 4", "multiple", "9")),
    Bad("layout unknown", ValueError, replace(kv_layout="DHN"), ("^kv_layout", "'DHN'", "'NHD'.*'HND'")),
    Bad("layout int", TypeError, replace(kv_layout=0), ("^kv_layout", "0", "'NHD'")),
    Bad("window -2", ValueError, replace(window_left=-2), ("^window_left", "-2", "-1")),
    Bad("window float", TypeError, replace(window_left=3.0), ("^window_left", "3.0", "integer")),
    Bad("window None", TypeError, replace(window_left=None), ("^window_left", "None", "integer")),
    Bad("cap negative", ValueError, replace(logits_soft_cap=-1.0), ("^logits_soft_cap", "-1", "0.*positive")),
    Bad("cap inf", ValueError, replace(logits_soft_cap=float("inf")), ("^logits_soft_cap", "inf", "finite")),
    Bad("scale NaN", ValueError, replace(sm_scale=float("nan")), ("^sm_scale", "nan", "finite")),
    Bad("scale bool", TypeError, replace(sm_scale=True), ("^sm_scale", "True", "float")),
    Bad("rope of odd heads", ValueError, replace(q=zeros(4, 15), k=zeros(9, 2, 15), rope_theta=1e4),
        ("head_dim|rope", "15", "even")),
    Bad("rope_scale 0", ValueError, replace(rope_scale=0.0), ("^rope_scale", "0", "positive")),
    Bad("rope_theta -1", ValueError, replace(rope_theta=-1.0), ("^rope_theta", "-1", "positive")),
    Bad("rope_theta text", TypeError, replace(rope_theta="x"), ("^rope_theta", "'x'", "float")),
    Bad("sinks length", ValueError, replace(sinks=zeros(2)), ("^sinks", "2", "4")),
    Bad("sinks float16", TypeError, replace(sinks=zeros(4, dtype=np.float16)), ("^sinks", "float16", "float32")),
    Bad("slopes rank", ValueError, replace(alibi_slopes=zeros(1, 4)), ("^alibi_slopes", r"\[1, 4\]", "expected")),
    Bad("slopes int", TypeError, replace(alibi_slopes=zeros(4, dtype=I32)), ("^alibi_slopes", "int32", "float32")),
    Bad("q float64", TypeError, cast(np.float64), ("^q", "float64", _FLOATS), x64=True),
    Bad("k float16", TypeError, cast(np.float16, "k"), ("^k", "float16", "float32")),
    Bad("v None", TypeError, replace(v=None), ("^v", "None", "array")),
    Bad("return_lse int", TypeError, replace(return_lse=1), ("^return_lse", "1", "True or False")),
    Bad("batch_invariant None", TypeError, replace(batch_invariant=None),
        ("^batch_invariant", "None", "True or False")),
    Bad("sm80 without a GPU", heed.UnsupportedError, replace(backend="sm80"),
        ("sm80_attention_decode", "needs an NVIDIA .*GPU", "cpu_attention_decode"), PLACED),
]  # fmt: skip

ROWS: dict[str, list[Bad]] = {
    "silu_and_mul": ACTIVATION,
    "gelu_and_mul": ACTIVATION[:2],
    "gelu_tanh_and_mul": ACTIVATION[:2],
    "apply_rope": ROPE_COMMON + ROPE_FREQUENCIES + ROPE_SEQUENCES,
    "apply_llama31_rope": ROPE_COMMON[:1] + ROPE_FREQUENCIES + ROPE_SEQUENCES[-4:-1] + LLAMA31,
    "apply_rope_pos_ids": ROPE_COMMON[:1] + ROPE_FREQUENCIES + POS_IDS,
    "apply_rope_with_cos_sin_cache": ROPE_COMMON + POS_IDS + CACHE,
    "rms_norm": NORM,
    "fused_add_rms_norm": NORM + RESIDUAL,
    "single_decode": DECODE,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ops.__all__)
def test_the_good_call_is_good(name: str, mode: str) -> None:
    assert invoke(mode, GOOD[name], getattr(ops, name)) is not None


@pytest.mark.parametrize(
    ("name", "row", "mode"),
    [
        pytest.param(name, row, mode, id=f"{name}-{row.name}-{mode}")
        for name, rows in ROWS.items()
        for row in rows
        for mode in row.modes
    ],
)
def test_bad_input(name: str, row: Bad, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_row(row, mode, monkeypatch, GOOD[name], getattr(ops, name))


STATIC: dict[str, dict[str, Any]] = {
    "apply_rope": {"rotary_dim": 8, "interleave": True, "rope_scale": 2.0, "rope_theta": 1e3},
    "apply_llama31_rope": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 100.0},
    "rms_norm": {"eps": 1e-5},
    "single_decode": {
        "window_left": 3, "logits_soft_cap": 2.0, "sm_scale": 0.5, "rope_scale": 1.0, "rope_theta": 1e4,
        "return_lse": True, "batch_invariant": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, arguments in STATIC.items() for argument in arguments]
)
def test_a_traced_static_argument_names_static_argnames(name: str, argument: str) -> None:
    jax = pytest.importorskip("jax")
    arrays = jax.tree.map(jax.numpy.asarray, GOOD[name])
    with pytest.raises(TypeError) as caught:
        jax.jit(lambda arrays, value: getattr(ops, name)(**arrays, **{argument: value}))(arrays, STATIC[name][argument])
    assert argument in str(caught.value) and "static_argnames" in str(caught.value)


@pytest.mark.parametrize("name", ops.__all__)
def test_backend_is_keyword_only(name: str) -> None:
    with pytest.raises(TypeError, match=r"positional|unexpected|multiple"):
        getattr(ops, name)(*GOOD[name].values(), None, None, None, None, None, None, None, None, None, None)


def test_kinds_of_array_do_not_mix() -> None:
    torch = pytest.importorskip("torch")
    x = floats(3, 8)
    with pytest.raises(TypeError, match=r"different kinds.*x is numpy.*weight is torch"):
        ops.rms_norm(x, torch.ones(8))
    with pytest.raises(TypeError, match=r"different kinds.*q is torch.*indptr is numpy"):
        ops.apply_rope(torch.ones(2, 1, 4), torch.ones(2, 1, 4), np.array([0, 2]), torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("name", ["apply_rope", "rms_norm", "fused_add_rms_norm", "single_decode"])
def test_numpy_beside_jax_counts_as_jax(name: str) -> None:
    jax = pytest.importorskip("jax")
    function = getattr(ops, name)
    first, *rest = GOOD[name].items()
    with jax.default_device(jax.devices("cpu")[0]):
        mixed = function(**{first[0]: jax.numpy.asarray(first[1])}, **dict(rest))
    for x, y in zip(jax.tree.leaves(mixed), jax.tree.leaves(function(**GOOD[name])), strict=True):
        assert isinstance(x, jax.Array)
        np.testing.assert_allclose(np.asarray(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["apply_rope", "rms_norm", "fused_add_rms_norm", "single_decode"])
def test_devices_do_not_mix(name: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    function = getattr(ops, name)
    for moved in GOOD[name]:
        arrays = {key: to_torch(x, "cpu" if key == moved else "cuda:0") for key, x in GOOD[name].items()}
        with pytest.raises((TypeError, ValueError), match=r"cpu|CPU|device"):
            function(**arrays)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ops.__all__)
def test_cpu_kernels_decline_a_gpus_arrays(name: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    arrays = {key: to_torch(x, "cuda:0") for key, x in GOOD[name].items()}
    with pytest.raises(heed.UnsupportedError) as caught:
        getattr(ops, name)(**arrays, backend="cpu")
    assert len(caught.value.reasons) >= 2 and all(caught.value.reasons.values())
