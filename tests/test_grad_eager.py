"""flash_mha_bwd and flash_mha_varlen_bwd called eagerly: layouts, spellings, kinds of array, repeats, explain."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import heed
from expected import GradientCase, expected_gradients, gradient_case
from grad_faces import bwd_of
from specs import BY_NAME, CONFORMANCE, DTYPES, AttentionSpec, make_inputs
from test_numpy_eager import LAYOUTS
from varlen_specs import VARLEN, VARLEN_BY_NAME, VarlenSpec

flash_mha: Any = heed.flash_mha  # the tests hand them what their annotations exclude
flash_mha_bwd: Any = heed.flash_mha_bwd
flash_mha_varlen: Any = heed.flash_mha_varlen
flash_mha_varlen_bwd: Any = heed.flash_mha_varlen_bwd
explain: Any = heed.explain

SMALL = AttentionSpec("grad_eager", q_len=37, kv_len=50, num_q_heads=4, head_dim_qk=24, head_dim_v=16, is_causal=True)


def given(dtype: str = "float32") -> dict[str, np.ndarray]:
    """The arrays of a call of flash_mha_bwd, by name, of a causal call of flash_mha."""
    inputs = make_inputs(AttentionSpec(**(SMALL.__dict__ | {"dtype": dtype})))
    rng = np.random.default_rng(5)
    out, lse = flash_mha(inputs.q, inputs.k, inputs.v, is_causal=True, return_lse=True)
    dout, dlse = rng.standard_normal(out.shape).astype(out.dtype), rng.standard_normal(lse.shape).astype(np.float32)
    return {"dout": dout, "q": inputs.q, "k": inputs.k, "v": inputs.v, "out": out, "lse": lse, "dlse": dlse}


def run_case(case: GradientCase) -> Any:
    return bwd_of(case.function, case.operands, case.cotangents, case.arrays, **case.statics)


def same_bits(x: Any, y: Any) -> bool:
    return all((a is None and b is None) or a.tobytes() == b.tobytes() for a, b in zip(x, y, strict=True))


# What comes back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["everything", "everything_top_left", "sinks", "alibi", "gqa_3", "kv_len_0_sinks"])
def test_shapes_and_dtypes(name: str) -> None:
    spec = BY_NAME[name]
    case = gradient_case(spec)
    found = run_case(case)
    assert isinstance(found, heed.AttentionGradients) and found._fields == ("dq", "dk", "dv", "dsinks", "dalibi_slopes")
    for x, operand in zip(found[:3], case.operands, strict=True):
        assert type(x) is np.ndarray and x.shape == operand.shape and x.dtype == operand.dtype
        assert x.flags.c_contiguous and x.flags.writeable
    for x, is_there in ((found.dsinks, spec.sinks), (found.dalibi_slopes, spec.alibi)):
        assert (x is not None) == is_there
        assert x is None or (x.shape == (spec.num_q_heads,) and x.dtype == np.float32)


def test_equivalent_spellings_agree() -> None:
    arrays = given()
    want = flash_mha_bwd(**arrays, is_causal=True)

    def same(*args: Any, **options: Any) -> None:
        call = options if args else arrays | {"is_causal": True} | options
        assert same_bits(flash_mha_bwd(*args, **call), want), options

    dout, q, k, v, out, lse, dlse = arrays.values()
    same(dout, q, k, v, out, lse, None, True, dlse=dlse)
    same(dout, q, k, v, out, lse, 24**-0.5, True, (-1, -1), dlse=dlse)
    same(window_size=[-1, 0])
    same(softcap=0.0)
    same(deterministic=True)
    same(backend="cpu")
    ids = np.zeros((2, 37), np.int64), np.zeros((2, 50), np.uint8)
    assert same_bits(
        flash_mha_bwd(**arrays, is_causal=True, segment_ids=ids),
        flash_mha_bwd(**arrays, is_causal=True, segment_ids=[x.astype(np.int32) for x in ids]),
    )
    no_dlse = arrays | {"dlse": None}
    zero_dlse = arrays | {"dlse": np.zeros_like(dlse)}
    assert same_bits(flash_mha_bwd(**no_dlse, is_causal=True), flash_mha_bwd(**zero_dlse, is_causal=True))
    assert not same_bits(flash_mha_bwd(**no_dlse, is_causal=True), want)


def test_varlen_spellings_agree() -> None:
    case = gradient_case(VARLEN_BY_NAME["varlen_causal_float32"])
    q, k, v = case.operands
    dout, dlse = case.cotangents
    ends = case.arrays["cu_seqlens_q"]
    out, lse = flash_mha_varlen(q, k, v, ends, is_causal=True, return_lse=True)
    want = flash_mha_varlen_bwd(dout, q, k, v, out, lse, ends, is_causal=True, dlse=dlse)
    longest = int(np.diff(ends).max())
    for args, options in (
        ((ends, ends), {}),
        ((ends.astype(np.int64), None, longest, len(k)), {}),
        ((ends, None, longest, longest, 64**-0.5), {"seqused_k": np.diff(ends)}),
    ):
        found = flash_mha_varlen_bwd(dout, q, k, v, out, lse, *args, is_causal=True, dlse=dlse, **options)
        assert same_bits(found, want), options


def test_inputs_are_not_written() -> None:
    arrays = given()
    copies = {name: x.copy() for name, x in arrays.items()}
    for x in arrays.values():
        x.flags.writeable = False
    flash_mha_bwd(**arrays, is_causal=True)
    for name, x in arrays.items():
        assert np.array_equal(x, copies[name]), name


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: str) -> None:
    arrays = given(dtype)
    placed = {name: LAYOUTS[layout](x) if x.ndim == 4 else x for name, x in arrays.items()}
    placed |= {name: np.asfortranarray(arrays[name]) for name in ("lse", "dlse")}
    if layout.startswith("read-only"):
        for name in ("lse", "dlse"):
            placed[name].flags.writeable = False
    want = expected_gradients((arrays["dout"], arrays["dlse"]), (arrays["q"], arrays["k"], arrays["v"]), is_causal=True)
    want.check(flash_mha_bwd(**placed, is_causal=True), layout)


@pytest.mark.parametrize("axis", range(4))
def test_zero_strides(axis: int) -> None:
    """dout is often a broadcast 1: sum(out) has that gradient."""
    arrays = given("float16")
    index = (slice(None),) * axis + (slice(0, 1),)
    wide = {name: np.broadcast_to(arrays[name][index], arrays[name].shape) for name in ("dout", "q", "k", "v")}
    out, lse = flash_mha(wide["q"], wide["k"], wide["v"], return_lse=True)
    dense = [np.ascontiguousarray(wide[name]) for name in ("q", "k", "v")]
    found = flash_mha_bwd(**wide, out=out, lse=lse)
    expected_gradients((np.ascontiguousarray(wide["dout"]), None), dense).check(found, f"axis {axis} broadcast")
    ones = np.broadcast_to(np.float16(1.0), out.shape)
    found = flash_mha_bwd(ones, *dense, out, lse)
    expected_gradients((np.ones_like(out), None), dense).check(found, "dout is a broadcast 1")


# Kinds of array ------------------------------------------------------------------------------------------------------


def test_jax_arrays_give_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    spec = BY_NAME["everything"]
    case = gradient_case(spec)
    dout, dlse = case.cotangents
    operands, arrays = jax.tree.map(jax.numpy.asarray, (case.operands, case.arrays))
    out, lse = flash_mha(*operands, return_lse=True, **arrays, **case.statics)
    options = {"dlse": dlse, **arrays, **case.statics}
    eager = flash_mha_bwd(dout, *operands, out, lse, **options)  # dout is NumPy's: it counts as JAX's
    assert isinstance(eager, heed.AttentionGradients) and all(isinstance(x, jax.Array) for x in eager)
    case.expected.check(eager, "eager")

    def call(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, arrays: Any) -> Any:
        return flash_mha_bwd(dout, q, k, v, out, lse, dlse=dlse, **arrays, **case.statics)

    assert same_bits(map(np.asarray, jax.jit(call)(dout, *operands, out, lse, arrays)), map(np.asarray, eager))
    assert same_bits(map(np.asarray, eager), run_case(GradientCase(*case)))


@pytest.mark.parametrize("name", ["varlen_everything", "varlen_all_empty_with_rows"])
def test_jax_arrays_of_packed_sequences(name: str) -> None:
    jax = pytest.importorskip("jax")
    case = gradient_case(VARLEN_BY_NAME[name])
    dout, dlse = case.cotangents
    operands, arrays = jax.tree.map(jax.numpy.asarray, (case.operands, case.arrays))
    out, lse = flash_mha_varlen(*operands, return_lse=True, **arrays, **case.statics)
    found = flash_mha_varlen_bwd(dout, *operands, out, lse, dlse=dlse, **arrays, **case.statics)
    assert same_bits([x if x is None else np.asarray(x) for x in found], run_case(case))


def test_kinds_do_not_mix() -> None:
    torch = pytest.importorskip("torch")
    arrays = given()
    with pytest.raises(TypeError, match="dout is torch"):
        flash_mha_bwd(**(arrays | {"dout": torch.from_numpy(arrays["dout"])}))


# Repeats -------------------------------------------------------------------------------------------------------------

# Each way in which the CPU kernel divides its work: over heads alone, over blocks of keys or queries, packed.
REPEATED: dict[str, AttentionSpec | VarlenSpec] = {
    "many_heads": AttentionSpec("repeat_heads", 2, 40, 50, 8, 8, 32, is_causal=True, sinks=True, alibi=True),
    "one_head": AttentionSpec("repeat_blocks", 1, 150, 300, 1, 1, 32, dtype="bfloat16"),
    "mqa": AttentionSpec("repeat_mqa", 1, 60, 90, 8, 1, 24, is_causal=True, dtype="float16"),
    "long_keys": AttentionSpec("repeat_keys", 1, 5, 1500, 2, 1, 16),
    "packed": VarlenSpec("repeat_packed", (5, 64, 0, 1, 90), num_q_heads=4, num_kv_heads=2, head_dim_qk=16),
}


@pytest.mark.parametrize("name", REPEATED)
def test_1000_repeats_are_bitwise_equal(name: str) -> None:
    case = gradient_case(REPEATED[name])
    dout, dlse = case.cotangents
    options = {"dlse": dlse, "deterministic": True, **case.arrays, **case.statics}
    out, lse = getattr(heed, case.function)(*case.operands, return_lse=True, **case.arrays, **case.statics)
    backward = getattr(heed, f"{case.function}_bwd")
    first = backward(dout, *case.operands, out, lse, **options)
    case.expected.check(first, name)
    for i in range(1000):
        assert same_bits(backward(dout, *case.operands, out, lse, **options), first), f"repeat {i} differs"


@pytest.mark.parametrize("spec", [*CONFORMANCE, *VARLEN], ids=lambda spec: spec.name)
def test_10_repeats_are_bitwise_equal(spec: AttentionSpec | VarlenSpec) -> None:
    case = gradient_case(spec)
    first = bwd_of(case.function, case.operands, case.cotangents, case.arrays, deterministic=True, **case.statics)
    for i in range(9):
        assert same_bits(run_case(case), first), f"repeat {i} differs"


# Explain -------------------------------------------------------------------------------------------------------------


def test_explain() -> None:
    arrays = given()
    found = explain(flash_mha_bwd, **arrays, is_causal=True)
    assert found.function == "flash_mha_bwd" and found.target == "cpu" and found.is_served
    assert found.problem.startswith("attention_bwd.v1;q=float32[2,37,4,24]") and ";dlse=" in found.problem
    assert found.workspace_bytes >= 0 and re.search(r"-> cpu_attention_bwd +chosen", str(found))
    for target in ("sm_80", "sm_90a"):
        on_gpu = explain(flash_mha_bwd, **arrays, is_causal=True, target=target)
        assert "cpu_attention_bwd" in on_gpu.reasons and "CPU" in on_gpu.reasons["cpu_attention_bwd"]
    refused = explain(flash_mha_bwd, **arrays, backend="sm80")
    assert not refused.is_served and "sm80" in str(refused)
    case = gradient_case(VARLEN_BY_NAME["varlen_everything"])
    out, lse = flash_mha_varlen(*case.operands, return_lse=True, **case.arrays, **case.statics)
    found = explain(flash_mha_varlen_bwd, case.cotangents[0], *case.operands, out, lse, **case.arrays, **case.statics)
    assert found.function == "flash_mha_varlen_bwd" and found.is_served and "max_seqlen" in found.problem
    with pytest.raises(TypeError, match="lse: got None"):
        explain(flash_mha_bwd, **(arrays | {"lse": None}))
