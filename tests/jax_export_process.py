"""The second process of test_jax_export.py: runs one of its cases and writes what it found to a file.

usage: python jax_export_process.py CASE FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_exported(folder: Path) -> dict[str, Any]:
    """Runs an exported program in a process that has imported heed and traced nothing."""
    results, hlo = _run_exported(folder)
    _save(folder, dict(zip(("out", "lse"), results, strict=True)))
    return {"hlo": hlo}


def run_exported_gradients(folder: Path) -> dict[str, Any]:
    """The same for a program whose results have names."""
    results, hlo = _run_exported(folder)
    _save(folder, results)
    return {"hlo": hlo}


def _save(folder: Path, results: Mapping[str, Any]) -> None:
    import numpy as np

    np.savez(folder / "results.npz", **{name: np.asarray(x) for name, x in results.items()})  # type: ignore[arg-type]


def _run_exported(folder: Path) -> tuple[Any, str]:
    import jax
    import numpy as np

    import heed

    heed.export_checks()  # registers heed's calls
    exported = jax.export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    operands = dict(np.load(folder / "operands.npz"))
    arrays = operands
    if exported.nr_devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        (tree, _) = jax.tree.unflatten(exported.in_tree, exported.in_shardings_jax(mesh))
        arrays = jax.device_put(operands, tree[0])
    call = jax.jit(exported.call)
    return call(arrays), str(call.lower(arrays).compile().as_text())


def run_cached(folder: Path) -> dict[str, Any]:
    """Compiles the same programs as every other process of its kind, and counts hits of the persistent cache."""
    import jax
    import numpy as np

    counts = _count_cache_hits(folder)

    import heed
    from jax_cases import attend, make_operands, make_varlen_operands

    operands = make_operands(batch=4)
    counts.update(hits=0, misses=0)
    call = jax.jit(attend)
    out, lse = call(operands)
    packed, packed_lse = call(make_varlen_operands())
    one_device = dict(counts)

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    arrays = [jax.device_put(operands[name], rows) for name in "qkv"]
    counts.update(hits=0, misses=0)
    divided = jax.jit(heed.flash_mha)(*arrays)
    causal = jax.jit(heed.flash_mha, static_argnames="is_causal")(*arrays, is_causal=True)
    four_devices = dict(counts)
    results = {"out": out, "lse": lse, "packed": packed, "packed_lse": packed_lse, "divided": divided, "causal": causal}
    _save(folder, results)
    return {"one_device": one_device, "four_devices": four_devices}


def run_cached_gradients(folder: Path) -> dict[str, Any]:
    """The same for gradients."""
    import jax
    import numpy as np

    counts = _count_cache_hits(folder)

    from jax_grad_cases import gradients, make_case

    operands = make_case(batch=4)
    counts.update(hits=0, misses=0)
    one = jax.jit(gradients)(operands)
    one_device = dict(counts)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    specs = {name: jax.sharding.PartitionSpec(*(() if x.ndim == 1 else ("x",))) for name, x in operands.items()}
    arrays = {name: jax.device_put(x, jax.sharding.NamedSharding(mesh, specs[name])) for name, x in operands.items()}
    counts.update(hits=0, misses=0)
    four = jax.jit(gradients)(arrays)
    four_devices = dict(counts)
    _save(folder, {f"one_{name}": x for name, x in one.items()} | {f"four_{name}": x for name, x in four.items()})
    return {"one_device": one_device, "four_devices": four_devices}


def _count_cache_hits(folder: Path) -> dict[str, int]:
    """Switches the persistent cache on, and counts its hits and misses from then on."""
    import jax

    counts = {"hits": 0, "misses": 0}

    def count(event: str, **_: Any) -> None:
        for kind in counts:
            counts[kind] += event == f"/jax/compilation_cache/cache_{kind}"

    jax.monitoring.register_event_listener(count)
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return counts


if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    cases = (run_exported, run_exported_gradients, run_cached, run_cached_gradients)
    found = {run.__name__.removeprefix("run_"): run for run in cases}[case](folder)
    (folder / "found.json").write_text(json.dumps(found))
