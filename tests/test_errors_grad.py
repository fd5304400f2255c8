"""Bad input of flash_mha_bwd and flash_mha_varlen_bwd: what the forward pass refuses, and what comes in addition.

Every row runs on NumPy arrays, on JAX arrays, under `jax.jit` and under `jax.eval_shape`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import heed
import test_errors
import test_errors_varlen
from test_errors import MODES, PLACED, Bad, cast, check_row, invoke, replace, zeros

flash_mha_bwd: Any = heed.flash_mha_bwd  # the tests hand them what their annotations exclude
flash_mha_varlen_bwd: Any = heed.flash_mha_varlen_bwd


def good() -> dict[str, Any]:
    more = {"out": zeros(2, 6, 4, 12), "lse": zeros(2, 4, 6), "dout": zeros(2, 6, 4, 12), "dlse": zeros(2, 4, 6)}
    return test_errors.good() | more


def good_varlen() -> dict[str, Any]:
    more = {"out": zeros(6, 4, 12), "lse": zeros(4, 6), "dout": zeros(6, 4, 12), "dlse": zeros(4, 6)}
    return test_errors_varlen.good() | more


def of_backward(rows: list[Bad], good: Callable[[], dict[str, Any]]) -> list[Bad]:
    """The forward pass's rows, of kernels that are named otherwise; those of arguments that only it has left out."""
    return [
        dataclasses.replace(row, says=tuple(text.replace("attention_fwd", "attention_bwd") for text in row.says))
        for row in rows
        if "return_lse" not in row.change(good())
    ]


LIKE_OUT, LIKE_LSE = "batch.*q_len.*num_q_heads.*head_dim_v", "batch.*num_q_heads.*q_len"
ROWS = [
    *(
        row
        for name in ("out", "dout")
        for row in (
            Bad(f"{name} rank 3", ValueError, replace(**{name: zeros(6, 4, 12)}),
                (f"^{name}", r"\[6, 4, 12\]", LIKE_OUT)),
            Bad(f"{name} rank 5", ValueError, replace(**{name: zeros(1, 2, 6, 4, 12)}), (f"^{name}", "rank 5|4 axes")),
            Bad(f"{name} batch", ValueError, replace(**{name: zeros(1, 6, 4, 12)}), (f"^{name}", "batch 1", "batch 2")),
            Bad(f"{name} q_len", ValueError, replace(**{name: zeros(2, 8, 4, 12)}), (f"^{name}", "q_len 8", "q_len 6")),
            Bad(f"{name} heads", ValueError, replace(**{name: zeros(2, 6, 2, 12)}),
                (f"^{name}", "num_q_heads 2", "num_q_heads 4")),
            Bad(f"{name} like q", ValueError, replace(**{name: zeros(2, 6, 4, 16)}),
                (f"^{name}", "head_dim_v 16", "head_dim_v 12")),
            Bad(f"{name} float16", TypeError, cast(np.float16, name), (f"^{name}", "float16", "float32", "q")),
            Bad(f"{name} float64", TypeError, cast(np.float64, name), (f"^{name}", "float64", "float32"), x64=True),
            Bad(f"{name} int32", TypeError, cast(np.int32, name), (f"^{name}", "int32", "float32")),
            Bad(f"{name} None", TypeError, replace(**{name: None}), (f"^{name}", "None", "array")),
        )
    ),
    *(
        row
        for name in ("lse", "dlse")
        for row in (
            Bad(f"{name} rank 2", ValueError, replace(**{name: zeros(4, 6)}), (f"^{name}", r"\[4, 6\]", LIKE_LSE)),
            Bad(f"{name} rank 4", ValueError, replace(**{name: zeros(2, 4, 6, 1)}), (f"^{name}", "rank 4|3 axes")),
            Bad(f"{name} transposed", ValueError, replace(**{name: zeros(2, 6, 4)}),
                (f"^{name}", r"\[2, 6, 4\]", "num_q_heads 6", "num_q_heads 4")),
            Bad(f"{name} batch", ValueError, replace(**{name: zeros(3, 4, 6)}), (f"^{name}", "batch 3", "batch 2")),
            Bad(f"{name} q_len", ValueError, replace(**{name: zeros(2, 4, 8)}), (f"^{name}", "q_len 8", "q_len 6")),
            Bad(f"{name} float16", TypeError, cast(np.float16, name), (f"^{name}", "float16", "float32")),
            Bad(f"{name} bfloat16", TypeError, cast(ml_dtypes.bfloat16, name), (f"^{name}", "bfloat16", "float32")),
            Bad(f"{name} float64", TypeError, cast(np.float64, name), (f"^{name}", "float64", "float32"), x64=True),
        )
    ),
    Bad("lse None", TypeError, replace(lse=None), ("^lse", "None", "array")),
    Bad("dout a number", TypeError, replace(dout=1.0), ("^dout", "float", "array"), ("numpy",)),
    Bad("lse big endian", TypeError, cast(">f4", "lse"), ("^lse", ">f4", "native"), ("numpy",)),
    Bad("dout strides", ValueError,
        replace(dout=np.ndarray((2, 6, 4, 12), np.float32, np.zeros(4096, np.uint8), 0, (1440, 240, 60, 5))),
        ("^dout", "strides", "multiples of 4"), ("numpy",)),
]  # fmt: skip

VARLEN_ROWS = [
    Bad("out rank 4", ValueError, replace(out=zeros(1, 6, 4, 12)), ("^out", r"\[1, 6, 4, 12\]", "rank 3|3 axes")),
    Bad("dout total_q", ValueError, replace(dout=zeros(7, 4, 12)), ("^dout", "total_q 7", "total_q 6")),
    Bad("dout like k", ValueError, replace(dout=zeros(8, 2, 12)), ("^dout", r"\[8, 2, 12\]", "expected")),
    Bad("lse transposed", ValueError, replace(lse=zeros(6, 4)), ("^lse", r"\[6, 4\]", "num_q_heads 4|total_q 6")),
    Bad("dlse rank 3", ValueError, replace(dlse=zeros(1, 4, 6)), ("^dlse", r"\[1, 4, 6\]", "rank 2|2 axes")),
    Bad("lse None", TypeError, replace(lse=None), ("^lse", "None", "array")),
    Bad("dlse float16", TypeError, cast(np.float16, "dlse"), ("^dlse", "float16", "float32")),
]  # fmt: skip

CALLS = [
    (flash_mha_bwd, good, [*of_backward(test_errors.ROWS, good), *ROWS]),
    (flash_mha_varlen_bwd, good_varlen, [*of_backward(test_errors_varlen.ROWS, good_varlen), *VARLEN_ROWS]),
]


@pytest.fixture(autouse=True)
def all_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """`invoke` makes JAX arrays of these too."""
    monkeypatch.setattr(test_errors, "ARRAYS", (*test_errors.ARRAYS, "out", "lse", "dout", "dlse"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("function", "arguments"), [call[:2] for call in CALLS])
def test_the_good_call_is_good(function: Any, arguments: Any, mode: str) -> None:
    given = arguments()
    found = invoke(mode, given, function)
    assert [x.shape for x in found[:3]] == [given[name].shape for name in "qkv"]


@pytest.mark.parametrize(
    ("function", "arguments", "row", "mode"),
    [
        pytest.param(function, arguments, row, mode, id=f"{function.__name__}-{row.name}-{mode}")
        for function, arguments, rows in CALLS
        for row in rows
        for mode in row.modes
    ],
)
def test_bad_input(function: Any, arguments: Any, row: Bad, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_row(row, mode, monkeypatch, arguments(), function)


@pytest.mark.parametrize("backend", ["sm80", "sm90"])
@pytest.mark.parametrize("mode", PLACED)
def test_unsupported_error_lists_every_candidate(mode: str, backend: str) -> None:
    with pytest.raises(heed.UnsupportedError) as caught:
        invoke(mode, good() | {"backend": backend}, flash_mha_bwd)
    reasons = caught.value.reasons
    assert set(reasons) >= {"cpu_attention_bwd", "sm80_attention_bwd"} and all(reasons.values())
    for name, reason in reasons.items():
        assert name in str(caught.value) and reason in str(caught.value)


def test_keyword_only_arguments_are_keyword_only() -> None:
    given = good()
    positional = [given[name] for name in ("dout", "q", "k", "v", "out", "lse")]
    with pytest.raises(TypeError, match="positional"):
        flash_mha_bwd(*positional, None, False, (-1, -1), given["dlse"])
    with pytest.raises(TypeError, match="return_lse"):
        flash_mha_bwd(**given, return_lse=True)
