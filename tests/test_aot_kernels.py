"""Every kernel of the ahead-of-time list compiles for every architecture that heed ships for, without spills.

This needs NVRTC and no GPU. What a kernel's code looks like is read from the compiler's log.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import processes
from heed._jit import CompiledKernel, ahead_of_time_list, compile_kernel
from heed._lib import function, library_dir

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "kernels"  # what `make compile` fills: nothing is compiled twice
ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100")
KERNELS = [(text, arch) for arch in ARCHS for text in ahead_of_time_list(arch)]
MAX_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}

needs_nvrtc = pytest.mark.skipif(not function("jit_info")()["nvrtc_path"], reason="there is no NVRTC on this machine")

_HEAD_DIM = re.compile(r"\bhead_dim_(?:qk|v)\s*=\s*(\d+)")


def kernel_id(kernel: tuple[str, str]) -> str:
    text, arch = kernel
    return f"{arch}-{re.sub(r'[^0-9A-Za-z_.=]+', '-', text).strip('-')}"


def compiled(text: str, arch: str) -> CompiledKernel:
    FOLDER.mkdir(parents=True, exist_ok=True)
    return compile_kernel(text, arch, FOLDER)


def largest_head_dim(text: str) -> int | None:
    """The larger of a kernel's head dims; None for a kernel that has none."""
    found = [int(value) for value in _HEAD_DIM.findall(text)]
    assert found or not text.partition(" ")[0].endswith(("attention_fwd", "attention_bwd")), f"no head dim in {text!r}"
    return max(found, default=None)


def is_hoppers_own(text: str) -> bool:
    return text.startswith("sm90_")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", ["attention_fwd", "attention_bwd"])
def test_the_list_has_what_common_calls_get(op: str, arch: str) -> None:
    texts = [text for text in ahead_of_time_list(arch) if text.partition(" ")[0].endswith(op)]
    assert len(set(texts)) == len(texts)
    assert {64, 128, 256} <= {largest_head_dim(text) for text in texts}
    for element in ("kBFloat16", "kFloat16"):
        assert any(element in text for text in texts), element


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", ["act_and_mul", "rope", "rms_norm", "rms_norm_bwd"])
def test_the_list_has_the_kernels_of_small_ops(op: str, arch: str) -> None:
    texts = [text for text in ahead_of_time_list(arch) if text.partition(" ")[0].endswith(f"_{op}")]
    assert len(set(texts)) == len(texts)
    for element in ("kBFloat16", "kFloat16", "kFloat32"):
        assert any(element in text for text in texts), element
    assert not any("is_aligned = false" in text for text in texts)


def test_hopper_has_kernels_of_its_own() -> None:
    texts = [text for text in ahead_of_time_list("sm_90a") if is_hoppers_own(text)]
    for feature in ("is_varlen", "has_mask", "has_segment_ids", "has_softcap"):
        assert any(f"{feature} = true" in text for text in texts), feature
    assert not any(is_hoppers_own(text) for arch in ("sm_80", "sm_89", "sm_100") for text in ahead_of_time_list(arch))


def allowed_spill_bytes(text: str, arch: str) -> int | None:
    """None for head dims above 128, where nothing is promised. float32 at 128 spills a little on older GPUs."""
    if is_hoppers_own(text):
        return 0
    dim = largest_head_dim(text)
    if dim is not None and dim > 128:
        return None
    return 48 if "kFloat32" in text and dim == 128 and arch in ("sm_80", "sm_89") else 0


@needs_nvrtc
@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_id)
def test_compiles_without_spills(kernel: tuple[str, str]) -> None:
    text, arch = kernel
    found = compiled(text, arch)
    assert 0 < found.registers <= 255
    assert 0 < found.num_threads <= 1024
    assert found.num_threads * found.registers <= 65536, "not even one block fits on a multiprocessor"
    assert found.shared_bytes >= 0 and found.shared_bytes + found.static_shared_bytes <= MAX_SHARED_BYTES[arch]
    allowed = allowed_spill_bytes(text, arch)
    assert allowed is None or found.spill_bytes <= allowed, found.log


@needs_nvrtc
@pytest.mark.parametrize("text", [text for text in ahead_of_time_list("sm_90a") if is_hoppers_own(text)])
def test_hoppers_own_divide_all_registers(text: str) -> None:
    """A launch gives every thread as many; the warpgroups then have 224, 224 and 56, those of tall tiles 160 and 32."""
    found = compiled(text, "sm_90a")
    registers = (160, 160, 160, 32) if "is_tall = true" in text else (224, 224, 56)
    assert found.num_threads == len(registers) * 128, found.log
    assert len(registers) * found.registers == sum(registers), found.log
    # Such as products that wait for one another, or registers that do not move.
    assert "Performance Loss" not in found.log, found.log


@needs_nvrtc
def test_a_spill_would_be_seen() -> None:
    """The compiler's own words are understood: its log with other numbers reads as spilling."""
    text, arch = KERNELS[0]
    found = compiled(text, arch)
    log, count = re.subn(r"\b0 bytes spill", "8 bytes spill", found.log)
    assert count >= 2, found.log
    assert CompiledKernel(**{**vars(found), "log": log}).spill_bytes == 8 * count


def shipped() -> list[Path]:
    folder = library_dir() / "heed-kernels"
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


@pytest.mark.skipif(not shipped(), reason="this build of heed ships no compiled kernels")
@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_kernels_need_no_compiler(arch: str, tmp_path: Path) -> None:
    """Each kernel of the list is found in the installed package, by a process that has neither NVRTC nor a cache."""
    program = (
        "from heed._jit import ahead_of_time_list, compile_kernel\n"
        f"print({{compile_kernel(text, {arch!r}).origin for text in ahead_of_time_list({arch!r})}})\n"
    )
    environment = {"HEED_NVRTC": str(tmp_path / "none.so"), "HEED_CACHE_DIR": str(tmp_path / "cache")}
    result = processes.run(program, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "{'ahead of time'}"
