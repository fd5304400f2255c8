#!/usr/bin/env bash
# Builds the wheel of this tree into dist/, in the build tree build/release, which later builds reuse:
#
#   scripts/build_wheel.sh [PYTHON]
#
# PYTHON must have the build requirements of pyproject.toml. The wheel is tagged for the glibc of this machine, which is
# the oldest one that it promises to run with, and checked for that promise.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

platform=$("$python" -c '
import os, platform
glibc = os.confstr("CS_GNU_LIBC_VERSION").split()[1].replace(".", "_")
print(f"manylinux_{glibc}_{platform.machine()}")')

options=(--config-settings build-dir=build/release --config-settings "wheel.tags=py3-none-$platform")
if [[ -n ${HEED_WITH_CPP_TESTS:-} ]]; then options+=(--config-settings "cmake.define.HEED_BUILD_TESTS=$HEED_WITH_CPP_TESTS"); fi

rm -f dist/heed-*.whl
"$python" -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist --verbose "${options[@]}"

wheel=$(echo dist/heed-*.whl)
size=$(stat -c %s "$wheel")
if ((size >= 25 * 1024 * 1024)); then
  echo "error: $wheel has $size bytes, which is more than the 25 MB that it may have" >&2
  exit 1
fi
if "$python" -c 'import auditwheel' 2>/dev/null; then "$python" -m auditwheel show "$wheel"; fi
echo "$wheel ($((size / 1024)) KiB)"
