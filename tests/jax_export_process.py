"""The second process of test_jax_export.py: runs one of its cases and writes what it found to a file.

usage: python jax_export_process.py CASE FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run_exported(folder: Path) -> dict[str, Any]:
    """Runs an exported program in a process that has imported heed and traced nothing."""
    import jax
    import numpy as np

    import heed

    heed.export_checks()  # registers heed's calls
    exported = jax.export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    operands = dict(np.load(folder / "operands.npz"))
    arrays = operands
    if exported.nr_devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arrays = {name: jax.device_put(x, whole if x.ndim == 1 else rows) for name, x in operands.items()}
    call = jax.jit(exported.call)
    out, lse = call(arrays)
    np.savez(folder / "results.npz", out=out, lse=lse)
    return {"hlo": call.lower(arrays).compile().as_text()}


def run_cached(folder: Path) -> dict[str, Any]:
    """Compiles the same programs as every other process of its kind, and counts hits of the persistent cache."""
    import jax
    import numpy as np

    counts = {"hits": 0, "misses": 0}

    def count(event: str, **_: Any) -> None:
        for kind in counts:
            counts[kind] += event == f"/jax/compilation_cache/cache_{kind}"

    jax.monitoring.register_event_listener(count)
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

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
    np.savez(folder / "results.npz", **results)
    return {"one_device": one_device, "four_devices": four_devices}


if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    found = {"exported": run_exported, "cached": run_cached}[case](folder)
    (folder / "found.json").write_text(json.dumps(found))
