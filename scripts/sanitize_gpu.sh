#!/usr/bin/env bash
# Runs heed's GPU kernels under each tool of compute-sanitizer and prints its summaries:
#
#   scripts/sanitize_gpu.sh PYTHON [--only TEXT]
#
# PYTHON has heed, CuPy and pytest; --only picks cases (scripts/sanitize_gpu_cases.py). Logs go to build/sanitize/.
#
#   COMPUTE_SANITIZER  the program, if it is neither on PATH nor in CUDA_HOME or /usr/local/cuda
#   SANITIZER_TOOLS    default: memcheck racecheck initcheck synccheck
set -uo pipefail
python=$(realpath -s "$(command -v "$1")")
shift
cd "$(dirname "$0")/.." || exit 1
mkdir -p build/sanitize

sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer)}
for folder in "${CUDA_HOME:-}" /usr/local/cuda /usr/local/cuda-*; do
  for file in "$folder/bin/compute-sanitizer" "$folder/compute-sanitizer/compute-sanitizer"; do
    [[ -z $sanitizer && -x $file ]] && sanitizer=$file
  done
done
if [[ -z $sanitizer ]]; then
  echo "sanitize_gpu: there is no compute-sanitizer: set COMPUTE_SANITIZER" >&2
  exit 1
fi

# Compiles the kernels and checks the results, before anything is slow.
cases=("$python" scripts/sanitize_gpu_cases.py "$@")
if ! "${cases[@]}"; then
  echo "sanitize_gpu: the cases fail without the sanitizer" >&2
  exit 1
fi

# Only what heed launched is watched. The option's name depends on the version.
help=$("$sanitizer" --help 2>&1)
for option in --kernel-regex --kernel-name --filter; do
  grep -q -- "$option" <<<"$help" && break
done
watch=("$option" "kns=heed_kernel" --error-exitcode 86)
# CuPy asks CUDA about pointers that may be none of its own; what fails there is no error of a kernel.
grep -q -- --report-api-errors <<<"$help" && watch+=(--report-api-errors no)

status=0
summaries=()
for tool in ${SANITIZER_TOOLS:-memcheck racecheck initcheck synccheck}; do
  log=build/sanitize/$tool.log
  extra=()
  # Room behind every allocation, so that one does not run over into the next.
  [[ $tool == memcheck ]] && grep -q -- --padding <<<"$help" && extra=(--padding 256)
  [[ $tool == racecheck ]] && extra=(--racecheck-report all)
  # It does not see what tensor copies write. Copies of results are left alone: the oracle finds what was not written.
  [[ $tool == initcheck ]] && grep -q -- --check-api-memory-access <<<"$help" && extra=(--check-api-memory-access no)
  start=$SECONDS
  "$sanitizer" --tool "$tool" "${watch[@]}" "${extra[@]}" "${cases[@]}" >"$log" 2>&1
  code=$?
  summary=$(grep -E 'SUMMARY' "$log" | tail -n 1)
  if [[ $code != 0 || -z $summary ]] || ! grep -q 'gave the right results' "$log"; then
    status=1
    tail -n 60 "$log"
  fi
  summaries+=("$tool: ${summary:-no summary} (exit $code, $((SECONDS - start)) s)")
done

printf '\n%s\n' "$("$sanitizer" --version | head -n 1)"
printf '%s\n' "${summaries[@]}"
exit "$status"
