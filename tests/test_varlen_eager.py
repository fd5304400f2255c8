"""flash_mha_varlen on NumPy arrays of any layout and on other objects with DLPack; and `explain` of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import heed
from expected import expected_of_varlen, expected_varlen
from specs import DTYPES
from test_correctness_classes import sparse
from test_numpy_eager import OnlyDLPack, in_layout, misplaced, read_only, spread
from varlen_specs import VARLEN_BY_NAME, VarlenSpec, make_varlen_inputs

flash_mha_varlen: Any = heed.flash_mha_varlen

LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")


def spec_of(dtype: str = "float32") -> VarlenSpec:
    return VarlenSpec(
        "varlen_eager", q_lens=(20, 0, 37), kv_lens=(50, 3, 41), used=(44, 3, 50), outside=(2, 3), num_q_heads=4,
        head_dim_qk=24, head_dim_v=16, dtype=dtype, is_causal=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", ["heads first", "every third token", "tokens reversed", "head dim spread", "misplaced", "read only"]
)
def test_layouts(layout: str, dtype: str) -> None:
    change: Any = {
        "heads first": lambda x: in_layout(x, (1, 0, 2)),
        "every third token": lambda x: spread(x, 0, 3),
        "tokens reversed": lambda x: spread(x, 0, -1),
        "head dim spread": lambda x: spread(x, 2, 2),
        "misplaced": misplaced,
        "read only": read_only,
    }[layout]
    spec = spec_of(dtype)
    inputs = make_varlen_inputs(spec)
    q, k, v = (change(x) for x in (inputs.q, inputs.k, inputs.v))
    out, lse = flash_mha_varlen(q, k, v, **inputs.arrays, is_causal=True, return_lse=True)
    expected_of_varlen(spec).check(out, lse, layout)


def test_one_sequence_for_all_tokens_of_one_key() -> None:
    """Zero strides: every key is the same memory."""
    inputs = make_varlen_inputs(spec_of())
    k, v = (np.broadcast_to(x[:1], x.shape) for x in (inputs.k, inputs.v))
    out, lse = flash_mha_varlen(inputs.q, k, v, **inputs.arrays, return_lse=True)
    expected_varlen(inputs.q, k, v, **inputs.arrays).check(out, lse, "zero strides")


def test_inputs_are_not_written() -> None:
    inputs = make_varlen_inputs(spec_of())
    operands = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.arrays}
    before = {name: x.copy() for name, x in operands.items()}
    flash_mha_varlen(**operands)
    for name, x in operands.items():
        assert np.array_equal(x, before[name]), name


def test_numpy_does_not_need_jax() -> None:
    program = (
        "import sys, numpy as np, heed\nx = np.ones((3, 1, 4), np.float32)\n"
        "assert heed.flash_mha_varlen(x, x, x, np.array([0, 1, 3])).all() and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("axis", ["tokens", "heads"])
def test_strides_beyond_32_bits(axis: str) -> None:
    spec = VarlenSpec("varlen_far", q_lens=(2, 0, 1), num_q_heads=3, num_kv_heads=3, head_dim_qk=72, dtype="float16")
    inputs = make_varlen_inputs(spec)
    far = 2**31 + 72
    strides = {"tokens": (far, 72, 1), "heads": (72, far, 1)}[axis]

    def far_apart(array: np.ndarray) -> np.ndarray:
        memory = sparse(2 * far + 9 * 72, array.dtype)
        view = np.lib.stride_tricks.as_strided(memory, array.shape, [s * array.itemsize for s in strides])
        view[...] = array
        return view

    q, k, v = (far_apart(x) for x in (inputs.q, inputs.k, inputs.v))
    out, lse = flash_mha_varlen(q, k, v, **inputs.arrays, return_lse=True)
    expected_of_varlen(spec).check(out, lse, f"far {axis}")


# Other kinds of array ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_any_object_with_dlpack(dtype: str) -> None:
    inputs = make_varlen_inputs(spec_of())
    arrays = {name: OnlyDLPack(x.astype(dtype)) for name, x in inputs.arrays.items()}
    q, k, v = (OnlyDLPack(x) for x in (inputs.q, inputs.k, inputs.v))
    out, lse = flash_mha_varlen(q, k, v, **arrays, is_causal=True, return_lse=True)
    expected_of_varlen(spec_of()).check(np.from_dlpack(out), np.from_dlpack(lse), dtype)
    with pytest.raises(TypeError, match=r"different kinds.*cu_seqlens_q is numpy"):
        flash_mha_varlen(q, k, v, inputs.arrays["cu_seqlens_q"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")

    def to_torch(array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    def to_numpy(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return np.asarray(tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
        return np.asarray(tensor.numpy())

    spec = spec_of(dtype)
    inputs = make_varlen_inputs(spec)
    q, k, v = (to_torch(x) for x in (inputs.q, inputs.k, inputs.v))
    for integers in (np.int32, np.int64, np.int16, np.uint8):
        arrays = {name: to_torch(x.astype(integers)) for name, x in inputs.arrays.items()}
        out, lse = flash_mha_varlen(q, k, v, **arrays, is_causal=True, return_lse=True)
        assert isinstance(out, torch.Tensor) and out.dtype == q.dtype and lse.dtype == torch.float32
        expected_of_varlen(spec).check(to_numpy(out), lse.numpy(), "torch")
    # Values of tensors are not read by the host: they are clamped, wherever they are, and never wrapped.
    wide = {
        "cu_seqlens_q": np.array([-(2**40), 20, 2**32 + 3]), "cu_seqlens_k": np.array([0, 50, 2**62]),
        "seqused_k": np.array([-(2**33), 2**32]),
    }  # fmt: skip
    clamped = {name: np.clip(x, -(2**31), 2**31 - 1) for name, x in wide.items()}
    out, lse = flash_mha_varlen(q, k, v, **{name: to_torch(x) for name, x in wide.items()}, return_lse=True)
    expected_varlen(inputs.q, inputs.k, inputs.v, **clamped).check(to_numpy(out), lse.numpy(), "clamped")


# explain -------------------------------------------------------------------------------------------------------------


def test_explain() -> None:
    inputs = make_varlen_inputs(VARLEN_BY_NAME["varlen_everything"])
    operands = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.arrays}
    answer = heed.explain(heed.flash_mha_varlen, **operands, max_seqlen_q=300, is_causal=True)
    assert answer.function == "flash_mha_varlen" and answer.is_served and answer.chosen == "cpu_attention_fwd"
    assert "cu_seqlens_q=int32[8];cu_seqlens_k=int32[8];seqused_k=int32[7]" in answer.problem
    assert ";max_seqlen=300,-1;" in answer.problem
    assert "heed.flash_mha_varlen on cpu is served by cpu_attention_fwd" in str(answer)
    assert "max_seqlen 300,-1" in str(answer) and "cu_seqlens_q int32[8]" in str(answer)


def test_explain_takes_descriptions_and_refuses_what_the_call_refuses() -> None:
    jax = pytest.importorskip("jax")
    q = jax.ShapeDtypeStruct((4096, 16, 128), ml_dtypes.bfloat16)
    lengths = jax.ShapeDtypeStruct((9,), np.int64)
    assert heed.explain(heed.flash_mha_varlen, q, q, q, lengths, target="cpu").is_served
    assert heed.explain(heed.flash_mha_varlen, q, q, q, lengths, target="sm_80").target == "sm_80"
    for bad, error, message in (
        ((q, q, q, None), TypeError, "cu_seqlens_q: got None"),
        ((q, None, q, lengths), TypeError, "k: got None"),
        ((q, q, q, q), TypeError, "cu_seqlens_q: got dtype bfloat16"),
        ((q, q, q, jax.ShapeDtypeStruct((0,), np.int32)), ValueError, "cu_seqlens_q: got shape"),
    ):
        with pytest.raises(error, match=message):
            heed.explain(heed.flash_mha_varlen, *bad, target="cpu")
    with pytest.raises(TypeError, match=r"heed\.flash_mha, heed\.flash_mha_varlen, .* or one of heed\.ops"):
        heed.explain(print)
