"""The kernel compiler as Python sees it: what is shipped compiled, compiling one kernel, what the cache holds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from heed._lib import function


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel's machine code for one architecture."""

    spec: str  # "<family> <instance>"
    arch: str
    origin: str  # "ahead of time", "cache" or "compiled"
    file: str  # empty if it could not be kept
    seconds: float
    log: str  # what the compiler said
    num_threads: int
    shared_bytes: int
    cubin_bytes: int

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return _sum_of(r"Used (\d+) registers", self.log)

    @property
    def spill_bytes(self) -> int:
        """Bytes that a thread stores to and loads from local memory for want of registers."""
        return _sum_of(r"(\d+) bytes spill (?:stores|loads)", self.log)

    @property
    def static_shared_bytes(self) -> int:
        """Shared memory that a block has beside `shared_bytes`, which a launch asks for."""
        return sum(map(int, re.findall(r"(\d+) bytes smem", self.log)))


def _sum_of(pattern: str, log: str) -> int:
    numbers = re.findall(pattern, log)
    if not numbers:
        raise ValueError(f"the compiler's log does not say what {pattern!r} matches:\n{log}")
    return sum(map(int, numbers))


@dataclass(frozen=True)
class StoredFile:
    """One file of a folder of kernels."""

    name: str
    bytes: int
    spec: str
    arch: str
    compiler: str
    error: str  # why it cannot be used; empty if it can


def ahead_of_time_list(arch: str) -> list[str]:
    """The kernels that are shipped compiled for the architecture, as `<family> <instance>`."""
    return [str(text) for text in function("jit_ahead_of_time_list")(arch)]


def compile_kernel(spec: str, arch: str, folder: str | os.PathLike[str] = "") -> CompiledKernel:
    """Compiles for an architecture such as sm_90a, unless the result is there already.

    It goes into the folder, to be shipped (`HEED_AOT_DIR`), or with none into the user's cache. Raises RuntimeError
    with the compiler's log if it does not compile, ValueError for a spec or an architecture that does not exist.
    """
    record = function("jit_compile")(spec, arch, os.fspath(folder))
    return CompiledKernel(
        spec=spec,
        arch=arch,
        origin=str(record["origin"]),
        file=str(record["file"]),
        seconds=float(record["seconds"]),
        log=str(record["log"]),
        num_threads=int(record["num_threads"]),
        shared_bytes=int(record["shared_bytes"]),
        cubin_bytes=int(record["cubin_bytes"]),
    )


def cache_dir() -> Path | None:
    """The folder of the user's cache; None if none can be had."""
    path = str(function("jit_info")()["cache_dir"])
    return Path(path) if path else None


def stored_files(folder: str | os.PathLike[str] = "") -> list[StoredFile]:
    """The kernels in the user's cache or in a folder, each verified by its checksum."""
    return [
        StoredFile(
            name=str(record["name"]),
            bytes=int(record["bytes"]),
            spec=str(record["spec"]),
            arch=str(record["arch"]),
            compiler=str(record["compiler"]),
            error=str(record["error"]),
        )
        for record in function("jit_stored_files")(os.fspath(folder))
    ]


def remove_stored_files(*, only_damaged: bool) -> int:
    """Empties the user's cache, or removes from it what cannot be used. Returns the number of files."""
    return int(function("jit_remove_stored_files")(only_damaged))


def local_archs() -> list[str]:
    """The architectures of this machine's GPUs. Initialises CUDA."""
    return sorted({str(device["arch"]) for device in function("gpu_info")()["devices"]})
