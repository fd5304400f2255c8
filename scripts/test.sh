#!/usr/bin/env bash
# Runs pytest and ctest on what scripts/setup.sh built, and ends with the closing line of each:
#
#   scripts/test.sh PYTHON
#
#   PYTEST_ARGS        further arguments for pytest (options, paths)
#   HEED_TEST_WORKERS  pytest processes, and C++ tests at a time; default: one per core, at most 8
#   HEED_SKIP_CTEST    set to run pytest only
set -uo pipefail
python=$(realpath -s "$1")
cd "$(dirname "$0")/.." || exit 1

workers=${HEED_TEST_WORKERS:-$(($(nproc) < 8 ? $(nproc) : 8))}
mkdir -p build
status=0

PATH=$(dirname "$python"):$PATH
# shellcheck disable=SC2086  # PYTEST_ARGS is a list of words
"$python" -m pytest -q -n "$workers" ${PYTEST_ARGS:-} 2>&1 | tee build/pytest.log || status=1
closing=("pytest: $(grep -E '^(=+ )?[0-9]+ (passed|failed|error|skipped|deselected)|no tests ran' build/pytest.log | tail -n 1)")

if [[ -z ${HEED_SKIP_CTEST:-} ]]; then
  # The C++ tests know nothing of Python's packages: the compiler may be the one of the nvidia-cuda-nvrtc wheel.
  HEED_NVRTC=${HEED_NVRTC:-$("$python" -c 'from heed import _lib; print(_lib.function("jit_info")()["nvrtc_path"])')}
  export HEED_NVRTC
  ctest --test-dir build/release --output-on-failure --parallel "$workers" 2>&1 | tee build/ctest.log || status=1
  closing+=("ctest:  $(grep -E 'tests passed|No tests were found' build/ctest.log | tail -n 1)")
fi

printf '\n'
printf '%s\n' "${closing[@]}"
exit "$status"
