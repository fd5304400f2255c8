#!/usr/bin/env bash
# Checks (or, with `format`, fixes) formatting, and runs the linters:
#
#   scripts/lint.sh VENV [format|clang-format|ruff|mypy|clang-tidy ...]      all checks when none is named
set -euo pipefail
venv=$(realpath -s "$1")
shift
cd "$(dirname "$0")/.."

cpp_files() { find include src tests/cpp examples/cpp -name '*.h' -o -name '*.cc' -o -name '*.cuh' | LC_ALL=C sort; }
dirs=(python tests examples bench docs scripts)

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
  "$venv/bin/ruff" check --fix "${dirs[@]}" || true
  "$venv/bin/ruff" format "${dirs[@]}"
}

check() {
  echo "lint: $1"
  case $1 in
    format) fix_everything ;;
    clang-format) cpp_files | xargs "$venv/bin/clang-format" --dry-run -Werror ;;
    ruff) "$venv/bin/ruff" check --output-format concise "${dirs[@]}" && "$venv/bin/ruff" format --check "${dirs[@]}" ;;
    # Tests pass wrong arguments on purpose.
    mypy) "$venv/bin/mypy" && "$venv/bin/mypy" --disable-error-code arg-type --disable-error-code misc \
      --disable-error-code call-arg tests ;;
    clang-tidy) run_clang_tidy ;;
    *) echo "unknown check $1" >&2 && return 2 ;;
  esac
}

if (($# == 0)); then set -- clang-format ruff mypy clang-tidy; fi
for name in "$@"; do check "$name"; done
