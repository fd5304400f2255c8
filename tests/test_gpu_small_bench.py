"""The benchmark of heed.ops on a GPU, without one: its peers, its check of results, its verdicts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import gpu_small_ops as bench  # noqa: E402
from small_op_specs import BENCHMARKS, ActSpec, DecodeSpec, NormSpec, OpSpec, RopeSpec  # noqa: E402

SMALL: list[OpSpec] = [
    ActSpec("silu", lead=(5,), hidden=24, dtype="bfloat16"),
    RopeSpec("rope", (9,), 0, 4, 2, 32, dtype="bfloat16"),
    NormSpec("norm", (5,), 40, dtype="bfloat16"),
    NormSpec("norm_add", (5,), 40, residual=True, dtype="bfloat16"),
    DecodeSpec("decode", 33, 4, 2, 32, dtype="float16"),
]


def row(name: str, microseconds: float | None, num_bytes: int = 1_000_000) -> dict[str, Any]:
    seconds = {} if microseconds is None else {"heed": [microseconds / 1e6] * 3, "copy": [1e-6, 2e-6, 4e-6]}
    return {"name": name, "bytes": num_bytes, "sets": 2, "seconds": seconds, "absent": {}, "wrong": None}


def test_every_target_has_a_row() -> None:
    assert set(bench.TARGETS) <= {spec.name for spec in BENCHMARKS}
    assert set(bench.QUICK_LEFT_OUT) <= {spec.name for spec in BENCHMARKS}


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_peers_compute_the_same_and_wrong_results_are_seen(spec: OpSpec) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    inputs = bench.make_inputs(spec, "cpu")
    out = bench.heed_function(spec)(**inputs)
    assert bench.wrong_result(spec, inputs, out) is None
    found, peer = (x if isinstance(x, tuple) else (x,) for x in (out, bench.torch_function(spec)(**inputs)))
    for one, other in zip(found, peer, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.05)  # that it is the same function
    spoiled = tuple(x.clone() for x in found)
    spoiled[-1].view(-1)[: spoiled[-1].shape[-1]] += 1.0
    assert bench.wrong_result(spec, inputs, spoiled if isinstance(out, tuple) else spoiled[0]) is not None


def test_verdicts() -> None:
    assert bench.verdict(row("bench_silu_t16", 2.9)) == ("<= 3.0 us", "met")
    assert bench.verdict(row("bench_silu_t16", 3.1))[1] == "MISSED"
    assert bench.verdict(row("bench_silu_t1024", 10.0, 39_000_001)) == (">= 3.9 TB/s", "met")
    assert bench.verdict(row("bench_silu_t1024", 10.0, 38_000_000))[1] == "MISSED"
    assert bench.verdict(row("bench_silu_t16", None))[1] == "not measured"
    assert bench.verdict(row("bench_norm_add_16384", 2.0)) == ("", "")


def test_the_report_names_what_is_wrong(tmp_path: Path) -> None:
    wrong = row("bench_silu_t16", 2.0) | {"wrong": "off by one", "absent": {"compiled": "no compiler"}}
    content = {"rows": [wrong, row("bench_rope_t64", 4.0)], "failed": {"bench_x": "boom"}, "skipped": ["bench_y"]}
    text = bench.report(content)
    assert bench.of_copy(wrong) == 1.0  # the median of paired ratios 2, 1 and 0.5
    for part in ("2.00 (0.50)", "WRONG RESULT: off by one", "compiled: no compiler", "bench_x: boom", "bench_y",
                 "targets: 1 met, 1 missed"):  # fmt: skip
        assert part in text
    assert bench.finish(content, tmp_path) == 1
    assert bench.finish({"rows": [row("bench_silu_t16", 2.0)], "failed": {}, "skipped": []}, tmp_path) == 0


def test_one_set_of_inputs_has_the_bytes_of_the_row() -> None:
    torch = pytest.importorskip("torch")
    for spec in SMALL:
        inputs = bench.make_inputs(spec, "cpu")
        large = sum(x.nbytes for name, x in inputs.items() if name in ("x", "q", "k", "v", "residual"))
        written = {ActSpec: large // 2, RopeSpec: large, NormSpec: large, DecodeSpec: 0}[type(spec)]
        if isinstance(spec, DecodeSpec):
            large -= inputs["q"].nbytes
        assert spec.num_bytes() == large + written
        assert all(isinstance(x, torch.Tensor) for x in inputs.values())
