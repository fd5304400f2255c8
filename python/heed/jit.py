"""heed.jit: kernels as TVM-FFI modules, for programs that register them with XLA (or call them) themselves.

The names and the parameter orders are those of the modules that FlashInfer's `flashinfer.jit` builds, so that code
written for those runs on heed by changing its imports, on the CPU too:

1. build and load: `module = gen_rope_module().build_and_load()`, a `tvm_ffi.Module`,
2. register: `jax_tvm_ffi.register_ffi_target(name, wrapper, arg_spec, platform="cpu" or "gpu", ...)`,
3. call: `jax.ffi.ffi_call(name, shapes)(*arrays, **scalars)`.

The modules' functions write into tensors that they are given, of any framework with DLPack, allocate nothing, and on a
GPU run on the stream that TVM-FFI holds for the device. They check all that they are given: shapes, values and devices
(ValueError), and dtypes (TypeError). Every tensor may have the same number of further leading axes, each of the
full size or 1, which is what `vmap_method="broadcast_all"` or "expand_dims" makes. `heed.ops` has the same operations
as ordinary functions.

Results have memory of their own. Only rotary embeddings work in place: q_rope may be q itself, and k_rope k, with the
same start, shape and strides. Whatever else of a result (or of scratch memory) is also part of an operand or of another
result raises ValueError before anything is written. Views that take turns in one tensor's memory, such as the heads of
q, k and v in `qkv[:, first:last]`, share none of it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from heed._lib import function
from heed._problem import choice_value, flag_value, integer_value
from heed._small_ops import ACTIVATIONS

__all__ = ["JitSpec", "gen_act_and_mul_module", "gen_rope_module", "gen_single_decode_module"]

_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
_POSITION_ENCODINGS = {0: "none", 1: "RoPE", 2: "ALiBi"}


@dataclass(frozen=True)
class JitSpec:
    """What a module is made of. Equal for equal parameters.

    Attributes:
        uri: a name that states every parameter: the same in every process, different for different parameters.
    """

    uri: str
    _load: Callable[[], Any] = field(repr=False, compare=False)

    def build_and_load(self) -> Any:
        """The `tvm_ffi.Module`. All calls, of equal specs and from any thread, return the same object.

        On a machine with NVIDIA GPUs it compiles (or finds compiled) and loads the kernels for tensors all of whose
        rows start at multiples of 16 bytes, of any size, so that such a call inside a captured CUDA graph only
        launches. Kernels for other rows (an odd head dim, a slice that starts anywhere) are loaded by the first call
        that needs them: make one before a capture.

        Raises:
            RuntimeError: on a machine with a GPU: no driver, no compiler for a kernel that is not there yet, or what
                CUDA reports.
        """
        return _loaded(self)


_lock = threading.Lock()
_modules: dict[JitSpec, Any] = {}


def _loaded(spec: JitSpec) -> Any:
    module = _modules.get(spec)
    if module is None:
        with _lock:
            module = _modules.get(spec)
            if module is None:
                module = _modules[spec] = spec._load()
    return module


def gen_act_and_mul_module(act_func_name: str) -> JitSpec:
    """The module of a gated activation, `heed.ops.silu_and_mul` and its like.

    Args:
        act_func_name: "silu", "gelu" or "gelu_tanh".

    Its one function is named after it, `silu_and_mul`, `gelu_and_mul` or `gelu_tanh_and_mul`:

    `silu_and_mul(out, input, enable_pdl)`: writes `silu(input[..., :H]) * input[..., H:]` to out, `[..., H]`. Both are
    float32, float16 or bfloat16. enable_pdl is accepted for compatibility: whether it is set changes no result.

    Raises:
        ValueError, TypeError: act_func_name is none of these.
    """
    activation = choice_value("act_func_name", act_func_name, ACTIVATIONS)
    return JitSpec(f"{activation}_and_mul", functools.partial(_make, "act_and_mul", activation))


def gen_rope_module() -> JitSpec:
    """The module of rotary embeddings. Functions write q_rope and k_rope, which are like q and k:

    - `apply_rope(q, k, q_rope, k_rope, indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta)`
    - `apply_llama31_rope(q, k, q_rope, k_rope, indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta,
      low_freq_factor, high_freq_factor, old_context_len)`
    - `apply_rope_pos_ids(q, k, q_rope, k_rope, pos_ids, rotary_dim, interleave, rope_scale, rope_theta)`
    - `apply_rope_with_cos_sin_cache(q, k, q_rope, k_rope, cos_sin_cache, pos_ids, interleave)`

    Arguments mean what they mean in the functions of `heed.ops` of these names, but indptr, offsets and pos_ids must be
    int32, and rotary_dim is a number. The values of an indptr in host memory are checked. q_rope may be q, and k_rope
    may be k: the call is then in place.
    """
    return JitSpec("rope", functools.partial(_make, "rope"))


def gen_single_decode_module(
    dtype_q: Any,
    dtype_kv: Any,
    dtype_o: Any,
    head_dim_qk: int,
    head_dim_vo: int,
    pos_encoding_mode: int = 0,
    use_sliding_window: bool = False,
    use_logits_soft_cap: bool = False,
) -> JitSpec:
    """The module of `heed.ops.single_decode` for one dtype and one pair of head dims.

    Args:
        dtype_q, dtype_kv, dtype_o: "float16", "bfloat16" or "float32", or that dtype of NumPy, JAX or PyTorch. All
            three are the same.
        head_dim_qk, head_dim_vo: head dims of q and k, and of v and the output; 1 to 256.
        pos_encoding_mode: 0: none; 1: q and k are rotated (head_dim_qk is even); 2: ALiBi.
        use_sliding_window, use_logits_soft_cap: part of the uri. Calls honour a window and a soft cap whenever they are
            given, whatever the module was made for.

    Its one function:

    `run(q, k, v, tmp, out, maybe_lse, kv_layout_code, window_left, maybe_alibi_slopes, logits_soft_cap, sm_scale,
    rope_rcp_scale, rope_rcp_theta)` writes out, and the natural log of the softmax denominator to maybe_lse (float32
    `[num_q_heads]`; None or a tensor of shape `[0]`: not wanted). tmp is scratch memory of any dtype; if it is too
    small, the error says how many bytes are needed. kv_layout_code is 0 for NHD and 1 for HND, window_left -1 for all
    keys, logits_soft_cap 0 for none; maybe_alibi_slopes (float32 `[num_q_heads]`, or None, or of shape `[0]`) count
    whenever they are given. rope_rcp_scale and rope_rcp_theta are the reciprocals of rope_scale and rope_theta in a
    module of mode 1; other modules ignore them.

    Raises:
        ValueError: a head dim or mode is out of range.
        TypeError: a dtype is not one of the three, or they differ.
    """
    dtype = _dtype_name("dtype_q", dtype_q)
    for name, value in (("dtype_kv", dtype_kv), ("dtype_o", dtype_o)):
        other = _dtype_name(name, value)
        if other != dtype:
            raise TypeError(f"{name}: got {other}, expected {dtype}, the dtype of dtype_q")
    qk, vo = (_head_dim(*one) for one in (("head_dim_qk", head_dim_qk), ("head_dim_vo", head_dim_vo)))
    mode = integer_value("pos_encoding_mode", pos_encoding_mode)
    if mode not in _POSITION_ENCODINGS:
        known = ", ".join(f"{code} ({name})" for code, name in _POSITION_ENCODINGS.items())
        raise ValueError(f"pos_encoding_mode: got {mode}, expected one of {known}")
    if mode == 1 and qk % 2:
        raise ValueError(f"head_dim_qk: got {qk}, expected an even number: pos_encoding_mode 1 rotates pairs")
    window = flag_value("use_sliding_window", use_sliding_window)
    cap = flag_value("use_logits_soft_cap", use_logits_soft_cap)
    short = _DTYPES[dtype]
    uri = (
        f"single_decode_with_kv_cache_dtype_q_{short}_dtype_kv_{short}_dtype_o_{short}_head_dim_qk_{qk}"
        f"_head_dim_vo_{vo}_posenc_{mode}_use_swa_{window}_use_logits_cap_{cap}"
    )
    return JitSpec(uri, functools.partial(_make, "single_decode", dtype, qk, vo, mode))


def _make(kind: str, *parameters: Any) -> Any:
    """The native library's module of that kind (`src/ffi/jit_modules.cc`)."""
    return function(f"{kind}_module")(*parameters)


def _dtype_name(name: str, value: Any) -> str:
    """The name of a dtype of any library, or given by its name."""
    try:
        found = value if isinstance(value, str) else np.dtype(value).name
    except TypeError:  # PyTorch's are not NumPy's
        found = str(value).removeprefix("torch.")
    if found not in _DTYPES:
        raise TypeError(f"{name}: got {value!r}, expected one of {', '.join(_DTYPES)}")
    return found


def _head_dim(name: str, value: Any) -> int:
    found = integer_value(name, value)
    if not 1 <= found <= 256:
        raise ValueError(f"{name}: got {found}, expected 1 to 256")
    return found
