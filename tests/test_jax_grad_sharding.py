"""Gradients of flash_mha on four CPU devices: they divide as the call does, and add up what devices share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import heed
from heed import reference
from jax_cases import OPERANDS, OPTIONS, attend, make_operands
from jax_grad_cases import (
    BACKWARD,
    COTANGENTS,
    DIFFERENTIABLE,
    check_divided,
    check_gradients,
    check_sums,
    gradients,
    make_case,
    make_varlen_case,
    with_cotangents,
)
from test_jax_sharding import COMMUNICATION, DIVISIONS, KINDS, LOCAL_CUT, make_mesh, place, run, specs_of
from tolerance import assert_close

pytestmark = pytest.mark.skipif(
    len(jax.devices("cpu")) < 4, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=4 (conftest.py sets it)"
)

Specs = dict[str, P]
Groups = frozenset[frozenset[int]]


def with_cotangent_specs(specs: Mapping[str, P]) -> Specs:
    """dout and dlse lie as out and lse do."""
    batch, _, heads = (*specs.get("q", P()), None, None, None)[:3]
    return {**specs, "dout": P(batch, None, heads), "dlse": P(batch, heads)}


def case(q_heads: int, kv_heads: int, batch: int = 4, names: Any = OPERANDS, dtype: str = "float32") -> Any:
    operands = make_case(batch=batch, q_heads=q_heads, kv_heads=kv_heads)
    kept = {name: x for name, x in operands.items() if name in names or name in COTANGENTS}
    return {name: x.astype(dtype) if name in ("q", "k", "v", "dout") else x for name, x in kept.items()}


def sums_in(hlo: str) -> set[Groups]:
    """Over which groups of devices the program's all-reduces go, in any of the ways that HLO has to write them."""
    found = set()
    for text in re.findall(r" all-reduce(?:-start)?\(.*replica_groups=(.*?), (?:use_global|to_apply|channel)", hlo):
        if text.startswith("{"):
            listed = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
        elif text.startswith("mesh"):  # mesh['a'=2,'b'=2] {'b'}
            sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
            (over,) = re.findall(r"\{([^{}]*)\}", text)
            axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", over)]
            assert re.fullmatch(r"('\w+',? ?)+", over), text
            ids = np.moveaxis(np.arange(4).reshape(list(sizes.values())), axes, range(-len(axes), 0))
            listed = ids.reshape(-1, np.prod([ids.shape[i] for i in range(-len(axes), 0)])).tolist()
        else:  # [groups,devices]<=[sizes]T(order)
            match = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
            assert match, text
            shape, sizes_text, order = ([int(n) for n in (numbers or "").split(",") if n] for numbers in match.groups())
            ids = np.arange(4).reshape(sizes_text)
            listed = (ids.transpose(order) if order else ids).reshape(shape).tolist()
        found.add(groups(*listed))
    return found


def groups(*ids: Sequence[int]) -> Groups:
    return frozenset(frozenset(group) for group in ids)


# Division: over which devices gradients of k and v are summed (nobody: {}), and how many ways the query heads are cut.
SHARED: dict[str, tuple[Groups, int]] = {
    "heads_mqa": (groups((0, 1, 2, 3)), 4),
    "batch_and_heads_mqa": (groups((0, 1), (2, 3)), 2),
    "kv_heads_over_one_of_the_query_heads_axes": (groups((0, 1), (2, 3)), 4),
    "8_heads_on_2_kv_heads_over_4_devices": (groups((0, 1), (2, 3)), 4),
}
# Divisions in which devices cut their part out of an operand that is whole on all of them. Under an explicit mesh its
# gradient is whole too, because a gradient has its operand's type: that is an all-gather that the types ask for.
CUT = [name for name, division in DIVISIONS.items() if division[4]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in DIVISIONS if name not in CUT])
def test_gradients_divide_as_the_call_does(name: str, kind: Any) -> None:
    """No communication but the sum over devices that share a KV head."""
    sizes, specs, q_heads, kv_heads, _ = DIVISIONS[name]
    operands = case(q_heads, kv_heads, names="qkv")
    arrays = place(make_mesh(kind, **sizes), operands, with_cotangent_specs(specs))
    found, hlo = run(gradients, arrays)
    assert BACKWARD in hlo and not LOCAL_CUT.findall(hlo)
    sharers, ways = SHARED.get(name, (None, 1))
    assert set(COMMUNICATION.findall(hlo)) == ({"all-reduce"} if sharers else set())
    assert sums_in(hlo) == ({sharers} if sharers else set())
    check_divided(found, operands, ways, name)
    for key, x in found.items():
        assert x.sharding.is_equivalent_to(arrays[key].sharding, x.ndim), key


@pytest.mark.parametrize("name", CUT)
def test_gradients_of_operands_that_are_whole_on_every_device(name: str) -> None:
    sizes, specs, q_heads, kv_heads, _ = DIVISIONS[name]
    operands = case(q_heads, kv_heads, names="qkv")
    sharers, ways = SHARED.get(name, (None, 1))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = make_mesh(kind, **sizes)
        arrays = place(mesh, operands, with_cotangent_specs(specs))
        if kind is AxisType.Explicit:  # cotangents have the types of results
            results = jax.eval_shape(attend, {name: arrays[name] for name in "qkv"})
            for key, result in zip(COTANGENTS, results, strict=True):
                arrays[key] = jax.device_put(operands[key], NamedSharding(mesh, result.sharding.spec))
        found, hlo = run(gradients, arrays)
        assert sums_in(hlo) == ({sharers} if sharers else set())
        check_divided(found, operands, ways, f"{name}, {kind}")
        if kind is AxisType.Explicit:
            for key, x in found.items():
                assert x.sharding.is_equivalent_to(arrays[key].sharding, x.ndim), key
        elif not sharers:  # nothing is said about results, so they stay where they are
            assert not COMMUNICATION.findall(hlo)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["batch", "heads_gqa", "heads_mqa", "batch_and_heads_gqa", "batch_and_heads_mqa"])
def test_gradients_of_per_head_values_sum_over_the_batch(name: str, kind: Any) -> None:
    """That sum is the only communication besides."""
    sizes, specs, q_heads, kv_heads, _ = DIVISIONS[name]
    operands = case(q_heads, kv_heads)
    arrays = place(make_mesh(kind, **sizes), operands, with_cotangent_specs(specs))
    found, hlo = run(gradients, arrays)
    sharers, ways = SHARED.get(name, (None, 1))
    over_batch = {"batch": groups((0, 1, 2, 3)), "batch_and_heads_gqa": groups((0, 2), (1, 3))}
    over_batch["batch_and_heads_mqa"] = over_batch["batch_and_heads_gqa"]
    assert set(COMMUNICATION.findall(hlo)) <= {"all-reduce"} and not LOCAL_CUT.findall(hlo)
    assert sums_in(hlo) == {x for x in (sharers, over_batch.get(name)) if x}
    check_divided(found, operands, ways, name)


def test_parts_of_16_bit_gradients_are_summed_in_float32() -> None:
    operands = case(8, 1, names="qkv", dtype="bfloat16")
    arrays = place(make_mesh(AxisType.Auto, x=4), operands, with_cotangent_specs(specs_of(heads="x", kv_heads=None)))
    found, hlo = run(gradients, arrays)
    results = re.findall(r"= (.*) all-reduce\(", hlo)
    assert results and all("f32[" in result and "bf16[" not in result for result in results)
    assert all(x.dtype == jnp.bfloat16 for x in found.values())
    check_divided(found, operands, 4, "bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_eager_calls_on_sharded_arrays(kind: Any) -> None:
    operands = case(8, 4)
    mesh = make_mesh(kind, x=4)
    for specs in (specs_of(batch="x"), specs_of(heads="x")):
        arrays = place(mesh, operands, with_cotangent_specs(specs))
        check_gradients(gradients(arrays), operands, str(specs["q"]))
        out, lse = attend({name: x for name, x in arrays.items() if name in OPERANDS})
        found = heed.flash_mha_bwd(
            arrays["dout"], arrays["q"], arrays["k"], arrays["v"], out, lse, dlse=arrays["dlse"], sinks=arrays["sinks"],
            alibi_slopes=arrays["alibi_slopes"], segment_ids=(arrays["q_segment_ids"], arrays["kv_segment_ids"]),
            **OPTIONS,
        )  # fmt: skip
        check_gradients(dict(zip(DIFFERENTIABLE, found, strict=True)), operands, f"flash_mha_bwd, {specs['q']}")
        assert found.dq.sharding.is_equivalent_to(arrays["q"].sharding, 4)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"q_len": 0}, {"kv_len": 0}])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_empty_operands_divide(sizes: dict[str, Any], kv_heads: int) -> None:
    operands = make_case(**sizes, kv_heads=kv_heads)
    specs = specs_of(heads="x", kv_heads="x" if kv_heads > 1 else None)
    found, _ = run(gradients, place(make_mesh(AxisType.Auto, x=4), operands, with_cotangent_specs(specs)))
    if "kv_len" in sizes:  # queries that see no key have their sink as LSE, which has a gradient
        check_gradients({"sinks": found.pop("sinks")}, operands, "sinks")
    for name, x in found.items():
        assert x.shape == operands[name].shape and not np.asarray(x).any(), name


def test_axes_that_do_not_divide_evenly() -> None:
    operands = case(6, 6, batch=6)
    mesh = make_mesh(AxisType.Auto, x=4)
    for axis in ("batch", "heads"):
        specs = with_cotangent_specs(specs_of(**{axis: "x"}))

        def call(operands: Mapping[str, Any], specs: Specs = specs) -> Any:
            constrain = jax.lax.with_sharding_constraint
            return gradients({name: constrain(x, NamedSharding(mesh, specs[name])) for name, x in operands.items()})

        found = jax.jit(call)(operands)
        if axis == "heads":
            check_gradients(found, operands, axis)
        else:  # six rows add up in too many orders
            check_gradients({name: found[name] for name in "qkv"}, operands, axis)


# Models.


def attention_layer(attention: Any, x: Any, weights: Mapping[str, Any]) -> Any:
    """One layer with 8 query heads on 4 KV heads, and the loss that it is differentiated by."""
    q, k, v = ((x @ weights[name]).reshape(*x.shape[:2], -1, 4) for name in "qkv")
    y = attention(q, k, v).reshape(*x.shape[:2], -1) @ weights["o"]
    return jnp.sum(jnp.sin(x + y))


def test_a_data_and_tensor_parallel_layer() -> None:
    """As models write it: gradients of weights are summed over the batch, those of the layer's input over the heads."""
    rng = np.random.default_rng(0)
    batch, length, width = 4, 6, 64
    x = rng.standard_normal((batch, length, width)).astype(np.float32)
    weights = {
        name: rng.standard_normal((width, 4 * heads)).astype(np.float32) * 0.15
        for name, heads in {"q": 8, "k": 4, "v": 4}.items()
    }
    weights["o"] = rng.standard_normal((32, width)).astype(np.float32) * 0.15

    def step(attention: Any) -> Any:
        return jax.grad(lambda x, weights: attention_layer(attention, x, weights), argnums=(0, 1))

    mesh = make_mesh(AxisType.Auto, data=2, model=2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    columns = {name: put(weights[name], None, "model") for name in "qkv"}
    placed = (put(x, "data"), {**columns, "o": put(weights["o"], "model")})
    found, hlo = run(step(lambda q, k, v: heed.flash_mha(q, k, v, is_causal=True)), *placed)
    assert set(COMMUNICATION.findall(hlo)) == {"all-reduce"} and not LOCAL_CUT.findall(hlo)
    assert sums_in(hlo) <= {groups((0, 2), (1, 3)), groups((0, 1), (2, 3))}

    def plain(dtype: Any) -> Any:
        def attention(*qkv: Any) -> Any:
            return reference.attention_forward(*qkv, is_causal=True, compute_dtype=dtype)[0]

        return jax.jit(step(attention))(*jax.tree.map(lambda a: jnp.asarray(a, dtype), (x, weights)))

    naive = plain(np.float32)
    with jax.enable_x64(True):
        oracle = plain(np.float64)
    leaves = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(naive), jax.tree.leaves(oracle), strict=True)
    for (path, a), b, c in leaves:
        assert_close(np.asarray(a), np.asarray(b), np.asarray(c), np.float32, jax.tree_util.keystr(path))


# shard_map.

MAPPED = ["batch", "heads_gqa", "heads_mqa", "batch_and_heads_gqa", "batch_and_heads_mqa"]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", MAPPED)
def test_gradients_through_shard_map(name: str, check_vma: bool) -> None:
    """The gradient of what is whole on some devices is the sum of those devices' parts."""
    sizes, specs, q_heads, kv_heads, _ = DIVISIONS[name]
    operands = case(q_heads, kv_heads)
    mesh = make_mesh(AxisType.Auto, **sizes)
    batch, _, heads = (*specs["q"], None, None)[:3]
    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=(specs,), out_specs=(P(batch, None, heads), P(batch, heads)), check_vma=check_vma
    )

    def call(operands: Mapping[str, Any]) -> Any:
        chosen = {name: operands[name] for name in DIFFERENTIABLE}
        ids = {name: operands[name] for name in OPERANDS[5:]}
        return jax.vjp(lambda x: mapped({**ids, **x}), chosen)[1]((operands["dout"], operands["dlse"]))[0]

    arrays = place(mesh, operands, with_cotangent_specs(specs))
    found, hlo = run(call, arrays)
    assert set(COMMUNICATION.findall(hlo)) <= {"all-reduce"}
    check_divided(found, operands, SHARED.get(name, (None, 1))[1], name)
    found = call(arrays)
    check_divided(found, operands, SHARED.get(name, (None, 1))[1], f"{name}, eager")


@pytest.mark.parametrize("name", MAPPED)
def test_gradients_inside_shard_map(name: str) -> None:
    """A training step on each device's share. With varying axes checked, JAX sums gradients of what does not vary."""
    sizes, specs, q_heads, kv_heads, _ = DIVISIONS[name]
    operands = case(q_heads, kv_heads)
    mesh = make_mesh(AxisType.Auto, **sizes)
    all_specs = with_cotangent_specs(specs)
    found_specs = {name: specs[name] for name in DIFFERENTIABLE}
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=(all_specs,), out_specs=found_specs)
    found, hlo = run(mapped, place(mesh, operands, all_specs))
    assert set(COMMUNICATION.findall(hlo)) <= {"all-reduce"}
    check_divided(found, operands, SHARED.get(name, (None, 1))[1], name)


def test_replicated_operands_in_shard_map() -> None:
    """Each operand varies over other mesh axes; gradients vary over exactly those, and are summed over the others."""
    lead = {"v": (2,), "dout": (2, 2), "dlse": (2, 2)}
    operands = with_cotangents(make_operands(q_heads=4, kv_heads=4, lead={"v": (2,)}), lead)
    mesh = make_mesh(AxisType.Auto, x=2, y=2)
    in_specs = {name: P() for name in OPERANDS} | {"v": P("x"), "dout": P("x", "y"), "dlse": P("x", "y")}

    def local(operands: dict[str, Any]) -> Any:
        rest = {**operands, "v": operands["v"][0], "dout": operands["dout"][0, 0], "dlse": operands["dlse"][0, 0]}
        found = gradients({**rest, "k": jax.lax.pcast(rest["k"], ("y",), to="varying")})
        return {**found, "k": found["k"][None], "v": found["v"][None]}

    out_specs = {name: P() for name in DIFFERENTIABLE} | {"k": P("y"), "v": P("x")}
    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs))(operands)

    def row(x: int, y: int) -> dict[str, Any]:
        return {**operands, "v": operands["v"][x], "dout": operands["dout"][x, y], "dlse": operands["dlse"][x, y]}

    every = [row(x, y) for x in range(2) for y in range(2)]
    check_sums({"q": found["q"]}, every, "whole everywhere")
    for i in range(2):
        check_sums({"k": found["k"][i]}, [row(x, i) for x in range(2)], f"k on row {i} of y")
        check_sums({"v": found["v"][i]}, [row(i, y) for y in range(2)], f"v on row {i} of x")


def test_gradients_in_shard_map_over_some_mesh_axes() -> None:
    """One mesh axis is manual, the other is left to XLA, which sums over the devices that share the KV head."""
    operands = case(4, 1, names="qkv")
    mesh = make_mesh(AxisType.Auto, x=2, y=2)
    for manual, automatic, sharers in (("x", "y", groups((0, 1), (2, 3))), ("y", "x", groups((0, 2), (1, 3)))):
        batch_only = with_cotangent_specs({name: P(manual) for name in "qkv"})
        out_specs = {name: P(manual) for name in "qkv"}
        mapped = jax.shard_map(gradients, mesh=mesh, in_specs=(batch_only,), out_specs=out_specs, axis_names={manual})
        specs = with_cotangent_specs({"q": P(manual, None, automatic), "k": P(manual), "v": P(manual)})
        found, hlo = run(mapped, place(mesh, operands, specs))
        assert sums_in(hlo) == {sharers} and set(COMMUNICATION.findall(hlo)) == {"all-reduce"}
        check_divided(found, operands, 2, f"{manual} is manual")


def test_sharers_that_cannot_be_named_are_refused() -> None:
    """Two mesh axes are left to XLA, which does not say in which order it counts their devices."""
    mesh = make_mesh(AxisType.Auto, x=1, y=2, z=2)
    batch_only = with_cotangent_specs({name: P("x") for name in "qkv"})
    out_specs = {name: P("x") for name in "qkv"}
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=(batch_only,), out_specs=out_specs, axis_names={"x"})
    specs = with_cotangent_specs({"q": P("x", None, ("y", "z")), "k": P("x"), "v": P("x")})
    with pytest.raises(Exception, match="flash_mha: got query heads divided more finely than KV heads inside a shard"):
        run(mapped, place(mesh, case(4, 1, names="qkv"), specs))
    operands = case(4, 4, names="qkv")
    found, hlo = run(mapped, place(mesh, operands, {**specs, "k": specs["q"], "v": specs["q"]}))
    assert not COMMUNICATION.findall(hlo)
    check_gradients(found, operands, "KV heads divided too")


# vmap.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapped", [(*OPERANDS, *COTANGENTS), ("q", *COTANGENTS), ("k", "v", "sinks", *COTANGENTS)])
def test_vmap_over_a_sharded_axis(mapped: tuple[str, ...], kind: Any) -> None:
    """Each device has its rows' gradients, of shared operands too."""
    operands = make_case(dict.fromkeys(mapped, (4,)))
    arrays = place(make_mesh(kind, x=4), operands, {name: P("x") for name in mapped})
    call = jax.vmap(gradients, in_axes=({name: 0 if name in mapped else None for name in operands},))
    found, hlo = run(call, arrays)
    assert BACKWARD in hlo and not COMMUNICATION.findall(hlo) and not LOCAL_CUT.findall(hlo)
    for i in range(4):
        row = {name: x[i] if name in mapped else x for name, x in operands.items()}
        check_gradients({name: np.asarray(x)[i] for name, x in found.items()}, row, f"row {i}")


def test_spmd_axis_name_is_accepted() -> None:
    lead = dict.fromkeys((*OPERANDS, *COTANGENTS), (4,))
    operands = make_case(lead)
    arrays = place(make_mesh(AxisType.Auto, x=4), operands, {name: P("x") for name in lead})
    found, hlo = run(jax.vmap(gradients, spmd_axis_name="x"), arrays)
    assert not COMMUNICATION.findall(hlo)
    for i in range(4):
        row = {name: x[i] for name, x in operands.items()}
        check_gradients({name: np.asarray(x)[i] for name, x in found.items()}, row, f"row {i}")


# Packed sequences.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(8, 4), (4, 1)], ids=["gqa", "mqa"])
def test_packed_sequences_divide_by_heads(heads: tuple[int, int], kind: Any) -> None:
    operands = make_varlen_case(q_heads=heads[0], kv_heads=heads[1])
    kv = P(None, "x") if heads[1] > 1 else P()
    specs = {"q": P(None, "x"), "k": kv, "v": kv, "sinks": P("x"), "alibi_slopes": P("x")}
    specs |= {"dout": P(None, "x"), "dlse": P("x")}
    found, hlo = run(gradients, place(make_mesh(kind, x=4), operands, specs))
    assert not LOCAL_CUT.findall(hlo)
    assert set(COMMUNICATION.findall(hlo)) == ({"all-reduce"} if heads[1] == 1 else set())
    assert sums_in(hlo) == ({groups((0, 1, 2, 3))} if heads[1] == 1 else set())
    check_divided(found, operands, 4, "packed")


# What is refused.


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_sharded_along_tokens_is_refused_with_the_reason(kind: Any) -> None:
    """Also through flash_mha_bwd, where it is an argument."""
    operands = make_case(batch=4, q_len=8, kv_len=12)
    bare = {name: x for name, x in operands.items() if name in ("q", "k", "v", "dout")}
    out, lse = heed.flash_mha(bare["q"], bare["k"], bare["v"], return_lse=True)
    arrays = place(make_mesh(kind, x=4), {**bare, "out": out, "lse": lse}, {"dout": P(None, "x")})
    message = r"flash_mha: dout: got axis 1 \(q_tokens, size 8\) sharded .*dout is the gradient of out, and follows"

    def call(x: Any) -> Any:
        return heed.flash_mha_bwd(x["dout"], x["q"], x["k"], x["v"], x["out"], x["lse"])

    for function in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=message):
            function(arrays)


def test_a_constraint_on_the_output_reaches_its_gradient() -> None:
    """And a second constraint, on the way, is what gathers the gradient on purpose."""
    operands = case(4, 4, names="qkv")
    operands = {name: x[:, :8] if name in ("q", "dout") else x for name, x in operands.items()}
    mesh = make_mesh(AxisType.Auto, x=4)
    tokens, whole = NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P())

    def loss(q: Any, *constraints: Any) -> Any:
        out = heed.flash_mha(q, operands["k"], operands["v"], **OPTIONS)
        for constraint in constraints:
            out = jax.lax.with_sharding_constraint(out, constraint)
        return jnp.vdot(out, operands["dout"])

    q = jax.device_put(operands["q"], whole)
    with pytest.raises(ValueError, match=r"flash_mha: dout: got axis 1 .*follows a constraint that out is put under"):
        jax.jit(lambda q: jax.grad(loss)(q, tokens))(q)
    found = jax.jit(lambda q: jax.grad(loss)(q, whole, tokens))(q)
    check_gradients({"q": found}, {**operands, "dlse": np.zeros((4, 4, 8), np.float32)}, "gathered on purpose")


def test_heads_that_do_not_divide_are_refused_for_gradients_too() -> None:
    operands = case(12, 6, names="qkv")
    arrays = place(make_mesh(AxisType.Auto, x=4), operands, {"dout": P(None, None, "x")})
    out, lse = heed.flash_mha(operands["q"], operands["k"], operands["v"], return_lse=True)

    def call(x: Any) -> Any:
        return heed.flash_mha_bwd(x["dout"], x["q"], x["k"], x["v"], out, lse)

    # Only dout is divided, in a way that the call cannot follow, and no device has all of it.
    with pytest.raises(Exception, match="do not fit together"):
        jax.jit(call)(arrays)
