"""heed.ops through each face and platform, with NumPy arrays in and out; what a call and its gradients should give."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest

import heed
from conftest import from_cupy, from_torch, to_cupy, to_torch
from expected import ROUNDINGS, farther
from heed import reference_ops
from small_op_specs import OpCase, OpSpec
from tolerance import assert_close

# What should be: oracles and plain implementations -------------------------------------------------------------------

_LLAMA31 = (1.0, 4.0, 8192.0)
_ROPE_DEFAULTS = {"apply_llama31_rope": {"rope_scale": 8.0, "rope_theta": 5e5, "llama31": _LLAMA31}}

Arrays = list[np.ndarray]


class Want(NamedTuple):
    """One result or gradient: in float64, by a plain implementation at the inputs' dtype, and of which dtype it is."""

    name: str
    oracle: np.ndarray
    naive: np.ndarray
    dtype: np.dtype[Any]

    def check(self, x: Any, what: str) -> None:
        """Asserts the tolerance rule."""
        assert_close(x, self.naive, self.oracle, self.dtype, f"{what}: {self.name}")


def _worst(oracle: Arrays, evaluate: Callable[[list[np.float32]], Arrays]) -> Arrays:
    """Of each element the worst of several plain evaluations: a single one may be exact by luck.

    `evaluate` multiplies what its results are linear in by the factors that it is given, which are 1 at first, and
    divides the results by them: the roundings fall differently each time.
    """
    rng = np.random.default_rng(0)
    worst = evaluate([np.float32(1)] * 3)
    for _ in range(ROUNDINGS - 1):
        others = evaluate([np.float32(1 + rng.random()) for _ in range(3)])
        worst = [farther(right, x, y.astype(np.float32)) for right, x, y in zip(oracle, worst, others, strict=True)]
    return worst


def _wants(
    names: Iterable[str], oracle: Any, evaluate: Callable[[list[np.float32]], Arrays], case: OpCase
) -> list[Want]:
    """The results of these names; those that begin with lse, dsinks or dalibi are float32."""
    dtype = next(iter(case.arrays.values())).dtype
    kinds = [np.dtype(np.float32) if name in ("lse", "dsinks", "dalibi_slopes") else dtype for name in names]
    oracle = [x for x in oracle if x is not None]
    return [Want(*one) for one in zip(names, oracle, _worst(oracle, evaluate), kinds, strict=True)]


def expected(case: OpCase) -> list[Want]:
    """The call's results."""
    if case.function.endswith("_and_mul"):
        return _expected_activation(case)
    if "rope" in case.function:
        options = _ROPE_DEFAULTS.get(case.function, {}) | case.statics | case.arrays
        pairs = reference_ops.apply_rope(**options), reference_ops.naive_apply_rope(**options)
        return [Want(name, x, y, y.dtype) for name, x, y in zip(("q_rope", "k_rope"), *pairs, strict=True)]
    return (_expected_norm if "norm" in case.function else _expected_decode)(case)


def expected_gradients(case: OpCase, cotangents: Arrays) -> list[Want]:
    """The gradients of `case.differentiable`, in its order."""
    if case.function.endswith("_and_mul"):
        return _activation_gradients(case, *cotangents)
    if "rope" in case.function:
        options = _ROPE_DEFAULTS.get(case.function, {}) | case.statics | {"inverse": True}
        options |= {name: value for name, value in case.arrays.items() if name not in ("q", "k")}
        pairs = [f(*cotangents, **options) for f in (reference_ops.apply_rope, reference_ops.naive_apply_rope)]
        return [Want(name, x, y, y.dtype) for name, x, y in zip(("dq", "dk"), *pairs, strict=True)]
    return (_norm_gradients if "norm" in case.function else _decode_gradients)(case, *cotangents)


def cotangents_of(case: OpCase, seed: int = 0) -> Arrays:
    """Random numbers like the call's results."""
    rng = np.random.default_rng([seed, 7])
    return [rng.standard_normal(want.oracle.shape).astype(want.dtype) for want in expected(case)]


def _expected_activation(case: OpCase) -> list[Want]:
    x, activation = case.arrays["x"], case.function.removesuffix("_and_mul")
    half = x.shape[-1] // 2

    def evaluate(factors: list[np.float32]) -> Arrays:
        with np.errstate(invalid="ignore"):
            scaled = x.astype(np.float32)
        scaled[..., half:] *= factors[0]
        out = reference_ops.act_and_mul(scaled, activation, compute_dtype=np.float32, storage_dtype=x.dtype)
        return [out.astype(np.float32) / factors[0]]

    return _wants(["out"], [reference_ops.act_and_mul(x, activation)], evaluate, case)


def _activation_gradients(case: OpCase, dout: np.ndarray) -> list[Want]:
    x, activation = case.arrays["x"], case.function.removesuffix("_and_mul")

    def evaluate(factors: list[np.float32]) -> Arrays:
        scaled = dout.astype(np.float32) * factors[0]
        dx = reference_ops.act_and_mul_backward(x, scaled, activation, compute_dtype=np.float32, storage_dtype=x.dtype)
        return [dx.astype(np.float32) / factors[0]]

    return _wants(["dx"], [reference_ops.act_and_mul_backward(x, dout, activation)], evaluate, case)


def _expected_norm(case: OpCase) -> list[Want]:
    x, weight = case.arrays["x"], case.arrays["weight"]
    options = {name: value for name, value in (case.arrays | case.statics).items() if name not in ("x", "weight")}
    names = ["out", "sum"] if "residual" in options else ["out"]

    def evaluate(factors: list[np.float32]) -> Arrays:
        scaled = weight.astype(np.float32) * factors[0]
        out, total = reference_ops.rms_norm(x, scaled, compute_dtype=np.float32, storage_dtype=x.dtype, **options)
        return [out.astype(np.float32) / factors[0], total.astype(np.float32)][: len(names)]

    oracle = reference_ops.rms_norm(x, weight, **options)
    return _wants(names, oracle[: len(names)], evaluate, case)


def _norm_gradients(case: OpCase, dout: np.ndarray, dsum: np.ndarray | None = None) -> list[Want]:
    x, weight = case.arrays["x"], case.arrays["weight"]
    options = {"eps": case.statics.get("eps", 1e-6)}
    total = x
    if "residual" in case.arrays:
        total = (x.astype(np.float32) + case.arrays["residual"].astype(np.float32)).astype(x.dtype)

    def ordered(dx: np.ndarray, dweight: np.ndarray) -> Arrays:
        return [dweight if name == "weight" else dx for name in case.differentiable]

    def evaluate(factors: list[np.float32]) -> Arrays:
        a, order = factors[0], np.random.default_rng(int(factors[1] * 1e6)).permutation(x.shape[-1])
        given = [dout.astype(np.float32) * a, None if dsum is None else dsum.astype(np.float32) * a]
        dx, dweight = reference_ops.rms_norm_backward(
            total[..., order], weight[order], *(one if one is None else one[..., order] for one in given),
            compute_dtype=np.float32, storage_dtype=x.dtype, **options,
        )  # fmt: skip
        back = np.argsort(order)
        return ordered(dx.astype(np.float32)[..., back] / a, dweight.astype(x.dtype).astype(np.float32)[back] / a)

    oracle = ordered(*reference_ops.rms_norm_backward(total, weight, dout, dsum, **options))
    return _wants([f"d{name}" for name in case.differentiable], oracle, evaluate, case)


def _decode_options(case: OpCase) -> tuple[dict[str, Any], float]:
    """The oracle's options without the scale of the scores, and that scale."""
    options = {name: x for name, x in (case.arrays | case.statics).items() if name not in ("q", "k", "v")}
    for name in ("return_lse", "batch_invariant"):
        options.pop(name, None)
    return options, options.pop("sm_scale", case.arrays["q"].shape[-1] ** -0.5)


def _expected_decode(case: OpCase) -> list[Want]:
    q, k, v = (case.arrays[name] for name in "qkv")
    options, scale = _decode_options(case)

    def evaluate(factors: list[np.float32]) -> Arrays:
        a, b, _ = factors
        out, lse = reference_ops.single_decode(
            a * q.astype(np.float32), k, b * v.astype(np.float32), sm_scale=scale / a, compute_dtype=np.float32,
            storage_dtype=q.dtype, **options,
        )  # fmt: skip
        return [out.astype(np.float32) / b, lse]

    return _wants(["out", "lse"], reference_ops.single_decode(q, k, v, sm_scale=scale, **options), evaluate, case)


def _decode_gradients(case: OpCase, dout: np.ndarray, dlse: np.ndarray) -> list[Want]:
    q, k, v = (case.arrays[name] for name in "qkv")
    options, scale = _decode_options(case)
    names = [f"d{name}" for name in case.differentiable]

    def evaluate(factors: list[np.float32]) -> Arrays:
        """Forward and backward are two functions, which need not round a score alike."""
        a, b, d = factors
        rounded = options | {"compute_dtype": np.float32, "storage_dtype": q.dtype}
        out, lse = reference_ops.single_decode(d * q.astype(np.float32), k, v, sm_scale=scale / d, **rounded)
        found = reference_ops.single_decode_backward(
            d * dout.astype(np.float32), a * q.astype(np.float32), k, b * v.astype(np.float32),
            b * out.astype(np.float32), lse, dlse=b * d * dlse, sm_scale=scale / a, **rounded,
        )._asdict()  # fmt: skip
        divisors = {"dq": b * d / a, "dv": d}
        return [found[name].astype(np.float32) / divisors.get(name, b * d) for name in names]

    oracle = reference_ops.single_decode_backward(dout, q, k, v, dlse=dlse, sm_scale=scale, **options)._asdict()
    return _wants(names, [oracle[name] for name in names], evaluate, case)


# Faces ---------------------------------------------------------------------------------------------------------------

# Takes a case, gives its results.
Face = Callable[[OpCase], list[np.ndarray]]
# Takes a case and cotangents of its results, gives the gradients of `case.differentiable`.
GradFace = Callable[[OpCase, list[np.ndarray]], list[np.ndarray]]

FACES = [
    pytest.param("numpy", id="numpy"),
    pytest.param("jax_jit:cpu", id="jax_jit_cpu"),
    pytest.param("torch:cpu", id="torch_cpu"),
    pytest.param("jax_jit:cuda", id="jax_jit_gpu", marks=pytest.mark.gpu),
    pytest.param("jax_eager:cuda", id="jax_eager_gpu", marks=pytest.mark.gpu),
    pytest.param("torch:cuda", id="torch_gpu", marks=pytest.mark.gpu),
    pytest.param("cupy:cuda", id="cupy_gpu", marks=pytest.mark.gpu),
]
GRAD_FACES = [param for param in FACES if param.values[0] not in ("numpy", "cupy:cuda")]


def face_of(param: str) -> Face:
    """A row of FACES."""
    face, _, platform = param.partition(":")
    if face == "numpy":
        return _numpy_face
    if face.startswith("jax"):
        return functools.partial(_jax_face, platform, face == "jax_jit")
    return _cupy_face if face == "cupy" else functools.partial(_torch_face, device_of(platform))


def grad_face_of(param: str) -> GradFace:
    """A row of GRAD_FACES."""
    face, _, platform = param.partition(":")
    if face.startswith("jax"):
        return functools.partial(_jax_grad_face, platform, face == "jax_jit")
    return functools.partial(_torch_grad_face, device_of(platform))


def device_of(platform: str) -> str:
    """PyTorch's name of a device of the platform; skips the test if its PyTorch has none."""
    torch = pytest.importorskip("torch")
    if platform == "cuda" and not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return "cpu" if platform == "cpu" else "cuda:0"


def call_of(case: OpCase) -> Callable[[dict[str, Any]], list[Any]]:
    """The call as a function of its arrays that gives a list."""
    function = getattr(heed.ops, case.function)

    def call(arrays: dict[str, Any]) -> list[Any]:
        results = function(**arrays, **case.statics)
        return list(results) if isinstance(results, (tuple, list)) else [results]

    return call


def _numpy_face(case: OpCase) -> list[np.ndarray]:
    results = call_of(case)(case.arrays)
    assert all(type(x) is np.ndarray for x in results)
    return results


def _jax_face(platform: str, is_jitted: bool, case: OpCase) -> list[np.ndarray]:
    jax = pytest.importorskip("jax")
    call = jax.jit(call_of(case)) if is_jitted else call_of(case)
    arrays = jax.device_put(case.arrays, jax.devices(platform)[0])
    results = call(arrays)
    assert all(x.devices() == {jax.devices(platform)[0]} for x in results)
    return [np.asarray(x) for x in results]


def _torch_face(device: str, case: OpCase) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    arrays = {name: to_torch(x, device) for name, x in case.arrays.items()}
    results = call_of(case)(arrays)
    assert all(isinstance(x, torch.Tensor) and x.device == torch.device(device) for x in results)
    return [from_torch(x) for x in results]


def _cupy_face(case: OpCase) -> list[np.ndarray]:
    cupy = pytest.importorskip("cupy")
    try:
        arrays = {name: to_cupy(x) for name, x in case.arrays.items()}
    except (TypeError, ValueError) as error:
        pytest.skip(f"CuPy {cupy.__version__} cannot hold {next(iter(case.arrays.values())).dtype}: {error}")
    results = call_of(case)(arrays)
    assert all(isinstance(x, cupy.ndarray) for x in results)
    return [from_cupy(x) for x in results]


def _jax_grad_face(platform: str, is_jitted: bool, case: OpCase, cotangents: list[np.ndarray]) -> list[np.ndarray]:
    jax = pytest.importorskip("jax")
    call = call_of(case)

    def gradients(floats: dict[str, Any], rest: dict[str, Any], cotangents: list[Any]) -> Any:
        _, pull = jax.vjp(lambda floats: call(floats | rest), floats)
        return pull(cotangents)[0]

    floats = {name: case.arrays[name] for name in case.differentiable}
    rest = {name: x for name, x in case.arrays.items() if name not in floats}
    given = jax.device_put((floats, rest, cotangents), jax.devices(platform)[0])
    found = (jax.jit(gradients) if is_jitted else gradients)(*given)
    return [np.asarray(found[name]) for name in case.differentiable]


def _torch_grad_face(device: str, case: OpCase, cotangents: list[np.ndarray]) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    arrays = {name: to_torch(x, device) for name, x in case.arrays.items()}
    for name in case.differentiable:
        arrays[name].requires_grad_()
    results = call_of(case)(arrays)
    assert all(x.requires_grad for x in results)
    torch.autograd.backward(results, [to_torch(x, device) for x in cotangents])
    return [from_torch(arrays[name].grad) for name in case.differentiable]


@functools.lru_cache(maxsize=8)
def case_of(spec: OpSpec, seed: int = 0) -> tuple[OpCase, list[Want]]:
    """A named spec's call and what it should give."""
    case = spec.case(seed)
    return case, expected(case)
