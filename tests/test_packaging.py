"""The installed package: one version everywhere, complete, dependent on nothing that it does not ship or declare."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import heed

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [Path(entry) for entry in heed.__path__]  # two folders in an editable install
PACKAGE = next((entry for entry in PACKAGES if (entry / "lib").is_dir()), PACKAGES[0])

SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
BUNDLED_LIBRARIES = {"libheed-hwy.so.1", "libheed-tbb.so.12"}
EXPECTED_LIBRARIES = {
    "libheed.so": SYSTEM_LIBRARIES | BUNDLED_LIBRARIES,
    "libheed_ffi.so": SYSTEM_LIBRARIES | {"libheed.so", "libtvm_ffi.so"},
    "libheed-hwy.so.1": SYSTEM_LIBRARIES,
    "libheed-tbb.so.12": SYSTEM_LIBRARIES,
}


def dynamic_entries(path: Path) -> dict[str, list[str]]:
    """NEEDED, SONAME and RUNPATH of a 64-bit little-endian ELF library."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is not an ELF library"
    (table,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    # Each program header: type, flags, offset, address, physical address, size in the file.
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    offset, length = next((header[2], header[5]) for header in headers if header[0] == 2)
    entries = [struct.unpack_from("<qQ", data, offset + i) for i in range(0, length, 16)]
    strings_address = next(value for tag, value in entries if tag == 5)
    loaded = next(header for header in headers if header[0] == 1 and 0 <= strings_address - header[3] < header[5])
    strings = loaded[2] + strings_address - loaded[3]

    def text(value: int) -> str:
        return data[strings + value : data.index(b"\0", strings + value)].decode()

    names = {1: "NEEDED", 14: "SONAME", 15: "RPATH", 29: "RUNPATH"}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for tag, value in entries:
        if tag in names:
            found[names[tag]].append(text(value))
    return found


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


def test_one_version() -> None:
    match = re.search(r"^project\(heed VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert match is not None
    expected = match.group(1)
    assert heed.__version__ == expected
    assert metadata.version("heed") == expected
    command_line = subprocess.run([sys.executable, "-m", "heed", "version"], capture_output=True, text=True, check=True)
    assert command_line.stdout.strip() == expected
    config = (PACKAGE / "lib" / "cmake" / "heed" / "heedConfigVersion.cmake").read_text()
    assert f'set(PACKAGE_VERSION "{expected}")' in config
    assert f"## [{expected}]" in (ROOT / "CHANGELOG.md").read_text()


def test_wheel_holds_what_it_promises() -> None:
    for name in ["py.typed", "__init__.py", "reference.py"]:
        assert any((entry / name).is_file() for entry in PACKAGES), f"{name} is missing"
    headers = ["include/heed/heed.h", "include/heed/ops.h"]
    for name in [*headers, "licenses/LICENSE", "licenses/libhwy.txt", "licenses/libtbb.txt"]:
        assert (PACKAGE / name).is_file(), f"{name} is missing"
    libraries = {path.name for path in (PACKAGE / "lib").glob("*.so*")}
    assert libraries == set(EXPECTED_LIBRARIES)


@pytest.mark.parametrize("name", EXPECTED_LIBRARIES)
def test_libraries_need_only_what_is_there(name: str) -> None:
    entries = dynamic_entries(PACKAGE / "lib" / name)
    assert entries["SONAME"] == [name]
    assert set(entries["NEEDED"]) <= EXPECTED_LIBRARIES[name]
    assert not entries["RPATH"]
    assert entries["RUNPATH"] in ([], ["$ORIGIN"])


@pytest.mark.parametrize("name", EXPECTED_LIBRARIES)
def test_libraries_keep_the_promise_of_the_tag(name: str) -> None:
    wheel = metadata.distribution("heed").read_text("WHEEL") or ""
    match = re.search(r"^Tag: py3-none-manylinux_2_(\d+)_", wheel, re.MULTILINE)
    if match is None:
        assert re.search(r"^Tag: py3-none-linux_", wheel, re.MULTILINE), wheel
        pytest.skip("installed from a build that is tagged for this machine only")
    versions = re.findall(rb"GLIBC_2\.(\d+)", (PACKAGE / "lib" / name).read_bytes())
    assert max(map(int, versions)) <= int(match.group(1))


def test_import_leaves_jax_alone() -> None:
    result = run_python(
        "import sys, tvm_ffi\n"
        "before = set(sys.modules)  # where PyTorch is installed, tvm_ffi imports it\n"
        "import heed, heed.__main__\n"
        "loaded = {'jax', 'jaxlib', 'jax_tvm_ffi', 'torch'} & (set(sys.modules) - before)\n"
        "assert not loaded and 'jax' not in sys.modules, loaded"
    )
    assert result.returncode == 0, result.stderr


def test_numpy_call_leaves_jax_alone() -> None:
    result = run_python(
        "import sys, heed, numpy as np\n"
        "x = np.ones((1, 4, 2, 8), np.float32)\n"
        "assert (heed.flash_mha(x, x, x) == x).all()\n"
        "assert 'jax' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("package", "found"), [("jax", "0.9.2"), ("jaxlib", "0.9.2"), ("jax-tvm-ffi", "0.1.1")])
def test_too_old_a_package_is_named(package: str, found: str) -> None:
    result = run_python(
        "from importlib import metadata\n"
        "real = metadata.version\n"
        f"metadata.version = lambda name: {found!r} if name == {package!r} else real(name)\n"
        "import heed"
    )
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError")
    assert f"{package} is {found}" in message
    assert "or newer" in message


def test_another_library_version_is_refused() -> None:
    result = run_python(
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '9.9.9' if name == 'heed' else real(name)\n"
        "import heed"
    )
    assert result.returncode != 0
    assert "ImportError: heed 9.9.9" in result.stderr


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    result = run_python("import heed", HEED_LIB_DIR=str(tmp_path))
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert str(tmp_path) in result.stderr


def test_command_line_lists_its_commands() -> None:
    result = subprocess.run([sys.executable, "-m", "heed", "--help"], capture_output=True, text=True, check=True)
    assert "cmake-dir" in result.stdout
    assert "version" in result.stdout


def test_offline_installation_names_what_is_missing(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "install_offline.sh"
    result = subprocess.run(
        [str(script), str(tmp_path), sys.executable, "--output", str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "error: no wheel for heed" in result.stderr
