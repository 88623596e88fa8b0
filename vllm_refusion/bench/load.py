"""A closed loop of requests through vLLM's engine, timed step by step."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Clock = Callable[[], float]
BIN_S = 0.25  # of what ``over_time`` tells
SETTLED_STEPS = 3  # scheduled without a prompt: the step before, the one measured, the next


@dataclass
class Trace:
    """When a request was added, when how many of its tokens came, in seconds, and which."""

    added: float
    deliveries: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def deliver(self, at: float, token_ids: Sequence[int]) -> None:
        if token_ids:
            self.deliveries.append((at, len(token_ids)))
            self.token_ids += token_ids

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
            token_ids = output.outputs[0].token_ids
            traces[output.request_id].deliver(now, token_ids)
            delivered += len(token_ids)
            if token_ids:
                starting.discard(output.request_id)
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


def run_phases(
    engine: Any,
    request: Callable[[int], tuple[Any, Any]],
    phases: Sequence[tuple[int, float]],
    name: str,
    clock: Clock = time.perf_counter,
) -> list[Trace]:
    """A load that moves: each phase keeps so many requests in flight for so many seconds.

    Those above a phase's number are not cut off, and those of the last one end.

    Args:
        request: prompt and sampling parameters of the n-th request.
    """
    traces: dict[str, Trace] = {}
    in_flight: set[str] = set()
    begin = clock()
    while True:
        left, wanted = clock() - begin, 0
        for concurrency, seconds in phases:
            if left < seconds:
                wanted = concurrency
                break
            left -= seconds
        while len(in_flight) < wanted:
            key = f"{name}-{len(traces)}"
            prompt, params = request(len(traces))
            traces[key] = Trace(clock())
            engine.add_request(key, prompt, params)
            in_flight.add(key)
        if not in_flight:
            break
        for output in engine.step():
            traces[output.request_id].deliver(clock(), output.outputs[0].token_ids)
            if output.finished:
                in_flight.discard(output.request_id)
    while engine.has_unfinished_requests():
        engine.step()
    return list(traces.values())


def ask(
    engine: Any, prompt: Any, params: Any, name: str, clock: Clock = time.perf_counter
) -> tuple[Trace, int]:
    """One request alone, and how many of its prompt's tokens were in the prefix cache."""
    trace, cached = Trace(clock()), 0
    engine.add_request(name, prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            trace.deliver(clock(), output.outputs[0].token_ids)
            cached = output.num_cached_tokens or cached
    return trace, cached


def over_time(traces: Sequence[Trace]) -> list[dict[str, float | None]]:
    """Throughput, requests in flight and gaps between deliveries, every ``BIN_S`` seconds."""
    begin = traces[0].added
    found = []
    last = max(trace.deliveries[-1][0] for trace in traces) - begin
    for number in range(int(last / BIN_S) + 1):
        start, stop = begin + number * BIN_S, begin + (number + 1) * BIN_S
        tokens, running, gaps = 0, 0, []
        for trace in traces:
            before = None
            for at, count in trace.deliveries:
                if start <= at < stop:
                    tokens += count
                    if before is not None:
                        gaps.append(at - before)
                before = at
            running += trace.added < stop <= trace.deliveries[-1][0]
        found.append(
            {
                "at_s": number * BIN_S,
                "tokens_per_s": tokens / BIN_S,
                "running": running,
                "gap_ms_p50": percentile(gaps, 50),
                "gap_ms_p99": percentile(gaps, 99),
            }
        )
    return found


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
