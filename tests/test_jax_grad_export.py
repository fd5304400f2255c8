"""Gradients in programs that outlive their process: jax.export and the persistent compilation cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import heed
from jax_cases import attend
from jax_grad_cases import (
    BACKWARD,
    DIFFERENTIABLE,
    FORWARD,
    check_divided,
    check_gradients,
    gradients,
    make_case,
    same_bits,
)
from test_jax_export import COMMUNICATION, export_cpu, run_process, shapes_of


def case() -> dict[str, np.ndarray]:
    return make_case(batch=4, kv_heads=1)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_an_exported_gradient_runs_in_another_process(num_devices: int, tmp_path: Path) -> None:
    """On four devices, which share the KV head, the other process finds the partitioner and the sum by itself."""
    pytest.importorskip("flatbuffers")
    operands = case()
    function: Any = jax.jit(gradients)
    if num_devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:num_devices]), ("x",))
        spec = {"q": (None, None, "x"), "dout": (None, None, "x"), "dlse": (None, "x"), "sinks": ("x",)}
        spec["alibi_slopes"] = spec["sinks"]
        shardings = {
            name: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec.get(name, ()))) for name in operands
        }
        function = jax.jit(gradients, in_shardings=(shardings,))
    exported = export_cpu(function, shapes_of(operands))
    (tmp_path / "program.bin").write_bytes(exported.serialize())
    np.savez(tmp_path / "operands.npz", **operands)  # type: ignore[arg-type]
    found, results = run_process("exported_gradients", tmp_path)
    assert f'custom_call_target="{BACKWARD}"' in found["hlo"]
    assert set(COMMUNICATION.findall(found["hlo"])) == ({"all-reduce"} if num_devices > 1 else set())
    check_divided(results, operands, num_devices, f"{num_devices} devices")


def test_an_exported_function_can_be_differentiated() -> None:
    """jax.export writes the gradient of a function beside it."""
    pytest.importorskip("flatbuffers")
    operands = case()
    rest = {name: x for name, x in operands.items() if name not in (*DIFFERENTIABLE, "dout", "dlse")}
    chosen = {name: operands[name] for name in DIFFERENTIABLE}
    exported = export_cpu(jax.jit(lambda x: attend({**rest, **x})), shapes_of(chosen))
    restored = export.deserialize(exported.serialize(vjp_order=1))
    (found,) = jax.vjp(restored.call, chosen)[1]((operands["dout"], operands["dlse"]))
    check_gradients(found, operands, "gradient of an exported function")


def test_export_without_heeds_checks_is_refused_by_jax() -> None:
    with pytest.raises(ValueError, match=rf"custom calls[\s\S]*{BACKWARD}"):
        export.export(jax.jit(gradients), platforms=["cpu"])(shapes_of(case()))


@pytest.mark.parametrize(
    "name, symbolic, message",
    [
        ("q", "b, 9, 4, 8", r"q: got the symbolic dimension b in shape \(b, 9, 4, 8\)"),
        ("v", "4, n, 1, 12", r"v: got the symbolic dimension n"),
    ],
)
def test_symbolic_dimensions_are_refused_by_name(name: str, symbolic: str, message: str) -> None:
    shapes: dict[str, Any] = dict(shapes_of(case()))
    shapes[name] = jax.ShapeDtypeStruct(export.symbolic_shape(symbolic), shapes[name].dtype)
    with pytest.raises(ValueError, match=message):
        export_cpu(jax.jit(gradients), shapes)


def test_a_symbolic_number_of_cotangents_is_refused_by_name() -> None:
    """As in a Jacobian of unknown size: only dout has the symbol."""
    operands = {name: case()[name] for name in "qkv"}

    def call(q: Any, k: Any, v: Any, dout: Any) -> Any:
        return jax.vmap(jax.vjp(heed.flash_mha, q, k, v)[1])(dout)

    shapes = shapes_of(operands)
    dout = jax.ShapeDtypeStruct(export.symbolic_shape("rows, 4, 9, 4, 12"), jnp.float32)
    with pytest.raises(ValueError, match="dout: got the symbolic dimension rows"):
        export.export(jax.jit(call), platforms=["cpu"], disabled_checks=heed.export_checks())(*shapes.values(), dout)


def test_the_persistent_cache_serves_another_process(tmp_path: Path) -> None:
    """Training steps on one device and on four."""
    first, _ = run_process("cached_gradients", tmp_path)
    assert first["one_device"]["hits"] == 0 and first["one_device"]["misses"] >= 1
    assert first["four_devices"]["hits"] == 0 and first["four_devices"]["misses"] >= 1
    (tmp_path / "results.npz").unlink()
    second, results = run_process("cached_gradients", tmp_path)
    assert second["one_device"]["misses"] == second["four_devices"]["misses"] == 0
    assert second["one_device"]["hits"] >= 1 and second["four_devices"]["hits"] >= 1
    operands = make_case(batch=4)
    check_gradients({name: results[f"one_{name}"] for name in DIFFERENTIABLE}, operands, "cached")
    check_gradients({name: results[f"four_{name}"] for name in DIFFERENTIABLE}, operands, "cached, divided")


def test_exported_gradients_compose() -> None:
    pytest.importorskip("flatbuffers")
    operands = case()
    restored = export.deserialize(export_cpu(jax.jit(gradients), shapes_of(operands)).serialize())
    assert all(f"@{name}" in restored.mlir_module() for name in (FORWARD, BACKWARD))
    found = jax.jit(lambda x: jax.tree.map(lambda y: y * 2, restored.call(x)))(operands)
    same_bits(found, jax.tree.map(lambda y: y * 2, gradients(operands)), "twice")
