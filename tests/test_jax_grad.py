"""Gradients of flash_mha under JAX's transformations: jit, checkpoint, scan, donation; their types; what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heed
from jax_cases import OPERANDS, OPTIONS, attend, make_operands
from jax_grad_cases import (
    BACKWARD,
    COTANGENTS,
    DIFFERENTIABLE,
    FORWARD,
    axes_of,
    check_gradients,
    gradients,
    make_case,
    operands_of,
    problems,
    rows_of,
    same_bits,
)

ALL = (*OPERANDS, *COTANGENTS)


# The gradients themselves. Every feature and size is in test_flash_mha_grad.py.


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_gradients_of_every_operand(heads: tuple[int, int]) -> None:
    operands = make_case(q_heads=heads[0], kv_heads=heads[1])
    found = gradients(operands)
    check_gradients(found, operands, "eager")
    same_bits(jax.jit(gradients)(operands), found, "jit")

    def loss(x: dict[str, Any]) -> Any:
        out, lse = attend({**operands, **x})
        return jnp.vdot(out, operands["dout"]) + jnp.vdot(lse, operands["dlse"])

    chosen = {name: jnp.asarray(operands[name]) for name in DIFFERENTIABLE}
    same_bits(jax.grad(loss)(chosen), found, "grad")
    value, again = jax.jit(jax.value_and_grad(loss))(chosen)
    same_bits(again, found, "value_and_grad")
    assert value == pytest.approx(float(loss(chosen)), nan_ok=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gradients_have_the_dtypes_of_their_operands(dtype: str) -> None:
    operands = {name: x.astype(dtype) if name in ("q", "k", "v", "dout") else x for name, x in make_case().items()}
    found = jax.jit(gradients)(operands)
    for name, x in found.items():
        assert (x.dtype, x.shape) == (operands[name].dtype, operands[name].shape), name
    check_gradients(found, operands, dtype)


def test_gradients_of_each_operand_alone_are_the_same() -> None:
    operands = make_case()
    whole = gradients(operands)
    for name in DIFFERENTIABLE:
        _, pull = jax.vjp(lambda x, name=name: attend({**operands_of(operands), name: x}), operands[name])
        same_bits(pull((operands["dout"], operands["dlse"]))[0], whole[name], name)


def test_either_result_may_go_unused() -> None:
    operands = make_case()
    rest = operands_of(operands)
    chosen = {name: rest[name] for name in DIFFERENTIABLE}
    for unused in COTANGENTS:
        spoilt = {**operands, unused: np.zeros_like(operands[unused])}

        def loss(x: Any, unused: str = unused) -> Any:
            out, lse = attend({**rest, **x})
            return jnp.vdot(lse, operands["dlse"]) if unused == "dout" else jnp.vdot(out, operands["dout"])

        check_gradients(jax.jit(jax.grad(loss))(chosen), spoilt, f"without {unused}")

    def without_lse(x: Any) -> Any:
        return jnp.vdot(heed.flash_mha(x["q"], x["k"], x["v"], **OPTIONS), operands["dout"])

    bare = {name: operands[name] for name in "qkv"}
    lowered = jax.jit(jax.grad(without_lse)).lower(bare)
    (problem,) = problems(lowered.as_text())
    assert ";dlse=" not in problem and ";lse=float32[2,4,9];dout=float32[2,9,4,12];scale=" in problem
    check_gradients(
        lowered.compile()(bare), {**bare, "dout": operands["dout"], "dlse": np.zeros_like(operands["dlse"])}, "bare"
    )


def test_the_same_inputs_give_the_same_bits_under_every_call_style() -> None:
    operands = make_case()
    eager = gradients(operands)
    arrays = jax.tree.map(jnp.asarray, operands)
    styles = {
        "JAX arrays": gradients(arrays),
        "jit": jax.jit(gradients)(arrays),
        "compiled ahead": jax.jit(gradients).lower(arrays).compile()(arrays),
        "jit inside": jax.vjp(jax.jit(attend), operands_of(arrays))[1]((arrays["dout"], arrays["dlse"]))[0],
    }
    with jax.disable_jit():
        styles["no jit"] = gradients(arrays)
    for name, found in styles.items():
        assert all(isinstance(found[key], jax.Array) for key in eager), name
        same_bits({key: found[key] for key in eager}, eager, name)


def test_options_reach_the_backward_pass() -> None:
    operands = {name: make_operands()[name] for name in "qkv"}
    found = {}
    variants: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"is_causal": True},
        "top left": {"is_causal": True, "causal_align": "top_left"},
        "window": {"window_size": (2, 1)},
        "softcap": {"softcap": 0.5},
        "scale": {"softmax_scale": 0.7},
        "deterministic": {"deterministic": True},
        "backend": {"backend": "cpu"},
    }
    for name, options in variants.items():
        call = jax.jit(jax.grad(lambda x, options=options: heed.flash_mha(*x, **options).sum()))
        (problem,) = problems(call.lower(tuple(operands.values())).as_text())
        assert problem.endswith(
            f";deterministic={int(name == 'deterministic')};backend={'cpu' if name == 'backend' else 'auto'}"
        )
        found[name] = np.asarray(call(tuple(operands.values()))[1])
    different = [name for name in found if name not in ("deterministic", "backend")]
    for a, b in itertools.combinations(different, 2):
        assert not np.array_equal(found[a], found[b]), (a, b)
    for name in ("deterministic", "backend"):
        np.testing.assert_array_equal(found[name], found["none"])


# Control flow and rematerialisation.


def test_checkpoint_keeps_what_its_policy_names() -> None:
    """Everything recomputed: two forward calls. Output and LSE kept: one. The numbers are the same."""
    operands = make_case()
    rest = operands_of(operands)
    policies = jax.checkpoint_policies

    def layer(x: dict[str, Any]) -> Any:
        out, lse = attend({**rest, **x, "q": jnp.sin(x["q"])})
        return jnp.vdot(jnp.cos(out), operands["dout"]) + jnp.vdot(lse, operands["dlse"])

    chosen = {name: jnp.asarray(rest[name]) for name in DIFFERENTIABLE}
    want = jax.jit(jax.value_and_grad(layer))(chosen)
    expected_calls = {
        "nothing": (policies.nothing_saveable, 2),
        "default": (None, 2),
        "both": (policies.save_only_these_names("heed_attention_out", "heed_attention_lse"), 1),
        "only out": (policies.save_only_these_names("heed_attention_out"), 2),
        "any but other names": (policies.save_any_names_but_these("other"), 1),
        "everything": (policies.everything_saveable, 1),
    }
    for name, (policy, num_calls) in expected_calls.items():
        kept = jax.checkpoint(layer, policy=policy)
        lowered = jax.jit(jax.value_and_grad(kept)).lower(chosen)
        text = lowered.as_text()  # XLA's CPU compiler finds equal calls, recomputed or not
        assert text.count(f"custom_call @{FORWARD}(") == num_calls, name
        assert text.count(f"custom_call @{BACKWARD}(") == 1, name
        same_bits(lowered.compile()(chosen), want, name)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat: bool) -> None:
    """Stacked weights, one layer in the program, gradients of the weights and of what goes in: as NumPy has them."""
    rng = np.random.default_rng(0)
    layers, shape, kv_shape = 3, (2, 12, 4, 8), (2, 12, 2, 8)
    x, dout = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    sizes = {"q": shape, "k": kv_shape, "v": kv_shape}
    weights = {name: rng.standard_normal((layers, *size)).astype(np.float32) for name, size in sizes.items()}

    def layer(x: Any, w: dict[str, Any]) -> Any:
        return heed.flash_mha(x * w["q"], w["k"], w["v"], is_causal=True), None

    step = jax.checkpoint(layer) if remat else layer
    call = jax.jit(lambda x, weights: jax.vjp(lambda *y: jax.lax.scan(step, *y)[0], x, weights)[1](dout))
    text = str(call.lower(x, weights).compile().as_text())
    assert text.count(f'custom_call_target="{BACKWARD}"') == 1
    assert text.count(f'custom_call_target="{FORWARD}"') == (2 if remat else 1)
    dx, found = call(x, weights)

    kept = []
    for i in range(layers):
        out, lse = heed.flash_mha(
            x * weights["q"][i], weights["k"][i], weights["v"][i], is_causal=True, return_lse=True
        )
        kept.append((x, out, lse))
        x = out
    for i in reversed(range(layers)):
        x, out, lse = kept[i]
        w = {name: stack[i] for name, stack in weights.items()}
        want = heed.flash_mha_bwd(dout, x * w["q"], w["k"], w["v"], out, lse, is_causal=True)
        same_bits(
            {name: y[i] for name, y in found.items()}, {"q": want.dq * x, "k": want.dk, "v": want.dv}, f"layer {i}"
        )
        dout = want.dq * w["q"]
    same_bits(dx, dout, "what goes in")


def test_cond_while_and_map() -> None:
    operands = make_case(lead=dict.fromkeys(("q", "dout"), (3,)))
    mapped = {name: jnp.asarray(operands[name]) for name in ("q", "dout")}
    fixed = {name: x for name, x in operands.items() if name not in mapped}
    found = jax.jit(lambda rows: jax.lax.map(lambda row: gradients(fixed | row), rows))(mapped)
    for i in range(3):
        check_gradients({name: x[i] for name, x in found.items()}, rows_of(operands, mapped, i), f"map, row {i}")
    row = rows_of(operands, mapped, 0)

    def branch(x: Any) -> Any:
        return jax.lax.cond(
            x["q"].sum() < 1e9, attend, lambda x: attend({**x, "q": -x["q"]}), {**operands_of(row), **x}
        )

    chosen = {name: jnp.asarray(row[name]) for name in DIFFERENTIABLE}
    check_gradients(jax.jit(lambda x: jax.vjp(branch, x)[1]((row["dout"], row["dlse"]))[0])(chosen), row, "cond")


def test_donated_operands_in_a_training_step() -> None:
    operands = make_operands()
    params = {name: jnp.array(operands[name]) for name in "qkv"}

    def step(params: dict[str, Any]) -> Any:
        def loss_of(p: dict[str, Any]) -> Any:
            return jnp.sum(heed.flash_mha(p["q"], p["k"], p["v"], **OPTIONS) ** 2)

        loss, found = jax.value_and_grad(loss_of)(params)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, found)

    want = jax.jit(step)(params)
    copies = jax.tree.map(jnp.array, params)
    got = jax.jit(step, donate_argnums=0)(copies)
    same_bits(got, want, "donated")
    assert all(x.is_deleted() for x in copies.values())
    same_bits(jax.jit(step)(params), want, "the others are untouched")


# Types.


def test_integer_operands_have_float0_gradients() -> None:
    operands = operands_of(make_case())
    _, pull = jax.vjp(attend, operands)
    found = pull(jax.tree.map(jnp.ones_like, attend(operands)))[0]
    for name in OPERANDS[5:]:
        assert found[name].dtype == jax.dtypes.float0 and found[name].shape == operands[name].shape
    allowed = jax.grad(lambda ids: attend({**operands, "q_segment_ids": ids})[0].sum(), allow_int=True)(
        jnp.asarray(operands["q_segment_ids"])
    )
    assert allowed.dtype == jax.dtypes.float0


@pytest.mark.parametrize("setting", ["rank_promotion", "dtype_promotion", "x64"])
def test_works_under_strict_jax_settings(setting: str) -> None:
    contexts: dict[str, Any] = {
        "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
        "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
        "x64": lambda: jax.enable_x64(True),  # type: ignore[attr-defined]
    }
    operands = make_case(lead={"q": (2,), "dout": (2,)})
    with contexts[setting]():
        found = jax.jit(jax.vmap(gradients, in_axes=(axes_of(("q", "dout"), ALL),)))(operands)
    assert all(found[name].dtype == np.float32 for name in DIFFERENTIABLE)
    for i in range(2):
        check_gradients({name: x[i] for name, x in found.items()}, rows_of(operands, ("q", "dout"), i), setting)


def test_abstract_evaluation_runs_nothing() -> None:
    """Shapes far beyond memory have their types in no time."""
    shape = jax.ShapeDtypeStruct
    operands = {
        "q": shape((4096, 65536, 64, 128), jnp.bfloat16),
        "k": shape((4096, 131072, 8, 128), jnp.bfloat16),
        "v": shape((4096, 131072, 8, 256), jnp.bfloat16),
        "sinks": shape((64,), jnp.float32),
        "dout": shape((4096, 65536, 64, 256), jnp.bfloat16),
        "dlse": shape((4096, 64, 65536), jnp.float32),
    }
    found = jax.eval_shape(gradients, operands)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (operands[name].shape, operands[name].dtype) for name in ("q", "k", "v", "sinks")
    }
    mapped = {**operands, "q": shape((7, *operands["q"].shape), jnp.bfloat16)}
    found = jax.eval_shape(jax.vmap(gradients, in_axes=(axes_of(("q",), operands),)), mapped)
    assert {name: x.shape for name, x in found.items()} == {
        name: (7, *operands[name].shape) for name in ("q", "k", "v", "sinks")
    }


def test_the_jaxpr_is_readable() -> None:
    text = str(jax.make_jaxpr(gradients)(make_case()))
    assert text.count("heed_attention_fwd[") == text.count("heed_attention_bwd[") == 1
    assert "name=heed_attention_out" in text and "name=heed_attention_lse" in text


def test_memory_is_linear_in_the_sequence() -> None:
    """S 16k, H 16, D 128: inputs, outputs, one float32 dQ and O(S * H). XLA says so, nothing is allocated."""
    batch, length, heads, dim = 1, 16384, 16, 128
    tensor = jax.ShapeDtypeStruct((batch, length, heads, dim), jnp.float32)
    lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    bytes_of = batch * length * heads * dim * 4
    per_row = 64 * length * heads

    def backward(q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any) -> Any:
        return heed.flash_mha_bwd(dout, q, k, v, out, lse, is_causal=True)[:3]

    found: Any = jax.jit(backward).lower(tensor, tensor, tensor, tensor, lse, tensor).compile().memory_analysis()
    assert found.argument_size_in_bytes >= 5 * bytes_of and found.output_size_in_bytes >= 3 * bytes_of
    assert found.output_size_in_bytes + found.temp_size_in_bytes <= 4 * bytes_of + per_row

    # The whole step: what is kept between the two passes is out and the LSE.
    step = jax.value_and_grad(lambda q, k, v: heed.flash_mha(q, k, v, is_causal=True).sum(), argnums=(0, 1, 2))
    found = jax.jit(step).lower(tensor, tensor, tensor).compile().memory_analysis()
    assert found.output_size_in_bytes + found.temp_size_in_bytes <= (3 + 2 + 1) * bytes_of + per_row


# What is not there.

SECOND = r"heed\.flash_mha: got a derivative of its gradient, expected first derivatives only"


def test_second_derivatives_are_refused_with_the_reason() -> None:
    operands = make_operands()
    q = jnp.asarray(operands["q"])

    def loss(q: Any) -> Any:
        return jnp.sum(attend({**operands, "q": q})[0] ** 2)

    def slope(q: Any) -> Any:
        return jnp.sum(jax.grad(loss)(q) ** 2)

    transforms: list[Any] = [
        lambda: jax.grad(slope)(q),
        lambda: jax.jit(jax.grad(slope))(q),
        lambda: jax.grad(jax.jit(slope))(q),
        lambda: jax.grad(jax.checkpoint(slope))(q),
        lambda: jax.vmap(jax.grad(slope))(q[None]),
        lambda: jax.hessian(loss)(q),
        lambda: jax.jacrev(jax.jacrev(loss))(q),
        lambda: jax.jvp(jax.grad(loss), (q,), (q,)),
    ]
    for transform in transforms:
        with pytest.raises(NotImplementedError, match=SECOND):
            transform()
    # Where one of the two is not meant to flow, nothing is refused.
    stopped = jax.grad(lambda q: jnp.sum(q * jax.grad(loss)(jax.lax.stop_gradient(q))))(q)
    same_bits(stopped, jax.grad(loss)(q), "stopped")


def test_forward_mode_ends_in_jaxs_own_message() -> None:
    operands = make_operands()
    q = jnp.asarray(operands["q"])
    for transform in (
        lambda f: jax.jvp(f, (q,), (q,)),
        lambda f: jax.jacfwd(f)(q),
        lambda f: jax.jit(lambda: jax.jvp(f, (q,), (q,)))(),
    ):
        with pytest.raises(TypeError, match="custom_vjp"):
            transform(lambda q: attend({**operands, "q": q})[0])


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_a_platform_without_kernels_is_refused_while_lowering(platform: str) -> None:
    traced = jax.jit(gradients).trace(make_case())
    traced.lower(lowering_platforms=("cpu",))
    with pytest.raises(heed.UnsupportedError, match=f"flash_mha: heed has no kernels for the platform {platform}"):
        traced.lower(lowering_platforms=("cpu", platform))


def test_gradients_may_be_lowered_for_gpus_that_are_not_here() -> None:
    """One program for both platforms has a workspace that is large enough for either."""
    traced = jax.jit(gradients).trace(make_case())
    sizes = []
    for platforms in (("cpu",), ("cuda",), ("cpu", "cuda")):
        text = traced.lower(lowering_platforms=platforms).as_text()
        (line,) = (line for line in text.splitlines() if f"custom_call @{BACKWARD}" in line)
        sizes.append(int(line.rpartition("tensor<2x4x")[2].partition("xf32>")[0]))
    assert sizes[2] == max(sizes[:2])


def test_a_forced_backend_that_cannot_run_here_is_refused() -> None:
    operands = make_operands()
    q, k, v = (jnp.asarray(operands[name]) for name in "qkv")
    with pytest.raises(heed.UnsupportedError) as caught:
        jax.grad(lambda q: heed.flash_mha(q, k, v, backend="sm90").sum())(q)
    assert caught.value.reasons


# flash_mha_bwd on JAX arrays.


def test_flash_mha_bwd_gives_the_gradients_too() -> None:
    operands = make_case()
    rest = operands_of(operands)
    out, lse = attend(rest)

    def call(x: dict[str, Any], out: Any, lse: Any) -> Any:
        ids = (x["q_segment_ids"], x["kv_segment_ids"])
        return heed.flash_mha_bwd(
            x["dout"], x["q"], x["k"], x["v"], out, lse, dlse=x["dlse"], segment_ids=ids, sinks=x["sinks"],
            alibi_slopes=x["alibi_slopes"], **OPTIONS
        )  # fmt: skip

    want = gradients(operands)
    arrays, results = jax.tree.map(jnp.asarray, operands), (jnp.asarray(out), jnp.asarray(lse))
    for name, found in {"eager": call(arrays, *results), "jit": jax.jit(call)(operands, out, lse)}.items():
        assert found._fields == ("dq", "dk", "dv", "dsinks", "dalibi_slopes")
        same_bits(dict(zip(DIFFERENTIABLE, found, strict=True)), want, name)
    many = jax.vmap(call, in_axes=(axes_of(("dout",), ALL), None, None))(
        {**arrays, "dout": arrays["dout"][None]}, *results
    )
    same_bits(dict(zip(DIFFERENTIABLE, [x[0] for x in many], strict=True)), want, "vmap")
    with pytest.raises(NotImplementedError, match=SECOND):
        jax.grad(lambda q: call({**arrays, "q": q}, *results).dq.sum())(arrays["q"])
