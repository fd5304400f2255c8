"""Times contenders on a GPU in shuffled order: hot (launches back to back) and paused (after idling).

A *clock* runs a block of launches of one contender and says how long each took; `EventClock` reads CUDA events, and
`WallClock` a host clock around work that JAX dispatches. What decides about order, pauses and block sizes knows
neither.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

Contenders = Mapping[str, Callable[[], Any]]
Samples = dict[str, list[float]]
"""Seconds per launch of each contender: one median for each round."""

MODES = ("hot", "paused")

# An idle GPU recovers its clocks and power budget: the figures after a pause are those of a kernel that runs alone.
PAUSE_SECONDS = 0.12

# A block is long enough that its events weigh little, and short enough that a whole table takes minutes.
_BLOCK_SECONDS = {"hot": 0.02, "paused": 0.008}
_MIN_LAUNCHES, _MAX_LAUNCHES = 5, 40

# How long all contenders run back to back before the first hot round, so that the GPU is at its power limit.
_HEAT_SECONDS = 0.25


class Clock(Protocol):
    """How a block of launches is timed, and how to do nothing for a while."""

    def block(self, run: Callable[[], Any], launches: int) -> list[float]:
        """Runs so many launches back to back; returns the seconds of each, or their mean as one figure."""
        ...

    def idle(self, seconds: float) -> None:
        """Waits until the GPU has finished, then for so long."""
        ...


def measure(contenders: Contenders, clock: Clock, mode: str, rounds: int, seed: int = 0) -> Samples:
    """Each contender's median seconds per launch in each round. Every round runs all of them, in shuffled order."""
    launches = {name: _launches(clock, run, mode) for name, run in contenders.items()}
    if mode == "hot" and contenders:
        _heat(contenders, clock, launches)
    shuffle = random.Random(seed)
    names = list(contenders)
    samples: Samples = {name: [] for name in names}
    for _ in range(rounds):
        shuffle.shuffle(names)
        for name in names:
            if mode == "paused":
                clock.idle(PAUSE_SECONDS)
            samples[name].append(statistics.median(clock.block(contenders[name], launches[name])))
    return samples


def _launches(clock: Clock, run: Callable[[], Any], mode: str) -> int:
    """How many launches make up a block: by a first block of two, which is also the warm-up."""
    seconds = statistics.median(clock.block(run, 2))
    wanted = _BLOCK_SECONDS[mode] / seconds if seconds > 0 else _MAX_LAUNCHES
    return max(_MIN_LAUNCHES, min(_MAX_LAUNCHES, math.ceil(wanted)))


def _heat(contenders: Contenders, clock: Clock, launches: Mapping[str, int]) -> None:
    done = 0.0
    while done < _HEAT_SECONDS:
        for name, run in contenders.items():
            done += statistics.median(clock.block(run, launches[name])) * launches[name] + 1e-6


def median_seconds(samples: Samples, name: str) -> float:
    """A contender's median over the rounds."""
    return statistics.median(samples[name])


class EventClock:
    """CUDA events around every launch, through torch.

    Where the host needs longer for a launch than the GPU, events would time the host. A kernel that only spins keeps
    the GPU busy until the whole block is queued.
    """

    _WARM_LAUNCHES = 2
    _CYCLES_PER_SECOND = 2.0e9  # at least what a GPU's clock makes: the spin lasts no shorter than asked

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._host: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
        self._device: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()

    def _host_seconds(self, run: Callable[[], Any]) -> float:
        """What the host needs to queue one launch and its two events."""
        known = self._host.get(run)
        if known is None:
            run()
            self._torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(3):
                run()
            known = (time.perf_counter() - start) / 3 + 10e-6
            self._torch.cuda.synchronize()
            self._host[run] = known
        return known

    def block(self, run: Callable[[], Any], launches: int) -> list[float]:
        torch = self._torch
        host = self._host_seconds(run)
        is_host_faster = host < 0.7 * self._device.get(run, 0.0)
        num_covered = 2 if is_host_faster else self._WARM_LAUNCHES + launches
        torch.cuda._sleep(int(host * num_covered * self._CYCLES_PER_SECOND))
        for _ in range(self._WARM_LAUNCHES):
            run()
        pairs = []
        for _ in range(launches):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        seconds = [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        self._device[run] = statistics.median(seconds)
        return seconds

    def idle(self, seconds: float) -> None:
        self._torch.cuda.synchronize()
        time.sleep(seconds)


class WallClock:
    """A host clock around a block of launches: for JAX, which has no events. Gives one mean for a block."""

    _WARM_LAUNCHES = 2

    def __init__(self, wait: Callable[[Any], Any]) -> None:
        self._wait = wait  # for the result of a launch

    def block(self, run: Callable[[], Any], launches: int) -> list[float]:
        for _ in range(self._WARM_LAUNCHES):
            result = run()
        self._wait(result)
        start = time.perf_counter()
        for _ in range(launches):
            result = run()
        self._wait(result)
        return [(time.perf_counter() - start) / launches]

    def idle(self, seconds: float) -> None:
        time.sleep(seconds)
