"""The eager path: NumPy arrays of any layout, and other objects with DLPack."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import heed
from expected import Expected, expected
from specs import DTYPES, AttentionSpec, make_inputs

flash_mha: Any = heed.flash_mha  # the tests hand it what its annotations exclude


def inputs(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    made = make_inputs(
        AttentionSpec("eager", q_len=37, kv_len=50, num_q_heads=4, head_dim_qk=24, head_dim_v=16, dtype=dtype)
    )
    return made.q, made.k, made.v


def want(dtype: str = "float32", **options: Any) -> Expected:
    return expected(*inputs(dtype), **options)


# Layouts -------------------------------------------------------------------------------------------------------------


def spread(array: np.ndarray, axis: int, step: int) -> np.ndarray:
    """The same values as every `step`-th element of a larger array that is NaN in between."""
    shape = list(array.shape)
    shape[axis] *= abs(step)
    large = np.full(shape, np.nan, array.dtype)
    view = large[(slice(None),) * axis + (slice(None, None, step),)]
    view[...] = array
    return view


def in_layout(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The same values, stored with the axes in another order."""
    return np.ascontiguousarray(array.transpose(axes)).transpose(np.argsort(axes))


def misplaced(array: np.ndarray) -> np.ndarray:
    """The same values at an address that is aligned to the element and to nothing more."""
    memory = np.empty(array.size + 1, array.dtype)
    view = memory[1:].reshape(array.shape)
    view[...] = array
    return view


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.copy()
    view.flags.writeable = False
    return view


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fortran": np.asfortranarray,
    "heads first": lambda x: in_layout(x, (0, 2, 1, 3)),
    "head_dim first": lambda x: in_layout(x, (3, 0, 1, 2)),
    "tokens last": lambda x: in_layout(x, (0, 2, 3, 1)),
    "batch last": lambda x: in_layout(x, (1, 2, 3, 0)),
    "every second token": lambda x: spread(x, 1, 2),
    "every second head": lambda x: spread(x, 2, 2),
    "every third feature": lambda x: spread(x, 3, 3),
    "backwards in batch": lambda x: spread(x, 0, -1),
    "backwards in tokens": lambda x: spread(x, 1, -1),
    "backwards in heads": lambda x: spread(x, 2, -2),
    "backwards in features": lambda x: spread(x, 3, -1),
    "backwards in all": lambda x: np.flip(np.ascontiguousarray(np.flip(x))),
    "misplaced": misplaced,
    "read-only": read_only,
    "read-only and backwards": lambda x: read_only(np.flip(x))[::-1, ::-1, ::-1, ::-1],
    "big array's slice": lambda x: np.pad(x, ((1, 2), (3, 1), (2, 1), (5, 6)), constant_values=np.nan)[
        1:-2, 3:-1, 2:-1, 5:-6
    ],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: str) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in inputs(dtype))
    for array, plain in zip((q, k, v), inputs(dtype), strict=True):
        assert np.array_equal(array, plain)
    out, lse = flash_mha(q, k, v, is_causal=True, return_lse=True)
    assert type(out) is np.ndarray and out.flags.writeable and out.flags.c_contiguous
    want(dtype, is_causal=True).check(out, lse, layout)


@pytest.mark.parametrize("one", ["q", "k", "v"])
def test_layouts_mix(one: str) -> None:
    operands = dict(zip("qkv", inputs("bfloat16"), strict=True))
    operands[one] = LAYOUTS["head_dim first"](operands[one])
    out, lse = flash_mha(**operands, return_lse=True)
    want("bfloat16").check(out, lse, one)


def test_zero_strides() -> None:
    q, k, v = inputs("float16")
    for axis in range(4):
        index = (slice(None),) * axis + (slice(0, 1),)
        wide = [np.broadcast_to(x[index], x.shape) for x in (q, k, v)]
        out, lse = flash_mha(*wide, return_lse=True)
        expected(*(np.ascontiguousarray(x) for x in wide)).check(out, lse, f"axis {axis} broadcast")
    one = [np.broadcast_to(np.float16(0.5), x.shape) for x in (q, k, v)]
    out, lse = flash_mha(*one, return_lse=True)
    expected(*(np.ascontiguousarray(x) for x in one)).check(out, lse, "scalars broadcast")


def test_small_operands_in_any_layout() -> None:
    q, k, v = inputs()
    rng = np.random.default_rng(1)
    sinks, slopes = rng.standard_normal(4).astype(np.float32), rng.random(4).astype(np.float32)
    ids = rng.integers(0, 3, (2, 37)), rng.integers(0, 3, (2, 50))
    result = want(sinks=sinks, alibi_slopes=slopes, segment_ids=ids)
    layouts: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x,
        read_only,
        misplaced,
        lambda x: (
            spread(x.astype(np.float32), x.ndim - 1, 3) if x.dtype.kind == "f" else np.repeat(x, 2, axis=-1)[..., ::2]
        ),
        lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    ]
    for layout in layouts:
        for id_dtype in (np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64):
            segment_ids = tuple(layout(x.astype(id_dtype)) for x in ids)
            out, lse = flash_mha(
                q, k, v, sinks=layout(sinks), alibi_slopes=layout(slopes), segment_ids=segment_ids, return_lse=True
            )
            result.check(out, lse, f"ids {np.dtype(id_dtype)}")
    same = np.broadcast_to(np.float32(0.25), (4,))
    out, lse = flash_mha(q, k, v, sinks=same, alibi_slopes=same, return_lse=True)
    expected(q, k, v, sinks=np.array(same), alibi_slopes=np.array(same)).check(out, lse, "broadcast sinks")


def test_inputs_are_not_written() -> None:
    operands = inputs()
    copies = [x.copy() for x in operands]
    flash_mha(*operands, is_causal=True)
    for array, copy in zip(operands, copies, strict=True):
        assert np.array_equal(array, copy)


def test_one_array_for_everything() -> None:
    q = inputs()[0]
    out, lse = flash_mha(q, q, q, is_causal=True, return_lse=True)
    expected(q, q, q, is_causal=True).check(out, lse, "q for all")


def test_unaligned_memory_is_refused() -> None:
    q, k, v = inputs()
    memory = np.empty(q.nbytes + 1, np.uint8)
    odd = memory[1:].view(np.float32).reshape(q.shape)
    with pytest.raises(ValueError, match=r"^q: .*align"):
        flash_mha(odd, k, v)
    fields = np.zeros(q.shape, np.dtype([("x", np.float32), ("tag", np.int8)]))
    with pytest.raises(ValueError, match=r"^q: .*strides"):
        flash_mha(fields["x"], k, v)


def test_numpy_scalars_and_subclasses() -> None:
    q, k, v = inputs()
    out = flash_mha(
        q, k, v, softmax_scale=np.float32(0.5), is_causal=np.bool_(True), window_size=np.array([3, 4]).tolist()
    )
    assert np.array_equal(out, flash_mha(q, k, v, 0.5, True, (3, 4)))


def test_empty_arrays() -> None:
    for shape_q, shape_k in (((0, 5, 2, 8), (0, 6, 2, 8)), ((2, 0, 2, 8), (2, 6, 2, 8)), ((2, 5, 2, 8), (2, 0, 2, 8))):
        for dtype in DTYPES.values():
            q, k = np.zeros(shape_q, dtype), np.zeros(shape_k, dtype)
            out, lse = flash_mha(read_only(q), k, read_only(k), return_lse=True)
            expected(q, k, k).check(out, lse, f"{shape_q} {shape_k}")


def test_numpy_does_not_need_jax() -> None:
    code = (
        "import sys\nimport numpy as np\nimport heed\nassert 'jax' not in sys.modules, 'import heed imports JAX'\n"
        "x = np.ones((1, 3, 2, 8), np.float32)\nheed.flash_mha(x, x, x)\n"
        "assert 'jax' not in sys.modules, 'a call imports JAX'\n"
        "print(heed.explain(heed.flash_mha, x, x, x))\nassert 'jax' not in sys.modules, 'explain imports JAX'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Other kinds ---------------------------------------------------------------------------------------------------------


class OnlyDLPack:
    """The least that an array can be: its memory through DLPack, and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device_type, index = self._array.__dlpack_device__()
        return int(device_type), int(index)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_object_with_dlpack(dtype: str) -> None:
    q, k, v = (OnlyDLPack(x) for x in inputs(dtype))
    out, lse = flash_mha(q, k, v, is_causal=True, return_lse=True)
    want(dtype, is_causal=True).check(np.from_dlpack(out), np.from_dlpack(lse), "DLPack")


def test_dlpack_objects_with_every_operand() -> None:
    q, k, v = inputs()
    rng = np.random.default_rng(2)
    sinks, slopes = rng.standard_normal(4).astype(np.float32), rng.random(4).astype(np.float32)
    for dtype in (np.int32, np.int64):
        ids = rng.integers(0, 3, (2, 37)).astype(dtype), rng.integers(0, 3, (2, 50)).astype(dtype)
        out = flash_mha(
            *(OnlyDLPack(x) for x in (q, k, v)),
            sinks=OnlyDLPack(sinks), alibi_slopes=OnlyDLPack(slopes), segment_ids=tuple(OnlyDLPack(x) for x in ids),
        )  # fmt: skip
        want(sinks=sinks, alibi_slopes=slopes, segment_ids=ids).check(
            np.from_dlpack(out), None, f"ids {np.dtype(dtype)}"
        )


def test_dlpack_errors_are_typed() -> None:
    q, _, v = (OnlyDLPack(x) for x in inputs())
    with pytest.raises(TypeError, match=r"^q: got dtype float64"):
        flash_mha(*(OnlyDLPack(x.astype(np.float64)) for x in inputs()))
    with pytest.raises(ValueError, match=r"^k: "):
        flash_mha(q, OnlyDLPack(inputs()[1][:1]), v)


def test_kinds_do_not_mix() -> None:
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"different kinds.*q is numpy, k is .*v is numpy"):
        flash_mha(q, OnlyDLPack(k), v)
    with pytest.raises(TypeError, match=r"different kinds.*sinks is "):
        flash_mha(q, k, v, sinks=OnlyDLPack(np.zeros(4, np.float32)))
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(TypeError, match="different kinds"):
        flash_mha(jnp.asarray(q), OnlyDLPack(k), jnp.asarray(v))


@pytest.mark.parametrize("which", ["q", "k", "v", "sinks"])
def test_numpy_beside_jax_counts_as_jax(which: str) -> None:
    jax = pytest.importorskip("jax")
    operands = dict(zip("qkv", inputs(), strict=True)) | {"sinks": np.zeros(4, np.float32)}
    result = want(sinks=operands["sinks"])
    operands[which] = jax.device_put(operands[which], jax.devices("cpu")[0])
    out, lse = flash_mha(**operands, return_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    result.check(np.asarray(out), np.asarray(lse), f"{which} from JAX")


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_views_of_jax_arrays(dtype: str) -> None:
    """np.asarray of a JAX array is read-only."""
    jnp = pytest.importorskip("jax.numpy")
    operands = [np.asarray(jnp.asarray(x)) for x in inputs(dtype)]
    out, lse = flash_mha(*operands, return_lse=True)
    assert type(out) is np.ndarray and out.dtype == DTYPES[dtype]
    want(dtype).check(out, lse, "views of JAX arrays")


def test_torch_tensors_that_are_negated_lazily() -> None:
    """Memory that holds the negatives of a tensor's numbers, as the imaginary part of a conjugate does."""
    torch = pytest.importorskip("torch")
    q, k = torch.randn(2, 1, 4, 2, 8)
    v = torch.randn(1, 4, 2, 8, dtype=torch.complex64).conj().imag
    assert v.is_neg()
    assert torch.equal(flash_mha(q, k, v), flash_mha(q, k, v.resolve_neg().clone()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")

    def to_torch(array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    def to_numpy(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return np.asarray(tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
        return np.asarray(tensor.numpy())

    ids = np.arange(37)[None].repeat(2, 0) % 3, np.arange(50)[None].repeat(2, 0) % 3
    q, k, v = (to_torch(x) for x in inputs(dtype))
    out, lse = flash_mha(q, k, v, segment_ids=tuple(map(torch.from_numpy, ids)), return_lse=True)
    assert isinstance(out, torch.Tensor) and out.dtype == q.dtype and lse.dtype == torch.float32
    want(dtype, segment_ids=ids).check(to_numpy(out), lse.numpy(), "torch")
    with pytest.raises(TypeError, match=r"different kinds.*q is torch, k is numpy"):
        flash_mha(q, inputs(dtype)[1], v)


def test_axes_of_size_one_may_have_any_stride() -> None:
    memory = np.zeros(64, np.uint8)
    one = np.ndarray((1, 1, 1, 8), np.float32, memory, 0, (5, 3, 7, 4))
    one[...] = np.arange(8)
    assert np.array_equal(heed.flash_mha(one, one, one), one)


def test_masked_and_structured_arrays_are_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(TypeError, match="k: got a masked array"):
        heed.flash_mha(q, np.ma.masked_invalid(k), v)
    for dtype in ([("a", np.float32)], []):
        with pytest.raises(TypeError, match="q: got dtype"):
            heed.flash_mha(np.zeros(q.shape, dtype), k, v)


def test_dlpack_objects_meet_the_same_checks() -> None:
    class Opaque:
        """Nothing but DLPack."""

        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    q, k, v = inputs()
    five = [Opaque(x[None]) for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"q: got shape .* of rank 5, expected rank 4"):
        heed.flash_mha(*five)
    read_only = q.copy()
    read_only.flags.writeable = False
    with pytest.raises(TypeError, match="q: got an array that DLPack cannot share"):
        heed.flash_mha(Opaque(read_only), Opaque(k), Opaque(v))
    assert heed.explain(heed.flash_mha, Opaque(q), Opaque(k), Opaque(v)).chosen == "cpu_attention_fwd"
    with pytest.raises(TypeError, match="q: got None"):
        heed.explain(heed.flash_mha, None, k, v)
