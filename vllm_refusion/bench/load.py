"""A closed loop of requests through vLLM's engine, timed step by step."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Clock = Callable[[], float]
SETTLED_STEPS = 3  # scheduled without a prompt: the step before, the one measured, the next


@dataclass
class Trace:
    """When a request was added, and when how many of its tokens came, in seconds."""

    added: float
    deliveries: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.deliveries)

    @property
    def gaps(self) -> list[float]:
        times = [at for at, _ in self.deliveries]
        return [later - earlier for earlier, later in zip(times, times[1:])]


@dataclass
class Load:
    """What a level of concurrency took.

    Attributes:
        wall: from the first request added to the last token, in seconds.
        steps: calls of the engine's step, i.e. forward passes of the batch.
        settled: (duration, tokens delivered) of every step in which the full concurrency decoded
            and neither prompt tokens nor the end of a request were in its way.
    """

    traces: list[Trace]
    wall: float
    steps: int
    settled: list[tuple[float, int]]


def run_load(
    engine: Any,
    requests: Sequence[tuple[Any, Any]],
    concurrency: int,
    name: str,
    watch: Any = None,
    clock: Clock = time.perf_counter,
) -> Load:
    """Keeps ``concurrency`` requests in flight until all are done.

    Args:
        engine: an ``LLMEngine``.
        requests: (prompt, sampling parameters) with output kind DELTA.
        name: prefix of the request ids, unique in the engine.
        watch: ``compat.ScheduleWatch`` of the engine's scheduler. Without one, steps count as
            settled once every request in flight has a token.
    """
    waiting = deque(enumerate(requests))
    traces: dict[str, Trace] = {}
    in_flight: set[str] = set()
    starting: set[str] = set()  # in flight, no token yet
    settled: list[tuple[float, int]] = []
    steps = 0

    def fill() -> None:
        while waiting and len(in_flight) < concurrency:
            index, (prompt, params) = waiting.popleft()
            key = f"{name}-{index}"
            traces[key] = Trace(clock())
            engine.add_request(key, prompt, params)
            in_flight.add(key)
            starting.add(key)

    begin = last = clock()
    fill()
    while in_flight:
        full = len(in_flight) == concurrency
        outputs = engine.step()
        now = clock()
        steps += 1
        delivered, finished, all_started = 0, False, not starting
        for output in outputs:
            count = len(output.outputs[0].token_ids)
            if count:
                traces[output.request_id].deliveries.append((now, count))
                starting.discard(output.request_id)
                delivered += count
            if output.finished:
                in_flight.discard(output.request_id)
                starting.discard(output.request_id)
                finished = True
        if watch is not None:
            # while a step is waited for, the one after it is scheduled already
            decoding = watch.steps_since_prompt >= SETTLED_STEPS and watch.requests == concurrency
        else:
            decoding = all_started
        if full and decoding and not finished:
            settled.append((now - last, delivered))
        fill()
        last = now
    wall = last - begin
    while engine.has_unfinished_requests():
        engine.step()
    return Load(list(traces.values()), wall, steps, settled)


def summarise(load: Load) -> dict[str, Any]:
    """The figures of a level that need no knowledge of the engine; times in ms, None if unknown."""
    tokens = sum(trace.tokens for trace in load.traces)
    gaps = [gap for trace in load.traces for gap in trace.gaps]
    first = [trace.deliveries[0][0] - trace.added for trace in load.traces if trace.deliveries]
    pace = [
        (trace.deliveries[-1][0] - trace.deliveries[0][0]) / (trace.tokens - trace.deliveries[0][1])
        for trace in load.traces
        if len(trace.deliveries) > 1
    ]
    settled_time = sum(duration for duration, _ in load.settled)
    settled_tokens = sum(count for _, count in load.settled)
    durations = [duration for duration, _ in load.settled]
    return {
        "requests_done": len(load.traces),
        "output_tokens": tokens,
        "deliveries": sum(len(trace.deliveries) for trace in load.traces),
        "wall_s": load.wall,
        "tokens_per_s": tokens / load.wall,
        "settled_tokens_per_s": settled_tokens / settled_time if settled_time else None,
        "steps": load.steps,
        "settled_steps": len(durations),
        "step_ms": 1e3 * settled_time / len(durations) if durations else None,
        "step_ms_p50": percentile(durations, 50),
        "step_ms_p99": percentile(durations, 99),
        "ttft_ms": 1e3 * statistics.fmean(first) if first else None,
        "ttft_ms_p50": percentile(first, 50),
        "ttft_ms_p99": percentile(first, 99),
        "gap_ms_p50": percentile(gaps, 50),
        "gap_ms_p99": percentile(gaps, 99),
        "time_per_token_ms": 1e3 * statistics.fmean(pace) if pace else None,
    }


def percentile(seconds: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile of some durations, in ms."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return 1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
