"""Random problems for the fuzz tests: valid ones in random memory layouts, and ways to spoil them.

Numbers are drawn so that float32 results are well conditioned: scores exact in float32 and about 8, so that no
log-sum-exp is near 0; positive values, so that no sum cancels. Even so a plain float32 implementation is exact by luck
in some of a million tiny outputs: `judge` tells luck from a defect.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from expected import Expected, expected, expected_varlen
from specs import DTYPES

OPERANDS = (
    "q", "k", "v", "sinks", "alibi_slopes",
    "q_segment_ids", "kv_segment_ids", "cu_seqlens_q", "cu_seqlens_k", "seqused_k",
)  # fmt: skip
BWD_OPERANDS = (*OPERANDS, "out", "lse", "dout", "dlse")
GUARD = 16  # elements of guard zone on either side of a tensor's memory


@dataclasses.dataclass
class Case:
    """One call: operands (None where absent) and what flash_mha or, with lengths, flash_mha_varlen takes besides."""

    operands: dict[str, np.ndarray | None]
    options: dict[str, Any]
    wants_lse: bool
    lead: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        q = self.operands["q"]
        assert q is not None
        return q.dtype

    @property
    def is_varlen(self) -> bool:
        return self.operands["cu_seqlens_q"] is not None

    @property
    def out_shape(self) -> tuple[int, ...]:
        q, v = self.operands["q"], self.operands["v"]
        assert q is not None and v is not None
        return (*self.lead, *q.shape[-3 if self.is_varlen else -4 : -1], v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        *batch, q_len, heads, _ = self.out_shape[len(self.lead) :]
        return (*self.lead, *batch, heads, q_len)

    def want(self) -> Expected:
        return want_of(self.operands, self.options)


def want_of(operands: dict[str, np.ndarray | None], options: dict[str, Any]) -> Expected:
    q, k, v = (operands[name] for name in "qkv")
    assert q is not None and k is not None and v is not None
    given = arguments_of(operands, options)
    return expected(q, k, v, **given) if operands["cu_seqlens_q"] is None else expected_varlen(q, k, v, **given)


def arguments_of(operands: dict[str, np.ndarray | None], options: dict[str, Any]) -> dict[str, Any]:
    """All but q, k and v, as the oracle takes them."""
    given: dict[str, Any] = {name: operands[name] for name in ("sinks", "alibi_slopes") if operands[name] is not None}
    if operands["q_segment_ids"] is not None:
        given["segment_ids"] = (operands["q_segment_ids"], operands["kv_segment_ids"])
    kept = ("softmax_scale", "is_causal", "causal_align", "window_size", "softcap")
    given |= {name: options[name] for name in kept}
    if operands["cu_seqlens_q"] is not None:
        given |= {name: operands[name] for name in OPERANDS[-3:]}
    return given


def judge(
    rng: np.random.Generator,
    case: Case,
    result: tuple[np.ndarray, np.ndarray | None],
    call: Callable[[], tuple[np.ndarray, np.ndarray | None]],
    what: str,
) -> None:
    """The tolerance rule, on other numbers in the same memory when it fails: a defect stays, luck does not.

    call() makes the same call again and returns out and lse.
    """
    for attempt in range(3):
        try:
            case.want().check(*result, what)
            return
        except AssertionError:
            if attempt == 2:
                raise
        for name in "qkv":
            array = case.operands[name]
            assert array is not None
            if array.flags.writeable and array.size:
                array[...] = rng.permuted(array, axis=-3)
                if name == "v":
                    array += array.dtype.type(rng.integers(1, 16) / 16)
        result = call()


def pick(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def draw_case(rng: np.random.Generator, *, max_lead: int) -> Case:
    """A valid call. Mostly tiny, now and then several tiles large."""
    large = rng.random() < 0.03
    batch = int(rng.integers(0, 4)) if rng.random() < 0.2 else 1 + int(rng.integers(2))
    q_len = int(rng.integers(0, 90 if large else 10))
    kv_len = int(rng.integers(0, 300 if large else 20))
    kv_heads = 1 + int(rng.integers(3))
    heads = kv_heads * (1 + int(rng.integers(4)))
    head_dim = 1 + int(rng.integers(256 if large else 24))
    head_dim_v = head_dim if rng.random() < 0.5 else 1 + int(rng.integers(256 if large else 24))
    dtype = DTYPES[pick(rng, *DTYPES)]
    lead = tuple(
        int(rng.integers(0, 3)) if rng.random() < 0.1 else 1 + int(rng.integers(2))
        for _ in range(int(rng.integers(max_lead + 1)))
    )

    def leading() -> tuple[int, ...]:
        return tuple(1 if rng.random() < 0.4 else size for size in lead)

    def normal(*shape: int, step: float = 2.0**-10) -> np.ndarray:
        return np.round(rng.standard_normal((*leading(), *shape)).clip(-3, 3) / step) * step

    q = normal(batch, q_len, heads, head_dim, step=0.25) * (0.5 if head_dim < 32 else 0.125)
    k = normal(batch, kv_len, kv_heads, head_dim, step=0.25)
    v = np.abs(normal(batch, kv_len, kv_heads, head_dim_v)) + 0.5
    q[..., 0], k[..., 0] = 4.0, 2.0 + 0.25 * k[..., 0]
    operands: dict[str, np.ndarray | None] = dict.fromkeys(OPERANDS)
    operands |= {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype)}
    if rng.random() < 0.25:
        operands["sinks"] = (normal(heads, step=0.125) + 8.0).astype(np.float32)
    if rng.random() < 0.25:
        operands["alibi_slopes"] = (rng.integers(0, 9, (*leading(), heads)) / (1024.0 if large else 64.0)).astype(
            np.float32
        )
    if rng.random() < 0.25:
        operands["q_segment_ids"] = rng.integers(-1, 2, (*leading(), batch, q_len)).astype(np.int32)
        operands["kv_segment_ids"] = rng.integers(-1, 2, (*leading(), batch, kv_len)).astype(np.int32)
    broadcast = np.broadcast_shapes(*(x.shape[: len(lead)] for x in operands.values() if x is not None))
    return Case(operands, draw_options(rng, dtype), bool(rng.random() < 0.6), broadcast)


def draw_options(rng: np.random.Generator, dtype: np.dtype[Any]) -> dict[str, Any]:
    return {
        "softmax_scale": pick(rng, 1.0, 1.0, 0.5, 2.0),
        "is_causal": bool(rng.random() < 0.4),
        "causal_align": pick(rng, "bottom_right", "top_left"),
        "window_size": (-1, -1) if rng.random() < 0.5 else (int(rng.integers(-1, 8)), int(rng.integers(-1, 8))),
        "softcap": 0.0 if dtype == np.float32 else pick(rng, 0.0, 0.0, 20.0),  # tanh is not exact
        "deterministic": bool(rng.random() < 0.3),
        "backend": pick(rng, None, "cpu"),
    }


# Memory --------------------------------------------------------------------------------------------------------------


def random_layout(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """(view, memory): a view of that shape with axes in random order, gaps and directions, inside guarded memory."""
    rank = len(shape)
    order = rng.permutation(rank) if rng.random() < 0.5 else np.arange(rank)[::-1]
    strides, offset, span = [0] * rank, GUARD, 1
    for axis in order:
        strides[axis] = span * pick(rng, 1, 1, 1, 2, 3)
        span = strides[axis] * max(shape[axis], 1) + pick(rng, 0, 0, 1, 5)
    total = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size > 0) + 1
    for axis in range(rank):
        if shape[axis] > 1 and rng.random() < 0.15:
            offset += (shape[axis] - 1) * strides[axis]
            strides[axis] = -strides[axis]
    memory = np.empty(total + 2 * GUARD, dtype)
    itemsize = memory.itemsize
    return np.ndarray(shape, dtype, memory, offset * itemsize, [s * itemsize for s in strides]), memory


def scatter(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """The same values in a random layout, with NaN (or a wild integer) everywhere around them. Sometimes broadcast."""
    if array.ndim and array.size and rng.random() < 0.1:
        axis = int(rng.integers(array.ndim))
        array[...] = array.take([0], axis)
        kept = scatter(rng, array.take(0, axis))
        return np.broadcast_to(np.expand_dims(kept, axis), array.shape)
    view, memory = random_layout(rng, array.shape, array.dtype)
    memory[...] = 2**30 if array.dtype.kind == "i" else np.nan
    view[...] = array
    return view


class Guarded:
    """An output in guarded memory: knows whether anything outside of it, or anything at all, was written."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> None:
        self.view, self.memory = random_layout(rng, shape, dtype)
        self._bytes = self.memory.view(np.uint8)
        self._bytes[...] = rng.integers(0, 256, 64, dtype=np.uint8).repeat(-(-self._bytes.size // 64))[
            : self._bytes.size
        ]
        self._before = self._bytes.copy()

    def is_untouched(self) -> bool:
        return np.array_equal(self._bytes, self._before)

    def is_intact_outside(self) -> bool:
        result = self.view.copy()
        before = self._before.view(self.memory.dtype)
        self.view[...] = np.ndarray(
            self.view.shape, self.view.dtype, before, self._offset(), self.view.strides
        )  # restore what was there before
        intact = self.is_untouched()
        self.view[...] = result
        return intact

    def _offset(self) -> int:
        return int(self.view.__array_interface__["data"][0] - self.memory.__array_interface__["data"][0])


# The problem's text --------------------------------------------------------------------------------------------------


def text_of(case: Case) -> str:
    """The canonical text, written here from its schema."""
    text = "attention_fwd.v1"
    for name, value in case.operands.items():
        if value is not None:
            text += f";{name}={value.dtype.name}[{','.join(map(str, value.shape))}]"
    return text + options_text(case, f";lse={int(case.wants_lse)}")


def options_text(case: Case, lse: str) -> str:
    o = case.options
    scale = "default" if o["softmax_scale"] is None else float(o["softmax_scale"]).hex()
    max_seqlen = f";max_seqlen={o['max_seqlen_q']},{o['max_seqlen_k']}" if case.is_varlen else ""
    left, right = o["window_size"]
    return (
        f";scale={scale};causal={int(o['is_causal'])};align={o['causal_align']}"
        f";window={left},{right}{max_seqlen};softcap={float(o['softcap']).hex()}{lse}"
        f";deterministic={int(o['deterministic'])};backend={o['backend'] or 'auto'}"
    )


_NUMBER = (
    r"-?0x-?(?:[0-9a-fA-F]+\.?[0-9a-fA-F]*|\.[0-9a-fA-F]+)(?:[pP][+-]*\d+)?"  # what C++ reads as a hexadecimal number
)


def _schema(name: str, operands: tuple[str, ...], lse: str) -> re.Pattern[str]:
    return re.compile(
        rf"{name}\.v1" + "".join(rf"(?:;{operand}=([a-z0-9_]+)\[((?:-?\d+(?:,-?\d+)*)?)\])?" for operand in operands) +
        rf";scale=(default|{_NUMBER});causal=([01]);align=(bottom_right|top_left);window=(-?\d+),(-?\d+)"
        rf"(?:;max_seqlen=(-?\d+),(-?\d+))?;softcap=({_NUMBER}){lse};deterministic=([01]);backend=(auto|cpu|sm80|sm90)"
    )  # fmt: skip


_SCHEMAS = {
    OPERANDS: _schema("attention_fwd", OPERANDS, ";lse=([01])"),
    BWD_OPERANDS: _schema("attention_bwd", BWD_OPERANDS, "()"),
}


def parse(
    text: str, names: tuple[str, ...] = OPERANDS
) -> tuple[dict[str, tuple[str, tuple[int, ...]] | None], dict[str, Any], bool]:
    """Operands, options and wants_lse of a text that follows the schema; raises AssertionError for any other."""
    match = _SCHEMAS[names].fullmatch(text)
    assert match, f"the library accepted a text that does not follow the schema: {text!r}"
    groups = match.groups()
    operands: dict[str, Any] = {}
    for i, name in enumerate(names):
        dtype, shape = groups[2 * i], groups[2 * i + 1]
        operands[name] = None if dtype is None else (dtype, tuple(int(n) for n in shape.split(",") if n))
    scale, causal, align, left, right, max_q, max_k, softcap, lse, _, _ = groups[2 * len(names) :]
    assert (max_q is None) == (operands["cu_seqlens_q"] is None), f"max_seqlen goes with cu_seqlens_q: {text!r}"
    options = {
        "softmax_scale": None if scale == "default" else _real(scale),
        "is_causal": causal == "1",
        "causal_align": align,
        "window_size": (int(left), int(right)),
        "softcap": _real(softcap),
    }
    if max_q is not None:
        options |= {"max_seqlen_q": int(max_q), "max_seqlen_k": int(max_k)}
    return operands, options, lse == "1"


def _real(text: str) -> float:
    sign = -1.0 if text.startswith("-") != ("0x-" in text) else 1.0
    return sign * float.fromhex(text.replace("+-", "-").lstrip("-").replace("0x-", "0x"))


def spoil_text(rng: np.random.Generator, text: str) -> str:
    """The text with one thing done to it; now and then that changes nothing that matters."""
    at = int(rng.integers(len(text) + 1))
    fields = text.split(";")
    one = int(rng.integers(len(fields)))
    wild = pick(
        rng,
        "0",
        "1",
        "-1",
        "7",
        "2147483648",
        "9223372036854775807",
        "99999999999999999999",
        "x",
        "",
        "0x1p+3",
        "nan",
        "1e9",
    )
    how = int(rng.integers(9))
    if how == 0:
        return text[:at] + text[at + 1 :]
    if how == 1:
        return text[:at] + pick(rng, *"0123456789,;[]=-.xpaé\n \t") + text[at:]
    if how == 2:
        return text[:at]
    if how == 3:
        return ";".join(fields[:one] + fields[one + 1 :])
    if how == 4:
        return ";".join(fields[: one + 1] + fields[one:])
    if how == 5:
        fields[one], fields[-1] = fields[-1], fields[one]
        return ";".join(fields)
    if how == 6:
        numbers = list(re.finditer(r"\d+", text))
        chosen = numbers[int(rng.integers(len(numbers)))]
        return text[: chosen.start()] + wild + text[chosen.end() :]
    if how == 7:
        old = pick(rng, "float32", "float16", "bfloat16", "int32", "top_left", "bottom_right", "default", "auto", "v1")
        return text.replace(
            old, pick(rng, "float32", "float16", "float64", "uint8", "sm90", "v2", "default", "top_left", ""), 1
        )
    return pick(
        rng, "", ";", "attention_fwd.v1", text * 2, text + ";", text.upper(), "\x00" + text, text + "\x00", "q" * 5000
    )


def spoil_arguments(rng: np.random.Generator, arguments: list[Any]) -> None:
    """Does one thing to the list of tensors that follow the text."""
    how = int(rng.integers(7))
    at = int(rng.integers(len(arguments)))
    victim = arguments[at]
    if how == 0:
        del arguments[at]
    elif how == 1:
        arguments.insert(at, victim)
    elif how == 2:
        arguments[at] = pick(rng, None, 3, 2.5, "text", [1, 2], np.zeros(()), np.zeros((1,) * 13, np.float32), b"bytes")
    elif how == 3:
        other = int(rng.integers(len(arguments)))
        arguments[at], arguments[other] = arguments[other], victim
    elif how == 4:
        dtype = pick(
            rng, np.float32, np.float16, np.float64, np.int32, np.int8, np.uint16, np.uint32, np.complex64, np.bool_
        )
        arguments[at] = np.zeros(victim.shape, dtype)
    elif how == 5:
        shape = list(victim.shape) or [1]
        axis = int(rng.integers(len(shape)))
        shape[axis] = max(0, shape[axis] + pick(rng, -1, 1, 5))
        arguments[at] = np.zeros(shape, victim.dtype)
    else:
        arguments[at] = (
            victim[None] if rng.random() < 0.5 or victim.ndim == 0 else victim[0] if len(victim) else victim[None]
        )


# Bad arguments of the Python function --------------------------------------------------------------------------------

NOT_NUMBERS: tuple[Any, ...] = ("1", True, 1j, [1.0], np.ones(3), object())
BAD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "softmax_scale": (float("nan"), float("inf"), -float("inf"), 1e39, *NOT_NUMBERS),
    "softcap": (float("nan"), float("inf"), -1.0, -1e-30, 1e300, *NOT_NUMBERS),
    "is_causal": (0, 1, None, "no", np.int64(1), 1.0),
    "return_lse": (0, None, "yes", np.array([True, False])),
    "deterministic": (1, None, ""),
    "window_size": (
        None,
        3,
        (1,),
        (1, 2, 3),
        (-2, 0),
        (0, -2),
        (-(2**40), 5),
        (1.5, 2),
        ("a", "b"),
        (True, 1),
        {},
        "ab",
    ),
    "causal_align": (None, "", "top-left", "TOP_LEFT", 0, b"top_left"),
    "backend": ("", "gpu", "cuda", "CPU", 80, "sm80", "sm90"),
}


def spoil_call(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """Arguments that differ from the case's in a way that flash_mha must refuse."""
    given: dict[str, Any] = {}
    q, k, v = (case.operands[name] for name in "qkv")
    assert q is not None and k is not None and v is not None
    if rng.random() < 0.4:
        name = pick(rng, *BAD_OPTIONS)
        return {name: pick(rng, *BAD_OPTIONS[name])}
    how = int(rng.integers(8))
    which = pick(rng, "q", "k", "v")
    array: np.ndarray = {"q": q, "k": k, "v": v}[which]
    if how == 0:
        given[which] = np.zeros(array.shape[1:], array.dtype)
    elif how == 1:
        bad_dtype = pick(rng, np.float64, np.int32, np.uint8, np.complex64, bool, ">f4", object)
        given[which] = np.zeros(array.shape, bad_dtype)
    elif how == 2:
        axis = int(rng.integers(4 if which != "q" else 1))
        axis = 3 if which == "q" else axis
        axis = pick(rng, 0, 1, 2) if which == "v" else axis
        axis = pick(rng, 0, 3) if which == "k" and axis in (1, 2) and case.operands["kv_segment_ids"] is None else axis
        shape = list(array.shape)
        shape[axis] += 1 + int(rng.integers(3))
        if axis == 2:  # kv heads of k and v must agree, whatever divides q's
            shape[axis] = array.shape[axis] + 1
        given[which] = np.zeros(shape, array.dtype)
    elif how == 3:
        given["q"] = np.zeros((*q.shape[:2], q.shape[2], 257), q.dtype)
        given["k"] = np.zeros((*k.shape[:3], 257), k.dtype)
    elif how == 4:
        heads = q.shape[2]
        name = pick(rng, "sinks", "alibi_slopes")
        bad = (np.zeros(heads + 1, np.float32), np.zeros(heads, np.float64), np.zeros(heads, np.float16),
               np.zeros((1, heads), np.float32), np.zeros((), np.float32), [0.0] * heads, "sinks", 1.0)  # fmt: skip
        given[name] = pick(rng, *bad)
    elif how == 5:
        good_q, good_kv = np.zeros(q.shape[:2], np.int32), np.zeros(k.shape[:2], np.int32)
        batch, length = q.shape[:2]
        bad_q = (np.zeros((batch + 1, length), np.int32), np.zeros((batch, length + 1), np.int32),
                 np.zeros(length + 3, np.int32), np.zeros((batch, length)), np.full((batch + 1, length + 1), 2**40),
                 None, "ids")  # fmt: skip
        given["segment_ids"] = (pick(rng, *bad_q), good_kv) if rng.random() < 0.7 else (good_q, good_kv, good_q)
    elif how == 6:
        given[which] = pick(rng, None, 3.0, "q", [[1.0]], object(), np.float32(1.0))
    else:
        given["q"] = np.zeros((*q.shape[:2], 0, q.shape[3]), q.dtype)
    return given


def seeds(count: int, start: int) -> Iterator[np.random.Generator]:
    """One generator per case, so that any case can be run again alone."""
    for number in range(count):
        yield np.random.default_rng([start, number])
