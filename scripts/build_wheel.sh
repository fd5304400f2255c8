#!/usr/bin/env bash
# Builds the wheel of this tree into dist/, in the build tree build/release, which later builds reuse:
#
#   scripts/build_wheel.sh [PYTHON]
#
# PYTHON must have the build requirements of pyproject.toml. The wheel is tagged for the glibc of this machine, which is
# the oldest one that it promises to run with, and checked for that promise.
#
# Where there is NVRTC, the GPU kernels of the ahead-of-time list are compiled (no GPU is needed) and shipped inside.
#
#   HEED_WHEEL_ARCHS    the architectures to compile them for; default: "sm_80 sm_89 sm_90a sm_100"; empty: none
#   HEED_WHEEL_KERNELS  a folder that a fresh `make compile` of this tree filled: all of it is shipped, and only what it
#                       lacks is compiled
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

platform=$("$python" -c '
import os, platform
glibc = os.confstr("CS_GNU_LIBC_VERSION").split()[1].replace(".", "_")
print(f"manylinux_{glibc}_{platform.machine()}")')

options=(--config-settings build-dir=build/release --config-settings "wheel.tags=py3-none-$platform")
if [[ -n ${HEED_WITH_CPP_TESTS:-} ]]; then options+=(--config-settings "cmake.define.HEED_BUILD_TESTS=$HEED_WITH_CPP_TESTS"); fi

read -ra archs <<<"${HEED_WHEEL_ARCHS-sm_80 sm_89 sm_90a sm_100}"
kernels=build/release/lib/heed-kernels
rm -rf "$kernels"

build() {
  rm -f dist/heed-*.whl
  "$python" -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist --verbose "${options[@]}"
}

# The kernels are compiled by the wheel that was just built, and packed by a second run, which compiles nothing else.
build
if ((${#archs[@]} > 0)); then
  unpacked=$(mktemp -d)
  trap 'rm -rf "$unpacked"' EXIT
  "$python" -m zipfile --extract dist/heed-*.whl "$unpacked"
  if PYTHONPATH=$unpacked "$python" -c '
import sys
from heed._lib import function
sys.exit(not function("jit_info")()["nvrtc_path"])'; then
    if [[ -n ${HEED_WHEEL_KERNELS:-} ]]; then cp -R "$HEED_WHEEL_KERNELS" "$kernels"; fi
    PYTHONPATH=$unpacked "$python" -m heed compile --output "$kernels" "${archs[@]/#/--arch=}"
    build
  elif [[ -n ${HEED_WHEEL_ARCHS:-} ]]; then
    echo "error: HEED_WHEEL_ARCHS asks for compiled kernels, and there is no NVRTC to compile them" >&2
    exit 1
  else
    echo "no NVRTC on this machine: the wheel ships no compiled kernels (they are compiled where they are used)"
  fi
fi

wheel=$(echo dist/heed-*.whl)
size=$(stat -c %s "$wheel")
if ((size >= 25 * 1024 * 1024)); then
  echo "error: $wheel has $size bytes, which is more than the 25 MB that it may have" >&2
  exit 1
fi
if "$python" -c 'import auditwheel' 2>/dev/null; then "$python" -m auditwheel show "$wheel"; fi
echo "$wheel ($((size / 1024)) KiB)"
