"""Counts of what decoding did: forward passes by kind, rows fed, tokens delivered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from vllm_refusion.decoding.state import Counter
from vllm_refusion.engine import compat

logger = logging.getLogger("vllm.refusion")

DECODING_PASSES = (
    Counter.PLAN,
    Counter.VERIFY,
    Counter.PREDICT,
    Counter.INFILL_VERIFY,
    Counter.SERIAL,
)
PASSES = (*DECODING_PASSES, Counter.REPLAY, Counter.IDLE)


def snapshot(llm: Any) -> dict[str, int]:
    """Totals since the engine started, from an ``LLM``.

    Returns:
        ``output_tokens``; ``forward_passes`` (prompt and replay passes excluded), also by kind
        under the names of ``Counter``; ``rows_fed``. Tokens per forward of some requests that
        ran alone is the difference of output_tokens over that of forward_passes.
    """
    counters = llm.collective_rpc("refusion_counters")[0]
    counts = {counter.name.lower(): counters[counter] for counter in Counter}
    counts["forward_passes"] = sum(counters[kind] for kind in DECODING_PASSES)
    counts["output_tokens"] = counts.pop("tokens")
    return counts


async def report(engine: Any) -> None:
    """Fetches the counters of an ``AsyncLLM``, updates its metrics and logs what was done since."""
    if not hasattr(engine, "refusion_figures"):
        engine.refusion_figures = Figures(engine.model_config.served_model_name)
    each = await compat.call_workers(engine, "refusion_counters")
    # ranks of one engine decide alike; data parallel engines have requests of their own
    line = engine.refusion_figures.update([sum(totals) for totals in zip(*(e[0] for e in each))])
    if line:
        logger.info(line)


def _counter(name: str, documentation: str, *labels: str) -> Any:
    """The process's counter of that name; its engines have labels of their own.

    Made anew where vLLM has dropped it.
    """
    import prometheus_client

    name = f"vllm:refusion_{name}"
    try:
        _counters[name] = prometheus_client.Counter(name, documentation, ["model_name", *labels])
    except ValueError:  # registered already
        if name not in _counters:
            raise
    return _counters[name]


_counters: dict[str, Any] = {}


class Figures:
    """Prometheus counters that follow the totals of the device.

    ``vllm:refusion_passes_total`` by ``kind``; one counter for every other entry of ``Counter``.
    The names begin as vLLM's, which drops them with its own when another engine starts. Engines
    of the same name in one process count together.
    """

    def __init__(self, model_name: str) -> None:
        labels = {"model_name": model_name}
        passes = _counter("passes", "Forward passes of requests.", "kind")
        self._metrics = {kind: passes.labels(**labels, kind=kind.name.lower()) for kind in PASSES}
        for counter in Counter:
            if counter not in self._metrics:
                name = counter.name.lower()
                self._metrics[counter] = _counter(name, f"Total of {name}.").labels(**labels)
        self._totals = [0] * len(Counter)

    def update(self, totals: Sequence[int]) -> str | None:
        """Counts up to ``totals``; returns a line about what was done since, None for nothing."""
        done = [new - old for new, old in zip(totals, self._totals, strict=True)]
        self._totals = list(totals)
        for counter, metric in self._metrics.items():
            metric.inc(done[counter])
        passes = sum(done[kind] for kind in DECODING_PASSES)
        if not passes:
            return None
        kinds = ", ".join(f"{done[kind]} {kind.name.lower()}" for kind in PASSES if done[kind])
        passed = done[Counter.TOKENS_PASSED] + done[Counter.DRAFTS_PASSED]
        tested = done[Counter.TOKENS_TESTED] + done[Counter.DRAFTS_TESTED]
        share = passed / max(1, tested)
        return (
            f"ReFusion: {done[Counter.TOKENS] / passes:.2f} tokens per forward pass of a request, "
            f"{done[Counter.ROWS_FED] / passes:.1f} fed; {share:.0%} of the tested tokens "
            f"accepted; passes: {kinds}"
        )
