"""heed.jit's functions on memory that is used twice, on leading axes of absent operands, and at the ends of slots."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conftest import from_torch, to_torch
from heed import ops
from heed.jit import gen_act_and_mul_module, gen_rope_module, gen_single_decode_module

Mover = Callable[[np.ndarray], Any]


@pytest.fixture(params=["numpy", "torch:cpu", pytest.param("torch:cuda:0", marks=pytest.mark.gpu)])
def move(request: pytest.FixtureRequest) -> Mover:
    """Makes an array a tensor of its own memory."""
    name, _, device = request.param.partition(":")
    if name == "numpy":
        return np.array
    torch = pytest.importorskip("torch")
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return lambda x: to_torch(x.copy(), device)


def back(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else from_torch(x)


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


INDPTR, OFFSETS = np.array([0, 5], np.int32), np.array([11], np.int32)


# In place.


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("head_dim", [6, 8, 16, 24, 34, 40, 48, 64, 80, 96, 128, 256])
def test_rope_in_place(head_dim: int, interleave: bool, dtype: Any, move: Mover) -> None:
    q, k = random(6, 3, head_dim, dtype=dtype), random(6, 2, head_dim, dtype=dtype)
    indptr, offsets = move(INDPTR), move(OFFSETS)
    want = ops.apply_rope(move(q), move(k), indptr, offsets, None, interleave)
    q_rope, k_rope = move(q), move(k)
    function = gen_rope_module().build_and_load().apply_rope
    function(q_rope, k_rope, q_rope, k_rope, indptr, offsets, head_dim, interleave, 1.0, 1e4)
    for found, expected in zip((q_rope, k_rope), want, strict=True):
        assert back(found).tobytes() == back(expected).tobytes()


@pytest.mark.parametrize("num_tokens", [5, 3000, 100_000])  # the last: written past the caches; many heads a thread
def test_rope_in_place_inside_one_tensor(num_tokens: int, move: Mover) -> None:
    """Queries and keys are often parts of what one projection made: they take turns in its memory."""
    qkv = random(num_tokens, 7, 24)
    indptr = np.array([1, num_tokens], np.int32)
    positions = move(indptr), move(OFFSETS)
    one = move(qkv)
    q, k = one[:, :4], one[:, 4:6]
    want = [back(x) for x in ops.apply_rope(move(qkv[:, :4]), move(qkv[:, 4:6]), *positions)]
    gen_rope_module().build_and_load().apply_rope(q, k, q, k, *positions, 24, False, 1.0, 1e4)
    assert np.array_equal(back(one), np.concatenate([*want, qkv[:, 6:]], 1))


# Other memory that is used twice is refused, before anything is written.


def call_rope(move: Mover, q: Any, k: Any, q_rope: Any, k_rope: Any) -> None:
    function = gen_rope_module().build_and_load().apply_rope
    indptr, offsets = move(np.array([0, 4], np.int32)), move(OFFSETS)
    function(q, k, q_rope, k_rope, indptr, offsets, 8, False, 1.0, 1e4)


def call_decode(
    move: Mover, q: Any = None, k: Any = None, out: Any = None, lse: Any = None, tmp: Any = None, keys: int = 9
) -> None:
    shapes = {"q": (4, 8), "k": (keys, 4, 8), "v": (keys, 4, 8), "out": (4, 8)}
    new = {name: move(random(*shape)) for name, shape in shapes.items()}
    q, k, out = (given if given is not None else new[name] for name, given in (("q", q), ("k", k), ("out", out)))
    tmp = move(np.zeros(1 << 16, np.float32)) if tmp is None else tmp
    run = gen_single_decode_module(*["float32"] * 3, 8, 8).build_and_load().run
    run(q, k, new["v"], tmp, out, lse, 0, -1, None, 0.0, 0.25, 1.0, 1e4)


def call_silu(x: Any, out: Any) -> None:
    gen_act_and_mul_module("silu").build_and_load().silu_and_mul(out, x, False)


# Each takes `memory`, float32 [5, 4, 8], and what makes further tensors.
REFUSED: dict[str, tuple[Callable[[Mover, Any], Any], str]] = {
    "act, the gates": (lambda _, m: call_silu(m[:, 0], m[:, 0, :4]), "out.* input.* own$"),
    "act, shifted": (lambda _, m: call_silu(m[:4, 0], m[1:, 0, :4]), "out.* input.* own$"),
    "rope, tokens later": (lambda f, m: call_rope(f, m[:4], f(random(4, 1, 8)), m[1:], f(random(4, 1, 8))),
                           "q_rope.* q,.* or exactly q"),
    "rope, heads later": (lambda f, m: call_rope(f, m[:, :2], f(random(5, 1, 8)), m[:, 1:3], f(random(5, 1, 8))),
                          "q_rope.* q,.* or exactly q"),
    "rope, k": (lambda f, m: call_rope(f, m[:, :2], m[:, 2:], f(random(5, 2, 8)), m[:, :2]),
                "k_rope.* q,.* or exactly k"),
    "rope, exchanged": (lambda f, m: call_rope(f, m[:, :2], m[:, 2:], m[:, 2:], m[:, :2]), "q_rope.* k,.* exactly q"),
    "rope, results": (lambda f, m: call_rope(f, f(random(5, 2, 8)), f(random(5, 2, 8)), m[:, :2], m[:, 1:3]),
                      "k_rope.* q_rope,.* or exactly k"),
    "decode, q": (lambda f, m: call_decode(f, q=m[0], out=m[0]), "out.* q,.* own$"),
    "decode, k": (lambda f, m: call_decode(f, k=m, out=m[2], keys=5), "out.* k,.* own$"),
    "decode, lse": (lambda f, m: call_decode(f, out=m[0], lse=m[0, 1, :4]), "maybe_lse.* out,.* own$"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_other_shared_memory_is_refused(what: str, move: Mover) -> None:
    call, says = REFUSED[what]
    before = random(5, 4, 8)
    memory = move(before)
    with pytest.raises(ValueError) as caught:
        call(move, memory)
    assert re.search(f"^{says}", str(caught.value).split(": the same")[0]), caught.value
    assert np.array_equal(back(memory), before)


def test_scratch_memory_that_is_needed_shares_none(move: Mover) -> None:
    memory = move(np.zeros(1 << 20, np.float32))
    keys = memory[: 20000 * 4 * 8].reshape(20000, 4, 8)
    if isinstance(memory, np.ndarray) or memory.device.type == "cpu":
        call_decode(move, out=memory[:32].reshape(4, 8), tmp=memory[:0], keys=9)  # not needed
    with pytest.raises(ValueError, match=r"^tmp: .* k, expected memory of its own"):
        call_decode(move, k=keys, tmp=memory, keys=20000)


def test_memory_beside_each_other_is_not_shared(move: Mover) -> None:
    memory = move(np.zeros((4, 12), np.float32))
    x = random(4, 8)
    memory[:, :8] = move(x)
    call_silu(memory[:, :8], memory[:, 8:])
    assert np.array_equal(back(memory)[:, 8:], back(ops.silu_and_mul(move(x))))
    call_silu(memory[:2, :8], memory[2:, :4])  # other rows
    assert np.array_equal(back(memory)[2:, :4], back(ops.silu_and_mul(move(x[:2]))))


# Leading axes.


@pytest.mark.parametrize("lead", [(3,), (2, 3), (1, 3), (0,)])
def test_leading_axes_of_absent_slopes_alone(lead: tuple[int, ...], move: Mover) -> None:
    """vmap over nothing but an operand that says by its size that it is not there."""
    ones = (1,) * len(lead)
    q, k, v = random(4, 8), random(9, 2, 8), random(9, 2, 5)
    out, tmp = move(np.full((*lead, 4, 5), 77, np.float32)), move(np.zeros(1 << 18, np.float32))
    run = gen_single_decode_module(*["float32"] * 3, 8, 5).build_and_load().run
    operands = [move(x.reshape(*ones, *x.shape)) for x in (q, k, v)]
    slopes = move(np.zeros((*lead, 0), np.float32))
    run(*operands, tmp, out, None, 0, -1, slopes, 0.0, 0.25, 1.0, 1e4)
    want = back(ops.single_decode(move(q), move(k), move(v), sm_scale=0.25))
    assert np.allclose(back(out), np.broadcast_to(want, out.shape), rtol=1e-5, atol=1e-6)


def test_leading_axes_of_absent_slopes_that_do_not_fit() -> None:
    run = gen_single_decode_module(*["float32"] * 3, 8, 8).build_and_load().run
    q, k = random(2, 4, 8), random(2, 9, 2, 8)
    out, tmp, slopes = np.zeros((2, 4, 8), np.float32), np.zeros(1 << 16, np.float32), np.zeros((3, 0), np.float32)
    with pytest.raises(ValueError, match=r"^maybe_alibi_slopes: got leading axis 0 of size 3, expected size 2 or 1"):
        run(q, k, k, tmp, out, None, 0, -1, slopes, 0.0, 0.25, 1.0, 1e4)


# Reciprocals.


@pytest.mark.parametrize(
    ("scale", "theta", "says"),
    [(1e-310, 1e-4, "^rope_rcp_scale: got 1e-310,"), (1.0, 1e-50, "^rope_rcp_theta: got 1e-50,"),
     (float("inf"), 1.0, "^rope_rcp_scale: got inf,"), (1.0, float("nan"), "^rope_rcp_theta: got nan,"),
     (1e39, 1.0, r"^rope_rcp_scale: got 1e\+39,")],
)  # fmt: skip
def test_reciprocals_out_of_range_are_named_as_given(scale: float, theta: float, says: str) -> None:
    run = gen_single_decode_module(*["float32"] * 3, 8, 8, 1).build_and_load().run
    q, k, out, tmp = random(4, 8), random(9, 2, 8), np.zeros((4, 8), np.float32), np.zeros(1 << 16, np.float32)
    with pytest.raises(ValueError, match=f"{says} expected a positive number whose reciprocal"):
        run(q, k, k, tmp, out, None, 0, -1, None, 0.0, 0.25, scale, theta)
