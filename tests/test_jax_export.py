"""Programs that outlive their process: jax.export and the persistent compilation cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import heed
from jax_cases import attend, check, make_operands, make_varlen_operands

TESTS = Path(__file__).resolve().parent
COMMUNICATION = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|dynamic-slice)\b")


def run_process(case: str, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs a case of jax_export_process.py in a process of its own."""
    import_path = os.pathsep.join([str(Path(heed.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": import_path,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(TESTS / "jax_export_process.py"), case, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(folder / "results.npz") as results:
        return json.loads((folder / "found.json").read_text()), dict(results)


def export_cpu(function: Any, shapes: Any) -> Any:
    return export.export(function, platforms=["cpu"], disabled_checks=heed.export_checks())(shapes)


def shapes_of(operands: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in operands.items()}


@pytest.mark.parametrize("num_devices", [1, 4])
def test_an_exported_program_runs_in_another_process(num_devices: int, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    operands = make_operands(batch=4)
    function: Any = jax.jit(attend)
    if num_devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:num_devices]), ("x",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        function = jax.jit(
            attend, in_shardings=({name: whole if x.ndim == 1 else rows for name, x in operands.items()},)
        )
    exported = export_cpu(function, shapes_of(operands))
    (tmp_path / "program.bin").write_bytes(exported.serialize())
    np.savez(tmp_path / "operands.npz", **operands)  # type: ignore[arg-type]
    found, results = run_process("exported", tmp_path)
    check(results["out"], results["lse"], operands, f"{num_devices} devices")
    assert "heed.attention_fwd.v1" in found["hlo"] and not COMMUNICATION.findall(found["hlo"])


def test_a_program_exported_for_one_device_divides_where_it_is_called() -> None:
    pytest.importorskip("flatbuffers")
    operands = {name: make_operands(batch=4)[name] for name in "qkv"}
    exported = export.export(jax.jit(attend), platforms=["cpu"], disabled_checks=heed.export_checks())(
        shapes_of(operands)
    )
    call = jax.jit(export.deserialize(exported.serialize()).call)
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:4]), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    arrays = jax.device_put(operands, rows)
    assert not COMMUNICATION.findall(str(call.lower(arrays).compile().as_text()))
    out, lse = call(arrays)
    check(out, lse, operands, "divided")
    assert out.sharding.is_equivalent_to(rows, out.ndim)


def test_export_without_heeds_checks_is_refused_by_jax() -> None:
    with pytest.raises(ValueError, match=r"custom calls[\s\S]*heed.attention_fwd.v1"):
        export.export(jax.jit(attend), platforms=["cpu"])(shapes_of(make_operands()))


@pytest.mark.parametrize(
    "name, symbolic, message",
    [
        ("q", "b, 9, 4, 8", r"q: got the symbolic dimension b in shape \(b, 9, 4, 8\)"),
        ("k", "2, n, 2, 8", r"k: got the symbolic dimension n"),
        ("v", "2, 4*n, 2, 12", r"v: got the symbolic dimension 4\*n"),
        ("kv_segment_ids", "2, n", r"kv_segment_ids: got the symbolic dimension n"),
    ],
)
def test_symbolic_dimensions_are_refused_by_name(name: str, symbolic: str, message: str) -> None:
    shapes: dict[str, Any] = dict(shapes_of(make_operands()))
    shapes[name] = jax.ShapeDtypeStruct(export.symbolic_shape(symbolic), shapes[name].dtype)
    with pytest.raises(ValueError, match=message):
        export_cpu(jax.jit(attend), shapes)


def test_a_symbolic_vmapped_axis_is_refused_by_name() -> None:
    shapes = shapes_of({name: make_operands()[name] for name in "qkv"})
    symbol = export.symbolic_shape("rows")
    rows = {name: jax.ShapeDtypeStruct(symbol + s.shape, s.dtype) for name, s in shapes.items()}
    with pytest.raises(ValueError, match="q: got the symbolic dimension rows"):
        export_cpu(jax.jit(jax.vmap(attend)), rows)


def test_export_for_a_platform_without_kernels_is_refused() -> None:
    for platforms in (["tpu"], ["cpu", "tpu"], ["rocm"]):
        with pytest.raises(heed.UnsupportedError, match="heed has no kernels for the platform"):
            export.export(jax.jit(attend), platforms=platforms, disabled_checks=heed.export_checks())(
                shapes_of(make_operands())
            )


@pytest.mark.parametrize("platforms", [["cuda"], ["cpu", "cuda"]], ids="_".join)
def test_export_for_a_gpu_needs_none(platforms: list[str]) -> None:
    """That such programs run, on a GPU, is in test_gpu_programs.py."""
    exported = export.export(jax.jit(attend), platforms=platforms, disabled_checks=heed.export_checks())(
        shapes_of(make_operands())
    )
    assert exported.platforms == tuple(platforms) and "heed.attention_fwd.v1" in exported.mlir_module()


def test_the_persistent_cache_serves_another_process(tmp_path: Path) -> None:
    """On one device and on four: nothing in a program names the process that compiled it."""
    first, _ = run_process("cached", tmp_path)
    assert first["one_device"]["hits"] == 0 and first["one_device"]["misses"] >= 2
    assert first["four_devices"]["hits"] == 0 and first["four_devices"]["misses"] >= 2
    (tmp_path / "results.npz").unlink()
    second, results = run_process("cached", tmp_path)
    assert second["one_device"]["hits"] >= 2 and second["one_device"]["misses"] == 0
    assert second["four_devices"]["hits"] >= 2 and second["four_devices"]["misses"] == 0
    operands = make_operands(batch=4)
    check(results["out"], results["lse"], operands, "cached")
    check(results["packed"], results["packed_lse"], make_varlen_operands(), "cached, packed")
    q, k, v = (operands[name] for name in "qkv")
    np.testing.assert_array_equal(results["divided"], heed.flash_mha(q, k, v))
    np.testing.assert_array_equal(results["causal"], heed.flash_mha(q, k, v, is_causal=True))
    assert not np.array_equal(results["divided"], results["causal"])


def test_exported_calls_compose() -> None:
    """An exported program is called inside jit and vmap-free code like any function."""
    pytest.importorskip("flatbuffers")
    operands = make_operands()
    exported = export.export(jax.jit(attend), platforms=["cpu"], disabled_checks=heed.export_checks())(
        shapes_of(operands)
    )
    restored = export.deserialize(exported.serialize())
    out = jax.jit(lambda x: restored.call(x)[0] * 2)(operands)
    np.testing.assert_array_equal(out, 2 * np.asarray(attend(operands)[0]))
    assert jnp.isfinite(out).all()
