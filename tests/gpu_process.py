"""The processes of test_gpu_programs.py: what is decided once per process, or must happen in another one.

usage: python gpu_process.py CASE FOLDER      writes FOLDER/found.json and, where there are arrays, FOLDER/results.npz
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXECUTE = 3
REPLAYS = 8
STEPS = 16


def count_calls() -> list[int]:
    """Puts itself between XLA and heed's handler for CUDA. Returns the list that every call's stage is appended to."""
    import jax

    stages: list[int] = []
    handler_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    kept: list[Any] = []
    register = jax.ffi.register_ffi_target
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

    def watched(capsule: Any) -> Any:
        handler = handler_type(get_pointer(capsule, None))

        def call(frame: int) -> Any:
            # An XLA_FFI_CallFrame: struct_size, extension_start, api, ctx, stage, ...
            extension = ctypes.c_void_p.from_address(frame + 8).value
            if extension is None:  # XLA asks for metadata otherwise
                stages.append(ctypes.c_int.from_address(frame + 32).value)
            return handler(frame)

        kept.append(handler_type(call))
        return jax.ffi.pycapsule(kept[-1])

    def register_watched(name: str, fn: Any, platform: str = "cpu", **options: Any) -> None:
        if platform == "CUDA":
            fn = {stage: watched(capsule) for stage, capsule in fn.items()}
        register(name, fn, platform=platform, **options)
        kept.append(fn)

    setattr(jax.ffi, "register_ffi_target", register_watched)  # noqa: B010 (mypy refuses to assign it)
    return stages


def run_command_buffer(
    folder: Path, shape: tuple[int, ...] = (2, 96, 4, 64), backend: str | None = None
) -> dict[str, Any]:
    """Runs one call again and again with new data in the same memory, and a loop of calls in one program."""
    stages = count_calls()
    import jax
    import jax.numpy as jnp
    import numpy as np

    import heed

    def launches() -> int:
        return stages.count(EXECUTE)

    rng = np.random.default_rng(0)
    q, k, v = (jax.device_put(rng.standard_normal(shape).astype(np.float16), jax.devices("cuda")[0]) for _ in "qkv")
    attend = jax.jit(functools.partial(heed.flash_mha, is_causal=True, return_lse=True, backend=backend))
    # In place: the next call finds other numbers at the same address.
    change = jax.jit(lambda x: (x * -0.75 + 0.125).astype(x.dtype), donate_argnums=0)
    inputs, outs, lses, counts = [], [], [], []
    for _ in range(2 * REPLAYS):
        inputs.append(np.asarray(q))
        before = launches()
        out, lse = jax.block_until_ready(attend(q, k, v))
        counts.append(launches() - before)
        outs.append(np.asarray(out))
        lses.append(np.asarray(lse))
        del out, lse
        q = change(q)

    @jax.jit
    def loop(q: Any, k: Any, v: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            out = heed.flash_mha(carry, k, v, is_causal=True, backend=backend)
            return (carry + out).astype(jnp.float16), out

        return jax.lax.scan(step, q, None, length=STEPS)

    before = launches()
    for _ in range(3):
        stacked = jax.block_until_ready(loop(q, k, v))[1]
    loop_calls = launches() - before
    np.savez(
        folder / "results.npz",
        q=np.stack(inputs),
        k=k,
        v=v,
        out=np.stack(outs),
        lse=np.stack(lses),
        loop_q=np.asarray(q),
        loop_out=stacked,
    )
    return {"counts": counts, "loop_calls": loop_calls, "stages": sorted(set(stages))}


def run_ops_command_buffer(folder: Path) -> dict[str, Any]:
    """Runs one program of several of heed.ops again and again with new data in the same memory."""
    stages = count_calls()
    import jax
    import numpy as np

    from heed import ops

    rng = np.random.default_rng(0)
    tokens, heads, dim = 96, 4, 64
    weight = rng.standard_normal(heads * dim).astype(np.float16)
    fixed = {"weight": weight, "indptr": np.array([0, 40, tokens], np.int32), "offsets": np.array([7, 0], np.int32)}
    placed = jax.device_put(fixed, jax.devices("cuda")[0])
    x = jax.device_put(rng.standard_normal((tokens, heads * dim)).astype(np.float16), jax.devices("cuda")[0])

    @jax.jit
    def layer(x: Any, fixed: dict[str, Any]) -> dict[str, Any]:
        normed = ops.rms_norm(x, fixed["weight"])
        q = normed.reshape(tokens, heads, dim)
        k = q[:, ::2]
        q_rope, k_rope = ops.apply_rope(q, k, fixed["indptr"], fixed["offsets"])
        query = q_rope[-1]
        out = ops.single_decode(query, k_rope, k)
        return {
            "normed": normed, "q": q, "k": k, "q_rope": q_rope, "k_rope": k_rope, "query": query, "out": out,
            "gated": ops.silu_and_mul(q_rope),
        }  # fmt: skip

    # In place: the next call finds other numbers at the same address.
    change = jax.jit(lambda x: (x * -0.75 + 0.125).astype(x.dtype), donate_argnums=0)
    kept: list[dict[str, Any]] = []
    counts = []
    for _ in range(2 * REPLAYS):
        before = stages.count(EXECUTE)
        results = jax.block_until_ready(layer(x, placed))
        counts.append(stages.count(EXECUTE) - before)
        kept.append({name: np.asarray(y) for name, y in {**results, "x": x}.items()})
        del results
        x = change(x)
    stacked = {name: np.stack([one[name] for one in kept]) for name in kept[0]}
    np.savez(folder / "results.npz", **stacked, **fixed)  # type: ignore[arg-type]
    return {"counts": counts, "num_ops": 4}


def run_exported(folder: Path) -> dict[str, Any]:
    """Runs an exported program in a process that has imported heed and traced nothing: no kernel is loaded yet."""
    stages = count_calls()
    import jax
    import numpy as np

    import heed

    heed.export_checks()  # registers heed's calls
    exported = jax.export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    operands = dict(np.load(folder / "operands.npz"))
    device = jax.devices("cuda")[0]
    arrays = jax.device_put(operands, device)
    call = jax.jit(exported.call)
    out, lse = jax.block_until_ready(call(arrays))
    assert out.devices() == {device}
    results = {"out": np.asarray(out), "lse": np.asarray(lse)}
    if "cpu" in exported.platforms:
        cpu_out, cpu_lse = jax.jit(exported.call)(jax.device_put(operands, jax.devices("cpu")[0]))
        results |= {"cpu_out": np.asarray(cpu_out), "cpu_lse": np.asarray(cpu_lse)}
    np.savez(folder / "results.npz", **results)  # type: ignore[arg-type]
    return {"stages": stages, "hlo": call.lower(arrays).compile().as_text()}


def run_export(folder: Path) -> dict[str, Any]:
    """Exports for the platforms named in platforms.json, in a process without a GPU."""
    import jax
    import numpy as np

    import heed
    from jax_cases import attend, make_operands

    assert jax.default_backend() == "cpu"
    operands = make_operands(batch=4)
    np.savez(folder / "operands.npz", **operands)  # type: ignore[arg-type]
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in operands.items()}
    platforms = json.loads((folder / "platforms.json").read_text())
    exported = jax.export.export(jax.jit(attend), platforms=platforms, disabled_checks=heed.export_checks())(shapes)
    (folder / "program.bin").write_bytes(exported.serialize())
    return {}


def run_cached(folder: Path) -> dict[str, Any]:
    """Compiles the same program as every other process of its kind, and counts hits of JAX's persistent cache."""
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

    from jax_cases import attend, make_operands

    arrays = jax.device_put(make_operands(batch=4), jax.devices("cuda")[0])
    counts.update(hits=0, misses=0)
    out, lse = jax.block_until_ready(jax.jit(attend)(arrays))
    found = dict(counts)
    np.savez(folder / "results.npz", out=np.asarray(out), lse=np.asarray(lse))
    return found


if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    cases: dict[str, Callable[[Path], dict[str, Any]]] = {
        "cached": run_cached,
        "command_buffer": run_command_buffer,
        # More tiles than multiprocessors: blocks take them in turns, by a counter in the call's workspace.
        "command_buffer_sm90": functools.partial(run_command_buffer, shape=(1, 129, 72, 128), backend="sm90"),
        "ops_command_buffer": run_ops_command_buffer,
        "export": run_export,
        "exported": run_exported,
    }
    (folder / "found.json").write_text(json.dumps(cases[case](folder)))
