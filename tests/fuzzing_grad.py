"""Random problems of the backward pass for the fuzz tests, and ways to spoil them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from expected import DRAWS, ExpectedGradients, expected_gradients, expected_gradients_varlen
from fuzzing import BWD_OPERANDS, Case, arguments_of, draw_case, options_text, pick
from fuzzing_varlen import draw_varlen_case
from heed.reference import Gradients


@dataclasses.dataclass
class GradCase:
    """One call: that of the forward pass, and what the backward pass takes besides. `out` and `lse` are None at first:
    they are what the forward pass gives.
    """

    forward: Case
    more: dict[str, np.ndarray | None]  # out, lse, dout, dlse
    lead: tuple[int, ...]  # of all operands together

    @property
    def operands(self) -> dict[str, np.ndarray | None]:
        """By name, in the order of BWD_OPERANDS."""
        return self.forward.operands | self.more

    @property
    def options(self) -> dict[str, Any]:
        return self.forward.options

    def results(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of each gradient that there is, dsinks and dalibi_slopes per batch row."""
        given = self.forward.operands
        found: dict[str, tuple[tuple[int, ...], Any]] = {}
        for name in ("q", "k", "v"):
            operand = given[name]
            assert operand is not None
            rank = 3 if self.forward.is_varlen else 4
            found[f"d{name}"] = ((*self.lead, *operand.shape[-rank:]), operand.dtype)
        q = given["q"]
        assert q is not None
        per_row = () if self.forward.is_varlen else (q.shape[-4],)
        for name in ("sinks", "alibi_slopes"):
            if given[name] is not None:
                found[f"d{name}"] = ((*self.lead, *per_row, q.shape[-2]), np.dtype(np.float32))
        return found

    def gradients(self, results: dict[str, np.ndarray]) -> Gradients:
        """What the public functions make of the results: sums over batch rows."""
        found: dict[str, Any] = dict(results)
        for name in ("dsinks", "dalibi_slopes"):
            if name in found and not self.forward.is_varlen:
                found[name] = found[name].sum(-2)
        return Gradients(**found)

    def want(self) -> ExpectedGradients:
        given = self.forward.operands
        cotangents = self.more["dout"], self.more["dlse"]
        operands = given["q"], given["k"], given["v"]
        expect = expected_gradients_varlen if self.forward.is_varlen else expected_gradients
        return expect(cotangents, operands, **arguments_of(given, self.options))

    def text(self) -> str:
        """The canonical text, written here from its schema."""
        text = "attention_bwd.v1"
        for name in BWD_OPERANDS:
            value = self.operands[name]
            if value is not None:
                text += f";{name}={value.dtype.name}[{','.join(map(str, value.shape))}]"
        return text + options_text(self.forward, "")


def draw_grad_case(rng: np.random.Generator, *, max_lead: int, in_range: bool) -> GradCase:
    """A valid call; its out and lse are still to be made. Only cotangents may have leading axes that nothing else has,
    as in a Jacobian.
    """
    is_varlen = rng.random() < 0.4
    forward = (
        draw_varlen_case(rng, max_lead=max_lead, in_range=in_range) if is_varlen else draw_case(rng, max_lead=max_lead)
    )
    lead = tuple(2 if size == 1 and rng.random() < 0.2 else size for size in forward.lead)

    def leading() -> tuple[int, ...]:
        return tuple(1 if rng.random() < 0.3 else size for size in lead)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        rank = len(forward.lead)
        return np.round(rng.standard_normal((*leading(), *shape[rank:])).clip(-3, 3) * 256) / 256

    more: dict[str, np.ndarray | None] = dict.fromkeys(("out", "lse", "dout", "dlse"))
    more["dout"] = normal(forward.out_shape).astype(forward.dtype)
    if rng.random() < 0.5:
        more["dlse"] = normal(forward.lse_shape).astype(np.float32)
    shapes = [x.shape[: len(lead)] for x in (*forward.operands.values(), more["dout"], more["dlse"]) if x is not None]
    return GradCase(forward, more, np.broadcast_shapes(forward.lead, *shapes))


def judge_grad(
    rng: np.random.Generator, case: GradCase, found: Gradients, call: Callable[[], Gradients], what: str
) -> None:
    """The tolerance rule, on other numbers in the same memory when it fails: a defect stays, luck does not.

    call() makes out and lse anew and the same call again.
    """
    for attempt in range(DRAWS):
        try:
            case.want().check(found, what)
            return
        except AssertionError:
            if attempt == DRAWS - 1:
                raise
        for name in ("q", "k", "v", "dout"):
            array = case.operands[name]
            assert array is not None
            if array.flags.writeable and array.size:
                array[...] = rng.permuted(array, axis=-3)
                if name in ("v", "dout"):
                    array += array.dtype.type(rng.integers(1, 16) / 16)
        found = call()


def spoil_grad_call(rng: np.random.Generator, case: GradCase) -> dict[str, Any]:
    """Arguments of flash_mha_bwd or flash_mha_varlen_bwd, beyond those of the forward pass, that must be refused."""
    name = pick(rng, "out", "lse", "dout", "dlse")
    array = case.more[name]
    like = case.more["lse"] if array is None else array
    assert like is not None
    wrong_dtype = np.float16 if like.dtype == np.float32 else np.float32
    shape = list(like.shape)
    axis = int(rng.integers(len(shape)))
    shape[axis] += 1 + int(rng.integers(3))
    bad: tuple[Any, ...] = (
        like[None], np.zeros(like.shape[:-1], like.dtype), np.zeros(shape, like.dtype), 1.0, [[1.0]], object(),
        *(like.astype(dtype) for dtype in (wrong_dtype, np.float64, np.int32)),
    )  # fmt: skip
    if name != "dlse":
        bad = (*bad, None)
    if like.shape[-1] != like.shape[-2]:
        bad = (*bad, like.swapaxes(-1, -2))
    return {name: pick(rng, *bad)}
