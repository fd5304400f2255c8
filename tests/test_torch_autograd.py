"""PyTorch's autograd through flash_mha and flash_mha_varlen. Conformance is in test_flash_mha_grad.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import heed
from conftest import each_array, from_torch, to_torch
from expected import GradientCase, gradient_case
from grad_faces import bwd_of
from specs import BY_NAME, AttentionSpec
from varlen_specs import VARLEN_BY_NAME

torch = pytest.importorskip("torch")

flash_mha: Any = heed.flash_mha  # the tests hand them what their annotations exclude
flash_mha_bwd: Any = heed.flash_mha_bwd
flash_mha_varlen: Any = heed.flash_mha_varlen

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return str(request.param)


def leaves(case: GradientCase, device: str) -> tuple[list[Any], dict[str, Any]]:
    """q, k and v as leaves of a graph, and the other arrays."""
    convert = functools.partial(to_torch, device=device)
    return [convert(x).requires_grad_() for x in case.operands], each_array(convert, case.arrays)


SMALL = AttentionSpec("torch_small", q_len=30, kv_len=40, num_q_heads=4, head_dim_qk=16, is_causal=True)


def small(device: str, **changes: Any) -> tuple[Any, Any, Any]:
    case = gradient_case(AttentionSpec(**(SMALL.__dict__ | changes)))
    q, k, v = leaves(case, device)[0]
    return q, k, v


def test_backward_is_the_function(device: str) -> None:
    """loss.backward() gives what flash_mha_bwd gives on the same arrays."""
    spec = BY_NAME["everything"]
    case = gradient_case(spec)
    (q, k, v), arrays = leaves(case, device)
    for name in ("sinks", "alibi_slopes"):
        arrays[name].requires_grad_()
    out, lse = flash_mha(q, k, v, return_lse=True, deterministic=True, **arrays, **case.statics)
    assert out.requires_grad and lse.requires_grad
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    ((out * weights).sum() + lse[torch.isfinite(lse)].sum()).backward()
    plain = [x.detach() for x in (q, k, v)]
    rest = {name: x if isinstance(x, tuple) else x.detach() for name, x in arrays.items()}
    options = {"deterministic": True, **rest, **case.statics}
    dlse = torch.isfinite(lse.detach()).to(torch.float32)
    want = flash_mha_bwd(weights, *plain, out.detach(), lse.detach(), dlse=dlse, **options)
    for leaf, x in zip((q, k, v, arrays["sinks"], arrays["alibi_slopes"]), want, strict=True):
        assert torch.equal(leaf.grad, x)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("q", "v"), ("sinks",)], ids=",".join)
def test_any_subset_may_require_grad(wanted: tuple[str, ...], device: str) -> None:
    case = gradient_case(AttentionSpec(**(SMALL.__dict__ | {"sinks": True, "name": "torch_sinks"})))
    operands, arrays = leaves(case, device)
    named = dict(zip("qkv", operands, strict=True)) | arrays

    def gradients(names: tuple[str, ...]) -> dict[str, Any]:
        given = {name: x.detach().clone().requires_grad_(name in names) for name, x in named.items()}
        flash_mha(**given, is_causal=True).square().sum().backward()
        return {name: x.grad for name, x in given.items()}

    everything, some = gradients(tuple(named)), gradients(wanted)
    for name, gradient in some.items():
        assert (gradient is not None) == (name in wanted)
        assert gradient is None or torch.allclose(gradient, everything[name], rtol=1e-3, atol=1e-5)


def test_only_one_result_is_used(device: str) -> None:
    q, k, v = small(device)
    _, lse = flash_mha(q, k, v, return_lse=True, is_causal=True)
    lse.sum().backward()
    assert not v.grad.any() and q.grad.any() and k.grad.any()
    q.grad = k.grad = v.grad = None
    out, _ = flash_mha(q, k, v, return_lse=True, is_causal=True)
    out.sum().backward()
    got = v.grad.clone()
    q.grad = k.grad = v.grad = None
    alone = flash_mha(q, k, v, is_causal=True)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, out)
    alone.sum().backward()  # the gradient of a sum is one number, broadcast
    assert torch.allclose(v.grad, got, rtol=1e-3, atol=1e-5)


def test_packed_sequences(device: str) -> None:
    case = gradient_case(VARLEN_BY_NAME["varlen_everything"])
    (q, k, v), arrays = leaves(case, device)
    arrays["cu_seqlens_q"] = arrays["cu_seqlens_q"].to(torch.int64)
    dout, _ = case.cotangents
    flash_mha_varlen(q, k, v, **arrays, **case.statics).backward(to_torch(np.nan_to_num(dout), device))
    clean = gradient_case(VARLEN_BY_NAME["varlen_everything"])
    clean = clean._replace(cotangents=(np.nan_to_num(dout), None))
    want = bwd_of(clean.function, clean.operands, clean.cotangents, clean.arrays, **clean.statics)
    for leaf, x in zip((q, k, v), want[:3], strict=True):
        assert leaf.grad.shape == x.shape
        assert np.allclose(from_torch(leaf.grad), x, rtol=1e-2, atol=1e-3)  # conformance has the rule


def test_a_layer_in_a_model_learns(device: str) -> None:
    """Views, projections and several layers; the loss of a tiny regression falls."""
    generator = torch.Generator().manual_seed(0)
    projections = [torch.randn(32, 96, generator=generator).mul(0.1).to(device).requires_grad_() for _ in range(2)]
    x = torch.randn(4, 20, 32, generator=generator).to(device)
    goal = torch.randn(4, 20, 32, generator=generator).to(device)
    optimizer = torch.optim.Adam(projections, lr=0.02)
    losses = []
    for _ in range(40):
        hidden = x
        for weight in projections:
            q, k, v = (hidden @ weight).view(4, 20, 3, 4, 8).unbind(2)
            hidden = hidden + flash_mha(q, k, v, is_causal=True).flatten(-2)
        loss = (hidden - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


def test_checkpointing(device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = small(device)
    options = {"is_causal": True, "deterministic": True}
    flash_mha(q, k, v, **options).square().sum().backward()
    want = [x.grad for x in (q, k, v)]
    q.grad = k.grad = v.grad = None
    checkpoint(lambda *x: flash_mha(*x, **options), q, k, v, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip((q, k, v), want, strict=True))


def test_functional_transforms(device: str) -> None:
    q, k, v = (x.detach() for x in small(device))
    options = {"is_causal": True, "deterministic": True}

    def loss(q: Any, k: Any, v: Any) -> Any:
        return flash_mha(q, k, v, **options).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    tracked = [x.clone().requires_grad_() for x in (q, k, v)]
    loss(*tracked).backward()
    assert all(torch.equal(x, y.grad) for x, y in zip(found, tracked, strict=True))


def test_nothing_is_recorded_without_need(device: str) -> None:
    q, k, v = small(device)
    with torch.no_grad():
        out = flash_mha(q, k, v, is_causal=True)
    assert not out.requires_grad
    assert torch.equal(out, flash_mha(q.detach(), k.detach(), v.detach(), is_causal=True))
    assert torch.equal(out, flash_mha(q, k, v, is_causal=True).detach())
    with torch.inference_mode():
        assert torch.equal(out, flash_mha(q, k, v, is_causal=True))


def test_second_derivatives_are_refused(device: str) -> None:
    q, k, v = small(device)
    (dq,) = torch.autograd.grad(flash_mha(q, k, v, is_causal=True).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dq.sum().backward()
    out, lse = flash_mha(q, k, v, is_causal=True, return_lse=True)
    gradients = flash_mha_bwd(torch.ones_like(out), q, k, v, out, lse, is_causal=True)
    with pytest.raises(NotImplementedError, match=r"heed\.flash_mha_bwd: got a derivative of its gradients"):
        gradients.dq.sum().backward()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_forward_mode_is_refused(needs_grad: bool, device: str) -> None:
    """Never dropped: a tangent that nobody differentiates would be taken for zeros."""
    forward_ad = torch.autograd.forward_ad
    operands = dict(zip("qkv", (x.detach().requires_grad_(needs_grad) for x in small(device)), strict=True))
    boundaries = torch.tensor([0, 30], device=device), torch.tensor([0, 40], device=device)

    def packed(q: Any, k: Any, v: Any) -> Any:
        return flash_mha_varlen(q[0], k[0], v[0], *boundaries)

    message = r"^heed\.{}: got a tensor with a tangent .* expected derivatives in reverse mode only"
    out, lse = flash_mha(**operands, return_lse=True)
    rest = (out.detach(), lse.detach())
    for name, x in operands.items():
        with forward_ad.dual_level():
            duals = {**operands, name: forward_ad.make_dual(x, torch.ones_like(x))}
            with pytest.raises(NotImplementedError, match=message.format("flash_mha")):
                flash_mha(**duals)
            with pytest.raises(NotImplementedError, match=message.format("flash_mha_varlen")):
                packed(**duals)
            with pytest.raises(NotImplementedError, match=message.format("flash_mha_bwd")):
                flash_mha_bwd(rest[0], *duals.values(), *rest)
            assert torch.equal(flash_mha(**operands), out)  # nothing has a tangent here
        with pytest.raises(NotImplementedError, match=message.format("flash_mha")):
            torch.func.jvp(lambda x, name=name: flash_mha(**{**operands, name: x}), (x.detach(),), (x.detach(),))


def test_operands_changed_in_place_are_noticed(device: str) -> None:
    q, k, v = small(device)
    doubled = q * 2
    out = flash_mha(doubled, k, v, is_causal=True)
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.fixture
def deterministic_mode() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_torchs_deterministic_mode_is_honoured(
    device: str, deterministic_mode: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from heed._arrays import DLPackOps

    problems: list[str] = []
    run = DLPackOps.run

    def recorded(self: Any, name: str, text: str, *views: Any) -> None:
        problems.append(text)
        run(self, name, text, *views)

    monkeypatch.setattr(DLPackOps, "run", recorded)
    q, k, v = small(device)
    flash_mha(q, k, v, is_causal=True).sum().backward()
    assert "deterministic=1" in problems[-1] and problems[-1].startswith("attention_bwd")


def test_errors_name_the_argument(device: str) -> None:
    q, k, v = small(device)
    with pytest.raises(ValueError, match="k: got shape"):
        flash_mha(q, k[:, :, :, :8], v)
    with pytest.raises(TypeError, match="q: got dtype float64"):
        flash_mha(q.double(), k.double(), v.double())
    out, lse = flash_mha(q, k, v, is_causal=True, return_lse=True)
    with pytest.raises(TypeError, match="dout: got dtype"):
        flash_mha_bwd(out.detach().half(), q.detach(), k.detach(), v.detach(), out.detach(), lse.detach())
