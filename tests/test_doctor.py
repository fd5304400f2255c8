"""python -m heed doctor: what it says about this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import heed
from processes import run


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "heed", "doctor", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def rows_of(output: str) -> dict[str, str]:
    return dict(line.split("  ", 1) for line in output.splitlines() if "  " in line.strip())


def test_it_describes_the_cpu_and_names_kernels() -> None:
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {name: text.strip() for name, text in rows_of(done.stdout).items()}
    assert rows["heed"].startswith(f"{heed.__version__} in ")
    assert " threads" in rows["CPU"]
    for row in ("packages", "NVIDIA driver", "NVRTC", "kernel cache"):
        assert rows[row], done.stdout
    chosen = [line for line in done.stdout.splitlines() if line.startswith("on cpu")]
    kernels = ": cpu_attention_fwd, cpu_attention_bwd"
    assert len(chosen) == 3 and all(line.endswith(kernels) for line in chosen), done.stdout
    assert any("varlen" in line for line in chosen)


def test_without_a_driver_it_says_so_and_that_is_no_problem() -> None:
    """A process that sees no GPU of the machine, if there are any."""
    code = (
        "from heed import _lib, _doctor\n"
        "real = _lib.function\n"
        "nothing = {'driver_version': 0, 'has_driver': False, 'why_no_driver': 'none was found', 'devices': []}\n"
        "_lib.function = lambda name: (lambda: nothing) if name == 'gpu_info' else real(name)\n"
        "raise SystemExit(_doctor.doctor())\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert rows_of(done.stdout)["NVIDIA driver"].strip() == "none: none was found"
    assert "GPU 0" not in done.stdout and "problem:" not in done.stdout


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_driver_that_cannot_be_used_is_a_problem(tmp_path: Path) -> None:
    """A library of the driver's name that has none of its functions."""
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", str(tmp_path / "libcuda.so.1")], check=True)
    done = run("from heed._doctor import doctor; raise SystemExit(doctor())", LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert rows_of(done.stdout)["NVIDIA driver"].strip() == "cannot be used"
    assert "problem: the NVIDIA driver is too old" in done.stdout


def test_a_gpu_that_cannot_be_used_is_a_problem() -> None:
    code = (
        "from heed import _lib, _doctor\n"
        "real = _lib.function\n"
        "gpu = {'name': 'H200', 'capability': 90, 'arch': 'sm_90a'}\n"
        "info = {'driver_version': 13000, 'has_driver': True, 'why_no_driver': '', 'devices': [gpu]}\n"
        "def broken(*_):\n"
        "    raise RuntimeError('NVRTC was not found')\n"
        "fakes = {'gpu_info': lambda: info, 'jit_compile': broken}\n"
        "_lib.function = lambda name: fakes.get(name) or real(name)\n"
        "raise SystemExit(_doctor.doctor())\n"
    )
    done = run(code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "problem: GPU 0 cannot run heed's kernels: NVRTC was not found" in done.stdout
    rows = {name: text.strip() for name, text in rows_of(done.stdout).items()}
    assert rows["NVIDIA driver"] == "for CUDA 13.0" and rows["GPU 0"] == "H200, sm_90a"
    assert any(line.startswith("on sm_90a") for line in done.stdout.splitlines())


def test_it_does_not_import_jax() -> None:
    done = run("import sys; from heed._doctor import doctor; doctor(); assert 'jax' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_on_a_gpu_it_loads_a_kernel_and_names_the_gpus_kernels() -> None:
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a kernel loads" in done.stdout and "problem:" not in done.stdout
    chosen = [line for line in done.stdout.splitlines() if line.startswith("on sm_")]
    assert len(chosen) >= 3, done.stdout
    for line in chosen:
        assert "_attention_fwd, sm" in line and "_attention_bwd" in line and "no kernel" not in line, done.stdout
