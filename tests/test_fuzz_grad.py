"""Random calls of the backward pass, good and bad: what test_fuzz.py does for the forward pass.

HEED_FUZZ_GRAD_COUNT sets the number of calls (1,000), HEED_FUZZ_SEED the seed. This file needs no JAX.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest

import fuzzing
import fuzzing_varlen
import heed
from fuzzing_grad import GradCase, draw_grad_case, judge_grad, spoil_grad_call
from heed._lib import function
from heed.reference import Gradients
from test_fuzz import TYPED, has_short_bound, pointers

COUNT = int(os.environ.get("HEED_FUZZ_GRAD_COUNT", "1000"))
CALLS: Counter[str] = Counter()


def describe(number: int, case: GradCase) -> str:
    layouts = {name: (x.shape, x.strides) for name, x in case.operands.items() if x is not None}
    return f"case {number}: {case.text()}\n{layouts}"


class Workspace:
    """Contiguous, aligned, full of garbage, with guard zones."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        count = int(np.prod(shape))
        memory = np.empty(count + 12, np.float32)
        at = 4 + (-(memory.ctypes.data // 4 + 4)) % 4  # 16-byte aligned
        memory[...] = np.where(rng.random(memory.size) < 0.5, np.nan, 1e30)
        self.view, self._zones = memory[at : at + count].reshape(shape), (memory[:at], memory[at + count :])
        self._before = [zone.copy() for zone in self._zones]

    def is_intact_outside(self) -> bool:
        return all(x.tobytes() == y.tobytes() for x, y in zip(self._zones, self._before, strict=True))


def run_forward(case: GradCase) -> None:
    """Makes out and lse, in the arrays that are there if they are."""
    forward = case.forward
    wants_lse = fuzzing.Case(forward.operands, forward.options, True, forward.lead)
    fresh = case.more["out"] is None
    out = np.empty(forward.out_shape, forward.dtype) if fresh else case.more["out"]
    lse = np.empty(forward.lse_shape, np.float32) if fresh else case.more["lse"]
    arguments = [x for x in forward.operands.values() if x is not None]
    function("attention_fwd")(fuzzing.text_of(wants_lse), *map(pointers, [*arguments, out, lse]))
    case.more |= {"out": out, "lse": lse}


def scatter(rng: np.random.Generator, name: str, array: np.ndarray | None) -> np.ndarray | None:
    """fuzzing.scatter, but never one number along all of a head: scores would lie hundreds apart, and gradients that
    are sums of numbers below float32's normal range are 0 to a kernel.
    """
    while array is not None:
        view = fuzzing.scatter(rng, array.copy())
        if name not in ("q", "k") or view.shape[-1] < 2 or view.strides[-1] != 0:
            return view
    return None


def scattered(rng: np.random.Generator, case: GradCase) -> None:
    """Puts every operand in a random layout, with out and lse made from the moved ones."""
    case.forward.operands = {name: scatter(rng, name, x) for name, x in case.forward.operands.items()}
    case.more |= {name: scatter(rng, name, x) for name, x in case.more.items()}
    run_forward(case)
    for name in ("out", "lse"):
        made = case.more[name]
        assert made is not None
        view, _ = fuzzing.random_layout(rng, made.shape, made.dtype)
        view[...] = made
        case.more[name] = view


def run_raw(number: int, rng: np.random.Generator) -> None:
    """The TVM-FFI export itself: text and strided memory; two of four calls have something spoiled."""
    case = draw_grad_case(rng, max_lead=2, in_range=False)
    is_wild = case.forward.is_varlen and rng.random() < 0.2
    if is_wild:
        fuzzing_varlen.wild_lengths(rng, case.forward)
    scattered(rng, case)
    text = case.text()
    found = function("attention_bwd_resolve")(text, "cpu")
    shapes = [tuple(map(int, shape)) for _, shape in found["results"]]
    assert shapes[:-1] == [shape for shape, _ in case.results().values()]
    workspace = Workspace(rng, shapes[-1])
    assert int(found["workspace_bytes"]) == workspace.view.nbytes
    outputs = {name: fuzzing.Guarded(rng, *result) for name, result in case.results().items()}
    arguments: list[Any] = [x for x in case.operands.values() if x is not None]
    arguments += [output.view for output in outputs.values()] + [workspace.view]
    original = list(arguments)
    given: Any = text
    how = int(rng.integers(4))
    if how == 1:
        given = fuzzing.spoil_text(rng, text)
    elif how == 2:
        fuzzing.spoil_arguments(rng, arguments)
        if rng.random() < 0.05:
            given = fuzzing.pick(rng, 1, None, 2.0, b"attention_bwd.v1")
    try:
        function("attention_bwd")(given, *map(pointers, arguments))
    except TYPED as error:
        assert how in (1, 2), f"a good call was refused: {error}\n{describe(number, case)}"
        assert str(error), "an error without a message"
        assert all(x.is_untouched() for x in outputs.values()), f"{error}, but written\n{describe(number, case)}"
        CALLS["raw refused"] += 1
        return
    CALLS["raw served"] += 1
    intact = workspace.is_intact_outside() and all(x.is_intact_outside() for x in outputs.values())
    assert intact, f"memory outside an output or the workspace was written\n{describe(number, case)}"
    if is_wild:
        return
    options = case.options
    if how in (1, 2):
        specs, options, _ = fuzzing.parse(given, fuzzing.BWD_OPERANDS)
        names = [name for name, spec in specs.items() if spec is not None]
        for name, array in zip(names, arguments, strict=False):
            dtype, shape = specs[name]  # type: ignore[misc]
            is_same = array.dtype.name == dtype or (array.dtype == np.uint16 and dtype == "bfloat16")
            assert is_same and array.shape == shape, f"case {number}: {name} {array.shape} was accepted for {given}"
        # Numbers can be judged where out and lse are those of the same problem, in memory that has not changed places.
        means_same = all(options[name] == case.options[name] for name in options)
        is_moved = len(arguments) != len(original) or any(x is not y for x, y in zip(arguments, original, strict=True))
        if is_moved or not means_same or has_short_bound(case.forward, options):
            return

    def call() -> Gradients:
        run_forward(case)
        function("attention_bwd")(given, *map(pointers, arguments))
        return case.gradients({name: x.view for name, x in outputs.items()})

    CALLS["judged"] += 1
    result = case.gradients({name: x.view for name, x in outputs.items()})
    judge_grad(rng, case, result, call, describe(number, case))


def run_python(number: int, rng: np.random.Generator) -> None:
    """A public function on NumPy arrays; a good call must be served, a spoiled one refused."""
    case = draw_grad_case(rng, max_lead=0, in_range=True)
    scattered(rng, case)
    is_varlen = case.forward.is_varlen
    backward: Any = heed.flash_mha_varlen_bwd if is_varlen else heed.flash_mha_bwd
    operands = case.operands
    of_varlen = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k") if is_varlen else ()
    taken = ("q", "k", "v", "sinks", "alibi_slopes", *of_varlen, "out", "lse", "dout", "dlse")
    arguments: dict[str, Any] = {name: operands[name] for name in taken} | case.options
    if operands["q_segment_ids"] is not None:
        arguments["segment_ids"] = (operands["q_segment_ids"], operands["kv_segment_ids"])
    is_spoiled = rng.random() < 0.5
    bad: dict[str, Any] = {}
    if is_spoiled:
        bad = spoil_grad_call(rng, case)
        if rng.random() < 0.4:
            spoil = fuzzing_varlen.spoil_varlen_call if is_varlen else fuzzing.spoil_call
            bad = {name: x for name, x in spoil(rng, case.forward).items() if name != "return_lse"} or bad
        arguments |= bad
    try:
        found = backward(**arguments)
    except TYPED as error:
        assert is_spoiled, f"a good call was refused: {error}\n{describe(number, case)}"
        assert str(error), "an error without a message"
        CALLS["python refused"] += 1
        return
    assert not is_spoiled, f"a bad call was served: {bad}\n{describe(number, case)}"
    CALLS["python served"] += 1
    CALLS["judged"] += 1

    def call() -> Gradients:
        run_forward(case)
        return Gradients(*backward(**arguments))

    judge_grad(rng, case, Gradients(*found), call, describe(number, case))


def run_resolve(number: int, rng: np.random.Generator) -> None:
    """attention_bwd_resolve on good and spoiled texts."""
    case = draw_grad_case(rng, max_lead=3, in_range=True)
    forward = case.forward
    case.more |= {"out": np.empty(forward.out_shape, forward.dtype), "lse": np.empty(forward.lse_shape, np.float32)}
    text = case.text()
    given = text if rng.random() < 0.5 else fuzzing.spoil_text(rng, text)
    target = fuzzing.pick(rng, "cpu", "cpu", "sm_80", "sm_90a", "sm_", "", "gpu", "sm_9999999999", "cpu ")
    try:
        found = function("attention_bwd_resolve")(given, target)
    except TYPED as error:
        assert given != text or target not in ("cpu", "sm_80", "sm_90a"), f"refused: {error}\n{describe(number, case)}"
        CALLS["resolve refused"] += 1
        return
    CALLS["resolve served"] += 1
    fuzzing.parse(given, fuzzing.BWD_OPERANDS)
    if given == text:
        shapes = [tuple(map(int, shape)) for _, shape in found["results"]]
        assert shapes[:-1] == [shape for shape, _ in case.results().values()]
        assert (str(found["chosen"]) == "cpu_attention_bwd") == (target == "cpu")


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
    assert sum(calls for name, calls in done.items() if name != "judged") == count
    if count >= 300:  # both ways are met often
        assert done[f"{kind} served"] > count // 10 and done[f"{kind} refused"] > count // 10
    with capsys.disabled():
        print(f"\ngradients, {kind}: {count} random calls, {done}", end="")
