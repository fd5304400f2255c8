"""Which calls the Hopper kernel gets, what programs that are lowered for it carry, and what others do not. No GPU."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType

import heed
from heed._arrays import DLPackOps
from heed._lib import function
from heed._problem import AttentionStatics, attention_text, resolve_attention
from jax_cases import attend, check, make_operands
from sm90_cases import OWN, call_of
from test_jax_sharding import assert_no_communication, make_mesh, place, run, specs_of

SM90, SM80 = "sm90_attention_fwd", "sm80_attention_fwd"
CALL = re.compile(r"custom_call @heed\.attention_fwd\.v1\(.* -> (.*)")


def rows(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def explain(q: Any, kv: Any = None, *, target: str = "sm_90a", **options: Any) -> heed.Explanation:
    kv = q if kv is None else kv
    return heed.explain(heed.flash_mha, q, kv, kv, target=target, **options)


# heed.explain.


def test_hopper_gets_its_own_kernel() -> None:
    answer = explain(rows(4, 4096, 32, 128), rows(4, 4096, 8, 128), is_causal=True)
    assert answer.chosen == SM90
    assert answer.reasons[SM80] == f"serves the problem too, but {SM90} comes first"
    assert answer.workspace_bytes == 16 * 4 * 32
    assert f"-> {SM90}" in str(answer) and "workspace: 2048 bytes" in str(answer)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_100"])
def test_other_gpus_do_not(target: str) -> None:
    answer = explain(rows(4, 4096, 32, 128), target=target)
    assert answer.chosen == SM80 and answer.workspace_bytes == 0
    assert answer.reasons[SM90] == f"needs an NVIDIA Hopper GPU (sm_90a), and the target is {target}"


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (rows(4, 4096, 32, 128, dtype=jnp.float32), "multiplies bfloat16 and float16, and this call has float32"),
        (rows(4, 4096, 32, 72), "has tiles for the head dims .*, and this call has 72"),
    ],
)
def test_what_it_declines_goes_to_the_portable_kernel(q: Any, reason: str) -> None:
    answer = explain(q)
    assert answer.chosen == SM80 and answer.workspace_bytes == 0
    assert re.fullmatch(reason, answer.reasons[SM90])
    forced = explain(q, backend="sm90")
    assert not forced.is_served and re.fullmatch(reason, forced.reasons[SM90])
    assert forced.reasons[SM80] == "not the backend that was asked for"


def test_either_can_be_asked_for() -> None:
    q = rows(4, 4096, 32, 128)
    assert explain(q, backend="sm80").chosen == SM80
    assert explain(q, backend="sm90").chosen == SM90


@pytest.mark.parametrize(
    ("dim", "dim_v"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "causal_align": "top_left"},
        {"window_size": (64, 32)},
        {"softcap": 30.0},
        {"sinks": rows(8, dtype=jnp.float32), "alibi_slopes": rows(8, dtype=jnp.float32)},
        {"segment_ids": (rows(2, 100, dtype=jnp.int32), rows(2, 300, dtype=jnp.int32))},
        {"softmax_scale": -1.0, "return_lse": True},
    ],
    ids=lambda options: "_".join(options) or "plain",
)
def test_what_it_serves(dim: int, dim_v: int, options: dict[str, Any]) -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        q, k, v = (rows(2, *shape, dtype=dtype) for shape in ((100, 8, dim), (300, 2, dim), (300, 2, dim_v)))
        assert heed.explain(heed.flash_mha, q, k, v, target="sm_90a", **options).chosen == SM90


def test_few_tiles_need_no_counter() -> None:
    assert explain(rows(1, 128, 64, 128)).workspace_bytes == 0
    assert explain(rows(1, 129, 64, 128)).workspace_bytes == 16 * 64


def test_packed_sequences() -> None:
    q, bounds = rows(4096, 32, 128), rows(9, dtype=jnp.int32)
    answer = heed.explain(heed.flash_mha_varlen, q, q, q, bounds, target="sm_90a")
    assert answer.chosen == SM90 and answer.workspace_bytes == 16 * 32


# Lowering. A program for GPUs carries the workspace; the others have no more than they had.


def results_of(traced: Any, *platforms: str) -> str:
    (types,) = CALL.findall(traced.lower(lowering_platforms=platforms).as_text())
    return str(types)


LARGE = rows(2, 1024, 8, 128)


@pytest.mark.parametrize("platforms", [("cuda",), ("cpu", "cuda")])
def test_programs_for_hopper_carry_a_workspace(platforms: tuple[str, ...]) -> None:
    traced = jax.jit(lambda q: heed.flash_mha(q, q, q)).trace(LARGE)
    types = results_of(traced, *platforms)
    assert types == "(tensor<2x1024x8x128xbf16>, tensor<2x8x4xf32>)"


def test_other_programs_carry_none() -> None:
    def attention(q: Any, backend: str | None = None) -> Any:
        return heed.flash_mha(q, q, q, backend=backend)

    assert results_of(jax.jit(attention).trace(LARGE), "cpu") == "tensor<2x1024x8x128xbf16>"
    traced = jax.jit(attention, static_argnames="backend").trace(LARGE, backend="sm80")
    assert results_of(traced, "cuda") == "tensor<2x1024x8x128xbf16>"
    traced = jax.jit(attention).trace(rows(2, 1024, 8, 128, dtype=jnp.float32))
    assert results_of(traced, "cuda") == "tensor<2x1024x8x128xf32>"


def test_mapped_calls() -> None:
    one = jax.jit(jax.vmap(lambda q: heed.flash_mha(q, q, q, return_lse=True))).trace(rows(3, 2, 1024, 8, 128))
    types = results_of(one, "cuda")
    assert types == "(tensor<3x2x1024x8x128xbf16>, tensor<3x2x8x1024xf32>, tensor<3x2x8x4xf32>)"
    # Tensor maps have one stride for leading axes and batch: k and v are shared along all of them or along none.
    attention = jax.jit(jax.vmap(heed.flash_mha, (0, None, None)))
    partly = attention.trace(rows(3, 2, 1024, 8, 128), LARGE, LARGE)
    assert results_of(partly, "cuda") == "tensor<3x2x1024x8x128xbf16>"
    kv = rows(1, 1024, 8, 128)
    shared = attention.trace(rows(3, 1, 1024, 8, 128), kv, kv)
    assert results_of(shared, "cuda").endswith("tensor<3x1x8x4xf32>)")


def test_the_forward_pass_of_a_gradient() -> None:
    loss = jax.jit(jax.grad(lambda q: heed.flash_mha(q, q, q).astype(jnp.float32).sum())).trace(LARGE)
    assert results_of(loss, "cuda").endswith(", tensor<2x8x4xf32>)")


def test_a_gradient_by_name_has_no_kernel_yet() -> None:
    """A backend that is asked for is never exchanged for another one, and says what would serve."""
    traced = jax.jit(lambda q: heed.flash_mha(q, q, q, backend="sm90")).trace(LARGE)
    assert results_of(traced, "cuda").endswith(", tensor<2x8x4xf32>)")
    loss = jax.jit(jax.grad(lambda q: heed.flash_mha(q, q, q, backend="sm90").astype(jnp.float32).sum()))
    with pytest.raises(heed.UnsupportedError, match="no kernel serves this call on target cuda") as caught:
        loss.trace(LARGE).lower(lowering_platforms=("cuda",))
    assert caught.value.reasons["sm90_attention_bwd"].endswith("(sm80, or no backend at all, serves Hopper too)")
    lse = rows(2, 8, 1024, dtype=jnp.float32)
    answer = heed.explain(heed.flash_mha_bwd, LARGE, LARGE, LARGE, LARGE, LARGE, lse, target="sm_90a")
    assert answer.chosen == "sm80_attention_bwd"
    assert answer.reasons["sm90_attention_bwd"] == "this version of heed has no such kernel for Hopper alone"


# Calls with a workspace and without.


def test_eager_calls_on_the_cpu_take_none() -> None:
    q = np.random.default_rng(0).standard_normal((2, 40, 4, 16), np.float32)
    ops = DLPackOps("numpy", q)
    text = attention_text(AttentionStatics(), [ops.spec("q", q)] * 3 + [None] * 7)
    out, scratch = np.empty_like(q), np.empty((2, 4, 4), np.float32)
    function("attention_fwd")(text, q, q, q, out)
    with pytest.raises(TypeError, match="attention_fwd: got 6 arguments, expected 5 for this problem"):
        function("attention_fwd")(text, q, q, q, out, scratch)


def test_eager_calls_allocate_none_that_they_do_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    empty = DLPackOps.empty

    def counted(self: DLPackOps, shape: tuple[int, ...], dtype: str) -> Any:
        shapes.append(shape)
        return empty(self, shape, dtype)

    monkeypatch.setattr(DLPackOps, "empty", counted)
    q = np.zeros((2, 1024, 8, 128), ml_dtypes.bfloat16)
    heed.flash_mha(q, q, q)
    assert shapes == [(2, 1024, 8, 128)]


def test_the_shape_of_the_workspace() -> None:
    text = attention_text(AttentionStatics(), [("bfloat16", (5, 2, 1024, 8, 128))] * 3 + [None] * 7)
    assert resolve_attention(text, "sm_90a").workspace_shape == (5, 2, 8, 4)
    assert resolve_attention(text, "cpu").workspace_shape == (5, 2, 8, 0)


@pytest.mark.parametrize("spec", [spec for spec in OWN if spec.name.startswith("parts_")], ids=lambda spec: spec.name)
def test_tiles_in_parts_have_room_for_them(spec: Any) -> None:
    """What is compared with the oracle on a GPU as tiles in parts does have parts: nothing else takes more than some
    bytes for each head.
    """
    call = call_of(spec)
    found = heed.explain(heed.flash_mha, *call.operands, **call.arrays, **call.statics, target="sm_90a")
    assert found.chosen == SM90 and 2**19 < found.workspace_bytes <= 28 * 2**20


@pytest.mark.skipif(len(jax.devices("cpu")) < 4, reason="needs four CPU devices (conftest.py makes them)")
@pytest.mark.parametrize("specs", [specs_of(batch="x"), specs_of(heads="x")], ids=["batch", "heads"])
def test_a_workspace_is_divided_with_its_call(specs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from heed._jax import devices

    prepare = devices.prepare

    def with_workspace(op: Any, text: str, *others: Any) -> Any:
        found = prepare(op, text, *others)
        return (4, 8, 4) if op.stem == "attention_fwd" else found

    monkeypatch.setattr(devices, "prepare", with_workspace)
    operands = make_operands(batch=4, q_heads=8, kv_heads=4)
    arrays = place(make_mesh(AxisType.Auto, x=4), operands, specs)

    def attend_anew(arrays: Any) -> Any:  # JAX remembers what it traced for `attend`, which has no workspace here
        return attend(arrays)

    assert "tensor<4x8x4xf32>" in jax.jit(attend_anew).lower(arrays).as_text()
    (out, lse), hlo = run(attend_anew, arrays)
    assert_no_communication(hlo)
    check(out, lse, operands, "with a workspace")


FEW_TILES, FEW_TILES_KV = (1, 128, 64, 128), (1, 2048, 64, 128)


@pytest.mark.skipif(len(jax.devices("cpu")) < 4, reason="needs four CPU devices (conftest.py makes them)")
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_shares_have_a_workspace_where_the_whole_has_none(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tiles are as many as may be left whole; each device's 16 are shared by its blocks."""
    from heed._jax import devices

    share = [rows(1, length, 16, 128) for length in (128, 2048, 2048)]
    of_share = heed.explain(heed.flash_mha, *share, target="sm_90a").workspace_bytes
    assert explain(rows(*FEW_TILES), rows(*FEW_TILES_KV)).workspace_bytes == 0 < of_share

    # The partitioner of the XLA that compiles for CPUs is told that this is the other one.
    find = devices.workspace_of_share
    monkeypatch.setattr(devices, "_cuda_targets", lambda: {0: "sm_90a", 1: "sm_80"})
    monkeypatch.setattr(devices, "workspace_of_share", lambda op, share, _: find(op, share, platform))
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in (FEW_TILES, *[FEW_TILES_KV] * 2)]
    mesh = make_mesh(AxisType.Auto, x=4)
    arrays = place(mesh, dict(zip("qkv", operands, strict=True)), specs_of(heads="x"))

    def attention(arrays: Any) -> Any:
        return heed.flash_mha(**arrays)

    assert results_of(jax.jit(attention).trace(arrays), "cpu") == "tensor<1x128x64x128xbf16>"
    out, hlo = run(attention, arrays)
    assert_no_communication(hlo)
    in_hlo = f"f32[1,16,{of_share // 64}]"
    assert (in_hlo in hlo) == (platform == "cuda")
    np.testing.assert_array_equal(out, heed.flash_mha(*operands))


def test_partitioners_know_what_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from heed._jax import ffi_target
    from heed._jax.ops import ATTENTION_FWD

    given: list[Any] = []
    monkeypatch.setattr("jaxlib.xla_client.register_custom_call_partitioner", lambda **named: given.append(named))
    monkeypatch.setattr("jax._src.xla_bridge.register_plugin_callbacks", lambda callback: callback(c_api="a plugin"))
    ffi_target.register_partitioner(ATTENTION_FWD, min, lambda *arguments: arguments, max)
    assert [(named["c_api"], named["partition"](1, 2)) for named in given] == [
        (None, ("cpu", 1, 2)),
        ("a plugin", ("cuda", 1, 2)),
    ]
