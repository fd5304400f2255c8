"""Every instruction set of this build that this machine runs, each forced in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import heed
from heed._lib import function
from processes import run

TARGETS = list(function("cpu_targets")())

# Runs a part of the named specs, so that vector tails, every dtype, masks and score functions are met.
CODE = """
import sys
sys.path.insert(0, {tests!r})
import heed
from expected import expected_of
from heed._lib import function
from specs import CONFORMANCE, make_inputs

assert str(function("cpu_target")()) == {target!r}, function("cpu_target")()
count = 0
for spec in CONFORMANCE:
    if spec.q_len * spec.kv_len * spec.batch * spec.num_q_heads > 400_000:
        continue
    inputs = make_inputs(spec)
    out, lse = heed.flash_mha(inputs.q, inputs.k, inputs.v, return_lse=True, **spec.static_options(), **inputs.arrays)
    expected_of(spec).check(out, lse, spec.name)
    count += 1
print(count)
"""


@pytest.mark.parametrize("target", TARGETS)
def test_target_obeys_the_rule(target: str) -> None:
    done = run(CODE.format(tests=str(Path(__file__).parent), target=target), HEED_CPU_TARGET=target)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 60


def test_the_best_target_is_the_default_and_the_scalar_fallback_exists() -> None:
    done = run("from heed._lib import function\nprint(function('cpu_target')())", HEED_CPU_TARGET="")
    assert done.stdout.strip() == TARGETS[0], done.stderr
    assert {"EMU128", "SCALAR"} & set(TARGETS)


def test_names_are_case_insensitive() -> None:
    done = run("from heed._lib import function\nprint(function('cpu_target')())", HEED_CPU_TARGET=TARGETS[-1].lower())
    assert done.stdout.strip() == TARGETS[-1], done.stderr


@pytest.mark.parametrize("name", ["NEON", "AVX9000", "avx2,sse4"])
def test_an_unknown_target_is_refused(name: str) -> None:
    code = "import numpy as np, heed\nx = np.ones((1, 2, 1, 8), np.float32)\nheed.flash_mha(x, x, x)"
    done = run(code, HEED_CPU_TARGET=name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "HEED_CPU_TARGET" in last and name.lower() in last.lower() and "Error" in last, done.stderr
    for target in TARGETS:
        assert target in last


def test_version_is_the_packages() -> None:
    assert str(function("version")()) == heed.__version__
