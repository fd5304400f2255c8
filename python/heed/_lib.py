"""Loads the native libraries. Everything native that Python calls is a function of `module()`."""

from __future__ import annotations

import functools
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import tvm_ffi

from heed._errors import UnsupportedError

tvm_ffi.register_error("heed.UnsupportedError", UnsupportedError)


def library_dir() -> Path:
    """The folder that holds libheed.so and libheed_ffi.so (`HEED_LIB_DIR`, or the one inside the package)."""
    override = os.environ.get("HEED_LIB_DIR")
    if override:
        return Path(override)
    folders = [Path(entry) / "lib" for entry in sys.modules["heed"].__path__]  # two in an editable install
    return next((folder for folder in folders if folder.is_dir()), folders[0])


@functools.cache
def module() -> Any:
    """The TVM-FFI module with heed's exported functions, loaded once."""
    path = library_dir() / "libheed_ffi.so"
    if not path.exists():
        raise ImportError(
            f"heed's native library is missing: {path} does not exist. Install heed's wheel, or build it with "
            "`pip install .` (a folder chosen with HEED_LIB_DIR must hold libheed.so and libheed_ffi.so)."
        )
    loaded = tvm_ffi.load_module(str(path))
    loaded.jit_set_site_dirs([entry for entry in sys.path if entry])  # where the nvidia-cuda-nvrtc wheel may be
    return loaded


@functools.cache
def function(name: str) -> Any:
    """An exported function, looked up once."""
    return getattr(module(), name)


def checked_version() -> str:
    """The version of the native library, which must be that of the installed Python package."""
    native = str(function("version")())
    try:
        installed = metadata.version("heed")
    except metadata.PackageNotFoundError:  # used from a source tree
        return native
    if installed != native:
        raise ImportError(
            f"heed {installed} found a native library of version {native} in {library_dir()}: reinstall heed"
        )
    return native
