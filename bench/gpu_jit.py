"""The kernel compiler's times on a GPU machine, on two cores: cold compile, load from disk, first call.

Every figure comes from a process of its own with a cache folder of its own, without the compiled kernels that the wheel
may ship. Started by gpu_attention_fwd.py, as `python bench/gpu_jit.py RESULT.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CORES = 2
OTHER_KERNEL = "probe Probe<64>"  # a small one, not the one that is timed


def library_dir() -> Path:
    """Where heed's libraries are. Does not import heed: what this process sets must not reach the measured ones."""
    override = os.environ.get("HEED_LIB_DIR")
    if override:
        return Path(override).resolve()
    spec = importlib.util.find_spec("heed")
    places = (spec.submodule_search_locations if spec is not None else None) or []
    return next(Path(place) / "lib" for place in places if (Path(place) / "lib").is_dir())


def library_copy(folder: Path) -> Path:
    """A copy of heed's libraries without the shipped kernels beside them."""
    target = folder / "lib"
    target.mkdir()
    for path in library_dir().glob("*.so*"):
        shutil.copy2(path, target / path.name)
    return target


def child(task: str, environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """Runs one of the tasks below in a process of its own and returns what it printed last."""
    command = [sys.executable, __file__, "--task", task, *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise RuntimeError(f"{task} ended with status {done.returncode}\n{end}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def first_call() -> dict[str, Any]:
    """The first calls of flash_mha in a process whose cache is as it finds it."""
    import torch

    import heed

    q, k, v = (torch.randn(1, 1024, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.synchronize()
    samples = []
    for _ in range(2):
        start = time.perf_counter()
        heed.flash_mha(q, k, v, is_causal=True)
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return {"first_s": samples[0], "second_s": samples[1]}


def compile_one(spec: str, arch: str) -> dict[str, Any]:
    """One lookup of a kernel, by the library's own clock: compiled, or from the cache."""
    import heed
    from heed._lib import function

    assert heed.__version__
    record = function("jit_compile")(spec, arch, "")
    return {"seconds": float(record["seconds"]), "origin": str(record["origin"])}


def load_one(spec: str) -> dict[str, Any]:
    """One kernel made ready to launch on the first GPU, in a process that uses the GPU already."""
    import heed
    from heed._lib import function

    assert heed.__version__
    load = function("jit_load")
    load(OTHER_KERNEL, 0)  # makes the CUDA context
    start = time.perf_counter()
    load(spec, 0)
    loaded = time.perf_counter() - start
    samples = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            load(spec, 0)
        samples.append((time.perf_counter() - start) / 500)
    return {"seconds": loaded, "again_s": statistics.median(samples)}


def arch_of_first_gpu() -> str:
    from heed._lib import function

    return str(function("gpu_info")()["devices"][0]["arch"])


def measure(repeats: int) -> dict[str, Any]:
    """All figures. The kernel is the one that a causal bfloat16 call with head dim 128 gets."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recorded = folder / "specs.txt"
        base = {"HEED_LIB_DIR": str(library_copy(folder)), "HEED_AOT_DIR": str(folder / "none")}
        first = child(
            "first_call", {**base, "HEED_CACHE_DIR": str(folder / "first"), "HEED_RECORD_SPECS": str(recorded)}
        )
        again = child("first_call", {**base, "HEED_CACHE_DIR": str(folder / "first")})
        spec = next(line for line in recorded.read_text().splitlines() if line.strip() and not line.startswith("#"))
        arch = str(child("arch", base)["arch"])
        cold, disk, load = [], [], []
        for index in range(repeats):
            environment = {**base, "HEED_CACHE_DIR": str(folder / f"cache{index}")}
            compiled = child("compile", environment, spec, arch)
            found = child("compile", environment, spec, arch)
            if (compiled["origin"], found["origin"]) != ("compiled", "cache"):
                raise RuntimeError(f"got a kernel {compiled['origin']}, then {found['origin']}: cannot time either")
            cold.append(compiled["seconds"])
            disk.append(found["seconds"])
            load.append(child("load", environment, spec))
        loads = [one["seconds"] for one in load]
        lookups = [one["again_s"] for one in load]
    milliseconds = 1e3 * statistics.median(disk)
    return {
        "spec": spec,
        "arch": arch,
        "cold_s": statistics.median(cold),
        "disk_s": statistics.median(loads),
        "details": {
            "kernel": f"{spec} for {arch}",
            "cold compile, by the library's clock": f"{statistics.median(cold):.2f} s ({_spread(cold)})",
            "lookup that finds the file in the cache": f"{milliseconds:.2f} ms",
            "load from disk until it can be launched": f"{1e3 * statistics.median(loads):.2f} ms",
            "load of what is loaded, called from Python": f"{1e6 * statistics.median(lookups):.2f} us",
            "first call of flash_mha, nothing cached": f"{first['first_s']:.2f} s",
            "first call of flash_mha, cached on disk": f"{1e3 * again['first_s']:.1f} ms",
            "second call of flash_mha": f"{1e3 * again['second_s']:.2f} ms",
        },
    }


def launch_cost() -> dict[str, Any]:
    """What bench/launch_cost.cc measures: the host's cost of one launch and of one lookup, without Python.

    The program is HEED_LAUNCH_COST, or where the build puts it. Nothing where it was not built.
    """
    built = Path(__file__).resolve().parent.parent / "build" / "release" / "bin" / "launch_cost"
    program = os.environ.get("HEED_LAUNCH_COST", str(built))
    if not Path(program).is_file():
        return {"details": {"host cost of one launch": f"not measured: {program} is not there"}}
    libraries = (
        f"{library_dir()}:{os.environ.get('LD_LIBRARY_PATH', '')}"  # the installed ones, not those it was built with
    )
    done = subprocess.run(
        [program],
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode != 0:
        return {"details": {"host cost of one launch": f"not measured: {done.stderr.strip()}"}}
    figures = json.loads(done.stdout)
    handlers = {name: one["median_us"] for name, one in figures["handler"].items()}
    driver = {name: one["median_us"] for name, one in figures["driver"].items()}
    details = {f"host cost of one launch, {name}": f"{value:.2f} us" for name, value in handlers.items()}
    details |= {f"the driver's own share, {name}": f"{value:.2f} us" for name, value in driver.items()}
    result: dict[str, Any] = {"launch_s": max(handlers.values()) / 1e6, "launch_cost": figures}
    if "lookup" in figures:
        lookups = {name: one["median_us"] for name, one in figures["lookup"].items()}
        details |= {f"lookup of a loaded kernel, {name}": f"{value:.3f} us" for name, value in lookups.items()}
        result["lookup_s"] = max(lookups.values()) / 1e6
    return {**result, "details": details}


def _spread(samples: list[float]) -> str:
    return f"{min(samples):.2f} to {max(samples):.2f}"


def run_task(task: str, arguments: list[str]) -> dict[str, Any]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if task == "arch":
        return {"arch": arch_of_first_gpu()}
    return {"first_call": first_call, "compile": compile_one, "load": load_one}[task](*arguments)  # type: ignore[operator]


def main() -> int:
    parser = argparse.ArgumentParser(description="The kernel compiler's part of the GPU benchmark.")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(run_task(arguments.task, arguments.arguments)))
        return 0
    result = launch_cost()
    Path(arguments.arguments[0]).write_text(json.dumps(result))
    measured = measure(repeats=1 if arguments.quick else 3)
    measured["details"] |= result["details"]
    Path(arguments.arguments[0]).write_text(json.dumps({**result, **measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
