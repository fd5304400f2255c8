"""The kernel compiler and its cache, process by process: who finds what, what is said, what killed processes leave.

Needs NVRTC, not a GPU. What happens inside one process is tested in C++ (tests/cpp/jit_*_test.cc).
"""

from __future__ import annotations

import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import processes
from heed import _jit
from heed._lib import function

_HAS_NVRTC = bool(function("jit_info")()["nvrtc_path"])
needs_nvrtc = pytest.mark.skipif(not _HAS_NVRTC, reason="there is no NVRTC on this machine")

# What the compiler of a test process is asked for: a small kernel, another one for each number.
_COMPILE = """
import sys
from heed import _jit
kernel = _jit.compile_kernel("probe Probe<64, {number}>", "sm_90a")
print(kernel.origin, kernel.num_threads, kernel.shared_bytes)
"""
_INFO = "from heed._lib import function; print(function('jit_info')()['nvrtc_path'])"


def compile_code(number: int = 0) -> str:
    return _COMPILE.format(number=number)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables with which a process sees only this test's folders."""
    return {
        "HEED_CACHE_DIR": str(tmp_path / "cache"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
        "TMPDIR": str(tmp_path),
        "HEED_AOT_DIR": str(tmp_path / "aot"),
        "HEED_JIT_VERBOSE": "",
        "HEED_RECORD_SPECS": "",
    }


def run(code: str, environment: dict[str, str], **more: str) -> str:
    """What the program printed; fails with its stderr if it does not end well."""
    process = processes.run(code, **environment, **more)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.fixture(scope="module")
def nvrtc_file() -> Path:
    """The file of this machine's NVRTC, as the loader sees it."""
    if not _HAS_NVRTC:
        pytest.skip("there is no NVRTC on this machine")
    code = compile_code() + 'print(*[line.split()[-1] for line in open("/proc/self/maps") if "libnvrtc.so" in line])'
    process = processes.run(code, HEED_CACHE_DIR="/proc/none", XDG_CACHE_HOME="/proc", TMPDIR="/proc")
    assert process.returncode == 0, process.stderr
    return Path(process.stdout.split()[-1])


# ----------------------------------------------------------------------------------------------------------------------


@needs_nvrtc
def test_one_process_compiles_the_next_one_reads(environment: dict[str, str]) -> None:
    assert run(compile_code(), environment) == "compiled 64 256"
    assert run(compile_code(), environment) == "cache 64 256"
    assert run(compile_code(4096), environment) == "compiled 64 4352"


@needs_nvrtc
def test_racing_processes_compile_a_key_once(environment: dict[str, str]) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", "import sys, heed; sys.stdin.read()" + compile_code()],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(16)
    ]
    for child in children:  # each goes on when its stdin ends
        assert child.stdin is not None
        child.stdin.close()
        child.stdin = None
    outputs = [child.communicate(timeout=120)[0].strip() for child in children]
    assert sorted(outputs) == ["cache 64 256"] * 15 + ["compiled 64 256"]


@needs_nvrtc
def test_processes_killed_at_random_leave_a_cache_that_works(environment: dict[str, str]) -> None:
    code = "from heed import _jit\nfor i in range(10**6): _jit.compile_kernel(f'probe Probe<64, {4 * i}>', 'sm_90a')"
    cache = Path(environment["HEED_CACHE_DIR"])
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment)
        deadline = time.monotonic() + 60
        before = len(list(cache.glob("*.kernel")))
        while len(list(cache.glob("*.kernel"))) <= before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        child.wait()
    files = stored_in(cache)
    assert len(files) >= 8
    assert [file.error for file in files] == [""] * len(files)
    assert run(compile_code(0), environment) == "cache 64 256"
    assert run(compile_code(4 * 10**4), environment) == "compiled 64 40256"


def stored_in(folder: Path) -> list[_jit.StoredFile]:
    return _jit.stored_files(folder)


@needs_nvrtc
def test_a_cache_lookup_takes_milliseconds(environment: dict[str, str], nvrtc_file: Path) -> None:
    # Of a process's first lookup, which opens the folders; the fastest of five, on a machine that does other things.
    environment["HEED_NVRTC"] = str(nvrtc_file)
    code = """
from heed import _jit
print(_jit.compile_kernel("probe Probe<64>", "sm_90a").seconds, "libnvrtc.so" in open("/proc/self/maps").read())
"""
    run(code, environment)
    results = [run(code, environment).split() for _ in range(5)]
    assert min(float(seconds) for seconds, _ in results) <= 0.005, results
    assert {is_open for _, is_open in results} == {"False"}  # nor does it open the compiler


@needs_nvrtc
def test_verbose_logs_each_lookup_with_its_time(environment: dict[str, str]) -> None:
    lines = []
    for _ in range(2):
        process = processes.run(compile_code(), **environment | {"HEED_JIT_VERBOSE": "1"})
        lines += process.stderr.splitlines()
    assert len(lines) == 2, lines
    pattern = r"heed: jit: sm_90a probe Probe<64, 0>: {} in [0-9.]+ ms \({}/[0-9a-f]+-nvrtc[0-9.]+\.kernel\)"
    for line, origin in zip(lines, ("compiled", "cache"), strict=True):
        assert re.fullmatch(pattern.format(origin, re.escape(environment["HEED_CACHE_DIR"])), line), line


def on_terminal(code: str, environment: dict[str, str]) -> str:
    """What a program writes to stderr if that is a terminal."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        text += part
    os.close(ours)
    assert child.wait(timeout=120) == 0, text
    return text.decode()


@needs_nvrtc
def test_commands_compile_without_lines_of_the_library(environment: dict[str, str]) -> None:
    assert on_terminal(compile_code(), environment) == ""


@needs_nvrtc
def test_specs_are_recorded_and_compiled_from_the_record(environment: dict[str, str], tmp_path: Path) -> None:
    record = tmp_path / "specs"
    with_record = environment | {"HEED_RECORD_SPECS": str(record)}
    for number in (0, 4, 0):  # compiled, compiled, from the cache
        run(compile_code(number), with_record)
    assert record.read_text().splitlines() == [f"probe Probe<64, {number}>" for number in (0, 4, 0)]
    output = tmp_path / "shipped"
    process = command(environment, "compile", "--arch", "sm_80", "--specs", str(record), "--output", str(output))
    assert process.returncode == 0, process.stderr
    assert {(file.spec, file.arch) for file in stored_in(output)} == {
        ("probe Probe<64, 0>", "sm_80"),
        ("probe Probe<64, 4>", "sm_80"),
    }


@needs_nvrtc
def test_an_unwritable_record_is_a_warning(environment: dict[str, str]) -> None:
    process = processes.run(compile_code(), **environment | {"HEED_RECORD_SPECS": "/proc/none"})
    assert process.returncode == 0
    assert process.stderr.strip() == "heed: warning: cannot append to HEED_RECORD_SPECS=/proc/none"


# ----------------------------------------------------------------------------------------------------------------------
# Finding NVRTC.


def fake_install(folder: Path, nvrtc_file: Path) -> Path:
    """A folder with links to the real NVRTC and its built-in headers."""
    folder.mkdir(parents=True)
    for file in nvrtc_file.parent.glob("libnvrtc*.so*"):
        (folder / file.name).symlink_to(file)
    return folder


def test_search_order(environment: dict[str, str], tmp_path: Path, nvrtc_file: Path) -> None:
    wheel = fake_install(tmp_path / "site/nvidia/cu13/lib", nvrtc_file)
    toolkit = fake_install(tmp_path / "toolkit/lib64", nvrtc_file)
    asked = fake_install(tmp_path / "asked", nvrtc_file)
    path = f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}"
    no_wheel = environment | {"CUDA_HOME": str(tmp_path / "toolkit"), "HEED_NVRTC": ""}
    everything = no_wheel | {"PYTHONPATH": path}

    def found(variables: dict[str, str]) -> Path:
        return Path(run(_INFO, variables)).parent

    assert found(everything | {"HEED_NVRTC": str(asked)}) == asked  # a folder
    assert found(everything | {"HEED_NVRTC": str(asked / nvrtc_file.name)}) == asked  # or a file
    assert found(everything) == wheel
    assert run(compile_code(), everything) == "compiled 64 256"
    if not any("nvidia" in os.listdir(entry) for entry in sys.path if os.path.isdir(entry)):
        assert found(no_wheel) == toolkit
        last = run(_INFO, no_wheel | {"CUDA_HOME": "", "CUDA_PATH": ""})
        assert last.startswith(("libnvrtc.so", "/usr/local/cuda")) or not last


def test_a_broken_install_is_passed_over(environment: dict[str, str], tmp_path: Path, nvrtc_file: Path) -> None:
    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0"):
        broken = tmp_path / "site/nvidia/cu13/lib" / name
        broken.parent.mkdir(parents=True, exist_ok=True)
        broken.write_bytes(b"no library")
    toolkit = fake_install(tmp_path / "toolkit/lib64", nvrtc_file)
    path = f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}"
    variables = environment | {"CUDA_HOME": str(toolkit.parent), "PYTHONPATH": path, "HEED_NVRTC": ""}
    assert run(compile_code(), variables) == "compiled 64 256"


def test_without_a_compiler_the_message_says_what_was_tried(environment: dict[str, str]) -> None:
    process = processes.run(compile_code(), **environment | {"HEED_NVRTC": "/nowhere/libnvrtc.so"})
    assert process.returncode != 0
    message = process.stderr[process.stderr.index("RuntimeError") :]
    for part in ("probe Probe<64, 0>", "sm_90a", "no NVRTC", "pip install nvidia-cuda-nvrtc", "HEED_NVRTC=/nowhere"):
        assert part in message


@needs_nvrtc
def test_without_a_compiler_what_is_there_serves(environment: dict[str, str], tmp_path: Path) -> None:
    no_compiler = environment | {"HEED_NVRTC": "/nowhere/libnvrtc.so"}
    run(compile_code(0), environment)
    file = next(Path(environment["HEED_CACHE_DIR"]).glob("*.kernel"))
    assert run(compile_code(0), no_compiler) == "cache 64 256"
    file.rename(file.with_name(re.sub(r"nvrtc[0-9.]+", "nvrtc99.0.", file.name)))  # another compiler's
    assert run(compile_code(0), no_compiler) == "cache 64 256"
    assert run(compile_code(0), environment) == "compiled 64 256"  # whose work is not mixed with this one's

    _jit.compile_kernel("probe Probe<64, 4>", "sm_90a", tmp_path / "aot")
    assert run(compile_code(4), no_compiler) == "ahead of time 64 260"


def test_heed_needs_neither_driver_nor_compiler(environment: dict[str, str]) -> None:
    code = """
import numpy as np
import heed
x = np.ones((1, 4, 2, 8), np.float32)
print(heed.flash_mha(x, x, x).sum())
maps = open("/proc/self/maps").read()
print("libnvrtc" in maps, "libcuda" in maps)
"""
    assert run(code, environment | {"HEED_NVRTC": "/nowhere"}).splitlines() == ["64.0", "False False"]


# ----------------------------------------------------------------------------------------------------------------------
# The command line.


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "heed", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@needs_nvrtc
def test_compile_command(environment: dict[str, str], tmp_path: Path) -> None:
    specs = tmp_path / "specs"
    specs.write_text("# recorded\nprobe Probe<64>\n\nprobe Probe<96>\nprobe Probe<64>\n")
    arguments = ["compile", "--arch", "sm_80", "--arch", "sm_90a", "--specs", str(specs), "--jobs", "2", "--verbose"]
    process = command(environment, *arguments)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # no bar where there is no terminal
    lines = process.stdout.splitlines()
    assert len(lines) == 5
    assert all("registers" in line and "0 bytes spilled" in line for line in lines[:-1]), lines
    assert lines[-1].startswith("4 kernels in the cache: 4 compiled, 0 were there, 0 failed"), lines
    again = command(environment, *arguments)
    assert "0 compiled, 4 were there" in again.stdout
    assert len(stored_in(Path(environment["HEED_CACHE_DIR"]))) == 4


@needs_nvrtc
def test_compile_command_reports_failures_and_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    specs = tmp_path / "specs"
    specs.write_text("probe Probe<33>\nnothing Probe<64>\nprobe Probe<64>\n")
    output = str(tmp_path / "output")
    process = command(environment, "compile", "--arch", "sm_90a", "--specs", str(specs), "--output", output)
    assert process.returncode == 1
    assert "1 compiled, 0 were there, 2 failed" in process.stdout
    assert "FAILED sm_90a probe Probe<33>" in process.stderr and "expected whole warps" in process.stderr
    assert "got family 'nothing'" in process.stderr


def test_compile_command_refuses_what_it_cannot_do(environment: dict[str, str], tmp_path: Path) -> None:
    process = command(environment, "compile", "--arch", "hopper")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "heed compile: arch: got 'hopper', expected a name such as sm_80 or sm_90a\n"
    process = command(environment, "compile", "--arch", "sm_80", "--specs", str(tmp_path / "none"))
    assert process.returncode == 2 and "none" in process.stderr
    (tmp_path / "file").write_text("")
    process = command(environment, "compile", "--arch", "sm_80", "--output", str(tmp_path / "file"))
    assert process.returncode == 1


@needs_nvrtc
def test_compile_command_shows_a_bar_on_a_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    specs = tmp_path / "specs"
    specs.write_text("probe Probe<64>\nprobe Probe<96>\n")
    code = f"""
import sys
from heed.__main__ import main
sys.exit(main(["compile", "--arch", "sm_80", "--arch", "sm_90a", "--specs", {str(specs)!r}]))
"""
    text = on_terminal(code, environment)
    assert all(f"{count}/4" in text for count in range(5)) and "#" * 30 in text, text
    assert text.endswith("\r\x1b[K")  # and takes it away


@needs_nvrtc
def test_cache_commands(environment: dict[str, str]) -> None:
    cache = Path(environment["HEED_CACHE_DIR"])
    for number in (0, 4):
        run(compile_code(number), environment)
    listed = command(environment, "cache", "list").stdout.splitlines()
    assert len(listed) == 3
    assert re.fullmatch(r"sm_90a +[0-9.]+ kB  nvrtc [0-9.]+  probe Probe<64, 0>", listed[0]), listed
    assert command(environment, "cache", "verify").returncode == 0

    file = sorted(cache.glob("*.kernel"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    verified = command(environment, "cache", "verify")
    assert verified.returncode == 1
    assert f"{file.name}: its checksum is wrong" in verified.stdout
    assert f"2 kernels, 0.0 MB, 1 damaged, in {cache}" in verified.stdout
    assert command(environment, "cache", "list", str(cache)).stdout.startswith("damaged  ")

    assert f"removed 1 files from {cache}" in command(environment, "cache", "clear", "--damaged").stdout
    assert command(environment, "cache", "verify").returncode == 0
    assert f"removed 1 files from {cache}" in command(environment, "cache", "clear").stdout
    assert list(cache.iterdir()) == []


def test_cache_commands_on_an_empty_cache(environment: dict[str, str]) -> None:
    assert "0 kernels" in command(environment, "cache", "list").stdout
    assert command(environment, "cache", "verify").returncode == 0
    assert "removed 0 files" in command(environment, "cache", "clear").stdout
    assert command(environment, "cache").returncode == 2


@pytest.mark.parametrize("action", ["list", "verify"])
def test_cache_commands_refuse_a_folder_that_does_not_exist(
    action: str, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = str(tmp_path / "none")
    process = command(environment, "cache", action, folder)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"heed cache: folder: got {folder!r}, expected one that exists\n"


def test_cache_clear_takes_no_folder(environment: dict[str, str], tmp_path: Path) -> None:
    process = command(environment, "cache", "clear", str(tmp_path / "none"))
    assert process.returncode == 2 and "unrecognized arguments" in process.stderr


@pytest.mark.parametrize("device", [-1, 64, 2**32])
def test_devices_that_cannot_be_are_value_errors(device: int) -> None:
    calls = {"cuda_target": (), "jit_load": ("probe Probe<64>",)}
    calls |= {"attention_fwd_load": ("",), "attention_bwd_load": ("",)}
    for name, arguments in calls.items():
        with pytest.raises(ValueError, match=f"got CUDA device {device}, expected one from 0 to 63"):
            function(name)(*arguments, device)
