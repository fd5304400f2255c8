"""flash_mha_varlen under JAX's transformations: vmap, scan, sharding, export. Gradients: test_jax_grad_varlen.py."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import heed
from conftest import FACES
from expected import expected_of_varlen, expected_varlen
from jax_cases import OPTIONS, VARLEN_OPERANDS, attend, check, make_varlen_operands
from test_jax_export import export_cpu, run_process, shapes_of
from test_jax_sharding import KINDS, assert_no_communication, make_mesh, place, run
from varlen_specs import VARLEN_BY_NAME, make_varlen_inputs

flash_mha_varlen: Any = heed.flash_mha_varlen
PLATFORMS = [
    pytest.param(str(row.values[0]).partition(":")[2], id=str(row.id), marks=row.marks)
    for row in FACES
    if str(row.values[0]).startswith("jax_jit")
]


def rows_of(operands: dict[str, np.ndarray], mapped: Any, index: int) -> dict[str, np.ndarray]:
    return {name: x[index] if name in mapped else x for name, x in operands.items()}


# vmap ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["q", "k", "v", "q+k", "k+v", "q+v", "q+k+v", ""])
def test_vmap_over_any_subset_of_operands(first: str) -> None:
    """Every mapped row is compared with the call on that row alone: all 255 subsets, 32 per test."""
    size = 2
    for others in itertools.product((False, True), repeat=5):
        mapped = frozenset(filter(None, [*first.split("+"), *itertools.compress(VARLEN_OPERANDS[3:], others)]))
        if not mapped:
            continue
        operands = make_varlen_operands(lead=dict.fromkeys(mapped, (size,)))
        out, lse = jax.vmap(attend, in_axes=({name: 0 if name in mapped else None for name in operands},))(operands)
        for i in range(size):
            check(out[i], lse[i], rows_of(operands, mapped, i), f"row {i} with {sorted(mapped)} mapped")


def test_nested_vmaps_that_map_different_operands() -> None:
    sizes = (2, 3, 2)
    lead = {"q": (2, 3), "k": (3, 2), "v": (2,), "cu_seqlens_q": (2, 2), "seqused_k": (3,)}
    in_axes = (  # outermost first; an operand's axes are taken in this order
        {"q": 0, "cu_seqlens_q": 0},
        {"q": 0, "k": 0, "seqused_k": 0},
        {"k": 0, "v": 0, "cu_seqlens_q": 0},
    )
    operands = make_varlen_operands(lead=lead)
    call: Any = attend
    for level in reversed(in_axes):
        call = jax.vmap(call, in_axes=({name: level.get(name) for name in VARLEN_OPERANDS},))
    out, lse = jax.jit(call)(operands)
    assert out.shape[:3] == lse.shape[:3] == sizes
    for index in np.ndindex(*sizes):
        row = operands
        for level, i in zip(in_axes, index, strict=True):
            row = rows_of(row, level, i)
        check(out[index], lse[index], row, f"row {index}")


def test_vmap_axes_may_be_anywhere() -> None:
    operands = make_varlen_operands(lead={"q": (3,), "cu_seqlens_q": (3,)})
    moved = {**operands, "q": np.moveaxis(operands["q"], 0, 2), "cu_seqlens_q": operands["cu_seqlens_q"].T}
    axes = {name: {"q": 2, "cu_seqlens_q": 1}.get(name) for name in VARLEN_OPERANDS}
    out, lse = jax.vmap(attend, in_axes=(axes,), out_axes=(1, -1))(moved)
    for i in range(3):
        row = rows_of(operands, ("q", "cu_seqlens_q"), i)
        check(np.asarray(out)[:, i], np.asarray(lse)[..., i], row, f"row {i}")


def test_vmap_copies_nothing() -> None:
    """An operand that is not mapped reaches the kernel once, with a leading axis of size 1."""
    operands = make_varlen_operands(lead={"q": (5,)})
    axes = {name: 0 if name == "q" else None for name in operands}
    lowered = jax.jit(jax.vmap(attend, in_axes=(axes,))).lower(operands).as_text()
    assert "q=float32[5,19,4,8];k=float32[1,41,2,8];v=float32[1,41,2,12];sinks=float32[1,4]" in lowered
    assert "cu_seqlens_q=int32[1,4];cu_seqlens_k=int32[1,4];seqused_k=int32[1,3]" in lowered
    assert "window=7,-1;max_seqlen=-1,-1;softcap=" in lowered
    assert "tensor<5x41x2x8xf32>" not in lowered


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vmap_obeys_the_rule(dtype: str, platform: str) -> None:
    """Several tiles, lengths mapped and keys not, on every platform."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, 150, 4, 64)).astype(dtype)
    k, v = (rng.standard_normal((200, 2, 64)).astype(dtype) for _ in range(2))
    lengths = [np.sort(rng.integers(0, size, (3, 5)), axis=-1).astype(np.int32) for size in (151, 201)]

    def call(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> Any:
        return flash_mha_varlen(q, k, v, cu_q, cu_k, is_causal=True, return_lse=True)

    operands = jax.device_put((q, k, v, *lengths), jax.devices(platform)[0])
    out, lse = jax.jit(jax.vmap(call, in_axes=(0, None, None, 0, 0)))(*operands)
    for i in range(3):
        want = expected_varlen(
            q[i], k, v, cu_seqlens_q=lengths[0][i], cu_seqlens_k=lengths[1][i], is_causal=True
        )  # fmt: skip
        want.check(np.asarray(out[i]), np.asarray(lse[i]), f"row {i}")


# Control flow, types and call styles ---------------------------------------------------------------------------------


def test_scan_and_map_over_lengths() -> None:
    operands = make_varlen_operands(lead=dict.fromkeys(("cu_seqlens_q", "seqused_k"), (4,)))
    mapped = {name: jnp.asarray(operands[name]) for name in ("cu_seqlens_q", "seqused_k")}
    fixed = {name: x for name, x in operands.items() if name not in mapped}

    def step(carry: Any, row: dict[str, Any]) -> Any:
        return carry, attend(fixed | row)

    results = {
        "scan": jax.jit(lambda rows: jax.lax.scan(step, 0, rows)[1])(mapped),
        "map": jax.lax.map(lambda row: attend(fixed | row), mapped),
        "map in batches": jax.lax.map(lambda row: attend(fixed | row), mapped, batch_size=2),
    }
    for name, (out, lse) in results.items():
        for i in range(4):
            check(out[i], lse[i], rows_of(operands, mapped, i), f"{name}, row {i}")
    out, lse = jax.jit(jax.checkpoint(attend))(rows_of(operands, mapped, 0))
    check(out, lse, rows_of(operands, mapped, 0), "checkpoint")


def test_lengths_may_be_computed_in_the_program() -> None:
    operands = make_varlen_operands()

    @jax.jit
    def call(lens: Any) -> Any:
        ends = jnp.cumulative_sum(lens, include_initial=True)
        return attend({**operands, "cu_seqlens_q": ends, "cu_seqlens_k": ends})

    out, lse = call(jnp.array([3, 0, 16]))
    ends = np.array([0, 3, 3, 19], np.int32)
    check(out, lse, {**operands, "cu_seqlens_q": ends, "cu_seqlens_k": ends}, "computed")


def test_abstract_evaluation_runs_nothing() -> None:
    shape = jax.ShapeDtypeStruct
    operands = {
        "q": shape((2**30, 64, 128), jnp.bfloat16),
        "k": shape((2**31 - 1, 8, 128), jnp.bfloat16),
        "v": shape((2**31 - 1, 8, 256), jnp.bfloat16),
        "cu_seqlens_q": shape((4097,), jnp.int32),
        "seqused_k": shape((4096,), jnp.int32),
    }
    out, lse = jax.eval_shape(attend, operands)
    assert (out.shape, out.dtype) == ((2**30, 64, 256), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((64, 2**30), jnp.float32)
    mapped = jax.tree.map(lambda x: shape((7, *x.shape), x.dtype), operands)
    assert [x.shape for x in jax.eval_shape(jax.vmap(attend), mapped)] == [(7, *out.shape), (7, *lse.shape)]


def test_the_jaxpr_is_one_readable_equation() -> None:
    jaxpr = jax.make_jaxpr(attend)(make_varlen_operands())
    (rule,) = jaxpr.jaxpr.eqns
    (equation,) = rule.params["call_jaxpr"].jaxpr.eqns
    assert equation.primitive.name == "heed_attention_fwd"
    assert "cu_seqlens_q" in str(jaxpr) and not jaxpr.effects


def test_the_same_inputs_give_the_same_bits_under_every_call_style() -> None:
    operands = make_varlen_operands()
    arrays = jax.tree.map(jnp.asarray, operands)
    styles = {
        "eager on JAX arrays": attend(arrays),
        "jit": jax.jit(attend)(operands),
        "compiled ahead": jax.jit(attend).lower(arrays).compile()(arrays),
        "lengths in NumPy": attend({**arrays, "cu_seqlens_q": operands["cu_seqlens_q"]}),
        "q in NumPy": attend({**arrays, "q": operands["q"]}),
        "lengths closed over": jax.jit(lambda x: attend({**operands, **x}))({name: arrays[name] for name in "qkv"}),
    }
    with jax.disable_jit():
        styles["no jit"] = attend(arrays)
    for name, (out, lse) in styles.items():
        assert isinstance(out, jax.Array), name
        check(out, lse, operands, name)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "uint64"])
def test_lengths_of_any_integer_dtype(dtype: str) -> None:
    operands = make_varlen_operands()
    lengths = {name: operands[name].astype(dtype) for name in VARLEN_OPERANDS[5:]}
    with jax.enable_x64(True):  # type: ignore[attr-defined]
        arrays = jax.tree.map(jnp.asarray, {**operands, **lengths})
        assert arrays["seqused_k"].dtype == dtype
        for call in (attend, jax.jit(attend), lambda x: attend({**x, **lengths})):
            check(*call(arrays), operands, dtype)


def test_lengths_beyond_int32_are_clamped_and_not_wrapped() -> None:
    operands = make_varlen_operands()
    with jax.enable_x64(True):  # type: ignore[attr-defined]
        wide = {
            "cu_seqlens_q": jnp.array([-(2**40), 5, 9, 2**32 + 3], jnp.int64),
            "cu_seqlens_k": jnp.array([0, 2**32 + 1, 2**63, 2**64 - 1], jnp.uint64),
            "seqused_k": jnp.array([2**32, -(2**33), 2**62], jnp.int64),
        }
        out, lse = jax.jit(attend)({**operands, **wide})
    narrow = {"cu_seqlens_q": [0, 5, 9, 19], "cu_seqlens_k": [0, 41, 41, 41], "seqused_k": [41, 0, 0]}
    check(out, lse, {**operands, **{name: np.array(x, np.int32) for name, x in narrow.items()}}, "clamped")


@pytest.mark.parametrize("setting", ["rank_promotion", "dtype_promotion", "x64"])
def test_works_under_strict_jax_settings(setting: str) -> None:
    contexts: dict[str, Any] = {
        "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
        "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
        "x64": lambda: jax.enable_x64(True),  # type: ignore[attr-defined]
    }
    spec = VARLEN_BY_NAME["varlen_everything"]
    inputs = make_varlen_inputs(spec)
    arrays = dict(inputs.arrays)
    if setting == "x64":
        arrays |= {name: arrays[name].astype(np.int64) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")}
    options = spec.static_options() | {"return_lse": True}
    with contexts[setting]():
        operands = jax.device_put((inputs.q, inputs.k, inputs.v, arrays), jax.devices("cpu")[0])
        for call in (lambda f: f, jax.jit):
            function: Any = call(lambda q, k, v, arrays: flash_mha_varlen(q, k, v, **arrays, **options))
            out, lse = function(*operands)
            expected_of_varlen(spec).check(np.asarray(out), np.asarray(lse), setting)


def test_static_options_are_part_of_every_cache_key() -> None:
    operands = jax.tree.map(jnp.asarray, make_varlen_operands())
    texts = set()
    for options in ({}, {"max_seqlen_q": 19}, {"max_seqlen_k": 41}, {"max_seqlen_q": 19, "max_seqlen_k": 41}):
        function = jax.jit(lambda x, options=options: flash_mha_varlen(**x, **options))
        (text,) = re.findall(r"max_seqlen=[-\d,]+", function.lower(operands).as_text())
        texts.add(text)
        np.testing.assert_array_equal(function(operands), flash_mha_varlen(**operands))
    assert texts == {"max_seqlen=-1,-1", "max_seqlen=19,-1", "max_seqlen=-1,41", "max_seqlen=19,41"}


def test_a_platform_without_kernels_is_refused_while_lowering() -> None:
    traced = jax.jit(attend).trace(make_varlen_operands())
    with pytest.raises(heed.UnsupportedError, match="flash_mha_varlen: heed has no kernels for the platform tpu"):
        traced.lower(lowering_platforms=("tpu",))


# Sharding ------------------------------------------------------------------------------------------------------------

needs_devices = pytest.mark.skipif(
    len(jax.devices("cpu")) < 4, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=4 (conftest.py sets it)"
)


def head_specs(heads: Any, kv_heads: Any = "as heads") -> dict[str, P]:
    """The specs that shard the heads over the given mesh axes; lengths are whole everywhere."""
    kv = P(None, heads if kv_heads == "as heads" else kv_heads)
    return {"q": P(None, heads), "k": kv, "v": kv, "sinks": P(heads), "alibi_slopes": P(heads)}


DIVISIONS: dict[str, tuple[dict[str, int], dict[str, P], int, int, bool]] = {
    "heads": ({"x": 4}, head_specs("x"), 4, 4, False),
    "heads_gqa": ({"x": 4}, head_specs("x"), 8, 4, False),
    "heads_mqa": ({"x": 4}, head_specs("x", None), 4, 1, False),
    "heads_over_both_axes": ({"x": 2, "y": 2}, head_specs(("x", "y")), 8, 4, False),
    "8_heads_on_2_kv_heads_over_4_devices": ({"x": 4}, head_specs("x", None), 8, 2, True),
}


@needs_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DIVISIONS)
def test_heads_divide_without_communication(name: str, kind: Any) -> None:
    sizes, specs, q_heads, kv_heads, may_cut = DIVISIONS[name]
    operands = make_varlen_operands(q_heads=q_heads, kv_heads=kv_heads)
    (out, lse), hlo = run(attend, place(make_mesh(kind, **sizes), operands, specs))
    assert_no_communication(hlo, may_cut=may_cut)
    check(out, lse, operands, name)
    assert len({str(index) for index in out.sharding.devices_indices_map(out.shape).values()}) == 4
    assert len({str(index) for index in lse.sharding.devices_indices_map(lse.shape).values()}) == 4


@needs_devices
@pytest.mark.parametrize("kind", KINDS)
def test_eager_calls_on_sharded_heads(kind: Any) -> None:
    operands = make_varlen_operands(q_heads=8, kv_heads=4)
    arrays = place(make_mesh(kind, x=4), operands, head_specs("x"))
    out, lse = attend(arrays)
    check(out, lse, operands, "eager")
    assert out.sharding.is_equivalent_to(arrays["q"].sharding, out.ndim)


@needs_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapped", [VARLEN_OPERANDS, ("q",), ("q", "cu_seqlens_q", "seqused_k"), ("k", "v")])
def test_vmap_over_a_sharded_axis(mapped: tuple[str, ...], kind: Any) -> None:
    """Data parallelism: each device has its own packed sequences."""
    operands = make_varlen_operands(lead=dict.fromkeys(mapped, (4,)))
    call = jax.vmap(attend, in_axes=({name: 0 if name in mapped else None for name in VARLEN_OPERANDS},))
    (out, lse), hlo = run(call, place(make_mesh(kind, x=4), operands, {name: P("x") for name in mapped}))
    assert_no_communication(hlo)
    for i in range(4):
        check(np.asarray(out)[i], np.asarray(lse)[i], rows_of(operands, mapped, i), f"row {i}")


@needs_devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma: bool) -> None:
    """By hand: the heads; and packed sequences of each device's own, cut along tokens and lengths."""
    mesh = make_mesh(AxisType.Auto, x=4)
    operands = make_varlen_operands(q_heads=8, kv_heads=4)
    specs = {name: head_specs("x").get(name, P()) for name in VARLEN_OPERANDS}
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=(P(None, "x"), P("x")), check_vma=check_vma)
    (out, lse), hlo = run(mapped, place(mesh, operands, specs))
    assert_no_communication(hlo)
    check(out, lse, operands, "heads")

    own = [make_varlen_operands(seed=seed) for seed in range(4)]
    shared = ("sinks", "alibi_slopes")
    joined = {
        name: own[0][name] if name in shared else np.concatenate([x[name] for x in own]) for name in VARLEN_OPERANDS
    }
    specs = {name: P() if name in shared else P("x") for name in VARLEN_OPERANDS}
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=(P("x"), P(None, "x")), check_vma=check_vma)
    (out, lse), hlo = run(mapped, place(mesh, joined, specs))
    assert_no_communication(hlo)
    for i in range(4):
        rows = slice(19 * i, 19 * (i + 1))
        row = {name: own[0 if name in shared else i][name] for name in VARLEN_OPERANDS}
        check(np.asarray(out)[rows], np.asarray(lse)[:, rows], row, f"device {i}")


REFUSED = {
    "q": (P("x"), r"flash_mha_varlen: q: got axis 0 \(q_tokens, size 20\) sharded .*ring attention.*Shard the heads"),
    "k": (P("x"), r"flash_mha_varlen: k: got axis 0 \(kv_tokens, size 24\) sharded .*ring attention"),
    "v": (P(None, None, "x"), r"flash_mha_varlen: v: got axis 2 \(head_dim_v, size 12\) sharded"),
    "cu_seqlens_q": (P("x"), r"cu_seqlens_q: got axis 0 \(boundaries, size 4\) sharded .*lengths of all sequences"),
    "cu_seqlens_k": (P("x"), r"cu_seqlens_k: got axis 0 \(boundaries, size 4\) sharded .*lengths of all sequences"),
}


@needs_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_refused_with_the_reason(name: str, kind: Any) -> None:
    spec, message = REFUSED[name]
    arrays = place(make_mesh(kind, x=4), make_varlen_operands(total_q=20, total_k=24, kv_heads=4), {name: spec})
    for call in (attend, jax.jit(attend)):
        with pytest.raises(ValueError, match=message):
            call(arrays)


@needs_devices
@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_do_not_divide_are_refused(kind: Any) -> None:
    operands = make_varlen_operands(q_heads=12, kv_heads=6)
    arrays = place(make_mesh(kind, x=4), operands, head_specs("x", None))
    with pytest.raises(Exception, match="flash_mha_varlen: got 12 query heads sharded 4 ways over 6 KV heads"):
        jax.jit(attend)(arrays)


# Export --------------------------------------------------------------------------------------------------------------


def test_an_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    operands = make_varlen_operands()
    exported = export_cpu(jax.jit(attend), shapes_of(operands))
    (tmp_path / "program.bin").write_bytes(exported.serialize())
    np.savez(tmp_path / "operands.npz", **operands)  # type: ignore[arg-type]
    found, results = run_process("exported", tmp_path)
    check(results["out"], results["lse"], operands, "exported")
    assert "heed.attention_fwd.v1" in found["hlo"]


@needs_devices
def test_a_program_exported_for_one_device_divides_where_it_is_called() -> None:
    pytest.importorskip("flatbuffers")
    operands = {name: make_varlen_operands(kv_heads=4)[name] for name in ("q", "k", "v", "cu_seqlens_q")}
    exported = export_cpu(jax.jit(attend), shapes_of(operands))
    call = jax.jit(export.deserialize(exported.serialize()).call)
    specs = {name: spec for name, spec in head_specs("x").items() if name in operands}
    (out, lse), hlo = run(call, place(make_mesh(AxisType.Auto, x=4), operands, specs))
    assert_no_communication(hlo)
    check(out, lse, operands, "divided")


def test_symbolic_dimensions_are_refused_by_name() -> None:
    shapes: dict[str, Any] = dict(shapes_of(make_varlen_operands()))
    (symbol,) = export.symbolic_shape("n")
    for name, shape in (("q", (symbol, 4, 8)), ("cu_seqlens_q", (symbol,))):
        spoilt = {**shapes, name: jax.ShapeDtypeStruct(shape, shapes[name].dtype)}
        with pytest.raises(ValueError, match=f"{name}: got the symbolic dimension n"):
            export_cpu(jax.jit(attend), spoilt)


def test_options_reach_the_kernel() -> None:
    """Every option of the shared cases changes the result, so that a rule that drops one shows."""
    operands = make_varlen_operands()
    whole = np.asarray(flash_mha_varlen(**operands, **OPTIONS))
    for name in OPTIONS:
        less = {key: value for key, value in OPTIONS.items() if key != name}
        assert not np.array_equal(whole, flash_mha_varlen(**operands, **less)), name
    for name in VARLEN_OPERANDS[3:]:
        if name == "cu_seqlens_q":
            continue
        less = {key: value for key, value in operands.items() if key != name}
        assert not np.array_equal(whole, flash_mha_varlen(**less, **OPTIONS)), name
