"""Programs with calls of heed.ops that outlive their process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import heed
from heed import ops
from jax_op_cases import CASES, check, check_gradients
from test_jax_export import COMMUNICATION, export_cpu, run_process, shapes_of

SIZES = {"rows": 4, "q_heads": 8, "kv_heads": 4}


def every_case() -> dict[str, np.ndarray]:
    """The operands of all cases, as `case__operand`."""
    return {f"{name}__{key}": x for name, case in CASES.items() for key, x in case.make(**SIZES).items()}


def parts_of(operands: Mapping[str, Any], name: str) -> dict[str, Any]:
    prefix = f"{name}__"
    return {key.removeprefix(prefix): x for key, x in operands.items() if key.startswith(prefix)}


def every_call(operands: Mapping[str, Any]) -> dict[str, Any]:
    """Results and gradients of all cases."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        own = parts_of(operands, name)
        found |= {f"{name}__{key}": x for key, x in zip(case.results, case.call(own), strict=True)}
        found |= {f"{name}__d{key}": x for key, x in case.gradients(own).items()}
    return found


@pytest.mark.parametrize("num_devices", [1, 4])
def test_an_exported_program_runs_in_another_process(num_devices: int, tmp_path: Path) -> None:
    """On four devices the other process finds the partitioners, and the sum of a norm's weight, by itself."""
    pytest.importorskip("flatbuffers")
    operands = every_case()
    function: Any = jax.jit(every_call)
    if num_devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:num_devices]), ("x",))
        axes = {"rows": "x", "q_heads": "x", "kv_heads": "x"}
        shardings = {}
        for name, case in CASES.items():
            shapes = {**case.operands, **dict(zip(case.cotangents, case.results.values(), strict=True))}
            for key, shape in shapes.items():
                spec = P(*(axes.get(str(axis)) for axis in shape))
                shardings[f"{name}__{key}"] = NamedSharding(mesh, spec)
        function = jax.jit(every_call, in_shardings=(shardings,))
    exported = export_cpu(function, shapes_of(operands))
    (tmp_path / "program.bin").write_bytes(exported.serialize())
    np.savez(tmp_path / "operands.npz", **operands)  # type: ignore[arg-type]
    found, results = run_process("exported_gradients", tmp_path)
    assert {case.target for case in CASES.values()} <= set(found["hlo"].replace('"', " ").split())
    assert set(COMMUNICATION.findall(found["hlo"])) == ({"all-reduce"} if num_devices > 1 else set())
    for name, case in CASES.items():
        own, got = parts_of(operands, name), parts_of(results, name)
        check([got[key] for key in case.results], case, own, name)
        whole = [key for key in case.differentiable if num_devices == 1 or key != "weight"]
        check_gradients({key: got[f"d{key}"] for key in whole}, case, own, name)


@pytest.mark.parametrize("name", CASES)
def test_an_exported_function_can_be_differentiated(name: str) -> None:
    """jax.export writes the gradient of a function beside it."""
    pytest.importorskip("flatbuffers")
    case = CASES[name]
    operands = case.make()
    rest = {key: operands[key] for key in case.operands if key not in case.differentiable}
    chosen = {key: operands[key] for key in case.differentiable}
    exported = export_cpu(jax.jit(lambda x: case.call({**rest, **x})), shapes_of(chosen))
    restored = export.deserialize(exported.serialize(vjp_order=1))
    _, pull = jax.vjp(restored.call, chosen)
    (found,) = pull(tuple(jnp.asarray(operands[key]) for key in case.cotangents))
    check_gradients(found, case, operands, name)


@pytest.mark.parametrize("name", CASES)
def test_export_without_heeds_checks_is_refused_by_jax(name: str) -> None:
    case = CASES[name]
    shapes = shapes_of({key: x for key, x in case.make().items() if key in case.operands})
    with pytest.raises(ValueError, match=rf"custom calls[\s\S]*{case.target}"):
        export.export(jax.jit(case.call), platforms=["cpu"])(shapes)
    assert any(case.target in str(check) for check in heed.export_checks())


def test_symbolic_dimensions_are_refused_by_name() -> None:
    for symbolic, name in (("b, 8", "b"), ("3, 2*n", "2*n")):
        x = jax.ShapeDtypeStruct(export.symbolic_shape(symbolic), jnp.float32)
        with pytest.raises(ValueError, match=rf"x: got the symbolic dimension {name.replace('*', '.')} in shape"):
            export_cpu(jax.jit(ops.silu_and_mul), x)
    (rows,) = export.symbolic_shape("rows")
    with pytest.raises(ValueError, match="x: got the symbolic dimension rows"):
        export_cpu(jax.jit(jax.vmap(ops.silu_and_mul)), jax.ShapeDtypeStruct((rows, 3, 8), jnp.float32))
