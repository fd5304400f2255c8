"""Random arguments, good and bad, thrown at the exported functions.

Each call returns what the oracle says, or raises ValueError, TypeError or UnsupportedError; nothing crashes, and
nothing outside of an output's elements is ever written. HEED_FUZZ_COUNT sets the number of calls (10,000),
HEED_FUZZ_SEED the seed; a failure names its case, which can be run again alone. This file imports neither JAX nor
anything that does, so that it can run against a library with sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

import fuzzing
import fuzzing_varlen
import heed
from heed._arrays import numpy_view
from heed._lib import function

COUNT = int(os.environ.get("HEED_FUZZ_COUNT", "10000"))
TYPED = (ValueError, TypeError)  # UnsupportedError is a ValueError
CALLS: Counter[str] = Counter()


def describe(number: int, case: fuzzing.Case) -> str:
    layouts = {name: (x.shape, x.strides) for name, x in case.operands.items() if x is not None}
    return f"case {number}: {fuzzing.text_of(case)}\n{layouts}"


def pointers(array: Any) -> Any:
    """An array as the exported function takes it; anything else as it is."""
    return numpy_view(array) if isinstance(array, np.ndarray) and array.dtype != object else array


def run_raw(number: int, rng: np.random.Generator) -> None:
    """The TVM-FFI export itself: text and strided memory; two of three calls have something spoiled."""
    is_wild = False
    if rng.random() < 0.6:
        case = fuzzing.draw_case(rng, max_lead=2)
    else:
        case = fuzzing_varlen.draw_varlen_case(rng, max_lead=2, in_range=False)
        is_wild = rng.random() < 0.2
        if is_wild:
            fuzzing_varlen.wild_lengths(rng, case)
    operands = {name: None if x is None else fuzzing.scatter(rng, x) for name, x in case.operands.items()}
    case = fuzzing.Case(operands, case.options, case.wants_lse, case.lead)
    text = fuzzing.text_of(case)
    outputs = [fuzzing.Guarded(rng, case.out_shape, case.dtype)]
    if case.wants_lse:
        outputs.append(fuzzing.Guarded(rng, case.lse_shape, np.float32))
    arguments: list[Any] = [x for x in operands.values() if x is not None] + [output.view for output in outputs]
    original = list(arguments)
    given: Any = text
    spoiled = pick = int(rng.integers(4))
    if pick == 1 or pick == 2:
        given = fuzzing.spoil_text(rng, text)
    elif pick == 3:
        fuzzing.spoil_arguments(rng, arguments)
        if rng.random() < 0.05:
            given = fuzzing.pick(rng, 1, None, 2.0, b"attention_fwd.v1")
    try:
        function("attention_fwd")(given, *map(pointers, arguments))
    except TYPED as error:
        assert spoiled, f"a good call was refused: {error}\n{describe(number, case)}"
        assert str(error), "an error without a message"
        assert all(output.is_untouched() for output in outputs), (
            f"{error}, but an output was written\n{describe(number, case)}"
        )
        CALLS["raw refused"] += 1
        return
    CALLS["raw served"] += 1
    assert all(output.is_intact_outside() for output in outputs), (
        f"memory outside an output was written\n{describe(number, case)}"
    )
    if is_wild:
        return
    if spoiled:
        check_accepted(rng, number, given, arguments, case, original)
    else:

        def call() -> tuple[np.ndarray, np.ndarray | None]:
            function("attention_fwd")(text, *map(pointers, arguments))
            return outputs[0].view, outputs[1].view if case.wants_lse else None

        result = outputs[0].view, outputs[1].view if case.wants_lse else None
        fuzzing.judge(rng, case, result, call, describe(number, case))


def check_accepted(
    rng: np.random.Generator, number: int, text: str, arguments: list[Any], case: fuzzing.Case, original: list[Any]
) -> None:
    """A spoiled call was served: then it must mean something, and that must be what came out."""
    specs, options, wants_lse = fuzzing.parse(text)
    names = [name for name, spec in specs.items() if spec is not None]
    assert len(arguments) == len(names) + 1 + wants_lse, (
        f"case {number}: {len(arguments)} tensors were accepted for {text}"
    )
    operands: dict[str, Any] = dict.fromkeys(fuzzing.OPERANDS)
    for name, array in zip(names, arguments, strict=False):
        dtype, shape = specs[name]  # type: ignore[misc]
        same = array.dtype.name == dtype or (array.dtype == np.uint16 and dtype == "bfloat16")
        assert same and array.shape == shape, (
            f"case {number}: {name} {array.dtype} {array.shape} was accepted for {text}"
        )
        operands[name] = array
    # Numbers can be judged where they are the ones that were drawn: not after tensors have changed places, nor in
    # float32 with a scale or cap that makes scores inexact.
    is_same = len(arguments) == len(original) and all(a is b for a, b in zip(arguments, original, strict=True))
    is_kind = case.dtype != np.float32 or all(
        options[name] == case.options[name] for name in ("softmax_scale", "softcap")
    )
    if is_same and is_kind and not has_short_bound(case, options):
        accepted = fuzzing.Case(operands, options, wants_lse, case.lead)

        def call() -> tuple[np.ndarray, np.ndarray | None]:
            function("attention_fwd")(text, *map(pointers, arguments))
            return arguments[len(names)], arguments[-1] if wants_lse else None

        result = arguments[len(names)], arguments[-1] if wants_lse else None
        fuzzing.judge(rng, accepted, result, call, f"case {number}: {text}")


def has_short_bound(case: fuzzing.Case, options: dict[str, Any]) -> bool:
    """Whether max_seqlen may be less than a sequence's length, so that some rows are undefined."""
    q, k = case.operands["q"], case.operands["k"]
    assert q is not None and k is not None
    rows = {"max_seqlen_q": q.shape[-3], "max_seqlen_k": k.shape[-3]}
    return any(0 <= options.get(name, -1) < count for name, count in rows.items())


def run_python(number: int, rng: np.random.Generator) -> None:
    """A public function on NumPy arrays; a good call must be served, a spoiled one refused."""
    is_varlen = rng.random() < 0.4
    if is_varlen:
        case = fuzzing_varlen.draw_varlen_case(rng, max_lead=0, in_range=True)
    else:
        case = fuzzing.draw_case(rng, max_lead=0)
    flash: Any = heed.flash_mha_varlen if is_varlen else heed.flash_mha
    operands = {name: None if x is None else fuzzing.scatter(rng, x) for name, x in case.operands.items()}
    case = fuzzing.Case(operands, case.options, case.wants_lse, ())
    of_varlen = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k") if is_varlen else ()
    taken = ("q", "k", "v", "sinks", "alibi_slopes", *of_varlen)
    arguments: dict[str, Any] = {name: operands[name] for name in taken} | case.options
    arguments["return_lse"] = case.wants_lse
    if operands["q_segment_ids"] is not None:
        arguments["segment_ids"] = (operands["q_segment_ids"], operands["kv_segment_ids"])
    is_spoiled = rng.random() < 0.5
    if is_spoiled:
        bad = fuzzing_varlen.spoil_varlen_call(rng, case) if is_varlen else fuzzing.spoil_call(rng, case)
        arguments |= bad
    try:
        result = flash(**arguments)
    except TYPED as error:
        assert is_spoiled, f"a good call was refused: {error}\n{describe(number, case)}"
        assert str(error), "an error without a message"
        CALLS["python refused"] += 1
        return
    assert not is_spoiled, f"a bad call was served: {bad}\n{describe(number, case)}"
    CALLS["python served"] += 1

    def pair(result: Any) -> tuple[np.ndarray, np.ndarray | None]:
        return result if case.wants_lse else (result, None)

    fuzzing.judge(rng, case, pair(result), lambda: pair(flash(**arguments)), describe(number, case))


def run_resolve(number: int, rng: np.random.Generator) -> None:
    """attention_fwd_resolve on good and spoiled texts."""
    if rng.random() < 0.6:
        case = fuzzing.draw_case(rng, max_lead=3)
    else:
        case = fuzzing_varlen.draw_varlen_case(rng, max_lead=3, in_range=True)
    text = fuzzing.text_of(case)
    given = text if rng.random() < 0.3 else fuzzing.spoil_text(rng, text)
    target = fuzzing.pick(rng, "cpu", "cpu", "sm_80", "sm_90a", "sm_", "", "gpu", "sm_9999999999", "cpu ")
    try:
        found = function("attention_fwd_resolve")(given, target)
    except TYPED as error:
        assert given != text or target not in ("cpu", "sm_80", "sm_90a"), f"refused: {error}\n{describe(number, case)}"
        CALLS["resolve refused"] += 1
        return
    CALLS["resolve served"] += 1
    specs, _, _ = fuzzing.parse(given)
    if given == text:
        assert tuple(found["out_shape"]) == case.out_shape and tuple(found["lse_shape"]) == case.lse_shape
        assert (str(found["chosen"]) == "cpu_attention_fwd") == (target == "cpu")
    assert str(found["out_dtype"]) == specs["q"][0]  # type: ignore[index]


@pytest.mark.parametrize(("kind", "share"), [("raw", 0.5), ("python", 0.4), ("resolve", 0.1)])
def test_random_calls(kind: str, share: float, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"raw": run_raw, "python": run_python, "resolve": run_resolve}[kind]
    count = max(1, round(COUNT * share))
    before = CALLS.copy()
    for number, rng in enumerate(fuzzing.seeds(count, seed)):
        try:
            run(number, rng)
        except Exception as error:
            raise AssertionError(f"{kind} case {number} of seed {seed}: {type(error).__name__}: {error}") from error
    done = {name: calls - before[name] for name, calls in CALLS.items() if calls != before[name]}
    assert sum(done.values()) == count
    if count >= 500:  # both ways are met often
        assert done[f"{kind} served"] > count // 10 and done[f"{kind} refused"] > count // 10
    with capsys.disabled():
        print(f"\n{kind}: {count} random calls, {done}", end="")


def test_no_jax_is_needed() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_fuzz; assert 'jax' not in sys.modules"
    folder = os.path.dirname(os.path.abspath(__file__))
    result = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
