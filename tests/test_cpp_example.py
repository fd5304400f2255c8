"""`examples/cpp` builds and runs against both installations of the C++ package: `cmake --install`, and the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "cpp"

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"
    return result.stdout


def check_example(build: Path, *options: str) -> None:
    run("cmake", "-S", EXAMPLE, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options)
    run("cmake", "--build", build)
    output = run(build / "heed_example")
    assert "max |heed - plain loop|" in output
    assert "heed::ValueError" in output


def has_highway() -> bool:
    return any(folder.exists() for base in ("/usr", "/usr/local") for folder in Path(base, "include").glob("hwy"))


def installed_prefix(tmp_path: Path) -> Path:
    """Installs from the build tree of the tested libraries if there is one, else from a build without Python."""
    build = ROOT / "build" / "release"
    if not (build / "lib" / "libheed.so").exists():
        if not has_highway():
            pytest.skip("needs a build tree, or the development packages of Highway and oneTBB")
        build = tmp_path / "build"
        run("cmake", "-S", ROOT, "-B", build, "-DHEED_BUILD_FFI=OFF", "-DCMAKE_BUILD_TYPE=Release")
        run("cmake", "--build", build, "--parallel", str(os.cpu_count()))
    first = tmp_path / "first"
    run("cmake", "--install", build, "--prefix", first)
    # The package is relocatable: it is used from another place than it was installed to.
    prefix = tmp_path / "moved here"
    first.rename(prefix)
    return prefix


def test_cmake_install(tmp_path: Path) -> None:
    prefix = installed_prefix(tmp_path)
    for config in (prefix / "lib" / "cmake" / "heed").glob("*.cmake"):
        assert str(ROOT) not in config.read_text(), f"{config.name} names the source tree"
    check_example(tmp_path / "example", f"-DCMAKE_PREFIX_PATH={prefix}")


def test_inside_the_wheel(tmp_path: Path) -> None:
    cmake_dir = run(sys.executable, "-m", "heed", "cmake-dir").strip()
    check_example(tmp_path / "example", f"-Dheed_DIR={cmake_dir}")


def test_another_version_is_refused(tmp_path: Path) -> None:
    cmake_dir = run(sys.executable, "-m", "heed", "cmake-dir").strip()
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(p LANGUAGES CXX)\nfind_package(heed 99 CONFIG REQUIRED)\n"
    )
    result = subprocess.run(
        ["cmake", "-S", str(project), "-B", str(tmp_path / "b"), f"-Dheed_DIR={cmake_dir}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "99" in result.stderr
