"""What the front end may ask of the worker that holds the decoding state."""

from __future__ import annotations

import gc
from typing import Any

import torch

from vllm_refusion.decoding.state import Field, Phase

SIZES = ("objects", "device_bytes")  # of refusion_held


class WorkerExtension:
    """Mixed into vLLM's worker, so that ``collective_rpc`` reaches the counters on the device."""

    def refusion_counters(self) -> list[int]:
        """Totals since start, indexed by ``Counter``."""
        return self.model_runner.model_state.decode_state.counters.tolist()

    def refusion_rows_run(self) -> int:
        """Decode rows of all steps since start, with those that no request used."""
        budget = self.model_runner.model_state.sampler.row_budget
        return 0 if budget is None else budget.rows_run

    def refusion_held(self) -> dict[str, int]:
        """What is kept of requests, by kind: nothing of any while the engine is idle.

        Beside that ``objects`` of Python in this process and ``device_bytes`` in use, which stay
        the same once the engine is warm. Collects garbage first: for tests.
        """
        state = self.model_runner.model_state
        held = {
            "decoding states": int((state.decode_state.ints[:, Field.PHASE] != Phase.IDLE).sum()),
            "requests": len(state._req_of),
            "suspended requests": len(state._suspended) + len(state._suspended_records),
            "logprob records": len(state.records),
            "constrained requests": len(state.constrained),
            "pick limits": len(state.limits._cut) + len(state.limits._bias_row_of),
            "prompt scores": len(state.prompt_scores.in_progress_prompt_logprobs)
            + len(state.prompt_scores.token_id_scores),
            "penalties": len(state.penalties._row_of),
        }
        device_bytes = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        gc.collect()  # what was made to tell those bytes, too
        return held | {"objects": len(gc.get_objects()), "device_bytes": device_bytes}

    def refusion_recordings(self) -> list[dict[str, Any]]:
        """What ``trace.Recorder.take`` gives; nothing where the engine does not trace."""
        recorder = self.model_runner.model_state.recorder
        return [] if recorder is None else recorder.take()

    def refusion_listen(self) -> str | None:
        """Where a ``trace_channel.Listener`` finds this worker's passes, if it publishes any.

        Says hello there, which a listener hears once it is connected.
        """
        publisher = self.model_runner.model_state.publisher
        if publisher is None:
            return None
        publisher.hello()
        return publisher.address
