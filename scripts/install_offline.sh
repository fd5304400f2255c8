#!/usr/bin/env bash
# Installs heed and what it needs from a folder of wheels, with no network:
#
#   scripts/install_offline.sh WHEEL_DIR [PYTHON] [--target DIR] [--test] [--bench] [--gpu] [--sanitize] [--output DIR]
#
#   WHEEL_DIR     holds heed's wheel and those of what the machine lacks (on a machine with a network:
#                 `make wheel`, then `pip download --dest WHEEL_DIR dist/heed-*.whl pytest hypothesis ...`)
#   PYTHON        the Python to install for (3.11 or newer, with pip); default: python3
#   --target DIR  install into DIR instead of the environment (then set PYTHONPATH=DIR)
#   --test        then run the tests of this checkout against what was installed
#   --bench       then run the benchmarks of this checkout
#   --gpu         then, on an NVIDIA GPU: python -m heed doctor, the GPU tests and the GPU benchmark of this checkout
#   --sanitize    with --gpu: compute-sanitizer on a reduced list too
#   --output DIR  where the logs (install, pytest, bench-*, doctor, pytest-gpu, bench-gpu-*, sanitize) and the
#                 benchmarks' results go; default: build/offline
#
# PYTEST_ARGS, BENCH_ARGS and GPU_BENCH_ARGS hold further arguments.
#
# Only what is missing is installed. JAX, jaxlib, NumPy and SciPy that are there already are never replaced: where heed
# needs newer ones, this stops and says so.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

wheels="" python=python3 target="" output=$here/build/offline run_tests="" run_bench="" run_gpu="" run_sanitizer=""
while (($# > 0)); do
  case $1 in
    --target) target=${2:?--target needs a folder} && shift ;;
    --output) output=${2:?--output needs a folder} && shift ;;
    --test) run_tests=1 ;;
    --bench) run_bench=1 ;;
    --gpu) run_gpu=1 ;;
    --sanitize) run_sanitizer=1 ;;
    -*) usage ;;
    *) if [[ -z $wheels ]]; then wheels=$1; else python=$1; fi ;;
  esac
  shift
done
[[ -n $wheels ]] || usage
[[ -d $wheels ]] || { echo "error: $wheels is not a folder" >&2 && exit 1; }
command -v "$python" >/dev/null || { echo "error: there is no Python called $python" >&2 && exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "error: heed needs Python 3.11 or newer, this is $("$python" --version)" >&2 && exit 1; }
mkdir -p "$output"
output=$(cd "$output" && pwd)

extras=()
if [[ -n $run_tests || -n $run_gpu ]]; then extras+=(--extra test); fi
if [[ -n $run_bench || -n $run_gpu ]]; then extras+=(--extra bench); fi
if [[ -n $target ]]; then
  mkdir -p "$target"
  target=$(cd "$target" && pwd)
  export PYTHONPATH=$target${PYTHONPATH:+:$PYTHONPATH}
fi

# Which wheels to install, one path per line; messages about missing ones go to the terminal.
"$python" "$here/scripts/offline_wheels.py" "$wheels" ${extras[@]+"${extras[@]}"} >"$output/wheels.txt"

echo "installing $(wc -l <"$output/wheels.txt") wheels${target:+ into $target}:"
sed 's|.*/|  |' "$output/wheels.txt"
install=("$python" -m pip install --no-index --no-deps --disable-pip-version-check --requirement "$output/wheels.txt")
if [[ -n $target ]]; then
  install+=(--target "$target" --upgrade)
else
  install+=(--force-reinstall)
fi
if ! "${install[@]}" >"$output/install.log" 2>&1; then
  tail -n 30 "$output/install.log" >&2
  echo "error: pip failed; its output is in $output/install.log" >&2
  exit 1
fi

cd /  # so that nothing of the checkout shadows what was installed
"$python" -c '
import heed, numpy
x = numpy.ones((1, 2, 1, 8), numpy.float32)
assert (heed.flash_mha(x, x, x) == 1).all()
print(f"heed {heed.__version__} works, installed in {heed.__path__[0]}")'
if [[ -n $target ]]; then echo "use it with: export PYTHONPATH=$target"; fi

status=0
cd "$here"
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))"); fi
if [[ -n $run_tests ]]; then
  # shellcheck disable=SC2086  # PYTEST_ARGS is a list of words
  "$python" -m pytest -q ${workers[@]+"${workers[@]}"} -p no:cacheprovider ${PYTEST_ARGS:-} 2>&1 |
    tee "$output/pytest.log" || status=1
fi
if [[ -n $run_bench ]]; then
  # shellcheck disable=SC2086
  for op in fwd bwd; do
    "$python" bench/cpu_attention_$op.py ${BENCH_ARGS:-} 2>&1 | tee "$output/bench-$op.log" || status=1
  done
  cp -r bench/results "$output/" 2>/dev/null || true
fi
if [[ -n $run_gpu ]]; then
  export XLA_PYTHON_CLIENT_PREALLOCATE=false  # several processes share the GPU's memory
  "$python" -m heed doctor 2>&1 | tee "$output/doctor.log" || status=1
  # shellcheck disable=SC2086
  HEED_REQUIRE_GPU=1 "$python" -m pytest -q -m gpu ${workers[@]+"${workers[@]}"} -p no:cacheprovider \
    ${PYTEST_ARGS:-} 2>&1 | tee "$output/pytest-gpu.log" || status=1
  # shellcheck disable=SC2086
  for op in fwd bwd; do
    "$python" bench/gpu_attention_$op.py --output "$output" ${GPU_BENCH_ARGS:-} 2>&1 |
      tee "$output/bench-gpu-$op.log" || status=1
  done
  if [[ -n $run_sanitizer ]]; then
    scripts/sanitize_gpu.sh "$python" 2>&1 | tee "$output/sanitize.log" || status=1
  fi
fi
exit "$status"
