"""heed.ops on four CPU devices: what does not interact divides without communication, everything else is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from heed import ops
from jax_grad_cases import sums_in_any_order
from jax_op_cases import CASES, Case, axes_of, check, check_gradients, rows_of
from small_op_faces import expected_gradients
from small_op_specs import OpCase
from test_jax_grad_sharding import groups, sums_in
from test_jax_sharding import COMMUNICATION, KINDS, LOCAL_CUT, make_mesh, place, run

pytestmark = pytest.mark.skipif(
    len(jax.devices("cpu")) < 4, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=4 (conftest.py sets it)"
)

SIZES = {"rows": 4, "tokens": 8, "q_heads": 8, "kv_heads": 4}

# Axes of cases by the mesh axes that divide them: {"rows": "x"} shards every axis named rows over x.
Division = Mapping[str, Any]

ROWS = ("silu_and_mul", "gelu_tanh_and_mul", "rms_norm", "fused_add_rms_norm")
PACKED = ("apply_rope", "apply_llama31_rope")
POSITIONS = ("apply_rope_pos_ids", "apply_rope_with_cos_sin_cache")
DECODES = ("single_decode", "single_decode_hnd_rope")

# (cases, mesh, how axes are divided, other sizes)
DIVISIONS: dict[str, tuple[tuple[str, ...], dict[str, int], Division, dict[str, int]]] = {
    "rows": (ROWS, {"x": 4}, {"rows": "x"}, {}),
    "tokens of rows": (ROWS, {"x": 4}, {"tokens": "x"}, {}),
    "rows and tokens": (ROWS, {"x": 2, "y": 2}, {"rows": "x", "tokens": "y"}, {}),
    "rows over both": (ROWS, {"x": 2, "y": 2}, {"rows": ("x", "y")}, {}),
    "heads": ((*PACKED, *POSITIONS, *DECODES), {"x": 4}, {"q_heads": "x", "kv_heads": "x"}, {}),
    "heads mqa": ((*PACKED, *POSITIONS, *DECODES), {"x": 4}, {"q_heads": "x"}, {"kv_heads": 1}),
    "heads over both": (
        (*PACKED, *POSITIONS, *DECODES), {"x": 2, "y": 2}, {"q_heads": ("x", "y"), "kv_heads": "x"}, {"kv_heads": 2}
    ),
    "tokens": (POSITIONS, {"x": 4}, {"tokens": "x"}, {}),
    "tokens and heads": (POSITIONS, {"x": 2, "y": 2}, {"tokens": "x", "q_heads": "y", "kv_heads": "y"}, {}),
    "query heads": ((*PACKED, *POSITIONS), {"x": 4}, {"q_heads": "x"}, {"kv_heads": 3}),
    "KV heads": ((*PACKED, *POSITIONS), {"x": 4}, {"kv_heads": "x"}, {"q_heads": 3}),
}  # fmt: skip
PAIRS = [(division, name) for division, row in DIVISIONS.items() for name in row[0]]
every_pair = pytest.mark.parametrize("division, name", PAIRS, ids=[f"{name}: {division}" for division, name in PAIRS])


def specs_of(case: Case, axes: Division) -> dict[str, P]:
    """The shardings of operands and cotangents."""
    shapes = {**case.operands, **dict(zip(case.cotangents, case.results.values(), strict=True))}
    return {name: P(*(axes.get(str(axis)) for axis in shape)) for name, shape in shapes.items()}


def setting(division: str, name: str, kind: Any = AxisType.Auto) -> tuple[Case, dict[str, Any], dict[str, Any], Any]:
    """The case, its operands as NumPy arrays and as they lie on devices, and the mesh."""
    _, sizes, axes, others = DIVISIONS[division]
    case, mesh = CASES[name], make_mesh(kind, **sizes)
    operands = case.make(**(SIZES | others))
    return case, operands, place(mesh, operands, specs_of(case, axes)), mesh


def assert_divided(results: Mapping[str, Any], case: Case, axes: Division, mesh: Any) -> None:
    """Results lie as the operands of the same axes do."""
    shapes = {**case.operands, **case.results}
    for name, x in results.items():
        spec = P(*(axes.get(str(axis)) for axis in shapes[name]))
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), f"{name}: {x.sharding}, expected {spec}"


@pytest.mark.parametrize("kind", KINDS)
@every_pair
def test_calls_divide_without_communication(division: str, name: str, kind: Any) -> None:
    case, operands, arrays, mesh = setting(division, name, kind)
    results, hlo = run(case.call, {key: arrays[key] for key in case.operands})
    assert case.target in hlo and not COMMUNICATION.findall(hlo) and not LOCAL_CUT.findall(hlo)
    check(results, case, operands, division)
    assert_divided(dict(zip(case.results, results, strict=True)), case, DIVISIONS[division][2], mesh)


@pytest.mark.parametrize("kind", KINDS)
@every_pair
def test_gradients_divide_as_calls_do(division: str, name: str, kind: Any) -> None:
    """No communication but sums: of the weight over rows, of K and V over the devices that share a KV head."""
    case, operands, arrays, mesh = setting(division, name, kind)
    axes = DIVISIONS[division][2]
    found, hlo = run(case.gradients, arrays)
    assert not LOCAL_CUT.findall(hlo)
    every = groups((0, 1, 2, 3))
    rows = dict.fromkeys(("rows", "tokens of rows", "rows and tokens", "rows over both"), every)
    sharers = {**rows, "heads mqa": every, "heads over both": groups((0, 1), (2, 3))}.get(division)
    summed = {"rms_norm": ("weight",), "attention_decode": ("k", "v")}.get(case.stem, ())
    if sharers is None or not summed:
        assert not COMMUNICATION.findall(hlo)
        check_gradients(found, case, operands, division)
    else:
        assert set(COMMUNICATION.findall(hlo)) == {"all-reduce"} and sums_in(hlo) == {sharers}
        check_gradients({key: x for key, x in found.items() if key not in summed}, case, operands, division)
        if "rope_theta" in case.options:  # the sum is rotated back, not what is summed
            check_definition("k", found["k"], case, operands)
            summed = ("v",)
        check_sums({key: found[key] for key in summed}, case, operands, axes, mesh)
    assert_divided(found, case, axes, mesh)


def check_definition(name: str, x: Any, case: Case, operands: dict[str, Any]) -> None:
    """Asserts that a gradient of decode obeys the tolerance rule."""
    arrays = {key: operands[key] for key in case.operands}
    wanted = expected_gradients(
        OpCase("single_decode", arrays, dict(case.options)), [operands[key] for key in case.cotangents]
    )
    wanted[case.differentiable.index(name)].check(np.asarray(x), name)


def check_sums(found: Mapping[str, Any], case: Case, operands: dict[str, Any], axes: Division, mesh: Any) -> None:
    """Asserts that gradients are sums of the shards' gradients, in some order."""
    specs = specs_of(case, axes)
    shards = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    devices = mesh.devices.reshape(-1)
    index = {name: shards[name].devices_indices_map(x.shape) for name, x in operands.items()}
    for name, got in found.items():
        got = np.asarray(got)
        for tile in {str(index[name][device]): index[name][device] for device in devices}.values():
            sharing = [device for device in devices if index[name][device] == tile]
            parts = [
                case.numpy_gradients({key: x[index[key][device]] for key, x in operands.items()})[name]
                for device in sharing
            ]
            fits = np.any([total == got[tile] for total in sums_in_any_order(parts)], axis=0)
            assert fits.all(), f"{name}: {int((~fits).sum())} of {fits.size} elements are no sum of {len(parts)} parts"


def test_parts_of_a_16_bit_weights_gradient_are_summed_in_float32() -> None:
    case = CASES["rms_norm"]
    operands = case.make(dtype="bfloat16", **SIZES)
    found, hlo = run(case.gradients, place(make_mesh(AxisType.Auto, x=4), operands, specs_of(case, {"rows": "x"})))
    (line,) = (line for line in hlo.splitlines() if " all-reduce(" in line)
    assert "f32[5]" in line and found["weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_eager_calls_on_sharded_arrays(name: str, kind: Any) -> None:
    division = "rows" if name in ROWS else "heads"
    case, operands, arrays, mesh = setting(division, name, kind)
    results = case.call(arrays)
    check(results, case, operands, division)
    assert_divided(dict(zip(case.results, results, strict=True)), case, DIVISIONS[division][2], mesh)
    found = case.gradients(arrays)
    kept = {key: x for key, x in found.items() if key != "weight"}
    check_gradients(kept, case, operands, division)


@pytest.mark.parametrize("name", CASES)
def test_empty_operands_divide(name: str) -> None:
    case = CASES[name]
    for empty in ("rows", "tokens", "kv_tokens"):
        operands = case.make(**(SIZES | {empty: 0}))
        axes = {"rows": "x"} if name in ROWS else {"q_heads": "x", "kv_heads": "x"}
        results, hlo = run(case.call, place(make_mesh(AxisType.Auto, x=4), operands, specs_of(case, axes)))
        assert not COMMUNICATION.findall(hlo)
        check(results, case, operands, f"no {empty}")


@pytest.mark.parametrize("name", CASES)
def test_axes_that_do_not_divide_evenly(name: str) -> None:
    case = CASES[name]
    operands = case.make(rows=6, tokens=8, q_heads=6, kv_heads=6)
    mesh = make_mesh(AxisType.Auto, x=4)
    specs = specs_of(case, {"rows": "x"} if name in ROWS else {"q_heads": "x", "kv_heads": "x"})

    def call(operands: Mapping[str, Any]) -> Any:
        constrain = jax.lax.with_sharding_constraint
        return case.call({key: constrain(operands[key], NamedSharding(mesh, specs[key])) for key in case.operands})

    check(jax.jit(call)(operands), case, operands, "6 over 4")


# shard_map and vmap.


@pytest.mark.parametrize("check_vma", [True, False])
@every_pair
def test_shard_map(division: str, name: str, check_vma: bool) -> None:
    """Each device calls heed on its part, forward and backward; JAX sums gradients of what devices share."""
    case, operands, arrays, mesh = setting(division, name)
    axes = DIVISIONS[division][2]
    specs = specs_of(case, axes)
    out_specs = tuple(P(*(axes.get(str(axis)) for axis in shape)) for shape in case.results.values())
    in_specs = ({key: specs[key] for key in case.operands},)
    mapped: Any = jax.shard_map(case.call, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    results, hlo = run(mapped, {key: arrays[key] for key in case.operands})
    assert case.target in hlo and not COMMUNICATION.findall(hlo)
    check(results, case, operands, division)

    def gradients(operands: Any) -> Any:
        chosen = {key: operands[key] for key in case.differentiable}
        rest = {key: operands[key] for key in case.operands if key not in chosen}
        _, pull = jax.vjp(lambda x: mapped({**rest, **x}), chosen)
        return pull(tuple(operands[key] for key in case.cotangents))[0]

    found, hlo = run(gradients, arrays)
    assert set(COMMUNICATION.findall(hlo)) <= {"all-reduce"}
    shared = {key for key in case.differentiable if len(used(specs[key])) < len(mesh.shape)}
    if case.stem == "rope":  # what devices share, each rotates: nothing is summed
        assert not COMMUNICATION.findall(hlo) or not check_vma
        shared = set()
    check_gradients({key: x for key, x in found.items() if key not in shared}, case, operands, division)
    check_sums({key: found[key] for key in shared}, case, operands, axes, mesh)


def used(spec: P) -> set[str]:
    return {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}


def test_norms_in_shard_map_over_some_mesh_axes() -> None:
    """One mesh axis is manual, the other is left to XLA, which sums over the devices that divide the rows."""
    case = CASES["rms_norm"]
    operands = case.make(**SIZES)
    mesh = make_mesh(AxisType.Auto, x=2, y=2)
    for manual, automatic in (("x", "y"), ("y", "x")):
        in_specs = ({"x": P(manual), "weight": P(), "dout": P(manual)},)
        out_specs = {"x": P(manual), "weight": P()}
        mapped = jax.shard_map(case.gradients, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={manual})
        specs = specs_of(case, {"rows": manual, "tokens": automatic})
        found, hlo = run(mapped, place(mesh, operands, specs))
        assert set(COMMUNICATION.findall(hlo)) == {"all-reduce"}
        check_gradients({"x": found["x"]}, case, operands, manual)
        check_sums({"weight": found["weight"]}, case, operands, {"rows": manual, "tokens": automatic}, mesh)


def test_sums_over_devices_that_cannot_be_named_are_refused() -> None:
    case = CASES["rms_norm"]
    mesh = make_mesh(AxisType.Auto, x=1, y=2, z=2)
    in_specs = ({"x": P("x"), "weight": P(), "dout": P("x")},)
    out_specs = {"x": P("x"), "weight": P()}
    mapped = jax.shard_map(case.gradients, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={"x"})
    arrays = place(mesh, case.make(**SIZES), specs_of(case, {"rows": "x", "tokens": ("y", "z")}))
    with pytest.raises(Exception, match=r"ops\.rms_norm: got rows divided inside a shard_map over some mesh axes"):
        run(mapped, arrays)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_vmap_over_a_sharded_axis(name: str, kind: Any) -> None:
    """Each device has its rows, forward and backward, whatever else is mapped."""
    case = CASES[name]
    names = (*case.operands, *case.cotangents)
    for mapped in (names, (names[0], *case.cotangents)):
        operands = case.make(lead=dict.fromkeys(mapped, (4,)))
        arrays = place(make_mesh(kind, x=4), operands, {key: P("x") for key in mapped})
        for call in (case.call, case.gradients):
            results, hlo = run(jax.vmap(call, in_axes=(axes_of(mapped, names),)), arrays)
            assert not COMMUNICATION.findall(hlo) and not LOCAL_CUT.findall(hlo)
            for i in range(4):
                row = jax.tree.map(lambda x, i=i: np.asarray(x)[i], results)
                compare: Any = check if call == case.call else check_gradients
                compare(row, case, rows_of(operands, mapped, i), f"row {i} with {mapped} mapped")


# Models.


def test_shardings_propagate_through_a_feed_forward_layer() -> None:
    """Tensor parallelism as models write it: gates and factors are products of weights with an axis of their own."""
    rng = np.random.default_rng(0)
    tokens, width, hidden = 6, 16, 8
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    up = rng.standard_normal((width, 4, 2 * hidden)).astype(np.float32)  # 4 shards, each with its gates and factors
    down = rng.standard_normal((4, hidden, width)).astype(np.float32)
    weight = np.ones(width, np.float32)
    mesh = make_mesh(AxisType.Auto, x=4)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731

    def layer(x: Any, weight: Any, up: Any, down: Any) -> Any:
        gates = jnp.einsum("tw,wsh->tsh", ops.rms_norm(x, weight), up)
        return x + jnp.einsum("tsh,shw->tw", ops.silu_and_mul(gates), down)

    _, hlo = run(layer, put(x), put(weight), put(up, None, "x"), put(down, "x"))
    assert set(COMMUNICATION.findall(hlo)) == {"all-reduce"} and not LOCAL_CUT.findall(hlo)


# What is refused.

REFUSED: dict[str, tuple[str, dict[str, P], str]] = {
    "last axis": ("silu_and_mul", {"x": P(None, None, "x")}, r"ops\.silu_and_mul: x: got axis 2 .*Shard any other"),
    "row": ("rms_norm", {"x": P(None, None, "x")}, r"ops\.rms_norm: x: got axis 2 \(hidden, size 8\) sharded"),
    "weight": ("rms_norm", {"weight": P("x")}, r"ops\.rms_norm: weight: got axis 0 \(hidden, size 8\) sharded"),
    "residual": ("fused_add_rms_norm", {"residual": P(None, None, "x")}, r"fused_add_rms_norm: residual: got axis 2"),
    "packed tokens": ("apply_rope", {"q": P("x")}, r"ops\.apply_rope: q: got axis 0 .*lengths of all sequences"),
    "lengths": ("apply_llama31_rope", {"indptr": P("x")}, r"ops\.apply_llama31_rope: indptr: got axis 0"),
    "head dim": ("apply_rope_pos_ids", {"k": P(None, None, "x")}, r"k: got axis 2 \(head_dim, size 8\) .*in pairs"),
    "table": ("apply_rope_with_cos_sin_cache", {"cos_sin_cache": P("x")}, r"cos_sin_cache: got axis 0 \(positions"),
    "keys": ("single_decode", {"k": P("x")}, r"ops\.single_decode: k: got axis 0 \(kv_tokens.*Shard the heads"),
    "keys, HND": ("single_decode_hnd_rope", {"k": P(None, "x")}, r"k: got axis 1 \(kv_tokens, size 8\) sharded"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_an_axis_that_cannot_be_sharded_is_refused_with_the_reason(name: str, kind: Any) -> None:
    case_name, specs, message = REFUSED[name]
    case, mesh = CASES[case_name], make_mesh(kind, x=4)
    operands = case.make(**SIZES, hidden=8, kv_tokens=8, sequences=3)
    arrays = place(mesh, {key: operands[key] for key in case.operands}, specs)
    for call in (case.call, jax.jit(case.call)):
        with pytest.raises(ValueError, match=message):
            call(arrays)


def test_divisions_that_would_move_inputs_are_refused() -> None:
    mesh = make_mesh(AxisType.Auto, x=4)
    case = CASES["single_decode"]
    operands = case.make(q_heads=12, kv_heads=6)
    arrays = place(mesh, operands, specs_of(case, {"q_heads": "x"}))
    with pytest.raises(Exception, match=r"ops\.single_decode: got 12 query heads sharded 4 ways over 6 KV heads"):
        jax.jit(case.call)(arrays)
    case = CASES["fused_add_rms_norm"]
    operands = case.make(rows=4, tokens=4)
    arrays = place(mesh, operands, {"x": P("x"), "residual": P(None, "x")})
    with pytest.raises(Exception, match=r"ops\.fused_add_rms_norm: the operands' shardings do not fit together"):
        jax.jit(case.call)(arrays)


def test_types_under_an_explicit_mesh() -> None:
    mesh = make_mesh(AxisType.Explicit, x=2, y=2)
    case = CASES["fused_add_rms_norm"]
    operands = case.make(**SIZES)
    arrays = place(mesh, operands, {"x": P("x"), "residual": P("y")})
    with pytest.raises(ValueError, match="residual: got row0 sharded over 'y' where x has it over 'x'"):
        jax.eval_shape(case.call, arrays)
    arrays = place(mesh, operands, {"x": P("x"), "residual": P(None, "y"), "dout": P("x", "y"), "dsum": P("x", "y")})
    out, total = jax.eval_shape(case.call, arrays)
    assert out.sharding.spec == total.sharding.spec == P("x", "y", None)
    found = jax.eval_shape(case.gradients, arrays)
    assert found["x"].sharding.spec == P("x", None, None) and found["residual"].sharding.spec == P(None, "y", None)
    assert found["weight"].sharding.spec == P(None)
    case = CASES["apply_rope_pos_ids"]
    arrays = place(mesh, case.make(**SIZES), {"q": P(None, "x"), "k": P(None, "y")})
    q_rope, k_rope = jax.eval_shape(case.call, arrays)
    assert q_rope.sharding.spec == P(None, "x", None) and k_rope.sharding.spec == P(None, "y", None)


# Workspaces.


def test_a_share_gets_the_workspace_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer heads leave more of a GPU to each: a device's share may need more per head than the whole call has."""
    from heed._jax import devices
    from heed._jax.ops import ATTENTION_DECODE

    def problem(heads: int) -> str:
        shape = jax.ShapeDtypeStruct((heads, 128), jnp.float16), jax.ShapeDtypeStruct((8192, heads, 128), jnp.float16)
        lowered = jax.jit(lambda q, k: ops.single_decode(q, k, k)).trace(*shape).lower(lowering_platforms=("cuda",))
        (text,) = re.findall(r'problem = "(attention_decode\.v1;[^"]*)"', lowered.as_text())
        return str(text)

    def floats(text: str, target: str) -> int:
        return int(ATTENTION_DECODE.resolve(text, target).results[-1][1][-1])

    whole, share = problem(64), problem(2)
    assert floats(share, "cuda") > floats(whole, "cuda")
    if not devices.local_cuda_ordinals():
        assert devices.workspace_of_share(ATTENTION_DECODE, share, "cuda") == (2, floats(share, "cuda"))
    assert devices.workspace_of_share(ATTENTION_DECODE, share, "cpu") == (2, floats(share, "cpu"))

    of_share = devices.workspace_of_share

    def more(*arguments: Any) -> tuple[int, ...] | None:
        shape = of_share(*arguments)
        return shape and (*shape[:-1], shape[-1] + 13)

    monkeypatch.setattr(devices, "workspace_of_share", more)
    for name in ("rms_norm", "single_decode"):
        case, operands, arrays, _ = setting("rows" if name == "rms_norm" else "heads", name)
        found, hlo = run(case.gradients, arrays)
        assert not LOCAL_CUT.findall(hlo)
        check_gradients({key: x for key, x in found.items() if key != "weight"}, case, operands, name)
