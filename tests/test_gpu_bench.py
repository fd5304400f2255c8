"""The GPU benchmark's own logic, without a GPU: order, pauses, ratios, verdicts, who is absent, and what is wrong.

Times come from clocks made up here, so that every figure in the report has one right value.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import gpu_attention_fwd as bench  # noqa: E402
import gpu_contenders  # noqa: E402
import gpu_fwd_report  # noqa: E402
import gpu_jax  # noqa: E402
import gpu_jit  # noqa: E402
import gpu_report  # noqa: E402
import gpu_run  # noqa: E402
import gpu_timing  # noqa: E402
from gpu_bench_fakes import TimedClock, failing_maker, fake_maker  # noqa: E402
from gpu_contenders import Row  # noqa: E402
from packed import PackedRow  # noqa: E402

# Rows.


def test_work_is_counted_over_kept_pairs() -> None:
    full = Row("d128", 512, 16, 16, 128, False)
    assert (full.batch, full.flops) == (32, 4.0 * 32 * 512 * 512 * 16 * 128)
    assert Row("d128", 512, 16, 16, 128, True).flops == full.flops / 2
    few = Row("few", 512, 16, 16, 128, False, query_tokens=16)
    assert (few.batch, few.flops) == (32, full.flops / 32)
    kept = sum(512 - 16 + i + 1 for i in range(16))
    assert Row("few", 512, 16, 16, 128, True, query_tokens=16).flops == 4.0 * 32 * kept * 16 * 128
    s, w = 100, 7
    kept = sum(min(i, w) + 1 for i in range(s))
    assert Row("window", s, 1, 1, 1, True, w, batch_tokens=s).flops == 4.0 * kept
    window, causal = Row("window", 16384, 32, 8, 128, True, 1024), Row("window", 16384, 32, 8, 128, True)
    assert window.flops / causal.flops == pytest.approx(0.121, abs=5e-4)
    assert window.work_share == pytest.approx(window.flops / causal.flops, rel=1e-3) and causal.work_share is None
    assert Row("window", s, 1, 1, 1, True, s).work_share == 1.0


def test_uneven_and_equal_sequences_have_the_same_work() -> None:
    for uneven, equal in gpu_contenders.packed_rows():
        assert len(uneven.lengths) == len(equal.lengths) == 16
        assert (min(uneven.lengths), max(uneven.lengths)) == (64, 8192)
        assert list(uneven.lengths) not in (sorted(uneven.lengths), sorted(uneven.lengths)[::-1])
        assert equal.flops == pytest.approx(uneven.flops, rel=1e-3)
        assert uneven.offsets[-1] == sum(uneven.lengths) and len(uneven.offsets) == 17


def test_the_rows_cover_what_the_targets_speak_of() -> None:
    rows = gpu_contenders.dense_rows(is_quick=False)
    found = {(row.group, row.is_causal, row.tokens) for row in rows}
    goals = gpu_fwd_report.FORWARD_GOALS
    assert found >= {("d128", causal, s) for causal, tokens in goals.cudnn.items() for s in tokens}
    assert found >= {(*kind, s) for kind, tokens in goals.tflops.items() for s in tokens}
    assert found >= {("short", causal, s) for causal in (False, True) for s in (64, 128, 256)}
    assert all(row.batch * row.tokens == 16384 for row in rows if row.group != "few")
    quick = gpu_contenders.dense_rows(is_quick=True)
    assert {row.group for row in rows} == {row.group for row in quick} == set(gpu_contenders.CONTENDERS)
    assert len(quick) < len(rows) / 2


def test_every_row_that_cudnn_serves_has_a_bound() -> None:
    rows = [row for row in gpu_contenders.dense_rows(is_quick=False) if row.group in gpu_fwd_report.CUDNN_GROUPS]
    bounds = {
        (row.group, row.is_causal, row.tokens, mode): gpu_fwd_report.cudnn_bound(vars(row), mode)
        for row in rows
        for mode in gpu_timing.MODES
    }
    assert all(bound is not None and 1.0 <= bound <= 1.36 for bound in bounds.values())
    assert bounds["d128", True, 1024, "hot"] == 1.35 and bounds["d128", True, 16384, "paused"] == 1.26
    assert bounds["d64", False, 16384, "hot"] == pytest.approx(548 / 467)
    assert bounds["d256", True, 1024, "paused"] == pytest.approx(470 / 418)
    assert bounds["short", False, 64, "hot"] == 1.0


# A whole run, on made-up times.


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A run whose heed takes 1 ms, FA2 0.95 ms at D 256 and 2 ms elsewhere, and whose cuDNN fails at D 256."""
    times = {
        "heed": 1e-3, "heed sm80": 1.6e-3, "fa2": 2e-3, "cudnn": 3e-3, "heed MHA": 1.25e-3, "heed full causal": 5e-3
    }  # fmt: skip
    made = {
        group: {name: fake_maker(times[name]) for name in makers} for group, makers in gpu_contenders.CONTENDERS.items()
    }
    made["d256"].update({"fa2": fake_maker(0.95e-3), "cudnn": failing_maker, "heed sm80": fake_maker(1e-3)})
    made["short"].update(cudnn=fake_maker(0.9e-3))
    monkeypatch.setattr(gpu_contenders, "CONTENDERS", made)
    monkeypatch.setattr(gpu_contenders, "make_inputs", lambda *_: None)
    monkeypatch.setattr(gpu_contenders, "make_packed_inputs", lambda *_: None)
    monkeypatch.setattr(gpu_contenders, "kernel_of", lambda *_: "sm90_attention_fwd")
    monkeypatch.setattr(gpu_contenders, "wrong_result", lambda *_: None)
    monkeypatch.setattr(gpu_contenders, "wrong_packed_result", lambda *_: None)
    packed = iter([1.1e-3, 1e-3, 1.2e-3, 1e-3])
    monkeypatch.setattr(gpu_contenders, "heed_packed_call", lambda *_: fake_maker(next(packed))())
    monkeypatch.setattr(gpu_contenders, "heed_sm80_packed_call", fake_maker(2e-3))
    monkeypatch.setattr(gpu_contenders, "fa2_packed_call", failing_maker)
    run = gpu_run.Run(bench.NAME, tmp_path, budget_s=1000)
    run.content["ceilings"] = {"matmul_tflops": 397.5, "copy_tb_per_s": 4.0}
    for row in gpu_contenders.dense_rows(is_quick=False):
        run.add("rows", row.label, lambda row=row: bench.measure_dense(row, TimedClock(), 3))
    for pair in gpu_contenders.packed_rows():
        run.add("packed", pair[0].label, lambda pair=pair: bench.measure_packed(pair, TimedClock(), 3))
    run.content["jit"] = {"cold_s": 1.5, "disk_s": 0.007, "details": {"cold compile": "1.5 s"}}
    loaded: dict[str, Any] = json.loads(run.path.read_text())  # what was written is what is reported
    loaded.update(jit=run.content["jit"])
    return loaded


def test_ratios_and_speeds(content: dict[str, Any]) -> None:
    row = gpu_report.of_group(content, "d128")[0]
    assert gpu_report.time_ratio(row, "hot", "fa2", "heed") == pytest.approx(2.0)
    assert gpu_report.speed(row, "paused", "heed") == pytest.approx(row["tflop"] / 1e-3)
    assert gpu_report.speed(row, "paused", "nobody") is None
    goals = gpu_fwd_report.FORWARD_GOALS
    assert gpu_report.goal(row, "hot", 397.5, goals) == pytest.approx(1.17 * row["tflop"] / 3e-3)
    d64 = next(r for r in gpu_report.of_group(content, "d64") if r["tokens"] == 1024 and not r["is_causal"])
    assert gpu_report.goal(d64, "hot", 397.5, goals) == pytest.approx(465 / 2)
    window = gpu_report.of_group(content, "window")[1]
    assert gpu_fwd_report.scaled_goal(window, 397.5) == pytest.approx(320)
    assert gpu_fwd_report.scaled_goal(gpu_report.of_group(content, "window")[2], 397.5) is None, "another window"
    assert gpu_fwd_report.per_work(window, "hot") == pytest.approx(0.2 / 0.1212, rel=1e-3)


def test_outside_of_d128_only_what_targets_speak_of_is_paused(content: dict[str, Any]) -> None:
    d128, d64 = (gpu_report.of_group(content, group)[0]["seconds"] for group in ("d128", "d64"))
    assert set(d128["paused"]) == set(d128["hot"]) == set(d64["hot"]) == {"heed", "heed sm80", "cudnn", "fa2"}
    assert set(d64["paused"]) == {"heed", "cudnn"}
    window = gpu_report.of_group(content, "window")[0]["seconds"]["paused"]
    assert set(window) == {"heed", "heed full causal"}
    assert set(content["packed"][0]["seconds"]["paused"]) == {"heed", "heed equal"}


def words_of(content: dict[str, Any]) -> dict[str, set[str]]:
    words: dict[str, set[str]] = {}
    for verdict in gpu_fwd_report.verdicts(content):
        words.setdefault(verdict.target, set()).add(verdict.word)
    return words


PORTABLE_WORDS = {
    "D 128, 16 heads: the portable kernel's speed / FA2's": {"met"},
    "D 64, 32 heads: the portable kernel's speed / FA2's": {"met"},
    "D 256, 8 heads: the portable kernel's speed / FA2's": {"met"},  # 0.95, where 0.9 is asked
    "the automatic choice: speed / the portable kernel's": {"met"},
    "GQA 32/8: time / MHA's": {"met"},
    "causal windows: time / full causal, same work": {"met", "MISSED"},  # 0.2 of the time, for 0.44 and for 0.12
    "varlen: uneven time / equal, same flops": {"met", "MISSED"},  # 1.1 and 1.2
    "cold compile of one kernel, 2 cores": {"met"},
    "load of one kernel from disk": {"MISSED"},  # 7 ms
    "lookup of a loaded kernel": {"not measured"},
    "host cost of one launch": {"not measured"},
}


def test_verdicts(content: dict[str, Any]) -> None:
    assert words_of(content) == PORTABLE_WORDS | {
        "D 128, 16 heads: speed / cuDNN's": {"met"},
        "D 64, 32 heads: speed / cuDNN's": {"met"},
        "D 256, 8 heads: speed / cuDNN's": {"not measured"},
        "D 128, 32/8 heads (GQA): speed / cuDNN's": {"met"},
        "D 128, 16 heads, short sequences: speed / cuDNN's": {"MISSED"},  # 0.9
        "causal window 1024: speed / goal (as the matmul scales it)": {"MISSED"},
        "varlen, very uneven lengths: speed / goal (as the matmul scales it)": {"met"},
    }
    d256 = [
        v for v in gpu_fwd_report.verdicts(content) if v.target == "D 256, 8 heads: the portable kernel's speed / FA2's"
    ]
    assert len(d256) == 6 and all(v.measured == pytest.approx(0.95) for v in d256)
    short = [v for v in gpu_fwd_report.verdicts(content) if "short" in v.target]
    assert len(short) == 12 and all(v.measured == pytest.approx(0.9) and v.bound == 1.0 for v in short)


def test_other_gpus_have_the_portable_targets_alone(content: dict[str, Any]) -> None:
    assert words_of({**content, "target": "sm_90a"}) == words_of(content)
    assert words_of({**content, "target": "sm_80"}) == PORTABLE_WORDS
    text = gpu_fwd_report.report({**content, "target": "sm_80"})
    assert "x cuDNN" in text and "target |" not in text.partition("\n")[0]


def test_the_worst_of_a_target_is_the_farthest_from_its_bound() -> None:
    found = [
        gpu_report.Verdict("speed", bound, True, measured, where=f"bound {bound}")
        for bound, measured in ((1.0, 1.05), (1.3, 1.2), (1.2, 1.19))
    ]
    line = gpu_report.verdict_table(found).splitlines()[2]
    assert "bound 1.3" in line and "1 of 3 met" in line


def test_the_report_says_it_all(content: dict[str, Any]) -> None:
    text = gpu_fwd_report.report(content)
    assert "| 1.17 met" in text and "| 1.00 MISSED" in text and "S 16384 causal window 4096 (sm90)" in text
    absent = "cuDNN (torch) absent (6 rows, the first: D 256, 8/8, S 1024 full): RuntimeError: No available kernel."
    assert absent in text
    lines = [line.replace("  ", "").replace(" |", "|") for line in text.splitlines()]
    what = "D 256, 8 heads: the portable kernel's speed / FA2's"
    assert f"| {what}| >= 0.9| 0.95| S 1024 full, hot| 6 of 6 met|" in lines
    assert "MISSED: load of one kernel from disk: 7 ms, <= 5 ms was asked" in lines
    missed = "causal windows: time / full causal, same work, S 16384 causal, paused: 1.65, <= 1.15 was asked"
    assert f"MISSED: {missed}" in lines
    assert "targets: " in text.splitlines()[-1]
    assert not gpu_report.wrong_results(content)


def test_nothing_measured_meets_nothing() -> None:
    empty: dict[str, Any] = {"rows": [], "packed": [], "failed": {"jax": "no GPU"}, "skipped": ["D 64"]}
    assert {verdict.word for verdict in gpu_fwd_report.verdicts(empty)} == {"not measured"}
    text = gpu_fwd_report.report(empty)
    assert "jax absent: no GPU" in text and "skipped, out of time: D 64" in text


def test_a_wrong_or_absent_heed_fails_the_run(content: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    assert gpu_run.finish(content, tmp_path, bench.NAME, gpu_fwd_report.FORWARD) == 0
    content["rows"][0]["wrong"] = "out: |x - oracle| is 1"
    assert gpu_run.finish(content, tmp_path, bench.NAME, gpu_fwd_report.FORWARD) == 1
    assert "WRONG RESULT: out: |x - oracle| is 1" in capsys.readouterr().out
    content["rows"][0]["wrong"] = None
    content["rows"][0]["absent"]["heed"] = "UnsupportedError: no kernel"
    assert gpu_run.finish(content, tmp_path, bench.NAME, gpu_fwd_report.FORWARD) == 1


def test_the_readme_block(content: dict[str, Any]) -> None:
    content["machine"] = {"gpu": "NVIDIA X1", "driver": "580", "cuda": "13.0", "cudnn": 91900, "date": "2026-11-21"}
    content["machine"]["versions"] = {"heed": "1", "jax": None}
    block = gpu_fwd_report.readme_block(content, "x.png")
    assert block.startswith("NVIDIA X1, bfloat16, TFLOP/s; driver 580, CUDA 13.0, cuDNN 91900, heed 1; 2026-11-21.")
    assert "| D 128, 16 heads, S 512 full " in block and "| 2.00 " in block and "| 3.00 " in block
    assert "causal windows: time / full causal, same work (<= 1.15) on 2 of 6 rows, at worst 1.65;" in block
    readme = (ROOT / "README.md").read_text()
    written = gpu_report.rewritten_readme(readme, block, bench.NAME)
    assert gpu_report.rewritten_readme(written, block, bench.NAME) == written
    assert block in written and written.endswith(readme[-500:])
    with pytest.raises(ValueError, match="markers"):
        gpu_report.rewritten_readme("no markers", block, bench.NAME)


def test_the_plot_is_drawn(content: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert gpu_report.plot(content, tmp_path / "x.png", "Forward")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert not gpu_report.plot({"rows": []}, tmp_path / "y.png", "Forward")


def test_a_run_out_of_time_skips_and_says_so(tmp_path: Path) -> None:
    run = gpu_run.Run(bench.NAME, tmp_path, budget_s=-1)
    run.add("rows", "a row", lambda: pytest.fail("must not be measured"))
    assert run.content["skipped"] == ["a row"]


def test_time_is_kept_for_the_parts_that_come_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[float] = []

    def run_child(part: str, arguments: list[str], timeout_s: float) -> tuple[dict[str, Any], str | None]:
        given.append(timeout_s)
        return {"rows": [part]}, None

    monkeypatch.setattr(gpu_run, "run_child", run_child)
    run = gpu_run.Run(bench.NAME, tmp_path, budget_s=100, num_children=2)
    run.add("rows", "a row", lambda: pytest.fail("must not be measured"))
    for part in ("jit", "jax"):
        run.add_child(part, gpu_run.child_arguments(False, 1))
    assert 55 <= given[0] < 56 and 99 < given[1] <= 100
    assert run.content["skipped"] == ["a row"] and run.content["jax"] == {"rows": ["jax"]}


def test_an_error_in_a_row_is_reported_and_the_rest_runs(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory\nmore")

    run = gpu_run.Run(bench.NAME, tmp_path, budget_s=100)
    run.add("rows", "a row", fail)
    assert run.content["failed"] == {"a row": "RuntimeError: out of memory"}


def test_a_child_that_fails_leaves_its_words(tmp_path: Path) -> None:
    (tmp_path / "gpu_part.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[1]).write_text('{\"a\": 1}')\nsys.exit('no such device')\n"
    )
    result, failure = gpu_run.run_child("part", ["--rounds", "1"], 60.0, folder=tmp_path)
    assert result == {"a": 1}
    assert failure is not None and "no such device" in failure and "status 1" in failure


def test_without_torch_or_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_attention_fwd.py"), "--quick", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert "needs PyTorch" in done.stderr or "no NVIDIA GPU" in done.stderr


# JAX's part, on the CPU.


def test_jax_rows_leave_out_who_cannot_serve_them() -> None:
    import jax

    row = gpu_jax.measure_row(small("d128", True), gpu_timing.WallClock(jax.block_until_ready), rounds=2)
    assert {mode: list(samples) for mode, samples in row["seconds"].items()} == {"hot": ["heed"], "paused": ["heed"]}
    assert all(len(samples["heed"]) == 2 for samples in row["seconds"].values())
    assert set(row["absent"]) == {"cudnn"} and row["absent"]["cudnn"].count("\n") == 0
    text = gpu_fwd_report.report(
        {"rows": [], "packed": [], "jax": {"rows": [row], "overhead_us": {"jitted x + 1": 3.25}}}
    )
    assert "| S 96 causal " in text and "cuDNN (torch) absent" not in text
    assert "JAX's cuDNN absent (JAX, D 32, 4/4, S 96 causal)" in text and "| jitted x + 1 " in text


# The compiler's times.


def no_nvrtc() -> bool:
    from heed._lib import function

    return not function("jit_info")()["nvrtc_path"]


@pytest.mark.skipif(no_nvrtc(), reason="there is no NVRTC on this machine")
def test_a_kernel_is_compiled_once_and_then_found(tmp_path: Path) -> None:
    environment = {"HEED_LIB_DIR": str(gpu_jit.library_copy(tmp_path)), "HEED_CACHE_DIR": str(tmp_path / "cache")}
    origins = [gpu_jit.child("compile", environment, "probe Probe<256>", "sm_90a")["origin"] for _ in range(2)]
    assert origins == ["compiled", "cache"]


def test_a_task_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)compile ended with status 1.*nothing_of_this_name"):
        gpu_jit.child("compile", {}, "nothing_of_this_name X", "sm_90a")


def test_the_compilers_times(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def child(task: str, environment: dict[str, str], *arguments: str) -> dict[str, Any]:
        cache = environment.get("HEED_CACHE_DIR", "")
        if task == "first_call":
            if "HEED_RECORD_SPECS" in environment:
                Path(environment["HEED_RECORD_SPECS"]).write_text("a_family A<1>\n")
            return {"first_s": 1.5 if "HEED_RECORD_SPECS" in environment else 0.01, "second_s": 1e-4}
        if task == "arch":
            return {"arch": "sm_90a"}
        assert arguments[0] == "a_family A<1>"
        if task == "compile":
            compiled.append(cache)
            is_first = compiled.count(cache) == 1
            return {"seconds": 1.0 if is_first else 2e-3, "origin": "compiled" if is_first else "cache"}
        return {"seconds": 3e-3, "again_s": 2e-6}

    monkeypatch.setattr(gpu_jit, "child", child)
    result = gpu_jit.measure(repeats=3)
    assert (result["cold_s"], result["disk_s"], result["arch"]) == (1.0, 3e-3, "sm_90a")
    assert result["details"]["first call of flash_mha, cached on disk"] == "10.0 ms"
    assert "lookup_s" not in result  # Python's part is in that figure: only launch_cost says it
    shipped = {"origin": "ahead of time"}
    monkeypatch.setattr(gpu_jit, "child", lambda task, *rest: child(task, *rest) | shipped)
    with pytest.raises(RuntimeError, match="got a kernel ahead of time, then ahead of time: cannot time either"):
        gpu_jit.measure(repeats=1)


def test_the_launch_cost_is_read_or_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEED_LAUNCH_COST", str(tmp_path / "none"))
    assert "none is not there" in gpu_jit.launch_cost()["details"]["host cost of one launch"]
    program = tmp_path / "launch_cost"
    figures = {
        "handler": {"a": {"median_us": 1.25}, "b": {"median_us": 1.5}},
        "lookup": {"by_spec": {"median_us": 0.25}},
        "driver": {"empty_kernel": {"median_us": 1.0}},
    }
    program.write_text(f"#!/bin/sh\ncat <<'E'\n{json.dumps(figures)}\nE\n")
    program.chmod(0o755)
    monkeypatch.setenv("HEED_LAUNCH_COST", str(program))
    result = gpu_jit.launch_cost()
    assert (result["launch_s"], result["lookup_s"]) == (1.5e-6, 0.25e-6)
    assert result["details"]["the driver's own share, empty_kernel"] == "1.00 us"
    program.write_text("#!/bin/sh\necho no driver >&2\nexit 1\n")
    assert "no driver" in gpu_jit.launch_cost()["details"]["host cost of one launch"]


# The check of results, and the contenders themselves, on the CPU where torch is there.


def small(group: str, is_causal: bool, kv_heads: int = 4, window: int = -1) -> Row:
    return Row(group, 96, 4, kv_heads, 32, is_causal, window, batch_tokens=192)


@pytest.mark.parametrize(
    "row",
    [small("d128", False), small("d128", True), small("gqa", True, kv_heads=2), small("window", True, 2, window=17)],
    ids=lambda row: row.label,
)
def test_right_results_pass_and_wrong_ones_do_not(row: Row) -> None:
    torch = pytest.importorskip("torch")
    x = gpu_contenders.make_inputs(row, "cpu")
    assert x.q.shape == (2, 96, 4, 32) and x.k.shape == (2, 96, row.kv_heads, 32)
    callers, absent, out = gpu_run.working(
        {name: gpu_run.maker(make, row, x) for name, make in gpu_contenders.CONTENDERS[row.group].items()}
    )
    assert "heed" in callers and "cudnn" not in callers
    assert all(name in callers or absent[name] for name in gpu_contenders.CONTENDERS[row.group])
    assert gpu_contenders.wrong_result(row, x, out) is None
    wrong = out.clone()
    wrong[..., 3] += 0.25
    assert gpu_contenders.wrong_result(row, x, wrong) is not None
    swapped = torch.flip(out, (2,))
    assert gpu_contenders.wrong_result(row, x, swapped) is not None
    if "heed MHA" in callers:
        assert torch.equal(callers["heed MHA"](), out)


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_results_are_checked_by_sequence(is_causal: bool) -> None:
    torch = pytest.importorskip("torch")
    row = PackedRow("uneven", (5, 40, 1, 23), 2, 16, is_causal)
    x = gpu_contenders.make_packed_inputs(row, "cpu")
    out = gpu_contenders.heed_packed_call(row, x)()
    assert gpu_contenders.wrong_packed_result(row, x, out) is None
    dense = gpu_contenders.heed_call(
        Row("d128", 69, 2, 2, 16, is_causal), gpu_contenders.Inputs(x.q[None], x.k[None], x.v[None])
    )()[0]
    assert gpu_contenders.wrong_packed_result(row, x, dense) is not None  # as if it were one sequence
    assert torch.isfinite(out).all()
