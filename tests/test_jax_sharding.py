"""flash_mha on four CPU devices: batch and heads divide without communication, everything else is refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import heed
from jax_cases import OPERANDS, attend, check, make_operands

pytestmark = pytest.mark.skipif(
    len(jax.devices("cpu")) < 4, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=4 (conftest.py sets it)"
)

COMMUNICATION = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\b")
LOCAL_CUT = re.compile(r"\bdynamic-slice\b")
KINDS = [pytest.param(AxisType.Auto, id="auto"), pytest.param(AxisType.Explicit, id="explicit")]
Specs = dict[str, P]


def make_mesh(kind: Any, **sizes: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices("cpu")[:4]).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(devices, tuple(sizes), axis_types=(kind,) * len(sizes))


def place(mesh: jax.sharding.Mesh, operands: Mapping[str, Any], specs: Mapping[str, P]) -> dict[str, jax.Array]:
    """Operands without a spec are whole on every device."""
    return {name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P()))) for name, x in operands.items()}


def specs_of(batch: Any = None, heads: Any = None, kv_heads: Any = "as heads") -> Specs:
    """The specs of all operands that shard the batch and heads over the given mesh axes."""
    kv_heads = heads if kv_heads == "as heads" else kv_heads
    kv = P(batch, None, kv_heads)
    segments = P(batch)
    per_head = P(heads)
    return dict(zip(OPERANDS, (P(batch, None, heads), kv, kv, per_head, per_head, segments, segments), strict=True))


def run(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """The results of the jitted call, and its compiled HLO."""
    compiled = jax.jit(call).lower(*arguments).compile()
    return compiled(*arguments), str(compiled.as_text())


def assert_no_communication(hlo: str, *, may_cut: bool = False) -> None:
    assert "heed.attention_fwd.v1" in hlo
    assert not COMMUNICATION.findall(hlo)
    assert may_cut or not LOCAL_CUT.findall(hlo)


# Name: (mesh, how operands lie, query heads, KV heads, whether devices cut their part out of an operand that is whole).
DIVISIONS: dict[str, tuple[dict[str, int], Specs, int, int, bool]] = {
    "batch": ({"x": 4}, specs_of(batch="x"), 4, 2, False),
    "heads": ({"x": 4}, specs_of(heads="x"), 4, 4, False),
    "heads_gqa": ({"x": 4}, specs_of(heads="x"), 8, 4, False),
    "heads_mqa": ({"x": 4}, specs_of(heads="x", kv_heads=None), 4, 1, False),
    "batch_and_heads": ({"x": 2, "y": 2}, specs_of(batch="x", heads="y"), 4, 4, False),
    "batch_and_heads_gqa": ({"x": 2, "y": 2}, specs_of(batch="x", heads="y"), 8, 2, False),
    "batch_and_heads_mqa": ({"x": 2, "y": 2}, specs_of(batch="x", heads="y", kv_heads=None), 4, 1, False),
    "batch_over_both_axes": ({"x": 2, "y": 2}, specs_of(batch=("x", "y")), 4, 2, False),
    "heads_over_both_axes": ({"x": 2, "y": 2}, specs_of(heads=("x", "y")), 8, 4, False),
    "kv_heads_over_one_of_the_query_heads_axes": (
        {"x": 2, "y": 2}, specs_of(heads=("x", "y"), kv_heads="x"), 8, 2, False
    ),
    "8_heads_on_2_kv_heads_over_4_devices": ({"x": 4}, specs_of(heads="x", kv_heads=None), 8, 2, True),
    "q_batch_only": ({"x": 4}, {"q": P("x")}, 4, 2, True),
    "kv_heads_only": ({"x": 4}, {"k": P(None, None, "x"), "v": P(None, None, "x")}, 8, 4, True),
    "q_batch_kv_heads": (
        {"x": 2, "y": 2}, {"q": P("x"), "k": P(None, None, "y"), "v": P(None, None, "y")}, 4, 2, True
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DIVISIONS)
def test_batch_and_heads_divide_without_communication(name: str, kind: Any) -> None:
    sizes, specs, q_heads, kv_heads, may_cut = DIVISIONS[name]
    operands = make_operands(batch=4, q_heads=q_heads, kv_heads=kv_heads)
    (out, lse), hlo = run(attend, place(make_mesh(kind, **sizes), operands, specs))
    assert_no_communication(hlo, may_cut=may_cut)
    check(out, lse, operands, name)
    # The results are divided as the finest operand, not copied to every device.
    assert len({str(index) for index in out.sharding.devices_indices_map(out.shape).values()}) == 4
    assert len({str(index) for index in lse.sharding.devices_indices_map(lse.shape).values()}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_bare_q_k_v_divide_too(kind: Any) -> None:
    operands = {name: make_operands(batch=4)[name] for name in "qkv"}
    mesh = make_mesh(kind, x=4)
    out, hlo = run(heed.flash_mha, *place(mesh, operands, specs_of(batch="x")).values())
    assert_no_communication(hlo)
    np.testing.assert_array_equal(out, heed.flash_mha(operands["q"], operands["k"], operands["v"]))


@pytest.mark.parametrize("kind", KINDS)
def test_eager_calls_on_sharded_arrays(kind: Any) -> None:
    operands = make_operands(batch=4, q_heads=8, kv_heads=4)
    mesh = make_mesh(kind, x=4)
    for specs in (specs_of(batch="x"), specs_of(heads="x")):
        arrays = place(mesh, operands, specs)
        out, lse = attend(arrays)
        check(out, lse, operands, str(specs["q"]))
        assert out.sharding.is_equivalent_to(arrays["q"].sharding, out.ndim)
    with jax.set_mesh(mesh):
        out, lse = attend(place(mesh, operands, specs_of(batch="x")))
    check(out, lse, operands, "under set_mesh")


def test_shardings_propagate_through_a_layer() -> None:
    """Tensor parallelism as models write it: only the weights are sharded, and one all-reduce follows the layer."""
    rng = np.random.default_rng(0)
    batch, length, width, heads, kv_heads, dim = 2, 6, 16, 8, 4, 4
    x = rng.standard_normal((batch, length, width)).astype(np.float32)
    weights = [rng.standard_normal((width, n * dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]
    weights.append(rng.standard_normal((heads * dim, width)).astype(np.float32))

    def layer(x: Any, wq: Any, wk: Any, wv: Any, wo: Any) -> Any:
        q, k, v = ((x @ w).reshape(batch, length, -1, dim) for w in (wq, wk, wv))
        return heed.flash_mha(q, k, v, is_causal=True).reshape(batch, length, -1) @ wo

    mesh = make_mesh(AxisType.Auto, x=4)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    columns = [put(w, None, "x") for w in weights[:3]]
    _, hlo = run(layer, put(x), *columns, put(weights[3], "x"))
    assert set(COMMUNICATION.findall(hlo)) == {"all-reduce"} and not LOCAL_CUT.findall(hlo)
    data_parallel = [put(w) for w in weights]
    _, hlo = run(layer, put(np.concatenate([x, x]).reshape(4, length, width)[:2]), *data_parallel)
    assert not COMMUNICATION.findall(hlo)


def test_the_results_may_be_wanted_elsewhere() -> None:
    """A result's own placement never changes how the call divides; a copy that the caller asks for is the caller's."""
    operands = make_operands(batch=4, q_len=8)
    mesh = make_mesh(AxisType.Auto, x=4)
    whole = place(mesh, operands, {})
    for spec in (P("x"), P(None, "x")):  # batch, and even tokens: every device cuts its part out
        call = jax.jit(attend, out_shardings=(NamedSharding(mesh, spec), None))
        assert_no_communication(str(call.lower(whole).compile().as_text()), may_cut=True)
        out, lse = call(whole)
        check(out, lse, operands, str(spec))
    call = jax.jit(attend, out_shardings=NamedSharding(mesh, P()))
    out, lse = call(place(mesh, operands, specs_of(batch="x")))
    check(out, lse, operands, "gathered on purpose")


@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_axes_that_do_not_divide_evenly(axis: str) -> None:
    operands = make_operands(batch=6, q_heads=6, kv_heads=6)
    mesh = make_mesh(AxisType.Auto, x=4)
    specs = specs_of(**{axis: "x"})

    def call(operands: Mapping[str, Any]) -> Any:
        return attend(
            {
                name: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, specs[name]))
                for name, x in operands.items()
            }
        )

    out, lse = jax.jit(call)(operands)
    check(out, lse, operands, axis)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"q_len": 0}, {"kv_len": 0}])
def test_empty_operands_divide(sizes: dict[str, Any]) -> None:
    operands = make_operands(**sizes, q_heads=4, kv_heads=4)
    mesh = make_mesh(AxisType.Auto, x=4)
    (out, lse), hlo = run(attend, place(mesh, operands, specs_of(heads="x")))
    assert not COMMUNICATION.findall(hlo)
    check(out, lse, operands, str(sizes))


# shard_map.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["batch", "heads_gqa", "heads_mqa", "batch_and_heads_gqa"])
def test_shard_map(name: str, check_vma: bool, kind: Any) -> None:
    sizes, specs, q_heads, kv_heads, _ = DIVISIONS[name]
    operands = make_operands(batch=4, q_heads=q_heads, kv_heads=kv_heads)
    mesh = make_mesh(kind, **sizes)
    batch, _, heads = (*specs["q"], None, None)[:3]
    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=(specs,), out_specs=(P(batch, None, heads), P(batch, heads)), check_vma=check_vma
    )
    arrays = place(mesh, operands, specs)
    (out, lse), hlo = run(mapped, arrays)
    assert_no_communication(hlo)
    check(out, lse, operands, name)
    if kind is AxisType.Auto:
        out, lse = mapped(arrays)
        check(out, lse, operands, f"{name}, eager")


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_of_operands_that_vary_over_different_axes(check_vma: bool) -> None:
    """Each operand varies over other mesh axes; the results vary over all of them."""
    operands = make_operands(batch=2, q_heads=4, kv_heads=4, lead={"v": (2,)})
    mesh = make_mesh(AxisType.Auto, x=2, y=2)
    in_specs = {name: P() for name in OPERANDS} | {"v": P("x"), "sinks": P(), "q": P()}

    def local(operands: dict[str, Any]) -> Any:
        out, lse = attend({**operands, "v": operands["v"][0]})
        return out[None], jax.lax.pmean(lse[None], "x") if check_vma else lse[None]

    out_specs = (P("x"), P() if check_vma else P("x"))
    (out, _), _ = run(
        jax.shard_map(local, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs, check_vma=check_vma), operands
    )
    for i in range(2):
        check(out[i], None, {**operands, "v": operands["v"][i]}, f"row {i}")


def test_vmap_inside_shard_map() -> None:
    operands = make_operands(lead=dict.fromkeys(("q", "v"), (4,)))
    mesh = make_mesh(AxisType.Auto, x=4)
    specs = {name: P("x") if name in ("q", "v") else P() for name in OPERANDS}
    mapped = jax.vmap(attend, in_axes=({name: 0 if name in ("q", "v") else None for name in OPERANDS},))
    (out, lse), hlo = run(jax.shard_map(mapped, mesh=mesh, in_specs=(specs,), out_specs=P("x")), operands)
    assert not COMMUNICATION.findall(hlo)
    for i in range(4):
        check(
            np.asarray(out)[i],
            np.asarray(lse)[i],
            {**operands, "q": operands["q"][i], "v": operands["v"][i]},
            f"row {i}",
        )


def test_shard_map_over_some_mesh_axes() -> None:
    """One mesh axis is manual, the other is left to XLA."""
    operands = make_operands(batch=4, q_heads=4, kv_heads=4)
    mesh = make_mesh(AxisType.Auto, x=2, y=2)
    batch_only, both = specs_of(batch="x"), specs_of(batch="x", heads="y")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(batch_only,), out_specs=(P("x"), P("x")), axis_names={"x"})
    for specs in (both, batch_only):
        (out, lse), hlo = run(mapped, place(mesh, operands, specs))
        assert_no_communication(hlo)
        check(out, lse, operands, str(specs["q"]))
    tokens = {**both, "q": P("x", "y"), "q_segment_ids": P("x", "y")}
    with pytest.raises(Exception, match=r"q: got axis 1 \(q_tokens, size 8\) sharded"):
        run(mapped, place(mesh, make_operands(batch=4, q_len=8, q_heads=4, kv_heads=4), tokens))


# vmap.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapped", [OPERANDS, ("q",), ("q", "v", "kv_segment_ids"), ("k", "v", "sinks")])
def test_vmap_over_a_sharded_axis(mapped: tuple[str, ...], kind: Any) -> None:
    operands = make_operands(lead=dict.fromkeys(mapped, (4,)))
    mesh = make_mesh(kind, x=4)
    call = jax.vmap(attend, in_axes=({name: 0 if name in mapped else None for name in OPERANDS},))
    (out, lse), hlo = run(call, place(mesh, operands, {name: P("x") for name in mapped}))
    assert_no_communication(hlo)
    for i in range(4):
        row = {name: x[i] if name in mapped else x for name, x in operands.items()}
        check(np.asarray(out)[i], np.asarray(lse)[i], row, f"row {i}")


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_one_sharded_axis_with_another_inside(kind: Any) -> None:
    operands = make_operands(lead=dict.fromkeys(("q", "k", "v"), (2,)))
    mesh = make_mesh(kind, x=2, y=2)
    inner = specs_of(batch="y")
    specs = {name: P("x", *spec) if name in ("q", "k", "v") else spec for name, spec in inner.items()}
    call = jax.vmap(attend, in_axes=({name: 0 if name in ("q", "k", "v") else None for name in OPERANDS},))
    (out, lse), hlo = run(call, place(mesh, operands, specs))
    assert_no_communication(hlo)
    for i in range(2):
        row = {name: x[i] if name in ("q", "k", "v") else x for name, x in operands.items()}
        check(np.asarray(out)[i], np.asarray(lse)[i], row, f"row {i}")


def test_spmd_axis_name_is_accepted() -> None:
    operands = make_operands(lead=dict.fromkeys(OPERANDS, (4,)))
    mesh = make_mesh(AxisType.Auto, x=4)
    arrays = place(mesh, operands, {name: P("x") for name in OPERANDS})
    (out, lse), hlo = run(jax.vmap(attend, spmd_axis_name="x"), arrays)
    assert_no_communication(hlo)
    for i in range(4):
        check(np.asarray(out)[i], np.asarray(lse)[i], {name: x[i] for name, x in operands.items()}, f"row {i}")


# What is refused.

TOKENS = {
    "q": ({"q": P(None, "x")}, r"flash_mha: q: got axis 1 \(q_tokens, size 8\) sharded .*ring attention"),
    "k": ({"k": P(None, "x")}, r"flash_mha: k: got axis 1 \(kv_tokens, size 12\) sharded .*ring attention"),
    "v": ({"v": P(None, "x")}, r"flash_mha: v: got axis 1 \(kv_tokens, size 12\) sharded .*ring attention"),
    "q_segment_ids": ({"q_segment_ids": P(None, "x")}, r"q_segment_ids: got axis 1 \(q_tokens, size 8\) sharded"),
    "q and kv": ({name: P(None, "x") for name in "qkv"}, r"flash_mha: q: got axis 1 .*never gathers an input silently"),
    "head_dim": ({"q": P(None, None, None, "x")}, r"flash_mha: q: got axis 3 \(head_dim_qk, size 8\) sharded"),
    "head_dim_v": ({"v": P(None, None, None, "x")}, r"flash_mha: v: got axis 3 \(head_dim_v, size 12\) sharded"),
}


def token_operands() -> dict[str, np.ndarray]:
    return make_operands(batch=4, q_len=8, kv_len=12, q_heads=4, kv_heads=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TOKENS)
def test_a_sharded_token_axis_is_refused_with_the_reason(name: str, kind: Any) -> None:
    specs, message = TOKENS[name]
    mesh = make_mesh(kind, x=4)
    arrays = place(mesh, token_operands(), specs)
    calls: dict[str, Callable[..., Any]] = {"eager": attend, "jit": jax.jit(attend)}
    if kind is AxisType.Auto:
        calls["constrained"] = jax.jit(
            lambda operands: attend(
                {
                    key: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, specs.get(key, P())))
                    for key, x in operands.items()
                }
            )
        )
    for call in calls.values():
        with pytest.raises(ValueError, match=message):
            call(arrays)


def test_a_token_sharding_that_only_the_compiler_finds_is_refused_too() -> None:
    """XLA wraps the error in its own type; the message stays."""
    mesh = make_mesh(AxisType.Auto, x=4)
    arrays = place(mesh, token_operands(), {"k": P(None, "x")})
    with pytest.raises(
        Exception, match=r"flash_mha: k: got axis 1 \(kv_tokens, size 12\) sharded 4 ways.*ring attention"
    ):
        jax.jit(lambda operands: attend({**operands, "k": operands["k"] * 2.0}))(arrays)


RAGGED = {
    "12 heads on 6 KV heads": (
        12, 6, specs_of(heads="x", kv_heads=None), "12 query heads sharded 4 ways over 6 KV heads"
    ),
    "q batch, kv heads": (
        4, 4, {"q": P("x"), "k": P(None, None, "x"), "v": P(None, None, "x")},
        "do not fit together|batch and q_heads sharded over mesh axis 'x'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RAGGED)
def test_divisions_that_would_move_inputs_are_refused(name: str, kind: Any) -> None:
    q_heads, kv_heads, specs, message = RAGGED[name]
    operands = make_operands(batch=4, q_heads=q_heads, kv_heads=kv_heads)
    with pytest.raises(ValueError if kind is AxisType.Explicit else Exception, match=message):
        jax.jit(attend)(place(make_mesh(kind, x=4), operands, specs))


def test_types_that_disagree_under_an_explicit_mesh_are_refused_while_tracing() -> None:
    mesh = make_mesh(AxisType.Explicit, x=2, y=2)
    operands = make_operands(batch=4, q_heads=4, kv_heads=4)
    for specs, message in (
        ({"q": P("x"), "k": P("y"), "v": P("x")}, "k: got batch sharded over 'y' where q has it over 'x'"),
        (specs_of(heads="x", kv_heads="y"), "query heads sharded over 'x' and KV heads over 'y'"),
    ):
        arrays = place(mesh, operands, specs)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(attend, arrays)
    out, lse = jax.eval_shape(attend, place(mesh, operands, specs_of(batch="x", heads="y")))
    assert out.sharding.spec == P("x", None, "y", None) and lse.sharding.spec == P("x", "y", None)


def test_what_to_do_instead_works() -> None:
    """The messages name with_sharding_constraint and reshard: both gather on purpose."""
    operands = token_operands()
    for kind, gather in (
        (AxisType.Auto, lambda mesh, x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))),
        (AxisType.Explicit, lambda mesh, x: jax.sharding.reshard(x, P())),
    ):
        mesh = make_mesh(kind, x=4)
        with jax.set_mesh(mesh):
            arrays = place(mesh, operands, {name: P(None, "x") for name in "qkv"})
            gathering = functools.partial(gather, mesh)

            def call(operands: dict[str, Any], gathering: Any = gathering) -> Any:
                return attend({name: gathering(x) for name, x in operands.items()})

            out, lse = jax.jit(call)(arrays)
        check(out, lse, operands, str(kind))


def test_no_sharding_rule_is_left_out_of_a_large_program() -> None:
    """Thirty layers in a scan: the body is divided as the carry is."""
    operands = make_operands(batch=4, q_heads=4, kv_heads=4, q_len=8, kv_len=8)
    mesh = make_mesh(AxisType.Auto, x=4)
    arrays = place(mesh, {name: operands[name] for name in "qkv"}, specs_of(batch="x"))

    def layers(q: Any, k: Any, v: Any) -> Any:
        return jax.lax.scan(lambda q, _: (heed.flash_mha(q, k, v)[..., :8], None), q, None, length=30)[0]

    out, hlo = run(layers, arrays["q"], arrays["k"], arrays["v"])
    assert_no_communication(hlo, may_cut=True)
    assert jnp.isfinite(out).all()
