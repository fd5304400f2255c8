"""The calls that scripts/sanitize_gpu.sh runs under compute-sanitizer: few, small, and every feature of the kernels.

usage: python scripts/sanitize_gpu_cases.py [--only TEXT]

They go through TVM-FFI with CuPy arrays, each in an allocation of its own, so that the sanitizer sees every access that
leaves one. Memory is written by copies from the host alone, which it sees too, whatever kernels it is told to watch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cupy  # noqa: E402

import heed  # noqa: E402
from conftest import from_cupy, to_cupy  # noqa: E402
from expected import expected_of  # noqa: E402
from specs import BY_NAME, make_inputs  # noqa: E402
from varlen_specs import VARLEN, expected_of_varlen, make_varlen_inputs  # noqa: E402

DENSE = (
    "full_bfloat16",
    "causal_float16",
    "causal_float32",
    "causal_gqa_d128_bfloat16",
    "causal_gqa_d128_float32",
    "head_dim_1",
    "head_dim_59",
    "head_dim_72",
    "head_dim_192_v_128",
    "head_dim_40_v_17",
    "head_dim_64_v_256",
    "head_dim_256",
    "kv_len_0_sinks",
    "q_len_1_causal",
    "primes_causal",
    "q_longer_causal",
    "top_left_window_q_longer",
    "window_both",
    "window_0_0",
    "softcap_gqa",
    "sinks_causal_empty_rows",
    "alibi_q_longer",
    "segments_padded",
    "segments_cross",
    "everything",
    "everything_top_left",
    "nan_hidden_bfloat16",
)
PACKED = (
    "varlen_float16",
    "varlen_cross_causal_bfloat16",
    "varlen_cross_causal_float32",
    "varlen_empty_first",
    "varlen_all_empty_with_rows",
    "varlen_many_tiny",
    "varlen_decode",
    "varlen_tile_edges",
    "varlen_outside_nan",
    "varlen_used_more_than_there_are",
    "varlen_used_nan_float16",
)


def to_device(arrays: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(map(to_cupy, value)) if isinstance(value, tuple) else to_cupy(value)
        for name, value in arrays.items()
    }


def run(function: Any, inputs: Any, options: dict[str, Any], want: Any, name: str) -> None:
    q, k, v = map(to_cupy, (inputs.q, inputs.k, inputs.v))
    out, lse = function(q, k, v, return_lse=True, **to_device(inputs.arrays), **options)
    cupy.cuda.Device().synchronize()
    want.check(from_cupy(out), from_cupy(lse), name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    only = parser.parse_args().only
    cupy.cuda.set_allocator(None)  # no pool
    packed = {spec.name: spec for spec in VARLEN}
    num_calls = 0
    for name in filter(lambda name: only in name, DENSE):
        spec = BY_NAME[name]
        run(heed.flash_mha, make_inputs(spec), spec.static_options(), expected_of(spec), name)
        num_calls += 1
    for name in filter(lambda name: only in name, PACKED):
        row = packed[name]
        run(heed.flash_mha_varlen, make_varlen_inputs(row), row.static_options(), expected_of_varlen(row), name)
        num_calls += 1
    print(f"{num_calls} calls gave the right results")
    return 0 if num_calls else 1


if __name__ == "__main__":
    sys.exit(main())
