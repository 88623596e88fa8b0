"""Counts of what decoding did: forward passes by kind, rows fed, tokens delivered."""

from __future__ import annotations

from typing import Any

from vllm_refusion.decoding import Counter


class WorkerExtension:
    """Mixed into vLLM's worker, so that ``collective_rpc`` reaches the counters on the device."""

    def refusion_counters(self) -> list[int]:
        """Totals since start, indexed by ``Counter``."""
        return self.model_runner.model_state.decode_state.counters.tolist()

    def refusion_recordings(self) -> list[dict[str, Any]]:
        """What ``trace.Recorder.take`` gives; nothing where the engine does not trace."""
        recorder = self.model_runner.model_state.recorder
        return [] if recorder is None else recorder.take()


def snapshot(llm: Any) -> dict[str, int]:
    """Totals since the engine started, from an ``LLM``.

    Returns:
        ``output_tokens``; ``forward_passes`` (prompt and replay passes excluded), also by kind
        under the names of ``Counter``; ``rows_fed``. Tokens per forward of some requests that
        ran alone is the difference of output_tokens over that of forward_passes.
    """
    counters = llm.collective_rpc("refusion_counters")[0]
    counts = {counter.name.lower(): counters[counter] for counter in Counter}
    passes = (Counter.PLAN, Counter.VERIFY, Counter.PREDICT, Counter.INFILL_VERIFY)
    counts["forward_passes"] = sum(counters[kind] for kind in passes)
    counts["output_tokens"] = counts.pop("tokens")
    return counts
