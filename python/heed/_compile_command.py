"""``python -m heed compile``: compiles many kernels at a time, in parallel, with a progress bar on a terminal."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from heed._jit import CompiledKernel, ahead_of_time_list, compile_kernel, local_archs

_BAR_WIDTH = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", action="append", metavar="ARCH", help="such as sm_90a; may be repeated (default: this machine's GPUs)"
    )
    parser.add_argument("--output", default="", metavar="DIR", help="a folder to ship (default: the user's cache)")
    parser.add_argument(
        "--specs", type=Path, metavar="FILE", help="kernels recorded with HEED_RECORD_SPECS (default: the list of heed)"
    )
    parser.add_argument("--jobs", type=int, default=_num_cpus(), metavar="N", help="kernels at a time (default: CPUs)")
    parser.add_argument("--verbose", action="store_true", help="print each kernel's registers, spills and time")


def run(args: argparse.Namespace) -> int:
    try:
        work = _work(args.arch or local_archs(), args.specs)
    except (ValueError, OSError) as error:
        print(f"heed compile: {error}", file=sys.stderr)
        return 2
    if not work:
        print("heed compile: nothing to do: no GPU here, and no --arch given, or no kernels listed", file=sys.stderr)
        return 2
    start = time.perf_counter()
    done, failures = _compile_all(work, args.output, max(1, args.jobs), args.verbose)
    seconds = time.perf_counter() - start

    for spec, arch, reason in failures:
        print(f"FAILED {arch} {spec}\n{reason}\n", file=sys.stderr)
    compiled = sum(kernel.origin == "compiled" for kernel in done)
    megabytes = sum(kernel.cubin_bytes for kernel in done) / 1e6
    where = args.output or "the cache"
    unkept = sum(not kernel.file for kernel in done)
    print(
        f"{len(done)} kernels in {where}: {compiled} compiled, {len(done) - compiled} were there, "
        f"{len(failures)} failed; {megabytes:.1f} MB of machine code, {seconds:.1f} s"
        + (f"; {unkept} could not be kept" if unkept else "")
    )
    return 1 if failures or unkept else 0


def read_specs(path: Path) -> list[str]:
    """The kernels of a recorded list, each once, in order. Empty lines and those that start with # do not count."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _work(archs: list[str], specs: Path | None) -> list[tuple[str, str]]:
    recorded = None if specs is None else read_specs(specs)
    return [
        (spec, arch)
        for arch in dict.fromkeys(archs)
        for spec in (ahead_of_time_list(arch) if recorded is None else recorded)
    ]


def _compile_all(
    work: list[tuple[str, str]], folder: str, jobs: int, is_verbose: bool
) -> tuple[list[CompiledKernel], list[tuple[str, str, str]]]:
    done: list[CompiledKernel] = []
    failures: list[tuple[str, str, str]] = []
    # Threads: the compiler runs without Python's lock, several times at once.
    with ThreadPoolExecutor(jobs) as pool, _Bar(len(work)) as bar:
        futures: dict[Future[CompiledKernel], tuple[str, str]] = {
            pool.submit(compile_kernel, spec, arch, folder): (spec, arch) for spec, arch in work
        }
        try:
            for future in as_completed(futures):
                spec, arch = futures[future]
                try:
                    kernel = future.result()
                except (RuntimeError, ValueError) as error:
                    failures.append((spec, arch, str(error)))
                else:
                    done.append(kernel)
                    if is_verbose:
                        bar.print(_one_line(kernel))
                bar.advance(f"{arch} {spec.split(' ', 1)[0]}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # those that run now cannot be stopped
            raise
    return done, failures


def _one_line(kernel: CompiledKernel) -> str:
    return (
        f"{kernel.arch:8} {kernel.origin:13} {kernel.seconds:6.2f} s {kernel.registers:4} registers "
        f"{kernel.spill_bytes:5} bytes spilled {kernel.shared_bytes:7} bytes shared  {kernel.spec}"
    )


class _Bar:
    """A progress bar on stderr; silent where that is no terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._count = 0
        self._label = ""
        self._is_shown = sys.stderr.isatty()

    def __enter__(self) -> _Bar:
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def advance(self, label: str) -> None:
        self._count += 1
        self._label = label
        self._draw()

    def print(self, line: str) -> None:
        self._clear()
        print(line, flush=True)
        self._draw()

    def _draw(self) -> None:
        if not self._is_shown:
            return
        filled = _BAR_WIDTH * self._count // self._total
        bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
        sys.stderr.write(f"\r\x1b[K[{bar}] {self._count}/{self._total} {self._label}"[:120])
        sys.stderr.flush()

    def _clear(self) -> None:
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
