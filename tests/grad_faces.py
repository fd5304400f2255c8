"""The gradients of flash_mha and flash_mha_varlen through each face and platform, with NumPy arrays in and out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import heed
from conftest import each_array, from_cupy, from_torch, to_cupy, to_torch
from heed.reference import Gradients

# Takes (function, (q, k, v), (dout, dlse or None), arrays, **statics).
GradFace = Callable[..., Gradients]

GRAD_FACES = [
    pytest.param("numpy", id="numpy"),
    pytest.param("jax_jit:cpu", id="jax_jit_cpu"),
    pytest.param("torch:cpu", id="torch_cpu"),
    pytest.param("jax_jit:cuda", id="jax_jit_gpu", marks=pytest.mark.gpu),
    pytest.param("jax_eager:cuda", id="jax_eager_gpu", marks=pytest.mark.gpu),
    pytest.param("torch:cuda", id="torch_gpu", marks=pytest.mark.gpu),
    pytest.param("cupy:cuda", id="cupy_gpu", marks=pytest.mark.gpu),
]


def grad_face_of(param: str) -> GradFace:
    """A row of GRAD_FACES."""
    face, _, platform = param.partition(":")
    if face.startswith("jax"):
        return functools.partial(_jax_face, platform, face == "jax_jit")
    if face == "torch":
        return functools.partial(_torch_face, "cpu" if platform == "cpu" else "cuda:0")
    return _numpy_face if face == "numpy" else _cupy_face


def split(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays that have gradients, and the others."""
    floats = {name: x for name, x in arrays.items() if name in ("sinks", "alibi_slopes")}
    return floats, {name: x for name, x in arrays.items() if name not in floats}


def bwd_of(function: str, operands: Any, cotangents: Any, arrays: dict[str, Any], **statics: Any) -> Any:
    """Forward, then backward by the function of its own; arrays of any eager kind."""
    dout, dlse = cotangents
    out, lse = getattr(heed, function)(*operands, return_lse=True, **arrays, **statics)
    return getattr(heed, f"{function}_bwd")(dout, *operands, out, lse, dlse=dlse, **arrays, **statics)


def _numpy_face(function: str, operands: Any, cotangents: Any, arrays: dict[str, Any], **statics: Any) -> Gradients:
    found = bwd_of(function, operands, cotangents, arrays, **statics)
    assert all(x is None or type(x) is np.ndarray for x in found)
    return Gradients(*found)


def _jax_face(
    platform: str,
    is_jitted: bool,
    function: str,
    operands: Any,
    cotangents: Any,
    arrays: dict[str, Any],
    **statics: Any,
) -> Gradients:
    jax = pytest.importorskip("jax")
    flash = getattr(heed, function)

    def gradients(
        operands: Any, floats: dict[str, Any], integers: dict[str, Any], dout: Any, dlse: Any
    ) -> tuple[Any, dict[str, Any]]:
        def call(operands: Any, floats: dict[str, Any]) -> Any:
            return flash(*operands, return_lse=dlse is not None, **floats, **integers, **statics)

        _, pull = jax.vjp(call, operands, floats)
        found: tuple[Any, dict[str, Any]] = pull(dout if dlse is None else (dout, dlse))
        return found

    given = jax.device_put((operands, *split(arrays), *cotangents), jax.devices(platform)[0])
    of_operands, of_floats = (jax.jit(gradients) if is_jitted else gradients)(*given)
    rest = (of_floats.get(name) for name in ("sinks", "alibi_slopes"))
    return Gradients(*(None if x is None else np.asarray(x) for x in (*of_operands, *rest)))


def _torch_face(
    device: str, function: str, operands: Any, cotangents: Any, arrays: dict[str, Any], **statics: Any
) -> Gradients:
    """Through autograd."""
    torch = pytest.importorskip("torch")
    convert = functools.partial(to_torch, device=device)
    leaves = [convert(x).requires_grad_() for x in operands]
    floats, integers = split(arrays)
    more = {name: convert(x).requires_grad_() for name, x in floats.items()}
    out, lse = getattr(heed, function)(*leaves, return_lse=True, **more, **each_array(convert, integers), **statics)
    dout, dlse = (None if x is None else convert(x) for x in cotangents)
    torch.autograd.backward([out] if dlse is None else [out, lse], [dout] if dlse is None else [dout, dlse])
    named = [*leaves, more.get("sinks"), more.get("alibi_slopes")]
    for leaf in named:
        assert leaf is None or (leaf.grad is not None and leaf.grad.device == leaf.device)
    return Gradients(*(None if leaf is None else from_torch(leaf.grad) for leaf in named))


def _cupy_face(function: str, operands: Any, cotangents: Any, arrays: dict[str, Any], **statics: Any) -> Gradients:
    cupy = pytest.importorskip("cupy")
    try:
        given = [to_cupy(x) for x in operands]
    except (TypeError, ValueError) as error:
        pytest.skip(f"CuPy {cupy.__version__} cannot hold {np.asarray(operands[0]).dtype}: {error}")
    cotangents = [None if x is None else to_cupy(x) for x in cotangents]
    found = bwd_of(function, given, cotangents, each_array(to_cupy, arrays), **statics)
    assert all(x is None or (isinstance(x, cupy.ndarray) and x.device == given[0].device) for x in found)
    return Gradients(*(None if x is None else from_cupy(x) for x in found))
