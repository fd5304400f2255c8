"""heed.jit: specs and their uri, building and loading, and the modules' functions on tensors. JAX is in _steps.py."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import heed
import processes
from conftest import from_cupy, from_torch, to_cupy, to_torch
from heed import jit, ops
from heed.jit import JitSpec, gen_act_and_mul_module, gen_rope_module, gen_single_decode_module
from small_op_faces import expected
from small_op_specs import BY_NAME, OpCase

F16 = ("float16",) * 3


# Specs.


def many_specs() -> dict[str, JitSpec]:
    """One spec for every choice of parameters out of a few of each, by what was chosen."""
    specs = {f"act {name}": gen_act_and_mul_module(name) for name in ("silu", "gelu", "gelu_tanh")}
    specs["rope"] = gen_rope_module()
    choices = itertools.product(
        ("float16", "bfloat16", "float32"), (64, 128), (64, 128), (0, 1, 2), (False, True), (False, True)
    )
    return specs | {str(one): gen_single_decode_module(*one[:1] * 3, *one[1:]) for one in choices}


def test_uris_tell_all_parameters_apart() -> None:
    specs = many_specs()
    assert len({spec.uri for spec in specs.values()}) == len(specs)
    assert all(re.fullmatch(r"\w+", spec.uri) for spec in specs.values())


def test_uris_are_those_of_another_process() -> None:
    code = "from test_heed_jit import many_specs\nfor spec in many_specs().values(): print(spec.uri)"
    paths = [str(heed.__path__[0]) + "/..", *__import__("sys").path]
    done = processes.run(code, PYTHONPATH=":".join(paths), PYTHONHASHSEED="77")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [spec.uri for spec in many_specs().values()]


def test_uris_are_the_tutorials() -> None:
    assert gen_single_decode_module(*F16, 64, 64).uri == (
        "single_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_head_dim_qk_64_head_dim_vo_64_posenc_0_"
        "use_swa_False_use_logits_cap_False"
    )


@pytest.mark.parametrize("library", ["numpy", "jax", "torch"])
def test_dtypes_of_any_library(library: str) -> None:
    module = {"numpy": "numpy", "jax": "jax.numpy", "torch": "torch"}[library]
    found = pytest.importorskip(module)
    for name in ("float16", "bfloat16", "float32"):
        dtype = ml_dtypes.bfloat16 if (library, name) == ("numpy", "bfloat16") else getattr(found, name)
        spellings = [dtype] if library == "torch" else [dtype, np.dtype(dtype)]
        for one in spellings:
            assert gen_single_decode_module(one, name, one, 64, 64) == gen_single_decode_module(*[name] * 3, 64, 64)


BAD_SPECS: list[tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    (lambda: gen_act_and_mul_module("relu"), ValueError, ("^act_func_name", "'relu'", "'silu'.*'gelu_tanh'")),
    (lambda: gen_act_and_mul_module(None), TypeError, ("^act_func_name", "None", "'silu'")),
    (lambda: gen_single_decode_module("float64", *F16[:2], 64, 64), TypeError, ("^dtype_q", "float64", "float16")),
    (lambda: gen_single_decode_module(*F16[:2], np.int8, 64, 64), TypeError, ("^dtype_o", "int8", "float16")),
    (lambda: gen_single_decode_module(None, *F16[:2], 64, 64), TypeError, ("^dtype_q", "None", "float16")),
    (lambda: gen_single_decode_module("float16", "bfloat16", "float16", 64, 64), TypeError,
     ("^dtype_kv", "bfloat16", "float16")),
    (lambda: gen_single_decode_module(*F16, 0, 64), ValueError, ("^head_dim_qk", "0", "1 to 256")),
    (lambda: gen_single_decode_module(*F16, 64, 257), ValueError, ("^head_dim_vo", "257", "1 to 256")),
    (lambda: gen_single_decode_module(*F16, 64.0, 64), TypeError, ("^head_dim_qk", "64.0", "integer")),
    (lambda: gen_single_decode_module(*F16, 64, 64, 3), ValueError, ("^pos_encoding_mode", "3", "0.*1.*2")),
    (lambda: gen_single_decode_module(*F16, 63, 64, 1), ValueError, ("^head_dim_qk", "63", "even")),
    (lambda: gen_single_decode_module(*F16, 64, 64, 0, 1), TypeError, ("^use_sliding_window", "1", "True or False")),
    (lambda: gen_single_decode_module(*F16, 64, 64, 0, False, None), TypeError, ("^use_logits_soft_cap", "None")),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "says"), BAD_SPECS, ids=lambda value: str(value) if value is tuple else None)
def test_bad_parameters(make: Callable[[], Any], error: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        make()
    for pattern in says:
        assert re.search(pattern, str(caught.value), re.DOTALL), f"{pattern!r} is not in: {caught.value}"


def test_build_and_load_gives_one_module_to_everyone() -> None:
    found: list[Any] = []
    barrier = threading.Barrier(8)

    def load() -> None:
        barrier.wait()
        found.append(gen_single_decode_module(*F16, 40, 24).build_and_load())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.append(gen_single_decode_module(*F16, 40, 24).build_and_load())
    assert len(found) == 9 and all(module is found[0] for module in found)
    assert gen_rope_module().build_and_load() is gen_rope_module().build_and_load()
    assert gen_rope_module().build_and_load() is not found[0]


def test_modules_are_those_of_tvm_ffi() -> None:
    import tvm_ffi

    for spec, names in (
        (gen_act_and_mul_module("gelu_tanh"), ["gelu_tanh_and_mul"]),
        (gen_rope_module(),
         ["apply_rope", "apply_llama31_rope", "apply_rope_pos_ids", "apply_rope_with_cos_sin_cache"]),
        (gen_single_decode_module(*F16, 64, 64), ["run"]),
    ):  # fmt: skip
        module = spec.build_and_load()
        assert isinstance(module, tvm_ffi.Module)
        for name in names:
            assert isinstance(getattr(module, name), tvm_ffi.Function)
            assert isinstance(module.get_function(name), tvm_ffi.Function)
        with pytest.raises(AttributeError, match="silu_and_mul"):
            _ = module.silu_and_mul


# The modules' functions on tensors: they give what heed.ops gives, bit for bit.


class Library(NamedTuple):
    """One kind of tensor on one device."""

    to: Callable[[np.ndarray], Any]
    back: Callable[[Any], np.ndarray]


LIBRARIES = [
    "numpy",
    "torch:cpu",
    pytest.param("torch:cuda:0", marks=pytest.mark.gpu),
    pytest.param("cupy", marks=pytest.mark.gpu),
]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    name, _, device = request.param.partition(":")
    if name == "numpy":
        return Library(np.array, lambda x: x)
    if name == "cupy":
        pytest.importorskip("cupy")
        return Library(to_cupy, from_cupy)
    torch = pytest.importorskip("torch")
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return Library(lambda x: to_torch(x, device), from_torch)


def results_of(case: OpCase, library: Library) -> list[np.ndarray]:
    """The call of heed.ops on tensors of the library."""
    results = getattr(ops, case.function)(**{name: library.to(x) for name, x in case.arrays.items()}, **case.statics)
    return [library.back(x) for x in (results if isinstance(results, (tuple, list)) else [results])]


def assert_same(found: list[Any], case: OpCase, library: Library) -> None:
    for want, x, y in zip(expected(case), found, results_of(case, library), strict=True):
        assert library.back(x).tobytes() == y.tobytes(), f"{case.function}: {want.name}"
        want.check(library.back(x), case.function)


def blank(*shape: int, dtype: Any) -> np.ndarray:
    return np.full(shape, 77, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_activations(activation: str, dtype: str, library: Library) -> None:
    case = BY_NAME[f"{activation}_{dtype}"].case()
    x = case.arrays["x"]
    out = library.to(blank(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype))
    module = gen_act_and_mul_module(activation).build_and_load()
    for enable_pdl in (False, True, 0, 1):
        getattr(module, f"{activation}_and_mul")(out, library.to(x), enable_pdl)
        assert_same([out], case, library)


ROTATIONS = ["rope_float16", "rope_gaps", "rope_interleaved_float32", "rope_partial_interleaved", "rope_llama31",
             "rope_pos_ids_options", "rope_cache_options", "rope_no_tokens"]  # fmt: skip


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations(name: str, library: Library) -> None:
    case = BY_NAME[name].case()
    arrays = {key: library.to(x) for key, x in case.arrays.items()}
    q_rope, k_rope = (library.to(blank(*x.shape, dtype=x.dtype)) for x in (case.arrays["q"], case.arrays["k"]))
    statics = {"rotary_dim": case.arrays["q"].shape[-1], "interleave": False, "rope_scale": 1.0, "rope_theta": 1e4}
    if case.function == "apply_llama31_rope":
        statics |= {"rope_scale": 8.0, "rope_theta": 5e5}
        statics |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    statics |= case.statics
    function = getattr(gen_rope_module().build_and_load(), case.function)
    if case.function == "apply_rope_with_cos_sin_cache":
        more: list[Any] = [arrays["cos_sin_cache"], arrays["pos_ids"], statics["interleave"]]
    else:
        more = [x for key, x in arrays.items() if key not in ("q", "k")] + list(statics.values())
    function(arrays["q"], arrays["k"], q_rope, k_rope, *more)
    assert_same([q_rope, k_rope], case, library)


@pytest.mark.parametrize(
    "name", ["decode_tutorial_float16", "decode_float32", "decode_d192_v128", "decode_hnd", "decode_window_33",
             "decode_softcap", "decode_alibi", "decode_rope", "decode_rope_hnd", "decode_empty"]
)  # fmt: skip
def test_decode(name: str, library: Library) -> None:
    case = BY_NAME[name].case()
    arrays, statics = case.arrays, case.statics
    q, v = arrays["q"], arrays["v"]
    if q.dtype.name == "bfloat16" and library.to is np.array:
        pytest.skip("NumPy's DLPack has no bfloat16")
    has_rope = "rope_theta" in statics or "rope_scale" in statics
    dtype = [q.dtype] * 3
    module = gen_single_decode_module(*dtype, q.shape[-1], v.shape[-1], int(has_rope)).build_and_load()
    tmp = library.to(np.zeros(1 << 20, np.uint8))
    out = library.to(blank(*q.shape[:-1], v.shape[-1], dtype=q.dtype))
    lse = library.to(blank(q.shape[0], dtype=np.float32))
    slopes = library.to(arrays["alibi_slopes"]) if "alibi_slopes" in arrays else None
    rope = [1 / statics.get("rope_scale", 1.0), 1 / statics.get("rope_theta", 1e4)] if has_rope else [1.0, 1e4]
    numbers = [statics.get("logits_soft_cap", 0.0), statics.get("sm_scale", q.shape[-1] ** -0.5), *rope]
    operands = [library.to(arrays[key]) for key in "qkv"]
    layout, window = int(statics.get("kv_layout") == "HND"), statics.get("window_left", -1)
    module.run(*operands, tmp, out, lse, layout, window, slopes, *numbers)
    for want, x, y in zip(expected(case), (out, lse), results_of(case, library), strict=True):
        want.check(library.back(x), name)
        assert np.array_equal(library.back(x), y) or has_rope  # a reciprocal of a reciprocal may be another number
    alone = library.to(blank(*q.shape[:-1], v.shape[-1], dtype=q.dtype))
    empty = library.to(np.zeros(0, np.float32))
    module.run(*operands, tmp, alone, empty, layout, window, empty if slopes is None else slopes, *numbers)
    assert library.back(alone).tobytes() == library.back(out).tobytes()


def test_leading_axes_broadcast(library: Library) -> None:
    """What vmap_method="expand_dims" and "broadcast_all" make of operands."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((3, 6, 4, 16)).astype(np.float32), rng.standard_normal((1, 6, 2, 16)).astype(np.float32)
    indptr, offsets = np.array([[0, 2, 6]], np.int32), rng.integers(0, 90, (3, 2)).astype(np.int32)
    q_rope, k_rope = (library.to(blank(3, 6, heads, 16, dtype=np.float32)) for heads in (4, 2))
    given = [library.to(x) for x in (q, k)], [library.to(x) for x in (indptr, offsets)]
    gen_rope_module().build_and_load().apply_rope(*given[0], q_rope, k_rope, *given[1], 16, False, 1.0, 1e4)
    for i in range(3):
        one = ops.apply_rope(*(library.to(x) for x in (q[i], k[0], indptr[0], offsets[i])))
        for x, y in zip((q_rope, k_rope), one, strict=True):
            assert np.array_equal(library.back(x)[i], library.back(y))
    keys = rng.standard_normal((3, 50, 2, 16)).astype(np.float32)
    out, tmp = library.to(blank(3, 4, 16, dtype=np.float32)), library.to(np.zeros(1 << 18, np.float32))
    queries = q[:1, 0]
    module = gen_single_decode_module(*["float32"] * 3, 16, 16).build_and_load()
    module.run(*map(library.to, (queries, keys, keys)), tmp, out, None, 0, -1, None, 0.0, 0.25, 1.0, 1e4)
    for i in range(3):
        arrays = {"q": queries[0], "k": keys[i], "v": keys[i]}
        expected(OpCase("single_decode", arrays, {}))[0].check(library.back(out)[i], f"row {i}")


# Bad calls: (what it is, module, function, arguments after a change, error, what the message contains).


def silu_arguments() -> dict[str, Any]:
    return {"out": blank(3, 4, dtype=np.float32), "input": np.ones((3, 8), np.float32), "enable_pdl": False}


def rope_arguments() -> dict[str, Any]:
    x = {
        name: np.ones((6, heads, 16), np.float32) for name, heads in (("q", 4), ("k", 2), ("q_rope", 4), ("k_rope", 2))
    }
    positions = {"indptr": np.array([0, 2, 6], np.int32), "offsets": np.array([5, 9], np.int32)}
    return x | positions | {"rotary_dim": 16, "interleave": False, "rope_scale": 1.0, "rope_theta": 1e4}


def decode_arguments() -> dict[str, Any]:
    arrays = {
        "q": np.ones((4, 16), np.float16),
        "k": np.ones((9, 2, 16), np.float16),
        "v": np.ones((9, 2, 16), np.float16),
    }
    return arrays | {
        "tmp": np.zeros(1 << 20, np.uint8), "out": blank(4, 16, dtype=np.float16), "maybe_lse": None,
        "kv_layout_code": 0, "window_left": -1, "maybe_alibi_slopes": None, "logits_soft_cap": 0.0, "sm_scale": 0.25,
        "rope_rcp_scale": 1.0, "rope_rcp_theta": 1e-4,
    }  # fmt: skip


I32, F32, HALF = np.int32, np.float32, np.float16
CALLS: dict[str, tuple[Callable[[], JitSpec], str, Callable[[], dict[str, Any]]]] = {
    "silu": (lambda: gen_act_and_mul_module("silu"), "silu_and_mul", silu_arguments),
    "rope": (gen_rope_module, "apply_rope", rope_arguments),
    "decode": (lambda: gen_single_decode_module(*F16, 16, 16), "run", decode_arguments),
    "rotating decode": (lambda: gen_single_decode_module(*F16, 16, 16, 1), "run", decode_arguments),
    "alibi decode": (lambda: gen_single_decode_module(*F16, 16, 16, 2), "run", decode_arguments),
}
BAD_CALLS: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ("silu", {"input": np.ones((3, 7), F32)}, ValueError, ("^input", r"\[3, 7\]", "even")),
    ("silu", {"input": np.ones((3, 8), np.float64)}, TypeError, ("^input", "float64", "float32")),
    ("silu", {"input": np.ones((3, 8), I32)}, TypeError, ("^input", "int32", "float32")),
    ("silu", {"input": None}, TypeError, ("^input", "tensor")),
    ("silu", {"input": "x"}, TypeError, ("^input", "tensor")),
    ("silu", {"out": blank(3, 8, dtype=F32)}, ValueError, ("^out", r"\[3, 8\]", r"\[3, 4\]")),
    ("silu", {"out": blank(4, 4, dtype=F32)}, ValueError, ("^out", r"\[4, 4\]", r"\[3, 4\]")),
    ("silu", {"out": blank(3, 4, dtype=HALF)}, TypeError, ("^out", "float16", "float32")),
    ("silu", {"enable_pdl": "yes"}, TypeError, ("^enable_pdl", "bool")),
    ("rope", {"indptr": np.array([0, 2, 6], np.int64)}, TypeError, ("^indptr", "int64", "int32")),
    ("rope", {"offsets": np.array([5, 9], np.int64)}, TypeError, ("^offsets", "int64", "int32")),
    ("rope", {"offsets": np.array([5, 9], F32)}, TypeError, ("^offsets", "float32", "int32")),
    ("rope", {"indptr": np.array([0, 5, 3], I32)}, ValueError, ("^indptr", "3 at index 2 after 5", "decrease")),
    ("rope", {"indptr": np.array([-1, 5, 6], I32)}, ValueError, ("^indptr", "-1", "0 or more")),
    ("rope", {"indptr": np.array([0, 5, 7], I32)}, ValueError, ("^indptr", "7", "at most 6")),
    ("rope", {"indptr": np.array([0, 6], I32)}, ValueError, ("^offsets", "2", "1")),
    ("rope", {"rotary_dim": 7}, ValueError, ("^rotary_dim", "7", "even")),
    ("rope", {"rotary_dim": 18}, ValueError, ("^rotary_dim", "18", "16")),
    ("rope", {"rotary_dim": -2}, ValueError, ("^rotary_dim", "-2", "even")),
    ("rope", {"rotary_dim": 8.0}, TypeError, ("^rotary_dim", "int")),
    ("rope", {"rope_scale": 0.0}, ValueError, ("^rope_scale", "0", "positive")),
    ("rope", {"rope_theta": "1e4"}, TypeError, ("^rope_theta", "number|float")),
    ("rope", {"k": np.ones((7, 2, 16), F32)}, ValueError, ("^k", "7", "6")),
    ("rope", {"k": np.ones((6, 2, 16), HALF)}, TypeError, ("^k", "float16", "float32")),
    ("rope", {"q_rope": np.ones((6, 4, 8), F32)}, ValueError, ("^q_rope", r"\[6, 4, 8\]", r"\[6, 4, 16\]")),
    ("rope", {"k_rope": np.ones((6, 2, 16), HALF)}, TypeError, ("^k_rope", "float16", "float32")),
    ("decode", {"q": np.ones((4, 8), HALF)}, ValueError, ("^q", "8", "16", "module")),
    ("decode", {"q": np.ones((4, 16), F32)}, TypeError, ("^q", "float32", "float16", "module")),
    ("decode", {"k": np.ones((9, 3, 16), HALF), "v": np.ones((9, 3, 16), HALF)}, ValueError, ("multiple", "4", "3")),
    ("decode", {"v": np.ones((8, 2, 16), HALF)}, ValueError, ("^v", "8", "9")),
    ("decode", {"kv_layout_code": 2}, ValueError, ("^kv_layout_code", "2", "0.*1")),
    ("decode", {"window_left": -2}, ValueError, ("^window_left", "-2", "-1")),
    ("decode", {"window_left": None}, TypeError, ("^window_left", "int")),
    ("decode", {"out": blank(4, 8, dtype=HALF)}, ValueError, ("^out", r"\[4, 8\]", r"\[4, 16\]")),
    ("decode", {"maybe_lse": blank(3, dtype=F32)}, ValueError, ("^maybe_lse", r"\[3\]", r"\[4\]")),
    ("decode", {"maybe_lse": blank(4, dtype=HALF)}, TypeError, ("^maybe_lse", "float16", "float32")),
    ("decode", {"maybe_alibi_slopes": blank(3, dtype=F32)}, ValueError, ("^maybe_alibi_slopes", "3", "4")),
    ("decode", {"logits_soft_cap": -1.0}, ValueError, ("^logits_soft_cap", "-1", "0")),
    ("decode", {"sm_scale": float("nan")}, ValueError, ("^sm_scale", "nan", "finite")),
    ("decode", {"tmp": None}, TypeError, ("^tmp", "tensor")),
    ("rotating decode", {"rope_rcp_scale": 0.0}, ValueError, ("^rope_rcp_scale", "0", "positive")),
    ("rotating decode", {"rope_rcp_theta": -1.0}, ValueError, ("^rope_rcp_theta", "-1", "positive")),
    ("alibi decode", {}, ValueError, ("^maybe_alibi_slopes", "expected")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "change", "error", "says"), [pytest.param(*row, id=f"{row[0]}-{'-'.join(row[1])}-{i}")
                                          for i, row in enumerate(BAD_CALLS)]
)  # fmt: skip
def test_bad_calls(call: str, change: dict[str, Any], error: type[Exception], says: tuple[str, ...]) -> None:
    spec, name, arguments = CALLS[call]
    given = arguments() | change
    with pytest.raises(error) as caught:
        getattr(spec().build_and_load(), name)(*given.values())
    assert type(caught.value) is error
    for pattern in says:
        assert re.search(pattern, str(caught.value), re.DOTALL), f"{pattern!r} is not in: {caught.value}"
    for result in ("out", "maybe_lse"):  # nothing was written
        assert given.get(result) is None or (given[result] == 77).all()


@pytest.mark.parametrize("call", ["silu", "rope", "decode", "rotating decode"])
def test_the_good_calls_are_good_and_need_all_arguments(call: str) -> None:
    spec, name, arguments = CALLS[call]
    function = getattr(spec().build_and_load(), name)
    given = arguments()
    function(*given.values())
    result = np.asarray(given.get("out", given.get("q_rope")))
    assert not np.any(result == 77)
    for wrong in (list(given.values())[:-1], [*given.values(), 1]):
        with pytest.raises(TypeError, match=rf"{name}: got {len(wrong)} arguments, expected {len(given)}"):
            function(*wrong)


def test_scratch_memory_that_is_too_small_is_refused() -> None:
    function = gen_single_decode_module(*F16, 64, 64).build_and_load().run
    given = decode_arguments()
    given |= {
        name: np.ones(shape, HALF) for name, shape in (("q", (4, 64)), ("k", (4096, 2, 64)), ("v", (4096, 2, 64)))
    }
    given |= {"out": blank(4, 64, dtype=HALF), "tmp": np.zeros(1, np.uint8)}
    with pytest.raises(ValueError, match=r"^tmp: got 1 bytes, expected at least (\d+)") as caught:
        function(*given.values())
    needed = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    given["tmp"] = np.zeros(needed, np.uint8)
    function(*given.values())
    given["tmp"] = np.zeros((needed // 4 + 1, 2), F32)[:, 0]
    with pytest.raises(ValueError, match=r"^tmp: .*contiguous"):
        function(*given.values())


def test_soft_cap_and_window_count_in_every_module() -> None:
    """Whatever the module was made for: the tutorial's passes them to one that was made without."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(HALF) for shape in ((4, 16), (9, 2, 16), (9, 2, 16)))
    for flags in ((False, False), (True, True)):
        run = gen_single_decode_module(*F16, 16, 16, 0, *flags).build_and_load().run
        for window, cap in ((-1, 0.0), (3, 0.0), (-1, 0.5), (3, 0.5)):
            given = decode_arguments() | {"q": q, "k": k, "v": v, "window_left": window, "logits_soft_cap": cap}
            run(*given.values())
            assert np.array_equal(given["out"], ops.single_decode(q, k, v, window_left=window, logits_soft_cap=cap))


@pytest.mark.gpu
@pytest.mark.parametrize("call", ["silu", "rope", "decode"])
def test_devices_do_not_mix(call: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    spec, name, arguments = CALLS[call]
    function = getattr(spec().build_and_load(), name)
    given = arguments()
    for moved in [key for key, x in given.items() if isinstance(x, np.ndarray)]:
        mixed = [
            x if not isinstance(x, np.ndarray) else to_torch(x, "cpu" if key == moved else "cuda:0")
            for key, x in given.items()
        ]
        with pytest.raises((TypeError, ValueError), match=r"cpu|CPU|device"):
            function(*mixed)


@pytest.mark.gpu
def test_calls_run_on_the_current_stream_and_inside_graphs() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    import tvm_ffi

    function = gen_act_and_mul_module("silu").build_and_load().silu_and_mul
    x = torch.randn(64, 512, device="cuda")
    out = torch.full((64, 256), 77.0, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream), tvm_ffi.use_torch_stream():
        function(out, x, False)
    torch.cuda.synchronize()
    assert (out == 77.0).all(), "a captured call must not run"
    for _ in range(3):
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, ops.silu_and_mul(x))


def test_the_public_names() -> None:
    assert jit.__all__ == ["JitSpec", "gen_act_and_mul_module", "gen_rope_module", "gen_single_decode_module"]
    assert isinstance(gen_rope_module(), JitSpec) and "uri='rope'" in repr(gen_rope_module())
