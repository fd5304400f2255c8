"""``python -m heed doctor``: what heed finds on this machine, and which kernels typical calls would get."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from heed import _lib
from heed._attention import flash_mha
from heed._attention_bwd import flash_mha_bwd, flash_mha_varlen_bwd
from heed._attention_varlen import flash_mha_varlen
from heed._explain import Explanation, explain

_PROBE = "probe Probe<256>"
"""A small kernel, which is on the ahead-of-time list: whether it is found or compiles, and loads, says if any does."""


def doctor() -> int:
    """Prints the report. Returns 0 if everything that this machine has can be used, else 1."""
    gpus = _lib.function("gpu_info")()
    jit = _lib.function("jit_info")()
    problems: list[str] = []
    rows = [
        *_library_rows(),
        *_driver_rows(gpus, problems),
        *_compiler_rows(jit, bool(gpus["devices"])),
        *_cache_rows(jit),
        *_probe_rows(gpus, problems),
    ]
    targets = dict.fromkeys(["cpu", *(str(device["arch"]) for device in gpus["devices"])])
    rows += [row for target in targets for row in _call_rows(target)]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    for problem in problems:
        print(f"\nproblem: {problem}")
    return 1 if problems else 0


Rows = Iterator[tuple[str, str]]


def _library_rows() -> Rows:
    version = _lib.checked_version()
    yield "heed", f"{version} in {_lib.library_dir()}"
    found = []
    for package in ("numpy", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "apache-tvm-ffi", "torch"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    cupy = sorted(d.name for d in metadata.distributions() if str(d.name).lower().startswith("cupy"))
    found += [f"{package} {metadata.version(package)}" for package in cupy]
    yield "packages", ", ".join(found)
    others = [str(name) for name in _lib.function("cpu_targets")() if name != _lib.function("cpu_target")()]
    yield (
        "CPU",
        f"{_lib.function('cpu_target')()} (runs {', '.join(others) or 'no other'} too), "
        f"{_lib.function('num_threads')()} threads",
    )


def _driver_rows(gpus: Any, problems: list[str]) -> Rows:
    version = int(gpus["driver_version"])
    if not gpus["has_driver"]:
        yield "NVIDIA driver", f"none: {gpus['why_no_driver']}"
        return
    if version == 0:
        problems.append(str(gpus["why_no_driver"]))
        yield "NVIDIA driver", "cannot be used"
        return
    yield "NVIDIA driver", f"for CUDA {version // 1000}.{version % 1000 // 10}"
    for index, device in enumerate(gpus["devices"]):
        yield f"GPU {index}", f"{device['name']}, {device['arch']}"
    if not gpus["devices"]:
        yield "GPU", "none"


def _compiler_rows(jit: Any, needs_one: bool) -> Rows:
    if jit["nvrtc_path"]:
        yield "NVRTC", f"{jit['nvrtc_version']}, {jit['nvrtc_path']}"
        return
    yield "NVRTC", "none: pip install heed[cuda13], or set HEED_NVRTC" if needs_one else "none"
    for line in str(jit["nvrtc_searched"]).strip().splitlines():
        yield "", line.strip()


def _cache_rows(jit: Any) -> Rows:
    yield "kernel cache", _folder(str(jit["cache_dir"])) if jit["cache_dir"] else "none: no folder can be written"
    for folder in jit["ahead_of_time_dirs"]:
        yield "shipped kernels", _folder(str(folder))


def _folder(path: str) -> str:
    files = _lib.function("jit_stored_files")(path)
    size = sum(int(file["bytes"]) for file in files)
    damaged = sum(bool(file["error"]) for file in files)
    return f"{path}: {len(files)} kernels, {size / 1e6:.1f} MB" + (f", {damaged} damaged" if damaged else "")


def _probe_rows(gpus: Any, problems: list[str]) -> Rows:
    """Compiles a kernel (or finds it) and loads it on every GPU."""
    for index, device in enumerate(gpus["devices"]):
        try:
            compiled = _lib.function("jit_compile")(_PROBE, str(device["arch"]), "")
            _lib.function("jit_load")(_PROBE, index)
        except (RuntimeError, ValueError) as error:
            problems.append(f"GPU {index} cannot run heed's kernels: {error}")
            yield f"test on GPU {index}", "failed"
        else:
            yield f"test on GPU {index}", f"a kernel loads ({compiled['origin']}, {1e3 * compiled['seconds']:.1f} ms)"


def _describe(dtype: str, **shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: SimpleNamespace(shape=shape, dtype=dtype) for name, shape in shapes.items()}


def _typical_calls() -> list[tuple[str, list[Callable[..., Explanation]]]]:
    """What is called, and how to ask about it and its gradients."""
    prompt = _describe("bfloat16", q=(1, 4096, 32, 128), k=(1, 4096, 8, 128), v=(1, 4096, 8, 128))
    image = _describe("float32", q=(8, 1024, 16, 64), k=(8, 1024, 16, 64), v=(8, 1024, 16, 64))
    packed = _describe("float16", q=(8192, 16, 64), k=(8192, 16, 64), v=(8192, 16, 64))
    lengths = _describe("int32", cu_seqlens_q=(17,))

    def both(forward: Any, backward: Any, shapes: dict[str, Any], **rest: Any) -> list[Callable[..., Explanation]]:
        q = shapes["q"]
        given = {"dout": q, "out": q} | _describe("float32", lse=(*q.shape[:-3], q.shape[-2], q.shape[-3]))
        return [
            functools.partial(explain, forward, **shapes, **rest),
            functools.partial(explain, backward, **shapes, **given, **rest),
        ]

    return [
        ("causal, bfloat16 [1, 4096, 32 over 8, 128]", both(flash_mha, flash_mha_bwd, prompt, is_causal=True)),
        ("full, float32 [8, 1024, 16, 64]", both(flash_mha, flash_mha_bwd, image)),
        ("varlen, float16 [8192, 16, 64] in 16", both(flash_mha_varlen, flash_mha_varlen_bwd, packed, **lengths)),
    ]


def _call_rows(target: str) -> Rows:
    for what, calls in _typical_calls():
        found = [call(target=target) for call in calls]
        yield f"on {target}", f"{what}: {', '.join(_kernel(explanation) for explanation in found)}"


def _kernel(explanation: Explanation) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in explanation.reasons.items())
    return explanation.chosen or f"no kernel ({reasons})"
