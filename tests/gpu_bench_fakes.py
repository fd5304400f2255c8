"""Contenders and a clock with made-up times, so that every figure in a benchmark's report has one right value."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


class FakeOut:
    device = types.SimpleNamespace(type="cpu")


def fake_maker(seconds: float) -> Callable[..., Callable[[], Any]]:
    """A contender that takes so long by TimedClock."""

    def make(*_: Any) -> Callable[[], Any]:
        def run() -> Any:
            return FakeOut()

        run.seconds = seconds  # type: ignore[attr-defined]
        return run

    return make


def failing_maker(*_: Any) -> Callable[[], Any]:
    def run() -> Any:
        raise RuntimeError("No available kernel.\nAborting execution.")

    return run


class TimedClock:
    def block(self, run: Any, launches: int) -> list[float]:
        return [run.seconds] * launches

    def idle(self, seconds: float) -> None:
        pass
