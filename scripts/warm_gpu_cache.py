"""Compiles the kernels of every named spec into the user's cache, many at a time, so that GPU tests only run them.

usage: python scripts/warm_gpu_cache.py [--only TEXT] [--processes N]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402

import heed  # noqa: E402
from heed._attention import split_segment_ids  # noqa: E402
from heed._lib import function  # noqa: E402
from heed._problem import (  # noqa: E402
    Spec,
    attention_bwd_text,
    attention_statics,
    attention_text,
)
from sm90_cases import NAMED, NUM_RANDOM, call_of, random_spec, why_declined  # noqa: E402
from specs import CONFORMANCE, AttentionSpec, make_cotangents, make_inputs  # noqa: E402
from varlen_specs import VARLEN, VarlenSpec, make_varlen_cotangents, make_varlen_inputs  # noqa: E402


def problems(spec: AttentionSpec | VarlenSpec) -> list[tuple[str, str]]:
    """(op, problem) of the forward pass and of the backward pass, free and deterministic."""
    if isinstance(spec, VarlenSpec):
        inputs, (_, dlse) = make_varlen_inputs(spec), make_varlen_cotangents(spec)
    else:
        inputs, (_, dlse) = make_inputs(spec), make_cotangents(spec)
    arrays, out_shape = inputs.arrays, (*inputs.q.shape[:-1], spec.head_dim_v)
    lse_shape = (*out_shape[:-3], out_shape[-2], out_shape[-3])
    names = ("sinks", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    sinks, slopes, *lengths = (arrays.get(name) for name in names)
    given = [inputs.q, inputs.k, inputs.v, sinks, slopes, *split_segment_ids(arrays.get("segment_ids")), *lengths]
    specs: list[Spec | None] = [None if x is None else (x.dtype.name, x.shape) for x in given]
    out, lse = (inputs.q.dtype.name, out_shape), ("float32", lse_shape)
    options = {
        "softmax_scale": None, "is_causal": False, "causal_align": "bottom_right", "window_size": (-1, -1),
        "softcap": None, "return_lse": True, "backend": None,
    } | spec.static_options()  # fmt: skip
    found = [("attention_fwd", attention_text(attention_statics(**options, deterministic=False), specs))]
    for deterministic in (False, True):
        statics = attention_statics(**options, deterministic=deterministic)
        every = [*specs, out, lse, out, None if dlse is None else lse]
        found.append(("attention_bwd", attention_bwd_text(statics, every)))
    return found


def sm90_problems(spec: AttentionSpec | VarlenSpec) -> list[tuple[str, str]]:
    """(op, problem) of a spec of tests/sm90_cases.py: the Hopper kernel, where it serves, and the portable one."""
    call = call_of(spec)
    if why_declined(call):
        return []
    texts = [
        heed.explain(getattr(heed, call.function), *call.operands, **call.arrays, **call.statics, return_lse=True,
                     backend=backend, target="sm_90a").problem
        for backend in ("sm90", "sm80")
    ]  # fmt: skip
    return [("attention_fwd", text) for text in texts]


def load(problem: tuple[str, str]) -> str:
    """What went wrong, if anything."""
    op, text = problem
    try:
        function(f"{op}_load")(text, 0)
    except Exception as error:  # the tests will say more
        return f"{text}: {error}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="the specs whose name contains this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    specs: list[AttentionSpec | VarlenSpec] = [*CONFORMANCE, *VARLEN]
    with np.errstate(all="ignore"):
        todo = [problem for spec in specs if given.only in spec.name for problem in problems(spec)]
        arch = str(function("gpu_info")()["devices"][0]["arch"])
        if arch.startswith("sm_90"):
            hopper = [*NAMED, *map(random_spec, range(NUM_RANDOM))]
            todo += [problem for spec in hopper if given.only in f"sm90_{spec.name}" for problem in sm90_problems(spec)]
    random.Random(0).shuffle(todo)  # neighbours need the same kernels
    start = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        failures = [text for text in pool.map(load, todo) if text]
    print(f"{len(todo)} problems' kernels in {time.perf_counter() - start:.0f} s, {len(failures)} failed")
    for text in failures[:5]:
        print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
