"""Compiled programs on a GPU that outlive what compiled them: command buffers, exports and JAX's persistent cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import heed
from conftest import gpu_devices
from expected import Expected, expected
from gpu_process import REPLAYS, STEPS
from heed._lib import library_dir
from jax_cases import OPTIONS, keywords, make_operands

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).resolve().parent


def run_process(case: str, folder: Path, **environment: str) -> dict[str, Any]:
    """Runs a case of gpu_process.py. Returns what it found, with its arrays under "results"."""
    import_path = os.pathsep.join([str(Path(heed.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TESTS / "gpu_process.py"), case, str(folder)],
        env=os.environ | {"PYTHONPATH": import_path, "XLA_FLAGS": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    found = json.loads((folder / "found.json").read_text())
    if (folder / "results.npz").exists():
        with np.load(folder / "results.npz") as results:
            found["results"] = dict(results)
    return found


def expected_case(operands: dict[str, np.ndarray]) -> Expected:
    return expected(**keywords(operands), **OPTIONS)


# Command buffers. XLA captures a call when it builds one and does not call heed again while it replays it: that its
# results are right then, for numbers that the capture never saw, is what shows that the graph holds the launch.


def check_command_buffer_results(results: dict[str, np.ndarray], what: str) -> None:
    assert len({x.tobytes() for x in results["q"]}) == 2 * REPLAYS, "every call is to see new data"
    for i, q in enumerate(results["q"]):
        want = expected(q, results["k"], results["v"], is_causal=True)
        want.check(results["out"][i], results["lse"][i], f"{what}: call {i}")
    carry = results["loop_q"]
    for i in range(STEPS):
        want = expected(carry, results["k"], results["v"], is_causal=True)
        want.check(results["loop_out"][i], None, f"{what}: step {i} of the loop")
        carry = (carry + results["loop_out"][i]).astype(np.float16)


def command_buffer_dump(folder: Path) -> str:
    """The lines on command buffers and custom calls of XLA's dumps, for a failure's message."""
    lines = []
    for file in sorted(folder.glob("dump/*thunk_sequence*")):
        text = file.read_text(errors="replace")
        lines += [f"{file.name}: {line.strip()[:160]}" for line in text.splitlines() if re.search("(?i)command", line)]
    return "\n".join(lines[:40]) or "no dump mentions command buffers"


def require_hopper() -> None:
    if str(gpu_devices()[0].compute_capability) != "9.0":
        pytest.skip("this is no Hopper GPU")


@pytest.mark.parametrize("case", ["command_buffer", "command_buffer_sm90"])
def test_calls_are_captured_into_command_buffers_and_replayed_with_new_data(case: str, tmp_path: Path) -> None:
    if case.endswith("sm90"):
        require_hopper()
    flags = f"--xla_gpu_graph_min_graph_size=1 --xla_dump_to={tmp_path / 'dump'} --xla_dump_hlo_as_text"
    found = run_process(case, tmp_path, XLA_FLAGS=f"{flags} --xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL")
    check_command_buffer_results(found["results"], "in command buffers")
    assert found["stages"] == [2, 3], "XLA is to initialise and to execute"
    replays = found["counts"][REPLAYS:]
    dump = command_buffer_dump(tmp_path)
    # Whenever XLA finds the results at an address that it has not seen it captures once more.
    assert sum(replays) <= REPLAYS // 4, f"heed was called {found['counts']} times, expected replays:\n{dump}"
    assert found["loop_calls"] <= 3 * STEPS // 2, f"heed was called {found['loop_calls']} times in the loop:\n{dump}"


def test_calls_outside_of_command_buffers_are_launched_one_by_one(tmp_path: Path) -> None:
    """That the count of the test above tells replays from launches."""
    found = run_process("command_buffer", tmp_path, XLA_FLAGS="--xla_gpu_enable_command_buffer=")
    check_command_buffer_results(found["results"], "outside of command buffers")
    assert found["counts"] == [1] * (2 * REPLAYS) and found["loop_calls"] == 3 * STEPS


# Other processes.


@pytest.mark.parametrize("platforms", [["cuda"], ["cpu", "cuda"]], ids="_".join)
def test_a_program_exported_without_a_gpu_runs_on_one(platforms: list[str], tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    (tmp_path / "platforms.json").write_text(json.dumps(platforms))
    run_process("export", tmp_path, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    found = run_process("exported", tmp_path)
    # The kernel was loaded by the stage that comes before the launch.
    assert found["stages"][:2] == [2, 3] and "heed.attention_fwd.v1" in found["hlo"]
    want = expected_case(make_operands(batch=4))
    results = found["results"]
    want.check(results["out"], results["lse"], "exported, on the GPU")
    if "cpu" in platforms:
        want.check(results["cpu_out"], results["cpu_lse"], "exported, on the CPU")


def test_an_exported_program_runs_without_a_cache_of_kernels(tmp_path: Path) -> None:
    """The process that runs it compiles the kernel anew, where nothing was shipped or stored."""
    pytest.importorskip("flatbuffers")
    (tmp_path / "platforms.json").write_text(json.dumps(["cuda"]))
    run_process("export", tmp_path, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    shutil.copytree(library_dir(), tmp_path / "lib", ignore=shutil.ignore_patterns("heed-kernels"))
    kernels = tmp_path / "kernels"
    found = run_process(
        "exported", tmp_path, HEED_LIB_DIR=str(tmp_path / "lib"), HEED_AOT_DIR="", HEED_CACHE_DIR=str(kernels)
    )
    assert list(kernels.glob("*.kernel")), "no kernel was compiled"
    expected_case(make_operands(batch=4)).check(found["results"]["out"], found["results"]["lse"], "compiled anew")


def test_the_persistent_cache_serves_another_process(tmp_path: Path) -> None:
    first = run_process("cached", tmp_path)
    assert first["hits"] == 0 and first["misses"] >= 1
    (tmp_path / "results.npz").unlink()
    second = run_process("cached", tmp_path)
    assert second["hits"] >= 1 and second["misses"] == 0
    want = expected_case(make_operands(batch=4))
    for name, found in (("first", first), ("second", second)):
        want.check(found["results"]["out"], found["results"]["lse"], f"{name} process")
    np.testing.assert_array_equal(first["results"]["out"], second["results"]["out"])
