"""Gradients of heed.ops by jax.vjp and PyTorch's autograd against the oracle, and what autograd may and may not ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conftest import from_torch, to_torch
from expected import judge
from heed import ops
from heed._arrays import DLPackOps
from small_op_faces import GRAD_FACES, call_of, cotangents_of, device_of, expected, expected_gradients, grad_face_of
from small_op_specs import ACTIVATIONS, BY_NAME, DECODES, NORMS, ROPES, DecodeSpec, OpCase, OpSpec
from tolerance import assert_agree, assert_close

DIFFERENTIATED: list[OpSpec] = [
    spec
    for spec in [*ACTIVATIONS, *ROPES, *NORMS, *DECODES]
    if getattr(spec, "numbers", "gaussian") not in ("special", "nan_visible")
]


@pytest.mark.parametrize("face", GRAD_FACES)
@pytest.mark.parametrize("spec", DIFFERENTIATED, ids=lambda spec: spec.name)
def test_spec(spec: OpSpec, face: str) -> None:
    gradients = grad_face_of(face)

    def check(seed: int) -> None:
        case = spec.case(seed)
        cotangents = cotangents_of(case, seed)
        wants = expected_gradients(case, cotangents)
        for want, x in zip(wants, gradients(case, cotangents), strict=True):
            want.check(x, spec.name)

    judge(check)


@pytest.mark.parametrize("face", GRAD_FACES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("has_everything", [False, True], ids=["plain", "everything"])
def test_rotated_decode_with_large_logits(has_everything: bool, dtype: str, face: str) -> None:
    """Nothing is rounded but the gradients: a plain implementation at float32 is what they are measured by.

    Scores of 60 turn the rounding of a rotated key into probabilities that are wrong by a fifth, and with another
    kernel's LSE they do not sum to 1. Keys are alike, so that all of them matter: no probability underflows.
    """
    gradients = grad_face_of(face)
    if has_everything:
        spec = DecodeSpec(
            "decode_rope_large", 200, 6, 2, 40, 24, "HND", 170, 500.0, 60 * 40**-0.5, 500.0, 3e4, True, True,
            dtype=dtype,
        )  # fmt: skip
    else:
        spec = DecodeSpec("decode_rope_large", 300, 8, 2, 128, sm_scale=60 * 128**-0.5, rope_scale=500.0, dtype=dtype)

    def check(seed: int) -> None:
        case = spec.case(seed)
        k = case.arrays["k"].astype(np.float32)
        case.arrays["k"] = ((k[:, :1] if has_everything else k[:1]) + k / 8).astype(dtype)
        cotangents = cotangents_of(case, seed)
        wide = OpCase(case.function, {key: x.astype(np.float32) for key, x in case.arrays.items()}, case.statics)
        wants = expected_gradients(wide, [x.astype(np.float32) for x in cotangents])
        for key, want, x in zip(case.differentiable, wants, gradients(case, cotangents), strict=True):
            own = case.arrays[key].dtype
            assert_close(x, want.naive.astype(own), want.oracle, own, f"{spec.name}: {want.name}")

    judge(check)


EVERY_OP = ["silu_float32", "rope_float32", "norm_float32", "norm_add_float32", "decode_everything_f32"]


@pytest.mark.parametrize("name", EVERY_OP)
def test_jax_gradients_repeat_bit_for_bit(name: str) -> None:
    pytest.importorskip("jax")
    case = BY_NAME[name].case()
    cotangents = cotangents_of(case)
    face = grad_face_of("jax_jit:cpu")
    first = face(case, cotangents)
    for _ in range(3):
        assert all(x.tobytes() == y.tobytes() for x, y in zip(first, face(case, cotangents), strict=True))


# PyTorch.


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def leaves(name: str, platform: str, wanted: tuple[str, ...] | None = None) -> tuple[Any, dict[str, Any], Any]:
    """A call as a function of its arrays, those arrays as tensors of which the wanted ones require grad, and torch."""
    torch = pytest.importorskip("torch")
    case = BY_NAME[name].case()
    arrays = {key: to_torch(x, device_of(platform)) for key, x in case.arrays.items()}
    for key in case.differentiable if wanted is None else wanted:
        arrays[key].requires_grad_()
    return call_of(case), arrays, torch


SUBSETS = [
    ("rope_float32", ("q",)), ("rope_float32", ("k",)), ("norm_float32", ("x",)), ("norm_float32", ("weight",)),
    ("norm_add_float32", ("residual",)), ("norm_add_float32", ("weight", "x")), ("decode_everything_f32", ("q",)),
    ("decode_everything_f32", ("k", "sinks")), ("decode_everything_f32", ("v",)),
    ("decode_everything_f32", ("alibi_slopes",)),
]  # fmt: skip


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize(("name", "wanted"), SUBSETS, ids=lambda value: str(value))
def test_any_subset_may_require_grad(name: str, wanted: tuple[str, ...], platform: str) -> None:
    def gradients(names: tuple[str, ...] | None) -> dict[str, Any]:
        call, arrays, _ = leaves(name, platform, names)
        sum(x.square().sum() for x in call(arrays)).backward()
        return {key: x.grad for key, x in arrays.items()}

    everything, some = gradients(None), gradients(wanted)
    for key, gradient in some.items():
        assert (gradient is not None) == (key in wanted)
        if gradient is not None:
            np.testing.assert_array_equal(from_torch(gradient), from_torch(everything[key]))


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", ["rope_float32", "norm_add_float32", "decode_everything_f32"])
def test_only_one_result_is_used(name: str, platform: str) -> None:
    """The gradient is that with zeros for the other result; that of a sum is one number, broadcast."""
    for which in (0, 1):
        call, arrays, _ = leaves(name, platform)
        call(arrays)[which].sum().backward()
        other_call, others, torch = leaves(name, platform)
        results = other_call(others)
        weights = [torch.ones_like(x) if i == which else torch.zeros_like(x) for i, x in enumerate(results)]
        torch.autograd.backward(results, weights)
        for key, x in arrays.items():
            if x.requires_grad:
                got = np.zeros(x.shape) if x.grad is None else from_torch(x.grad)
                np.testing.assert_allclose(got, from_torch(others[key].grad), atol=1e-6)


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", [*EVERY_OP, "decode_rope"])
def test_undefined_gradients_are_zeros(name: str, platform: str) -> None:
    """What a consumer has no gradient for does not reach the backward pass at all."""
    call, arrays, torch = leaves(name, platform)

    class Ignores(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, x: Any, y: Any) -> Any:
            return x.sum() + y

        @staticmethod
        def backward(ctx: Any, cotangent: Any) -> Any:
            return None, cotangent

    other = torch.zeros((), requires_grad=True, device=device_of(platform))
    for result in call(arrays):
        wanted = [x for x in arrays.values() if x.requires_grad]
        *found, one = torch.autograd.grad(
            Ignores.apply(result, other), [*wanted, other], retain_graph=True, allow_unused=True
        )
        assert one == 1 and all(x is None or not x.any() for x in found)


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("name", [name for name in EVERY_OP if "rope" not in name])
def test_forward_mode_is_refused(name: str, needs_grad: bool, platform: str) -> None:
    call, arrays, torch = leaves(name, platform, None if needs_grad else ())
    forward_ad = torch.autograd.forward_ad
    for key in BY_NAME[name].case().differentiable:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(arrays[key], torch.ones_like(arrays[key]))
            with pytest.raises(NotImplementedError, match=r"^heed\.ops\.\w+: got a tensor with a tangent"):
                call({**arrays, key: dual})
            if needs_grad and key == next(iter(arrays)):  # of a gradient
                results = call(arrays)
                with pytest.raises(NotImplementedError, match=r"^heed\.ops\.\w+: got a tensor with a tangent"):
                    tangents = [forward_ad.make_dual(x.detach(), torch.ones_like(x)) for x in results]
                    torch.autograd.grad(results, arrays[key], tangents)
            assert len(call(arrays)) in (1, 2)  # nothing has a tangent here
        first = arrays[key].detach()
        with pytest.raises(NotImplementedError, match="got a tensor with a tangent"):
            torch.func.jvp(lambda x, key=key: call({**arrays, key: x}), (first,), (first,))


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", ["rope_float32", "rope_cache_float32"])
def test_rotations_have_derivatives_in_forward_mode(name: str, platform: str) -> None:
    """Rotations are linear: a tangent is rotated as its operand is."""
    call, arrays, torch = leaves(name, platform, ())
    forward_ad = torch.autograd.forward_ad
    dq, dk = (torch.flip(arrays[key], (0,)) for key in "qk")
    for tangents in ({"q": dq, "k": dk}, {"q": dq}, {"k": dk}):
        zeros = {key: torch.zeros_like(arrays[key]) for key in "qk"}
        want = call({**arrays, **zeros, **tangents})
        with forward_ad.dual_level():
            duals = {key: forward_ad.make_dual(arrays[key], x) for key, x in tangents.items()}
            found = [forward_ad.unpack_dual(x) for x in call({**arrays, **duals})]
        for result, plain, x in zip(found, call(arrays), want, strict=True):
            assert torch.equal(result.primal, plain) and torch.equal(result.tangent, x)
    _, found = torch.func.jvp(lambda q: call({**arrays, "q": q})[0], (arrays["q"],), (dq,))
    assert torch.equal(found, call({**arrays, "q": dq})[0])
    if "cos_sin_cache" in arrays:
        with forward_ad.dual_level():
            table = forward_ad.make_dual(arrays["cos_sin_cache"], torch.ones_like(arrays["cos_sin_cache"]))
            with pytest.raises(NotImplementedError, match=r"^cos_sin_cache: got a tensor that has a tangent"):
                call({**arrays, "cos_sin_cache": table})


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", ["silu_float32", "norm_add_float32", "decode_float32"])
def test_second_derivatives_are_refused(name: str, platform: str) -> None:
    call, arrays, torch = leaves(name, platform)
    first = next(x for x in arrays.values() if x.requires_grad)
    (gradient,) = torch.autograd.grad(call(arrays)[0].square().sum(), first, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"heed\.ops\.\w+: got a derivative of its gradient"):
        gradient.sum().backward()


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", ["decode_float16", "decode_rope"])
def test_gradients_of_decode_are_added_in_order(name: str, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[str] = []
    run = DLPackOps.run

    def recorded(self: Any, called: str, text: str, *views: Any) -> None:
        problems.append(text)
        run(self, called, text, *views)

    monkeypatch.setattr(DLPackOps, "run", recorded)
    call, arrays, _ = leaves(name, platform)
    call(arrays)[0].sum().backward()
    (text,) = (text for text in problems if text.startswith("attention_bwd"))
    assert "deterministic=1" in text


@pytest.mark.parametrize("platform", DEVICES)
def test_rotations_may_be_differentiated_again(platform: str) -> None:
    call, arrays, torch = leaves("rope_float32", platform)
    q = arrays["q"]
    (gradient,) = torch.autograd.grad((call(arrays)[0] ** 2).sum(), q, create_graph=True)  # lengths stay: 2 q
    np.testing.assert_allclose(from_torch(gradient), 2 * from_torch(q), rtol=1e-4, atol=1e-5)
    gradient.square().sum().backward()
    np.testing.assert_allclose(from_torch(q.grad), 8 * from_torch(q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("platform", DEVICES)
def test_the_table_has_no_gradient(platform: str) -> None:
    call, arrays, _ = leaves("rope_cache_float32", platform, ("q", "cos_sin_cache"))
    with pytest.raises(NotImplementedError, match=r"^cos_sin_cache: got a tensor that requires grad"):
        call(arrays)


def test_jax_refuses_the_tables_gradient_too() -> None:
    jax = pytest.importorskip("jax")
    x = BY_NAME["rope_cache_float32"].case().arrays

    def loss(table: Any) -> Any:
        return ops.apply_rope_with_cos_sin_cache(x["q"], x["k"], x["pos_ids"], table)[0].sum()

    with pytest.raises(NotImplementedError, match="cos_sin_cache"):
        jax.grad(loss)(jax.numpy.asarray(x["cos_sin_cache"]))


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", EVERY_OP)
def test_no_grad_leaves_no_history(name: str, platform: str) -> None:
    call, arrays, torch = leaves(name, platform)
    with torch.no_grad():
        assert not any(x.requires_grad for x in call(arrays))
    with_history = call(arrays)
    plain = call({key: x.detach() for key, x in arrays.items()})
    for x, y, want in zip(with_history, plain, expected(BY_NAME[name].case()), strict=True):
        assert x.requires_grad and not y.requires_grad
        if "decode" in name:  # rotated and to be differentiated: attention's kernel
            assert_agree(from_torch(x), from_torch(y), want.naive, want.oracle, want.dtype, want.name)
        else:
            assert torch.equal(x.detach(), y)


@pytest.mark.parametrize("platform", DEVICES)
def test_a_layer_of_these_ops_learns(platform: str) -> None:
    """A norm, a gated feed-forward and rotated attention over a cache: the loss of a tiny regression falls."""
    torch = pytest.importorskip("torch")
    device = device_of(platform)
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).mul(shape[0] ** -0.5).to(device).requires_grad_()

    norm = torch.ones(32, device=device, requires_grad=True)
    w_qkv, w_up, w_down = parameter(32, 96), parameter(32, 128), parameter(64, 32)
    x = torch.randn(20, 32, generator=generator).to(device)
    goal = torch.randn(32, generator=generator).to(device)
    optimizer = torch.optim.Adam([norm, w_qkv, w_up, w_down], lr=0.02)
    losses = []
    for _ in range(40):
        q, k, v = (ops.rms_norm(x, norm) @ w_qkv).view(20, 3, 4, 8).unbind(1)
        attended = ops.single_decode(q[-1], k, v, rope_theta=1e4).flatten()
        normed, total = ops.fused_add_rms_norm(attended, x[-1], norm)
        out = total + ops.silu_and_mul(normed @ w_up) @ w_down
        loss = (out - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses
