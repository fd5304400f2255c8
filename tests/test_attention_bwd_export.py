"""The exported function attention_bwd itself: which arguments it takes, and that nothing is written when it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from heed import reference
from heed._lib import function
from tolerance import assert_close

TEXT = (
    "attention_bwd.v1;q=float32[2,9,4,16];k=float32[2,13,2,16];v=float32[2,13,2,24];sinks=float32[4]"
    ";out=float32[2,9,4,24];lse=float32[2,4,9];dout=float32[2,9,4,24]"
    ";scale=default;causal=1;align=bottom_right;window=-1,-1;softcap=0x0p+0;deterministic=0;backend=auto"
)
INPUTS = ("q", "k", "v", "sinks", "out", "lse", "dout")
RESULTS = ("dq", "dk", "dv", "dsinks", "workspace")
UNTOUCHED = np.float32(-77.0)


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = {"q": (2, 9, 4, 16), "k": (2, 13, 2, 16), "v": (2, 13, 2, 24), "sinks": (4,), "dout": (2, 9, 4, 24)}
    found = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    forward = reference.naive_attention_forward(*(found[x] for x in "qkv"), is_causal=True, sinks=found["sinks"])
    found["out"], found["lse"] = (x.copy() for x in forward)
    resolved = function("attention_bwd_resolve")(TEXT, "cpu")["results"]
    for name, (dtype, shape) in zip(RESULTS, resolved, strict=True):
        found[name] = np.full(tuple(map(int, shape)), UNTOUCHED, str(dtype))
    return found


def call(arrays: dict[str, Any], text: Any = TEXT) -> None:
    function("attention_bwd")(text, *(arrays[name] for name in INPUTS + RESULTS if name in arrays))


def test_results_obey_the_rule() -> None:
    arrays = tensors()
    call(arrays)
    operands: list[Any] = [arrays[name] for name in ("dout", "q", "k", "v", "out", "lse")]
    options: Any = {"is_causal": True, "sinks": arrays["sinks"]}
    oracle = reference.attention_backward(*operands, **options)
    naive = reference.naive_attention_backward(*operands, **options)
    for name in ("dq", "dk", "dv"):
        assert_close(arrays[name], getattr(naive, name), getattr(oracle, name), np.float32, name)
    assert_close(arrays["dsinks"].sum(axis=0), naive.dsinks, oracle.dsinks, np.float32, "dsinks")


def test_resolve_says_what_the_call_takes() -> None:
    found = function("attention_bwd_resolve")(TEXT, "cpu")
    shapes = [(str(dtype), tuple(map(int, shape))) for dtype, shape in found["results"]]
    assert shapes[:4] == [
        ("float32", (2, 9, 4, 16)), ("float32", (2, 13, 2, 16)), ("float32", (2, 13, 2, 24)), ("float32", (2, 4)),
    ]  # fmt: skip
    assert shapes[4] == ("float32", tuple(found["workspace_shape"]))
    assert shapes[4][1][:2] == (2, 4)
    assert found["workspace_bytes"] == 4 * np.prod(shapes[4][1])
    assert found["chosen"] == "cpu_attention_bwd"
    assert [row[0] for row in found["candidates"]] == ["sm90_attention_bwd", "sm80_attention_bwd", "cpu_attention_bwd"]
    for target in ("sm_80", "sm_90a"):
        assert function("attention_bwd_resolve")(TEXT, target)["chosen"] == "sm80_attention_bwd"


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no workspace": ({"workspace": None}, TypeError, "attention_bwd: got 12 arguments, expected 13 for this problem"),
    "shape": ({"dk": np.zeros((2, 13, 4, 16), np.float32)}, ValueError, r"dk: got float32 \[2, 13, 4, 16\], expected"),
    "dtype": ({"lse": np.zeros((2, 4, 9), np.float64)}, TypeError, "lse: got a dtype with DLPack code 2 and 64 bits"),
    "kind": ({"dout": "text"}, TypeError, "dout: got no tensor, expected a DLPack tensor"),
    "overlap": (
        {"dq": np.lib.stride_tricks.as_strided(np.full(16, UNTOUCHED), (2, 9, 4, 16), (0, 0, 0, 4))},
        ValueError,
        r"dq: got strides \[0, 0, 0, 1\], expected strides that keep output elements apart",
    ),
    "small workspace": (
        {"workspace": np.zeros((2, 4, 1), np.float32)},
        ValueError,
        r"workspace: got float32 \[2, 4, 1\] of 32 bytes, expected at least \d+ bytes of float32",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_named_and_nothing_is_written(case: str) -> None:
    changes, error, message = REFUSALS[case]
    arrays = {name: array for name, array in {**tensors(), **changes}.items() if array is not None}
    with pytest.raises(error, match=message):
        call(arrays)
    for name in RESULTS:
        if name in arrays and name not in changes:
            assert (arrays[name] == UNTOUCHED).all(), name


@pytest.mark.parametrize("text", [5, None, b"attention_bwd.v1", "", TEXT[:-1], TEXT.replace("_bwd", "_fwd")])
def test_texts_that_are_none_are_refused(text: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="problem: got"):
        call(tensors(), text)
