"""Conformance of gradients: every named spec, through every face and platform, against the oracle."""

from __future__ import annotations

import pytest

from expected import GradientCase, judge_gradients
from grad_faces import GRAD_FACES, GradFace, grad_face_of
from specs import CONFORMANCE, AttentionSpec
from varlen_specs import VARLEN, VarlenSpec

SPECS: list[AttentionSpec | VarlenSpec] = [*CONFORMANCE, *VARLEN]


@pytest.fixture(params=GRAD_FACES)
def face(request: pytest.FixtureRequest) -> GradFace:
    return grad_face_of(request.param)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_spec(spec: AttentionSpec | VarlenSpec, face: GradFace) -> None:
    def check(case: GradientCase) -> None:
        found = face(case.function, case.operands, case.cotangents, case.arrays, **case.statics)
        case.expected.check(found, spec.name)

    judge_gradients(spec, check)
