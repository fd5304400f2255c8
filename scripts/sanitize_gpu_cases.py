"""The calls that scripts/sanitize_gpu.sh runs under compute-sanitizer: few, small, and every feature of the kernels.

usage: python scripts/sanitize_gpu_cases.py [--only TEXT] [--pass forward|backward]

They go through TVM-FFI with CuPy arrays, each in an allocation of its own, so that the sanitizer sees every access that
leaves one. Memory is written by copies from the host alone, which it sees too, whatever kernels it is told to watch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cupy  # noqa: E402
import numpy  # noqa: E402

import heed  # noqa: E402
from conftest import each_array, from_cupy, to_cupy  # noqa: E402
from expected import (  # noqa: E402
    GradientCase,
    expected_of,
    expected_of_varlen,
    judge_gradients,
)
from grad_faces import bwd_of  # noqa: E402
from heed._arrays import DLPackOps, common_kind  # noqa: E402
from heed._lib import function  # noqa: E402
from heed._small_ops import ACT_AND_MUL_BWD, RMS_NORM_BWD, ActStatics, NormStatics, run_eagerly  # noqa: E402
from heed.reference import Gradients  # noqa: E402
from sm90_cases import NAMED_BY_NAME, call_of, expected_result, why_declined  # noqa: E402
from small_op_faces import cotangents_of, expected, expected_gradients  # noqa: E402
from small_op_specs import BY_NAME as SMALL_BY_NAME  # noqa: E402
from small_op_specs import OpCase  # noqa: E402
from specs import BY_NAME, AttentionSpec  # noqa: E402
from varlen_specs import VARLEN, VarlenSpec  # noqa: E402

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
    "varlen_everything",
)
# Of tests/sm90_cases.py, for the Hopper forward kernel by name; what it does not serve is left out.
SM90 = (
    "full_bfloat16-d128",
    "causal_float16-d128",
    "causal_gqa_d128_bfloat16-d128",
    "len_1-d128-float16",
    "kv_len_0_sinks-d128-bfloat16",
    "q_longer_causal-d128",
    "top_left_window_q_longer-d128-bfloat16",
    "window_both-d128",
    "softcap_gqa-d128",
    "sinks_causal_empty_rows-d128",
    "alibi_causal-d128",
    "segments_packed_causal-d128",
    "everything_top_left-d128",
    "large_logits_bfloat16-d128",
    "nan_visible_causal-d128",
    "varlen_cross_causal_bfloat16-d128",
    "varlen_all_empty_with_rows-d128-bfloat16",
    "varlen_tile_edges-d128",
    "varlen_outside_nan-d128",
    "varlen_used_nan_float16-d128",
    "varlen_everything-d128-float16",
    "many_tiles_causal",
    "many_tiles_packed_causal",
    "few_rows_3_group_4_masked",
    "few_rows_16_group_8",
    "parts_few",
    "parts_few_nan_visible",
    "parts_packs_causal",
    "tall_tiles_nan_hidden",
    *(f"{name}-d{dims}" for dims in ("64", "80", "96", "192", "256", "192_128")
      for name in ("causal_float16", "varlen_tile_edges")),
)  # fmt: skip
SMALL = (
    "silu_bfloat16",
    "silu_h59",
    "silu_rank_4",
    "gelu_float16",
    "gelu_wide_float32",
    "gelu_tanh_wide_row",
    "rope_bfloat16",
    "rope_interleaved_float16",
    "rope_gaps",
    "rope_partial",
    "rope_odd_head",
    "rope_many_sequences",
    "rope_no_sequences",
    "rope_pos_ids_options",
    "rope_cache_bfloat16",
    "rope_cache_options",
    "rope_llama31",
    "norm_float16",
    "norm_add_bfloat16",
    "norm_h1021",
    "norm_h4096",
    "norm_h12289",
    "norm_add_h1021",
    "norm_many_rows",
    "norm_no_rows",
    "decode_float32",
    "decode_tutorial_bfloat16",
    "decode_s1031",
    "decode_empty_sinks",
    "decode_d59",
    "decode_d192_v128",
    "decode_hnd",
    "decode_window_hides_nan",
    "decode_rope",
    "decode_everything",
    "decode_everything_f32",
)
OF_HEADS = ("dsinks", "dalibi_slopes")


def empty_of_nans(self: DLPackOps, shape: tuple[int, ...], dtype: str, empty: Any = DLPackOps.empty) -> Any:
    """A new array, written: with NaNs. The Hopper kernel looks at its counter of tiles and at flags of parts in memory
    that nobody has written, and works whatever is there, of which initcheck knows nothing. Where it took what was not
    written for results, these are NaN.
    """
    value = empty(self, shape, dtype)
    if value.size:
        value.reshape(-1).view(cupy.uint8).set(numpy.full(value.nbytes, 0xFF, numpy.uint8))
    return value


def run_forward(case: GradientCase, spec: AttentionSpec | VarlenSpec) -> None:
    q, k, v = map(to_cupy, case.operands)
    out, lse = getattr(heed, case.function)(
        q, k, v, return_lse=True, **each_array(to_cupy, case.arrays), **case.statics
    )
    cupy.cuda.Device().synchronize()
    want = expected_of_varlen(spec) if isinstance(spec, VarlenSpec) else expected_of(spec)
    want.check(from_cupy(out), from_cupy(lse), spec.name)


def run_sm90(name: str, arch: str) -> bool:
    """The Hopper kernel, if the GPU is one of its kind and it serves the case."""
    call = call_of(NAMED_BY_NAME[name])
    if not arch.startswith("sm_90") or why_declined(call):
        return False
    with patch.object(DLPackOps, "empty", empty_of_nans):
        out, lse = getattr(heed, call.function)(
            *map(to_cupy, call.operands),
            return_lse=True,
            backend="sm90",
            **each_array(to_cupy, call.arrays),
            **call.statics,
        )
    cupy.cuda.Device().synchronize()
    expected_result(NAMED_BY_NAME[name]).check(from_cupy(out), from_cupy(lse), name)
    return True


def run_backward(case: GradientCase, spec: AttentionSpec | VarlenSpec) -> None:
    """Both ways of adding: in whatever order blocks finish, and always in the same."""
    operands = [to_cupy(x) for x in case.operands]
    cotangents = [None if x is None else to_cupy(x) for x in case.cotangents]
    arrays = each_array(to_cupy, case.arrays)
    for deterministic in (False, True):
        options = case.statics | {"deterministic": deterministic}
        found = bwd_of(case.function, operands, cotangents, arrays, **options)
        cupy.cuda.Device().synchronize()
        host = Gradients(*(None if x is None else from_cupy(x) for x in found))
        if case.function == "flash_mha":  # see main()
            sums = {name: x.sum(0) for name, x in host._asdict().items() if name in OF_HEADS and x is not None}
            host = host._replace(**sums)
        case.expected.check(host, f"{spec.name}, deterministic={deterministic}")


def run_small_forward(case: OpCase, name: str) -> None:
    results = getattr(heed.ops, case.function)(**each_array(to_cupy, case.arrays), **case.statics)
    cupy.cuda.Device().synchronize()
    results = results if isinstance(results, tuple) else (results,)
    for want, result in zip(expected(case), results, strict=True):
        want.check(from_cupy(result), name)


def run_small_backward(case: OpCase, name: str) -> bool:
    """The backward kernel of activations and norms. The others have none of their own: False."""
    cotangents = cotangents_of(case)
    statics: ActStatics | NormStatics
    if case.function.endswith("_and_mul"):
        op, statics = ACT_AND_MUL_BWD, ActStatics(case.function.removesuffix("_and_mul"), None)
        operands = [case.arrays["x"], *cotangents]
    elif "norm" in case.function:
        op, statics = RMS_NORM_BWD, NormStatics(case.statics.get("eps", 1e-6), None)
        total = (
            expected(case)[1].oracle.astype(case.arrays["x"].dtype) if "residual" in case.arrays else case.arrays["x"]
        )
        operands = [total, case.arrays["weight"], *cotangents, *[None] * (2 - len(cotangents))]
    else:
        return False
    given = [None if x is None else to_cupy(x) for x in operands]
    found = run_eagerly(common_kind(op.names, given), op, f"ops.{case.function}", statics, given)
    cupy.cuda.Device().synchronize()
    dx, *dweight = map(from_cupy, found)
    for want in expected_gradients(case, cotangents):
        want.check(dweight[0].astype(want.dtype) if want.name == "dweight" else dx, name)
    return True


def run_small(name: str, which: str | None) -> int:
    """Both passes or one. Returns how many calls there were."""
    case = SMALL_BY_NAME[name].case()
    num_calls = 0
    if which in (None, "forward"):
        run_small_forward(case, name)
        num_calls += 1
    if which in (None, "backward"):
        num_calls += run_small_backward(case, name)
    return num_calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    parser.add_argument("--pass", dest="which", choices=("forward", "backward"), help="run this pass only")
    given = parser.parse_args()
    cupy.cuda.set_allocator(None)  # no pool
    # Gradients of sinks and slopes come per batch row here: CuPy's kernel for their sum would write memory unseen.
    DLPackOps.sum_over_first = lambda self, value: value  # type: ignore[method-assign]
    packed = {spec.name: spec for spec in VARLEN}
    passes = {"forward": run_forward, "backward": run_backward}
    num_calls = 0
    for name in filter(lambda name: given.only in name, (*DENSE, *PACKED)):
        spec = BY_NAME[name] if name in BY_NAME else packed[name]
        for which, run in passes.items():
            if given.which in (None, which):
                judge_gradients(spec, lambda case, run=run, spec=spec: run(case, spec))  # type: ignore[misc]
                num_calls += 1
    if given.which in (None, "forward"):
        arch = str(function("gpu_info")()["devices"][0]["arch"])
        num_calls += sum(run_sm90(name, arch) for name in SM90 if given.only in f"sm90_{name}")
    num_calls += sum(run_small(name, given.which) for name in SMALL if given.only in name)
    print(f"{num_calls} calls gave the right results")
    return 0 if num_calls else 1


if __name__ == "__main__":
    sys.exit(main())
