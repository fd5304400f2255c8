"""The GPU backward benchmark's own logic, without a GPU: rows, ratios, verdicts, tables, wrong gradients."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import gpu_attention_bwd as bench  # noqa: E402
import gpu_bwd_contenders as contenders  # noqa: E402
import gpu_bwd_report as bwd_report  # noqa: E402
import gpu_jax  # noqa: E402
import gpu_report  # noqa: E402
import gpu_run  # noqa: E402
import gpu_timing  # noqa: E402
from gpu_bench_fakes import TimedClock, failing_maker, fake_maker  # noqa: E402
from gpu_contenders import Inputs, Row  # noqa: E402
from packed import PackedRow  # noqa: E402

# Rows.


def test_the_rows_cover_what_the_targets_speak_of() -> None:
    rows = contenders.dense_rows(is_quick=False)
    assert {row.group for row in rows} == set(contenders.CONTENDERS)
    for group in gpu_report.FA2_TARGETS:
        found = {(row.tokens, row.is_causal) for row in rows if row.group == group}
        assert {(s, c) for s in (512, 1024, 4096, 16384) for c in (False, True)} <= found
    quick = contenders.dense_rows(is_quick=True)
    assert {row.group for row in quick} == set(contenders.CONTENDERS) and len(quick) < len(rows) / 2
    assert [len(contenders.packed_rows(is_quick)) for is_quick in (True, False)] == [1, 2]


@pytest.mark.parametrize(("is_quick", "tokens"), [(True, {4096}), (False, {1024, 4096, 16384})])
def test_the_rows_of_jax(is_quick: bool, tokens: set[int]) -> None:
    rows = gpu_jax.chosen_rows(is_quick, is_backward=True)
    assert {row.tokens for row in rows} == tokens and {row.group for row in rows} == {"d128"}


# A whole run, on made-up times.

TIMES = {
    "heed": 2e-3,
    "heed deterministic": 2.2e-3,
    "heed bwd": 1.5e-3,
    "heed bwd deterministic": 2.1e-3,
    "heed full causal": 8e-3,
    "fa2": 3e-3,
    "fa2 bwd": 1.2e-3,
    "cudnn": 1e-3,
    "cudnn bwd": 0.75e-3,
}


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A run with the times above; at D 256 FA2 takes 1.9 ms and cuDNN fails."""
    made = {
        group: {name: fake_maker(TIMES[name]) for name in makers} for group, makers in contenders.CONTENDERS.items()
    }
    made["d256"].update({"fa2": fake_maker(1.9e-3), "cudnn": failing_maker, "cudnn bwd": failing_maker})
    monkeypatch.setattr(contenders, "CONTENDERS", made)
    for name in ("make_inputs", "make_packed_inputs", "wrong_gradients", "wrong_packed_gradients"):
        monkeypatch.setattr(contenders, name, lambda *_: None)
    monkeypatch.setattr(contenders, "heed_packed_step", fake_maker(1e-3))
    monkeypatch.setattr(contenders, "heed_deterministic_packed_step", fake_maker(1.3e-3))
    monkeypatch.setattr(contenders, "fa2_packed_step", fake_maker(1.5e-3))
    run = gpu_run.Run(bench.NAME, tmp_path, budget_s=1000)
    run.content["ceilings"] = {"matmul_tflops": 397.5, "copy_tb_per_s": 4.0}
    for row in contenders.dense_rows(is_quick=False):
        run.add("rows", row.label, lambda row=row: bench.measure_dense(row, TimedClock(), 3))
    for pair in contenders.packed_rows(is_quick=False):
        run.add("packed", pair[0].label, lambda pair=pair: bench.measure_packed(pair, TimedClock(), 3))
    assert not run.content["failed"]
    loaded: dict[str, Any] = json.loads(run.path.read_text())  # what was written is what is reported
    return loaded


def test_speeds_count_three_and_a_half_forward_passes(content: dict[str, Any]) -> None:
    row = next(row for row in gpu_report.of_group(content, "d128") if row["tokens"] == 1024)
    work = Row("d128", 1024, 16, 16, 128, row["is_causal"]).flops / 1e12
    assert gpu_report.speed(row, "paused", "heed") == pytest.approx(3.5 * work / 2e-3)
    assert gpu_report.speed(row, "hot", "heed bwd") == pytest.approx(2.5 * work / 1.5e-3)
    assert gpu_report.speed(row, "paused", "heed bwd") is None, "the backward pass alone is timed hot only"
    assert gpu_report.goal(row, "hot", 397.5, bwd_report.BACKWARD_GOALS) == pytest.approx(1.11 * 3.5 * work / 1e-3)


def test_verdicts(content: dict[str, Any]) -> None:
    words: dict[str, set[str]] = {}
    for verdict in bwd_report.verdicts(content):
        words.setdefault(verdict.target, set()).add(verdict.word)
    assert words == {
        "D 128, 16 heads: forward + backward speed / FA2's": {"met"},
        "D 64, 32 heads: forward + backward speed / FA2's": {"met"},
        "D 256, 8 heads: forward + backward speed / FA2's": {"met"},  # 0.95, where 0.9 is asked
        "deterministic=True: forward + backward time / the default's": {"met", "MISSED"},  # 1.1; packed: 1.3
        "deterministic=True: backward time / the default's": {"MISSED"},  # 1.4
        "varlen: uneven time / equal, same flops": {"met"},
    }
    d256 = [v for v in bwd_report.verdicts(content) if v.target.startswith("D 256")]
    assert len(d256) == 16 and all(v.measured == pytest.approx(0.95) for v in d256)
    empty: dict[str, Any] = {"rows": [], "packed": [], "failed": {}, "skipped": []}
    assert {verdict.word for verdict in bwd_report.verdicts(empty)} == {"not measured"}


def test_the_report_says_it_all(content: dict[str, Any]) -> None:
    text = bwd_report.report(content)
    assert "| 0.9 met" in text and "| 1.0 met" in text
    assert (
        "cuDNN (torch) absent (8 rows, the first: D 256, 8/8, S 512 full): RuntimeError: No available kernel." in text
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    backward = next(line for line in lines if line.startswith("| D 256, 8 heads, S 512 full |"))
    assert backward.split(" | ")[-3:] == ["0.80", "-", "1.400 |"]  # x FA2, x cuDNN, deterministic / default
    assert "targets: " in lines[-1]
    assert not gpu_report.wrong_results(content)


def test_the_readme_block_and_the_plot(content: dict[str, Any], tmp_path: Path) -> None:
    content["machine"] = {"gpu": "NVIDIA X1", "driver": "580", "cuda": "13.0", "cudnn": 91900, "date": "2026-11-21"}
    content["machine"]["versions"] = {"heed": "1", "jax": None}
    block = bwd_report.readme_block(content, "x.png")
    row = next(line for line in block.splitlines() if line.startswith("| D 64, 32 heads, S 512 full"))
    assert [cell.strip() for cell in row.split("|")][-4:-1] == ["1.50", "0.50", "1.10"]
    readme = (ROOT / "README.md").read_text()
    written = gpu_report.rewritten_readme(readme, block, bench.NAME)
    assert block in written and gpu_report.rewritten_readme(written, block, bench.NAME) == written
    pytest.importorskip("matplotlib")
    assert gpu_report.plot(content, tmp_path / "x.png", bwd_report.BACKWARD.title)


def test_a_wrong_gradient_fails_the_run(content: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    assert gpu_run.finish(content, tmp_path, bench.NAME, bwd_report.BACKWARD) == 0
    content["rows"][3]["wrong"] = "dk: |x - oracle| is 1"
    assert gpu_run.finish(content, tmp_path, bench.NAME, bwd_report.BACKWARD) == 1
    assert "WRONG RESULT: dk: |x - oracle| is 1" in capsys.readouterr().out


def test_without_torch_or_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_attention_bwd.py"), "--quick", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert "needs PyTorch" in done.stderr or "no NVIDIA GPU" in done.stderr


# JAX's part, on the CPU.


def test_jax_rows_are_gradients() -> None:
    import jax

    row = small("d128", True)
    measured = gpu_jax.measure_row(row, gpu_timing.WallClock(jax.block_until_ready), rounds=1, is_backward=True)
    assert measured["tflop"] == pytest.approx(3.5 * row.flops / 1e12)
    assert {mode: list(samples) for mode, samples in measured["seconds"].items()} == {
        "hot": ["heed"],
        "paused": ["heed"],
    }
    assert set(measured["absent"]) == {"cudnn"}
    dq, dk, dv = gpu_jax.calls(row, is_backward=True)["heed"]()
    assert dq.shape == (2, 96, 4, 32) and dk.shape == dv.shape == dq.shape


# The check of results, and the contenders themselves, on the CPU where torch is there.


def small(group: str, is_causal: bool, kv_heads: int = 4, window: int = -1) -> Row:
    return Row(group, 96, 4, kv_heads, 32, is_causal, window, batch_tokens=192)


SMALL = [small("d128", False), small("d128", True), small("gqa", True, kv_heads=2), small("window", True, 2, window=17)]


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.label)
def test_the_oracle_is_what_autograd_gives(row: Row) -> None:
    """The formulas of the check beside float64 autograd of plain attention."""
    torch = pytest.importorskip("torch")
    x = contenders.make_inputs(row, "cpu")
    group = row.q_heads // row.kv_heads
    q, dout = (t[1, :, :group].transpose(0, 1) for t in (x.q, x.dout))
    k, v = (t[1, :, 0] for t in (x.k, x.v))
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    distance = torch.arange(row.tokens)[:, None] - torch.arange(row.tokens)
    hidden = (distance < 0) & row.is_causal | (distance > row.window) & (row.window >= 0)
    scores = (leaves[0] @ leaves[1].T * row.head_dim**-0.5).masked_fill(hidden, -torch.inf)
    expected = torch.autograd.grad(torch.softmax(scores, -1) @ leaves[2], leaves, dout.double())
    for found, wanted in zip(contenders.head_gradients(row, q, k, v, dout, is_naive=False), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.label)
def test_right_gradients_pass_and_wrong_ones_do_not(row: Row) -> None:
    torch = pytest.importorskip("torch")
    x = contenders.make_inputs(row, "cpu")
    makers = {name: gpu_run.maker(make, row, x) for name, make in contenders.CONTENDERS[row.group].items()}
    callers, absent, found = gpu_run.working(makers)
    assert "heed" in callers and "cudnn" not in callers, absent
    assert all(name in callers or absent[name] for name in makers)
    assert contenders.wrong_gradients(row, x, found) is None
    for index in range(3):
        wrong = [t.clone() for t in found]
        wrong[index][..., 3] += 0.25
        assert contenders.wrong_gradients(row, x, tuple(wrong)) is not None
    assert contenders.wrong_gradients(row, x, (found[0], found[2], found[1])) is not None
    for name in set(callers) & {"heed bwd", "heed deterministic", "heed bwd deterministic"}:
        assert all(torch.equal(a, b) for a, b in zip(callers[name](), found, strict=True)), name


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_gradients_are_checked_by_sequence(is_causal: bool) -> None:
    pytest.importorskip("torch")
    row = PackedRow("uneven", (5, 40, 2, 23), 2, 16, is_causal)
    x = contenders.make_packed_inputs(row, "cpu")
    found = contenders.heed_packed_step(row, x)()
    assert contenders.wrong_packed_gradients(row, x, found) is None
    dense = Row("d128", 70, 2, 2, 16, is_causal, batch_tokens=70)
    one = Inputs(x.q[None], x.k[None], x.v[None], dout=x.dout[None])
    merged = tuple(t[0] for t in contenders.heed_step(dense, one)())
    assert contenders.wrong_packed_gradients(row, x, merged) is not None  # as if it were one sequence


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """The command from its arguments to its report, with small rows and a host clock where a GPU would be."""
    pytest.importorskip("torch")
    on_cpu = {name: getattr(contenders, name) for name in ("make_inputs", "make_packed_inputs")}
    for name, make in on_cpu.items():
        monkeypatch.setattr(contenders, name, lambda row, device, make=make: make(row, "cpu"))
    monkeypatch.setattr(contenders, "dense_rows", lambda is_quick: SMALL)
    packed = PackedRow("uneven", (5, 40), 2, 16, True), PackedRow("equal", (28, 28), 2, 16, True)
    monkeypatch.setattr(contenders, "packed_rows", lambda is_quick: [packed])
    monkeypatch.setattr(gpu_timing, "EventClock", lambda: gpu_timing.WallClock(lambda result: None))
    monkeypatch.setattr(bench, "ceilings", lambda clock: {"matmul_tflops": 1.0, "copy_tb_per_s": 1.0})
    monkeypatch.setattr(bench, "gpu_machine", lambda: {"gpu": "none", "driver": "0", "cuda": "0", "cudnn": 0,
                                                       "date": "today", "versions": {}})  # fmt: skip
    arguments = argparse.Namespace(output=tmp_path, budget=100.0, quick=False, rounds=1)
    content = bench.measure(arguments, [*contenders.CONTENDERS, "varlen"])
    assert gpu_run.finish(content, tmp_path, bench.NAME, bwd_report.BACKWARD) == 0, capsys.readouterr().out
    assert len(content["rows"]) == len(SMALL) and len(content["packed"]) == 1 and not content["failed"]
    text = capsys.readouterr().out
    for words in ("forward + backward, D 128", "forward + backward, varlen", "backward alone", "targets: "):
        assert words in text
