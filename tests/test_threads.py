"""Several callers at once, fork, the number of threads, and what surrounds a call: results never change."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest

import heed
from expected import expected_of
from processes import run
from specs import BY_NAME, AttentionSpec, make_inputs

NAMES = ("everything", "causal_gqa_d128_bfloat16", "window_causal", "kv_len_0", "gqa_64_over_4", "sinks_window")

DIGEST = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import heed
from heed._lib import function
from specs import BY_NAME, make_inputs
digest = hashlib.sha256()
for name in {names!r}:
    spec = BY_NAME[name]
    inputs = make_inputs(spec)
    for x in heed.flash_mha(inputs.q, inputs.k, inputs.v, return_lse=True, **spec.static_options(), **inputs.arrays):
        digest.update(x.tobytes())
print(function("num_threads")(), digest.hexdigest())
"""


def flash(spec: AttentionSpec) -> tuple[np.ndarray, np.ndarray]:
    inputs = make_inputs(spec)
    out, lse = heed.flash_mha(inputs.q, inputs.k, inputs.v, return_lse=True, **spec.static_options(), **inputs.arrays)
    return out, lse


GRADIENT_DIGEST = """
import hashlib
import numpy as np
import heed
digest = hashlib.sha256()
for batch, tokens, heads, kv_heads, is_causal in ((1, 700, 2, 1, True), (2, 400, 4, 4, False), (1, 500, 6, 2, True)):
    rng = np.random.default_rng(tokens)
    q, dout = (rng.standard_normal((batch, tokens, heads, 48), np.float32) for _ in range(2))
    k, v = (rng.standard_normal((batch, tokens + 90, kv_heads, 48), np.float32) for _ in range(2))
    options = {"is_causal": is_causal, "alibi_slopes": np.full(heads, 0.01, np.float32)}
    out, lse = heed.flash_mha(q, k, v, return_lse=True, **options)
    for _ in range(3):
        for x in heed.flash_mha_bwd(dout, q, k, v, out, lse, **options):
            digest.update(b"" if x is None else x.tobytes())
print(digest.hexdigest())
"""


def test_several_callers_at_once() -> None:
    """Eight threads, each with its own problems in its own order, all sharing one arena."""
    results = {name: flash(BY_NAME[name]) for name in NAMES}
    failures: list[str] = []
    start = threading.Barrier(8)

    def caller(number: int) -> None:
        try:
            start.wait()
            rng = np.random.default_rng(number)
            for _ in range(15):
                name = NAMES[int(rng.integers(len(NAMES)))]
                for got, want in zip(flash(BY_NAME[name]), results[name], strict=True):
                    if got.tobytes() != want.tobytes():
                        failures.append(name)
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for name in NAMES:
        expected_of(BY_NAME[name]).check(*results[name], name)


def test_errors_in_one_thread_leave_others_alone() -> None:
    spec = BY_NAME["full_float32"]
    want = flash(spec)[0].tobytes()
    failures: list[str] = []

    def good() -> None:
        failures.extend("wrong result" for _ in range(40) if flash(spec)[0].tobytes() != want)

    def bad() -> None:
        x = np.zeros((1, 4, 3, 8), np.float32)
        for _ in range(200):
            try:
                heed.flash_mha(x, x[:, :, :2], x[:, :, :2])
                failures.append("did not raise")
            except ValueError as error:
                if "num_q_heads 3" not in str(error):
                    failures.append(str(error))

    threads = [threading.Thread(target=target) for target in (good, bad, good, bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    code = DIGEST.format(tests=str(Path(__file__).parent), names=NAMES)
    lines = {}
    for count in ("1", "2", "3", "7"):
        done = run(code, HEED_NUM_THREADS=count)
        assert done.returncode == 0, done.stderr
        threads, digest = done.stdout.split()
        assert threads == count
        lines[count] = digest
    assert len(set(lines.values())) == 1, lines


def test_the_number_of_threads_does_not_change_a_bit_of_a_gradient() -> None:
    """Fewer heads than threads, so that chunks of one head's keys run at the same time and take turns to add."""
    lines = {}
    for count in ("1", "2", "3", "5", "8"):
        done = run(GRADIENT_DIGEST, HEED_NUM_THREADS=count)
        assert done.returncode == 0, done.stderr
        lines[count] = done.stdout
    assert len(set(lines.values())) == 1, lines


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1e3", "99999999999999999999"])
def test_a_bad_number_of_threads_is_refused(value: str) -> None:
    code = "import numpy as np, heed\nx = np.ones((2, 300, 4, 64), np.float32)\nheed.flash_mha(x, x, x)"
    done = run(code, HEED_NUM_THREADS=value)
    assert done.returncode != 0
    assert "HEED_NUM_THREADS" in done.stderr and value in done.stderr, done.stderr
    assert done.returncode > 0, "the process was killed"


def test_one_thread_means_no_other_threads() -> None:
    code = (
        "import os, numpy as np, heed\nx = np.ones((2, 400, 4, 64), np.float32)\n"
        "before = len(os.listdir('/proc/self/task'))\nheed.flash_mha(x, x, x)\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    done = run(code, HEED_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    assert done.stdout.strip() == "0", done.stdout + done.stderr


def _child(queue: multiprocessing.Queue[bytes], name: str) -> None:
    queue.put(flash(BY_NAME[name])[0].tobytes())


def test_fork_makes_the_arena_anew() -> None:
    """A child forked after the parent's arena has run must compute, not wait for threads that it does not have.

    In a process without JAX, whose own threads make forking unsafe.
    """
    code = """
import os, sys, time
sys.path.insert(0, {tests!r})
import numpy as np
import heed
from specs import BY_NAME, make_inputs
spec = BY_NAME["primes"]
inputs = make_inputs(spec)
want = heed.flash_mha(inputs.q, inputs.k, inputs.v).tobytes()
children = []
for generation in range(3):
    child = os.fork()
    if child == 0:
        ok = heed.flash_mha(inputs.q, inputs.k, inputs.v).tobytes() == want
        if generation == 2:  # a grandchild too
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if heed.flash_mha(inputs.q, inputs.k, inputs.v).tobytes() == want else 1)
            ok = ok and os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if ok else 1)
    children.append(child)
assert heed.flash_mha(inputs.q, inputs.k, inputs.v).tobytes() == want
deadline = time.time() + 60
for child in children:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        assert time.time() < deadline, "a child hangs"
        time.sleep(0.01)
    assert status == 0, status
assert heed.flash_mha(inputs.q, inputs.k, inputs.v).tobytes() == want
print("ok")
"""
    done = run(code.format(tests=str(Path(__file__).parent)), HEED_NUM_THREADS="4", OPENBLAS_NUM_THREADS="1")
    assert done.stdout.strip() == "ok", done.stdout + done.stderr


def test_multiprocessing_pool() -> None:
    """Spawned workers, as data loaders use them."""
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[bytes] = context.Queue()
    workers = [context.Process(target=_child, args=(queue, "full_float32")) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert set(results) == {flash(BY_NAME["full_float32"])[0].tobytes()}


def test_jitted_calls_from_several_threads() -> None:
    jax = pytest.importorskip("jax")
    spec = BY_NAME["causal_float32"]
    inputs = make_inputs(spec)
    call = jax.jit(lambda q, k, v: heed.flash_mha(q, k, v, is_causal=True))
    operands = jax.device_put((inputs.q, inputs.k, inputs.v), jax.devices("cpu")[0])
    want = np.asarray(call(*operands)).tobytes()
    failures: list[int] = []

    def caller(number: int) -> None:
        failures.extend(number for _ in range(10) if np.asarray(call(*operands)).tobytes() != want)

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
