"""Small calls of every function of heed.ops with all their operands, shared by the JAX tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from heed import _small_ops, flash_mha, flash_mha_bwd, ops

Operands = Mapping[str, Any]
Lead = Mapping[str, tuple[int, ...]]
Shape = tuple[int | str, ...]
"""The names of sizes, or numbers."""

SIZES = {
    "rows": 3, "tokens": 7, "hidden": 5, "twice_hidden": 10, "q_heads": 4, "kv_heads": 2, "head_dim": 8,
    "head_dim_v": 12, "sequences": 3, "boundaries": 4, "positions": 16, "rotary_dim": 6, "kv_tokens": 11,
}  # fmt: skip
"""What cases are made with unless a test says otherwise."""


@dataclass(frozen=True)
class Case:
    """One function with every operand.

    Attributes:
        function: the public function, called with the operands by name.
        stem: its op's.
        operands: their shapes, in the op's order.
        results: those of its results.
        options: static arguments that it is called with, so that a rule that drops one shows.
        integers: the highest value of each integer operand.
    """

    function: Callable[..., Any]
    stem: str
    operands: Mapping[str, Shape]
    results: Mapping[str, Shape]
    options: Mapping[str, Any] = field(default_factory=dict)
    integers: Mapping[str, int] = field(default_factory=dict)

    @property
    def cotangents(self) -> tuple[str, ...]:
        return tuple(f"d{name}" for name in self.results)

    @property
    def differentiable(self) -> tuple[str, ...]:
        return tuple(name for name in self.operands if name not in self.integers and name != "cos_sin_cache")

    @property
    def target(self) -> str:
        """The name of its custom call."""
        return f"heed.{self.stem}.v1"

    def call(self, operands: Operands) -> tuple[Any, ...]:
        """The function's results: a function of the operands alone."""
        results = self.function(**{name: operands[name] for name in self.operands}, **self.options)
        return tuple(results) if isinstance(results, tuple) else (results,)

    def gradients(self, operands: Operands) -> dict[str, Any]:
        """The gradients of `call` by the names of its operands: a function of operands and cotangents alone."""
        chosen = {name: operands[name] for name in self.differentiable}
        rest = {name: operands[name] for name in self.operands if name not in chosen}
        _, pull = jax.vjp(lambda x: self.call({**rest, **x}), chosen)
        (found,) = pull(tuple(operands[name] for name in self.cotangents))
        return dict(found)

    def make(
        self, lead: Lead | None = None, dtype: Any = "float32", seed: int = 0, **sizes: int
    ) -> dict[str, np.ndarray[Any, Any]]:
        """All operands and cotangents; `lead` gives some of them leading axes, `sizes` replace some of SIZES."""
        rng = np.random.default_rng(seed)
        lead = lead or {}
        sizes = SIZES | sizes
        sizes |= {"twice_hidden": 2 * sizes["hidden"], "boundaries": sizes["sequences"] + 1}
        made = {}
        for name, shape in (*self.operands.items(), *zip(self.cotangents, self.results.values(), strict=True)):
            whole = (*lead.get(name, ()), *(sizes[axis] if isinstance(axis, str) else axis for axis in shape))
            if name in self.integers:
                high = sizes["tokens"] if name == "indptr" else self.integers[name]
                x = rng.integers(0, high, whole, endpoint=True).astype(np.int32)
                made[name] = np.sort(x, axis=-1) if name == "indptr" else x
            elif name in ("sinks", "alibi_slopes", "cos_sin_cache", "dlse"):
                made[name] = np.abs(rng.standard_normal(whole)).astype(np.float32)
            else:
                made[name] = rng.standard_normal(whole).astype(np.float32).astype(dtype)
        return made

    def numpy_results(self, operands: Operands) -> tuple[np.ndarray[Any, Any], ...]:
        """The same call on NumPy arrays, which conformance tests check."""
        found = self.call({name: np.asarray(operands[name]) for name in self.operands})
        assert all(type(x) is np.ndarray for x in found)
        return found

    def numpy_gradients(self, operands: Operands) -> dict[str, np.ndarray[Any, Any]]:
        """Its gradients on NumPy arrays, by the kernels of the backward pass. No leading axes."""
        arrays = {name: np.asarray(x) for name, x in operands.items()}
        return _NUMPY_GRADIENTS[self.stem](self, arrays)


_ROPE_Q, _ROPE_K = ("tokens", "q_heads", "head_dim"), ("tokens", "kv_heads", "head_dim")
_ROPE = {"q_rope": _ROPE_Q, "k_rope": _ROPE_K}
_PACKED = {"q": _ROPE_Q, "k": _ROPE_K, "indptr": ("boundaries",), "offsets": ("sequences",)}
_ROWS = ("rows", "tokens", "hidden")
_GATED = ({"x": ("rows", "tokens", "twice_hidden")}, {"out": _ROWS})
_DECODE_OPTIONS = {"window_left": 8, "logits_soft_cap": 20.0, "return_lse": True}
_PER_HEAD = {"sinks": ("q_heads",), "alibi_slopes": ("q_heads",)}
_DECODED = {"out": ("q_heads", "head_dim_v"), "lse": ("q_heads",)}

CASES = {
    "silu_and_mul": Case(ops.silu_and_mul, "act_and_mul", *_GATED),
    "gelu_tanh_and_mul": Case(ops.gelu_tanh_and_mul, "act_and_mul", *_GATED),
    "apply_rope": Case(
        ops.apply_rope,
        "rope",
        _PACKED,
        _ROPE,
        {"rotary_dim": 6, "interleave": True, "rope_scale": 2.0, "rope_theta": 100.0},
        {"indptr": 7, "offsets": 50},
    ),
    "apply_llama31_rope": Case(
        ops.apply_llama31_rope,
        "rope",
        _PACKED,
        _ROPE,
        {"rotary_dim": 4, "rope_theta": 100.0, "old_context_len": 32.0, "high_freq_factor": 3.0},
        {"indptr": 7, "offsets": 50},
    ),
    "apply_rope_pos_ids": Case(
        ops.apply_rope_pos_ids,
        "rope",
        {"q": _ROPE_Q, "k": _ROPE_K, "pos_ids": ("tokens",)},
        _ROPE,
        {"rope_scale": 0.5},
        {"pos_ids": 50},
    ),
    "apply_rope_with_cos_sin_cache": Case(
        ops.apply_rope_with_cos_sin_cache,
        "rope",
        {"q": _ROPE_Q, "k": _ROPE_K, "pos_ids": ("tokens",), "cos_sin_cache": ("positions", "rotary_dim")},
        _ROPE,
        {"interleave": True},
        {"pos_ids": 15},
    ),
    "rms_norm": Case(ops.rms_norm, "rms_norm", {"x": _ROWS, "weight": ("hidden",)}, {"out": _ROWS}, {"eps": 1e-3}),
    "fused_add_rms_norm": Case(
        ops.fused_add_rms_norm,
        "rms_norm",
        {"x": _ROWS, "weight": ("hidden",), "residual": _ROWS},
        {"out": _ROWS, "sum": _ROWS},
        {"eps": 1e-3},
    ),
    "single_decode": Case(
        ops.single_decode,
        "attention_decode",
        {
            "q": ("q_heads", "head_dim"),
            "k": ("kv_tokens", "kv_heads", "head_dim"),
            "v": ("kv_tokens", "kv_heads", "head_dim_v"),
            **_PER_HEAD,
        },
        _DECODED,
        _DECODE_OPTIONS,
    ),
    "single_decode_hnd_rope": Case(
        ops.single_decode,
        "attention_decode",
        {
            "q": ("q_heads", "head_dim"),
            "k": ("kv_heads", "kv_tokens", "head_dim"),
            "v": ("kv_heads", "kv_tokens", "head_dim_v"),
            **_PER_HEAD,
        },
        _DECODED,
        {**_DECODE_OPTIONS, "kv_layout": "HND", "rope_theta": 100.0, "sm_scale": 0.5},
    ),
}


def rows_of(operands: Operands, mapped: Any, index: int) -> dict[str, Any]:
    """One row's operands, where some are mapped."""
    return {name: x[index] if name in mapped else x for name, x in operands.items()}


def axes_of(mapped: Any, names: Any) -> dict[str, int | None]:
    """in_axes of a function of named operands."""
    return {name: 0 if name in mapped else None for name in names}


def check(results: Any, case: Case, operands: Operands, what: str) -> None:
    """Asserts that results are, to the bit, those of the same call on NumPy arrays (which conformance tests check).

    Every row, token and head is computed by itself and in the same order, however calls are batched or divided.
    """
    for name, got, want in zip(case.results, results, case.numpy_results(operands), strict=True):
        np.testing.assert_array_equal(np.asarray(got), want, err_msg=f"{what}: {name}")


def check_gradients(found: Mapping[str, Any], case: Case, operands: Operands, what: str) -> None:
    """The same for gradients."""
    want = case.numpy_gradients(operands)
    assert set(found) <= set(want), what
    for name, got in found.items():
        np.testing.assert_array_equal(np.asarray(got), want[name], err_msg=f"{what}: gradient of {name}")


# Gradients on NumPy arrays.

Arrays = Mapping[str, np.ndarray[Any, Any]]
Found = dict[str, np.ndarray[Any, Any]]


def _statics_of(case: Case) -> Any:
    """What the public function makes of the case's options."""
    described = case.function.__wrapped__  # type: ignore[attr-defined]
    small = case.make()
    return described(**{name: small[name] for name in case.operands}, **case.options).statics


def _act_gradients(case: Case, arrays: Arrays) -> Found:
    operands = (arrays["x"], arrays["dout"])
    (dx,) = _small_ops.run_eagerly("numpy", _small_ops.ACT_AND_MUL_BWD, "ops", _statics_of(case), operands)
    return {"x": dx}


def _rope_gradients(case: Case, arrays: Arrays) -> Found:
    statics = dataclasses.replace(_statics_of(case), inverse=True)
    positions = [arrays.get(name) for name in _small_ops.ROPE_NAMES[2:]]
    operands = (arrays["dq_rope"], arrays["dk_rope"], *positions)
    dq, dk = _small_ops.run_eagerly("numpy", _small_ops.ROPE, "ops", statics, operands)
    return {"q": dq, "k": dk}


def _norm_gradients(case: Case, arrays: Arrays) -> Found:
    is_fused = "residual" in case.operands
    normalised = case.numpy_results(arrays)[1] if is_fused else arrays["x"]
    operands = (normalised, arrays["weight"], arrays["dout"], arrays.get("dsum"))
    op = _small_ops.RMS_NORM_BWD
    dx, dweight = _small_ops.run_eagerly("numpy", op, "ops", _statics_of(case), operands)
    found = {"x": dx, "weight": dweight.astype(arrays["weight"].dtype)}
    return {**found, "residual": dx} if is_fused else found


def _decode_gradients(case: Case, arrays: Arrays) -> Found:
    """Those of flash_mha on one query row, after and before rotations in float32."""
    options = case.options
    k, v = (arrays[name] for name in "kv")
    if options.get("kv_layout") == "HND":
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
    theta = options.get("rope_theta")

    def rotate(x: Any, positions: Any, inverse: bool) -> Any:
        statics = _small_ops.RopeStatics(theta=theta, inverse=inverse)
        operands = (x, np.zeros_like(x[:, :1]), None, None, np.asarray(positions, np.int32), None)
        return _small_ops.run_eagerly("numpy", _small_ops.ROPE, "ops", statics, operands)[0]

    q, last = arrays["q"][None], [len(k) - 1]
    same = {
        "softmax_scale": options.get("sm_scale"), "window_size": (options["window_left"], -1),
        "softcap": options["logits_soft_cap"], "sinks": arrays["sinks"], "alibi_slopes": arrays["alibi_slopes"],
    }  # fmt: skip
    dout, dlse = arrays["dout"][None, None], arrays["dlse"][None, :, None]
    if theta is None:
        out, lse = case.numpy_results(arrays)
        out, lse = out[None, None], lse[None, :, None]
    else:  # both passes are of numbers that are rounded nowhere
        q, k, v, dout = (x.astype(np.float32) for x in (q, k, v, dout))
        q, k = rotate(q, last, False), rotate(k, range(len(k)), False)
        out, lse = flash_mha(q[None], k[None], v[None], return_lse=True, **same)
    found = flash_mha_bwd(dout, q[None], k[None], v[None], out, lse, dlse=dlse, **same)
    dq, dk, dv = found.dq[0], found.dk[0], found.dv[0]
    if theta is not None:
        dq, dk = rotate(dq, last, True), rotate(dk, range(len(dk)), True)
    if options.get("kv_layout") == "HND":
        dk, dv = dk.swapaxes(0, 1), dv.swapaxes(0, 1)
    found_of = {"q": dq[0], "k": dk, "v": dv, "sinks": found.dsinks, "alibi_slopes": found.dalibi_slopes}
    return {name: x.astype(arrays[name].dtype) for name, x in found_of.items()}


_NUMPY_GRADIENTS: dict[str, Callable[[Case, Arrays], Found]] = {
    "act_and_mul": _act_gradients,
    "rope": _rope_gradients,
    "rms_norm": _norm_gradients,
    "attention_decode": _decode_gradients,
}
