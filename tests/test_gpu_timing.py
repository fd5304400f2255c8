"""How the GPU benchmark takes times, without a GPU: order, pauses, block sizes, and what its two clocks read."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import gpu_timing


class FakeClock:
    """Every caller returns how long it takes; the clock notes what happened, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def block(self, run: Callable[[], Any], launches: int) -> list[float]:
        seconds = run()
        self.events.append(("block", (seconds, launches)))
        return [seconds] * launches

    def idle(self, seconds: float) -> None:
        self.events.append(("idle", seconds))


FAKES = {"heed": lambda: 1e-3, "fa2": lambda: 2e-3, "cudnn": lambda: 4e-3}


def test_every_round_runs_all_in_another_order() -> None:
    clock = FakeClock()
    samples = gpu_timing.measure(FAKES, clock, "paused", rounds=8)
    assert samples == {name: [run()] * 8 for name, run in FAKES.items()}
    order = [event[1][0] for event in clock.events if event[0] == "block"][len(FAKES) :]
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(one) == [1e-3, 2e-3, 4e-3] for one in rounds)
    assert len(set(rounds)) > 1


def test_paused_idles_before_every_block_and_hot_never() -> None:
    clock = FakeClock()
    gpu_timing.measure(FAKES, clock, "paused", rounds=2)
    kinds = [kind for kind, _ in clock.events][len(FAKES) :]
    assert kinds == ["idle", "block"] * 6
    assert {value for kind, value in clock.events if kind == "idle"} == {0.12}
    clock = FakeClock()
    gpu_timing.measure(FAKES, clock, "hot", rounds=2)
    assert all(kind == "block" for kind, _ in clock.events)


def test_hot_rounds_begin_on_a_hot_gpu() -> None:
    clock = FakeClock()
    gpu_timing.measure(FAKES, clock, "hot", rounds=1)
    blocks = [value for _, value in clock.events]
    heating = blocks[len(FAKES) : -len(FAKES)]
    assert sum(seconds * launches for seconds, launches in heating) >= 0.2


@pytest.mark.parametrize(("seconds", "launches"), [(1.0, 5), (1e-3, 20), (1e-6, 40), (0.0, 40)])
def test_blocks_are_neither_too_long_nor_too_short(seconds: float, launches: int) -> None:
    clock = FakeClock()
    gpu_timing.measure({"heed": lambda: seconds}, clock, "hot", rounds=1)
    assert clock.events[-1] == ("block", (seconds, launches))


class FakeTorchCuda(types.ModuleType):
    """A GPU that runs what is queued in order; `now` is its time, `spins` what it was made to wait."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.now, self.spins = 0.0, []  # type: float, list[float]
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = -1.0

            def record(self) -> None:
                self.at = cuda.now

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        self.Event = Event

    def _sleep(self, cycles: int) -> None:
        self.spins.append(cycles / 2e9)

    def synchronize(self) -> None:
        pass


def test_events_time_each_launch_and_the_spin_covers_a_slow_host(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = types.ModuleType("torch")
    cuda = torch.cuda = FakeTorchCuda()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    host_now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: host_now[0])
    clock = gpu_timing.EventClock()
    count = 0

    def slow_host() -> None:
        nonlocal count
        count += 1
        host_now[0] += 1e-3
        cuda.now += 0.5e-3

    assert clock.block(slow_host, 3) == pytest.approx([0.5e-3] * 3)
    assert count == 1 + 3 + 2 + 3  # to warm up, to learn the host's cost, in front of the block, the block
    assert cuda.spins[-1] >= 5e-3  # the host's time for the whole block
    assert clock.block(slow_host, 3) == pytest.approx([0.5e-3] * 3)
    assert cuda.spins[-1] >= 5e-3

    def fast_host() -> None:
        host_now[0] += 1e-5
        cuda.now += 1e-3

    clock.block(fast_host, 3)
    clock.block(fast_host, 3)
    assert cuda.spins[-1] < 1e-4


def test_the_host_clock_times_blocks_to_the_last_result(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pending: list[float] = []

    def wait(_: Any) -> None:
        now[0] += sum(pending)
        pending.clear()

    assert gpu_timing.WallClock(wait).block(lambda: pending.append(2e-3), 4) == pytest.approx([2e-3])


def test_nobody_to_time_ends_at_once() -> None:
    assert gpu_timing.measure({}, FakeClock(), "hot", rounds=2) == {}
