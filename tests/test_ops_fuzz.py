"""Random calls of heed.ops and of their backward kernels, in random memory layouts between guard zones.

Each call gives what the oracle says; spoiled ones raise ValueError, TypeError or UnsupportedError; nothing crashes, and
nothing outside of a result's elements is ever written. HEED_FUZZ_COUNT sets the number of calls (10,000: a tenth of it
here), HEED_FUZZ_SEED the seed. This file does not import JAX, so that it can run against a library with sanitizers.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import numpy as np
import pytest

import fuzzing
from expected import judge
from heed import ops
from heed._arrays import numpy_view
from heed._lib import function
from heed._small_ops import ACT_AND_MUL_BWD, RMS_NORM_BWD, Call, SmallOp, resolve
from small_op_faces import cotangents_of, expected, expected_gradients
from small_op_specs import ActSpec, DecodeSpec, NormSpec, OpCase, OpSpec, RopeSpec

COUNT = int(os.environ.get("HEED_FUZZ_COUNT", "10000")) // 10
CHUNKS = 8
DTYPES = ("float32", "float16", "bfloat16")


def pick(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def size(rng: np.random.Generator, most: int) -> int:
    """From 1 on; small ones and powers of two more often than others."""
    return int(pick(rng, 1, 2, 8, 16, 64, rng.integers(1, 20), rng.integers(1, most + 1))) % most + 1


def draw_spec(rng: np.random.Generator, number: int) -> OpSpec:
    name, dtype = f"fuzz_{number}", pick(rng, *DTYPES)
    lead = tuple(int(rng.integers(0 if rng.random() < 0.05 else 1, 7)) for _ in range(rng.integers(0, 4)))
    kind = rng.integers(4)
    if kind == 0:
        return ActSpec(name, pick(rng, "silu", "gelu", "gelu_tanh"), lead, size(rng, 700), dtype)
    if kind == 1:
        return NormSpec(name, lead, size(rng, 900), bool(rng.integers(2)), pick(rng, None, 1e-5, 0.1), dtype)
    if kind == 2:
        head_dim = max(2, size(rng, 256))
        rotary_dim = 2 * int(rng.integers(1, head_dim // 2 + 1)) if head_dim % 2 or rng.random() < 0.5 else None
        positions = pick(rng, "offsets", "pos_ids", "cache")
        return RopeSpec(
            name,
            lengths=tuple(int(n) for n in rng.integers(0, 9, rng.integers(0, 6))),
            gaps=int(rng.integers(3)),
            num_q_heads=size(rng, 9),
            num_kv_heads=size(rng, 5),
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            interleave=bool(rng.integers(2)),
            rope_scale=None if positions == "cache" else pick(rng, None, 0.5, 8.0),
            rope_theta=None if positions == "cache" else pick(rng, None, 5e5, 100.0),
            llama31=positions == "offsets" and rng.random() < 0.3,
            positions=positions,
            max_position=int(pick(rng, 1, 100, 1 << 20)) if positions != "cache" else int(pick(rng, 1, 77)),
            dtype=dtype,
        )
    num_kv_heads, head_dim = size(rng, 4), size(rng, 256)
    has_rope = head_dim % 2 == 0 and rng.random() < 0.3
    return DecodeSpec(
        name,
        kv_len=int(pick(rng, 0, 1, rng.integers(0, 40), rng.integers(0, 700))),
        num_q_heads=num_kv_heads * int(rng.integers(1, 10)),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=int(pick(rng, -1, size(rng, 256))),
        kv_layout=pick(rng, None, "NHD", "HND"),
        window_left=pick(rng, None, -1, 0, int(rng.integers(0, 300))),
        logits_soft_cap=pick(rng, None, 0.0, 5.0),
        sm_scale=pick(rng, None, 0.3),
        rope_scale=pick(rng, None, 2.0) if has_rope else None,
        rope_theta=pick(rng, None, 1e5) if has_rope else None,
        alibi=rng.random() < 0.3,
        sinks=rng.random() < 0.3,
        batch_invariant=pick(rng, None, True),
        dtype=dtype,
    )


class Raw:
    """One call of an exported function: its text, operands in random layouts, and results in guarded memory.

    A layout may be a broadcast one: the given arrays then change, so what should be is worked out afterwards.
    """

    def __init__(self, rng: np.random.Generator, op: SmallOp, statics: Any, operands: dict[str, np.ndarray]) -> None:
        self.op = op
        self.operands = {name: fuzzing.scatter(rng, x) for name, x in operands.items()}
        specs = {name: (x.dtype.name, x.shape) for name, x in self.operands.items()}
        self.text = op.write(statics, [specs.get(name) for name in op.names])
        resolution = resolve(op.stem, self.text, "cpu")
        assert resolution.chosen == f"cpu_{op.stem}", self.text
        self.results = []
        for i, (dtype, shape) in enumerate(resolution.results):
            if op.has_workspace and i == len(resolution.results) - 1:
                self.results.append(_Workspace(shape))
            else:
                like = next(iter(operands.values())).dtype
                self.results.append(fuzzing.Guarded(rng, shape, like if like.name == dtype else np.dtype(dtype)))

    def arguments(self) -> list[Any]:
        return [*self.operands.values(), *(result.view for result in self.results)]

    def run(self, arguments: list[Any] | None = None) -> None:
        given = self.arguments() if arguments is None else arguments
        function(self.op.stem)(self.text, *(numpy_view(x) if isinstance(x, np.ndarray) else x for x in given))


class _Workspace:
    """Scratch memory has to be contiguous; it lies between guard zones too, and holds NaN at first."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        count = int(np.prod(shape))
        self._memory = np.full(count + 64, np.nan, np.float32)
        self._guards = [self._memory[:32], self._memory[32 + count :]]
        for guard in self._guards:
            guard[...] = 1234.5
        self.view = self._memory[32 : 32 + count].reshape(shape)

    def is_intact_outside(self) -> bool:
        return all((guard == 1234.5).all() for guard in self._guards)

    def is_untouched(self) -> bool:
        return self.is_intact_outside() and bool(np.isnan(self.view).all())


def described(case: OpCase) -> Call:
    call: Call = inspect.unwrap(getattr(ops, case.function))(**case.arrays, **case.statics)
    return call


def forward_of(case: OpCase, rng: np.random.Generator) -> Raw:
    call = described(case)
    operands = {name: x for name, x in zip(call.op.names, call.operands, strict=True) if x is not None}
    return Raw(rng, call.op, call.statics, operands)


def check_forward(spec: OpSpec, seed: int, rng: np.random.Generator) -> None:
    case = spec.case(seed)
    raw = forward_of(case, rng)
    raw.run()
    assert all(result.is_intact_outside() for result in raw.results), raw.text
    for want, result in zip(expected(case), raw.results, strict=False):
        want.check(result.view.copy(), raw.text)


def check_backward(spec: OpSpec, seed: int, rng: np.random.Generator) -> None:
    """The backward kernels of activations and norms (the others' gradients are other ops)."""
    case = spec.case(seed)
    cotangents = dict(zip(("dout", "dsum"), cotangents_of(case, seed), strict=False))
    op = ACT_AND_MUL_BWD if isinstance(spec, ActSpec) else RMS_NORM_BWD
    arrays = {name: x for name, x in case.arrays.items() if name != "residual"}
    raw = Raw(rng, op, described(case).statics, arrays | cotangents)
    raw.run()
    assert all(result.is_intact_outside() for result in raw.results), raw.text
    function_name = case.function if isinstance(spec, ActSpec) else "rms_norm"
    wants = expected_gradients(OpCase(function_name, arrays, case.statics), list(cotangents.values()))
    for want, result in zip(wants, raw.results, strict=False):
        want.check(result.view.astype(want.dtype), raw.text)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_calls_give_what_the_oracle_says(chunk: int, seed: int) -> None:
    for number in range(chunk, COUNT, CHUNKS):
        rng = np.random.default_rng([seed, number])
        spec = draw_spec(rng, number)
        check = check_forward
        if isinstance(spec, (ActSpec, NormSpec)) and rng.random() < 0.5:
            check = check_backward
        try:
            judge(lambda draw, spec=spec, check=check, rng=rng: check(spec, draw, rng))
        except Exception as error:
            error.add_note(f"case {number}: {spec}")
            raise


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_spoiled_calls_raise_and_write_nothing(chunk: int, seed: int) -> None:
    """One tensor of another shape, dtype or kind, or one too many or too few, after the problem was resolved."""
    for number in range(chunk, COUNT, CHUNKS):
        rng = np.random.default_rng([seed, number, 1])
        raw = forward_of(draw_spec(rng, number).case(), rng)
        arguments = raw.arguments()
        at = int(rng.integers(len(arguments)))
        x = arguments[at]
        spoiled: list[Any] = [None, "x", 1.5]
        if not (raw.op.has_workspace and at == len(arguments) - 1):  # which may be larger, and have no elements at all
            spoiled += [np.zeros(x.shape, np.float64), np.zeros((*x.shape, 2), x.dtype)]
        if x.ndim and at < len(arguments) - 1 and x.shape[-1] > 1 and x.dtype.name != "bfloat16":
            spoiled.append(x[..., :-1])
        arguments[at] = pick(rng, *spoiled)
        if rng.random() < 0.2:
            arguments = pick(rng, raw.arguments()[:-1], [*raw.arguments(), np.zeros(3, np.float32)], [])
        try:
            with pytest.raises((ValueError, TypeError)) as caught:
                raw.run(arguments)
        except BaseException as error:
            error.add_note(f"case {number}: {raw.text}, argument {at}: {arguments[at : at + 1]}")
            raise
        assert re_names(str(caught.value)), f"case {number}: {caught.value}"
        assert all(result.is_untouched() for result in raw.results), raw.text


def re_names(message: str) -> bool:
    """Whether a message says what it got or expected."""
    return "got" in message and "expected" in message


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_spoiled_texts_raise(chunk: int, seed: int) -> None:
    for number in range(chunk, COUNT, CHUNKS):
        rng = np.random.default_rng([seed, number, 2])
        call = described(draw_spec(rng, number).case())
        specs = [None if x is None else (x.dtype.name, x.shape) for x in call.operands]
        text = call.op.write(call.statics, specs)
        at = int(rng.integers(len(text)))
        garbage = "".join(pick(rng, *"0123456789;=,[]-.xabcdef") for _ in range(rng.integers(0, 4)))
        changed = text[:at] + garbage + text[at + int(rng.integers(0, 4)) :]
        try:
            resolve(call.op.stem, changed, "cpu")
        except (ValueError, TypeError) as error:
            assert re_names(str(error)), f"{changed}: {error}"
