"""Gradients against directional differences of the float64 oracle's forward pass: no formula of a gradient is involved.

One spec per feature. Each gives as many numbers as there are directions; they obey the tolerance rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expected import GradientCase, judge_gradients
from grad_faces import GRAD_FACES, GradFace, grad_face_of
from heed import reference
from specs import BY_NAME, AttentionSpec
from tolerance import assert_close
from varlen_specs import VARLEN_BY_NAME, VarlenSpec

DENSE = (
    "full_float32", "causal_float32", "head_dim_59", "head_dim_192_v_128", "gqa_3", "mqa_64", "kv_len_0_sinks",
    "q_len_1", "primes_causal", "top_left_causal", "window_both", "window_0_right", "window_causal", "scale_0.3",
    "scale_negative", "softcap", "sinks", "sinks_causal_empty_rows", "alibi", "alibi_top_left",
    "segments_packed_causal", "segments_cross", "everything", "everything_top_left", "skewed_float32",
)  # fmt: skip
PACKED = (
    "varlen_cross_float32", "varlen_causal_float32", "varlen_few_keys", "varlen_outside", "varlen_used_causal",
    "varlen_top_left_causal", "varlen_softcap", "varlen_sinks", "varlen_alibi", "varlen_everything",
)  # fmt: skip
SPECS: list[AttentionSpec | VarlenSpec] = [
    *(BY_NAME[name] for name in DENSE),
    *(VARLEN_BY_NAME[name] for name in PACKED),
]
NUM_DIRECTIONS = 12
STEP = 2.0**-11


@pytest.fixture(params=[face for face in GRAD_FACES if face.id in ("numpy", "torch_gpu")])
def face(request: pytest.FixtureRequest) -> GradFace:
    return grad_face_of(request.param)


def differences(case: GradientCase, directions: list[list[Any]]) -> np.ndarray:
    """The slopes of sum(dout * out) + sum(dlse * lse) along each direction, with an error of STEP^4."""
    named = [*case.operands, case.arrays.get("sinks"), case.arrays.get("alibi_slopes")]
    named = [None if x is None else x.astype(np.float64) for x in named]
    others = {name: x for name, x in case.arrays.items() if name not in ("sinks", "alibi_slopes")}
    options = {name: x for name, x in case.statics.items() if not name.startswith("max_seqlen")} | others
    dout, dlse = (None if x is None else np.nan_to_num(x.astype(np.float64)) for x in case.cotangents)
    is_varlen = case.function == "flash_mha_varlen"
    forward: Any = reference.attention_forward_varlen if is_varlen else reference.attention_forward

    def loss(direction: list[Any], step: float) -> float:
        q, k, v, sinks, slopes = (x if d is None else x + step * d for x, d in zip(named, direction, strict=True))
        out, lse = forward(q, k, v, sinks=sinks, alibi_slopes=slopes, **options)
        total = float(np.vdot(dout, out))
        return total if dlse is None else total + float(np.vdot(dlse, np.where(np.isfinite(lse), lse, 0.0)))

    def slope(d: list[Any]) -> float:
        near, far = loss(d, STEP) - loss(d, -STEP), loss(d, 2 * STEP) - loss(d, -2 * STEP)
        return (8 * near - far) / (12 * STEP)

    return np.array([slope(direction) for direction in directions])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_differences(spec: AttentionSpec | VarlenSpec, face: GradFace) -> None:
    def check(case: GradientCase) -> None:
        found = face(case.function, case.operands, case.cotangents, case.arrays, **case.statics)
        naive = case.expected.naive(1)
        rng = np.random.default_rng(1)

        def unit(x: Any) -> Any:
            return None if x is None else rng.standard_normal(x.shape) / max(x.size, 1) ** 0.5

        directions = [[unit(x) for x in found] for _ in range(NUM_DIRECTIONS)]

        def slope(gradients: Any, direction: list[Any]) -> float:
            pairs = zip(gradients, direction, strict=True)
            return sum(float(np.vdot(x.astype(np.float64), d)) for x, d in pairs if d is not None)

        def along(gradients: Any) -> np.ndarray:
            return np.array([slope(gradients, direction) for direction in directions])

        # The slopes are exact sums of the gradients' elements, so their dtype's rounding is what counts.
        dtype = case.operands[0].dtype
        want = differences(case, directions)
        assert_close(along(found).astype(dtype), along(naive), want, dtype, spec.name)

    judge_gradients(spec, check)
