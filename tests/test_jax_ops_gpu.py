"""heed.ops on GPUs through JAX: transforms, repeated calls, several GPUs, command buffers.

Conformance is in test_ops.py and test_ops_grad.py, through the faces.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from conftest import gpu_devices
from expected import judge
from gpu_process import REPLAYS
from jax_op_cases import CASES, Case, axes_of, rows_of
from small_op_faces import expected, expected_gradients
from small_op_specs import OpCase
from test_gpu_programs import command_buffer_dump, run_process
from test_jax_ops_sharding import ROWS, specs_of
from test_jax_sharding import COMMUNICATION

pytestmark = pytest.mark.gpu

SIZES = {"tokens": 70, "hidden": 136, "head_dim": 64, "head_dim_v": 96, "kv_tokens": 700, "sequences": 5}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def on_gpu(operands: Any) -> Any:
    return jax.device_put(operands, gpu_devices()[0])


def definition_of(case: Case, operands: Mapping[str, Any]) -> OpCase:
    """The call as the oracles take it."""
    statics = dict(case.options)
    if case.function.__name__ == "apply_llama31_rope":
        defaults = {name: x.default for name, x in inspect.signature(case.function).parameters.items()}
        given = defaults | statics
        bounds = [float(given[name]) for name in ("low_freq_factor", "high_freq_factor", "old_context_len")]
        statics = {name: x for name, x in statics.items() if name in ("rotary_dim", "interleave", "rope_theta")}
        statics["llama31"] = tuple(bounds)
    arrays = {name: np.asarray(operands[name]) for name in case.operands}
    return OpCase(case.function.__name__, arrays, statics)


def check_results(results: Any, case: Case, operands: Mapping[str, Any], what: str) -> None:
    """Asserts the tolerance rule for the results of one call."""
    for want, x in zip(expected(definition_of(case, operands)), results, strict=True):
        want.check(np.asarray(x), what)


def check_gradients(found: Mapping[str, Any], case: Case, operands: Mapping[str, Any], what: str) -> None:
    """The same for its gradients."""
    cotangents = [np.asarray(operands[name]) for name in case.cotangents]
    for want, name in zip(
        expected_gradients(definition_of(case, operands), cotangents), case.differentiable, strict=True
    ):
        want.check(np.asarray(found[name]), f"{what}, gradient of {name}")


@every_case
@dtypes
def test_jit_and_eager(case: Case, dtype: str) -> None:
    def check(seed: int) -> None:
        operands = case.make(dtype=dtype, seed=seed, **SIZES)
        arrays = on_gpu(operands)
        for what, results in (("jit", jax.jit(case.call)(arrays)), ("eager", case.call(arrays))):
            assert all(x.devices() == {gpu_devices()[0]} for x in results)
            check_results(results, case, operands, what)
        check_gradients(jax.jit(case.gradients)(arrays), case, operands, "jit")

    judge(check)


@every_case
@dtypes
@pytest.mark.parametrize("which", ["everything", "the first operand", "the others"])
def test_vmap(case: Case, dtype: str, which: str) -> None:
    names = (*case.operands, *case.cotangents)
    mapped = {"everything": names, "the first operand": names[:1], "the others": names[1:]}[which]

    def check(seed: int) -> None:
        stacked = case.make(lead=dict.fromkeys(mapped, (3,)), dtype=dtype, seed=seed, **SIZES)
        arrays = on_gpu(stacked)
        found = jax.jit(jax.vmap(case.gradients, in_axes=(axes_of(mapped, names),)))(arrays)
        operands = {name: arrays[name] for name in case.operands}
        results: Any = [None] * 3
        if not set(mapped).isdisjoint(operands):
            results = jax.jit(jax.vmap(case.call, in_axes=(axes_of(mapped, operands),)))(operands)
            results = [[x[i] for x in results] for i in range(3)]
        for i in range(3):
            row = rows_of(stacked, mapped, i)
            if results[i] is not None:
                check_results(results[i], case, row, f"row {i}")
            check_gradients({name: x[i] for name, x in found.items()}, case, row, f"row {i}")

    judge(check)


@every_case
def test_calls_and_gradients_repeat_bit_for_bit(case: Case) -> None:
    """Also where XLA replays them as a CUDA graph."""
    arrays = on_gpu(case.make(dtype="bfloat16", **SIZES))
    step = jax.jit(lambda x: (case.call(x), case.gradients(x)))
    first = [np.asarray(x).tobytes() for x in jax.tree.leaves(step(arrays))]
    for i in range(20):
        assert [np.asarray(x).tobytes() for x in jax.tree.leaves(step(arrays))] == first, f"call {i}"


def test_a_batch_invariant_decode_is_the_same_in_any_batch() -> None:
    case = CASES["single_decode"]
    case = Case(case.function, case.stem, case.operands, case.results, {**case.options, "batch_invariant": True})
    names = tuple(case.operands)
    for size in (2, 17):
        stacked = case.make(lead=dict.fromkeys(names, (size,)), dtype="float16", **SIZES)
        stacked = {name: stacked[name] for name in names}
        many = jax.jit(jax.vmap(case.call))(on_gpu(stacked))
        for i in range(size):
            alone = jax.jit(case.call)(on_gpu(rows_of(stacked, names, i)))
            for x, y in zip(many, alone, strict=True):
                assert np.asarray(x[i]).tobytes() == np.asarray(y).tobytes(), f"row {i} of {size}"


@pytest.mark.multi_gpu
@every_case
def test_calls_divide_over_gpus(case: Case) -> None:
    """Each GPU has its rows or heads, with kernels of their own and as much workspace as those need."""
    is_rows = case.function.__name__ in ROWS
    axes = {"rows": "x"} if is_rows else {"q_heads": "x", "kv_heads": "x"}
    mesh = Mesh(np.array(gpu_devices()[:2]), ("x",))
    sizes = {**SIZES, "rows": 4, "kv_tokens": 9000}

    def check(seed: int) -> None:
        operands = case.make(seed=seed, **sizes)
        specs = specs_of(case, axes)
        arrays = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in operands.items()}
        call = jax.jit(case.call).lower({name: arrays[name] for name in case.operands}).compile()
        assert not COMMUNICATION.findall(str(call.as_text()))
        check_results(call({name: arrays[name] for name in case.operands}), case, operands, "divided")
        gradients = jax.jit(case.gradients).lower(arrays).compile()
        assert set(COMMUNICATION.findall(str(gradients.as_text()))) <= {"all-reduce"}
        check_gradients(gradients(arrays), case, operands, "divided")

    judge(check)


@pytest.mark.multi_gpu
@every_case
def test_on_the_second_gpu(case: Case) -> None:
    operands = case.make(dtype="bfloat16", **SIZES)
    arrays = jax.device_put(operands, gpu_devices()[1])
    results = jax.jit(case.call)(arrays)
    assert all(x.devices() == {gpu_devices()[1]} for x in results)
    for x, y in zip(results, jax.jit(case.call)(on_gpu(operands)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_all_kernels_are_captured_into_one_command_buffer(tmp_path: Path) -> None:
    """XLA does not call heed again while it replays: the results are right for numbers that the capture never saw."""
    flags = f"--xla_gpu_graph_min_graph_size=1 --xla_dump_to={tmp_path / 'dump'} --xla_dump_hlo_as_text"
    flags += " --xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL"
    found = run_process("ops_command_buffer", tmp_path, XLA_FLAGS=flags)
    results = found["results"]
    assert len({x.tobytes() for x in results["x"]}) == 2 * REPLAYS, "every call is to see new data"
    for i in range(2 * REPLAYS):
        one = {name: x[i] for name, x in results.items() if len(x) == 2 * REPLAYS}
        one |= {name: x for name, x in results.items() if len(x) != 2 * REPLAYS}
        calls = [
            (OpCase("rms_norm", {"x": one["x"], "weight": one["weight"]}, {}), ["normed"]),
            (
                OpCase(
                    "apply_rope",
                    {"q": one["q"], "k": one["k"], "indptr": one["indptr"], "offsets": one["offsets"]},
                    {},
                ),
                ["q_rope", "k_rope"],
            ),
            (OpCase("single_decode", {"q": one["query"], "k": one["k_rope"], "v": one["k"]}, {}), ["out"]),
            (OpCase("silu_and_mul", {"x": one["q_rope"]}, {}), ["gated"]),
        ]
        for case, names in calls:
            for want, name in zip(expected(case), names, strict=False):
                want.check(one[name], f"call {i}: {case.function}")
    replays = found["counts"][REPLAYS:]
    dump = command_buffer_dump(tmp_path)
    # What got memory at another address, such as one result of every other run, XLA records anew; it replays the rest.
    assert sum(replays) <= found["num_ops"] * REPLAYS // 2, f"heed was called {found['counts']} times:\n{dump}"
