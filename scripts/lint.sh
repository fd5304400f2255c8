#!/usr/bin/env bash
# Checks (or, with `format`, fixes) formatting, and runs the linters:
#
#   scripts/lint.sh VENV [format|clang-format|ruff|mypy|clang-tidy ...]      all checks when none is named
set -euo pipefail
venv=$(realpath -s "$1")
shift
cd "$(dirname "$0")/.."

cpp_files() { find include src tests/cpp examples/cpp -name '*.h' -o -name '*.cc' -o -name '*.cuh' | LC_ALL=C sort; }
python_dirs() {
  local dir
  for dir in python tests examples bench docs; do
    if [[ -n $(find "$dir" -name '*.py' -print -quit) ]]; then echo "$dir"; fi
  done
}

# clang-tidy reads each source once, for one instruction set: the other passes of Highway's foreach_target repeat the
# same code. It needs no build, only the headers.
run_clang_tidy() {
  local includes=(-Iinclude -Isrc) option
  for option in --includedir --dlpack-includedir; do
    includes+=(-isystem "$("$venv/bin/python" -m tvm_ffi.config $option)")
  done
  find src -name '*.cc' | LC_ALL=C sort | xargs -P "$(nproc)" -I{} clang-tidy --quiet --warnings-as-errors='*' {} -- \
    -std=c++20 "${includes[@]}" -DHEED_VERSION='"0"' -DHWY_SHARED_DEFINE -DHWY_COMPILE_ONLY_STATIC 2>&1 |
    { grep -vE '^[0-9]+ warnings? generated\.$' || true; }
}

fix_everything() {
  cpp_files | xargs "$venv/bin/clang-format" -i
  # shellcheck disable=SC2046
  "$venv/bin/ruff" check --fix $(python_dirs) || true
  # shellcheck disable=SC2046
  "$venv/bin/ruff" format $(python_dirs)
}

check() {
  echo "lint: $1"
  case $1 in
    format) fix_everything ;;
    clang-format) cpp_files | xargs "$venv/bin/clang-format" --dry-run -Werror ;;
    # shellcheck disable=SC2046
    ruff) "$venv/bin/ruff" check $(python_dirs) && "$venv/bin/ruff" format --check $(python_dirs) ;;
    mypy) "$venv/bin/mypy" ;;
    clang-tidy) run_clang_tidy ;;
    *) echo "unknown check $1" >&2 && return 2 ;;
  esac
}

if (($# == 0)); then set -- clang-format ruff mypy clang-tidy; fi
for name in "$@"; do check "$name"; done
