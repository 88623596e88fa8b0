"""Scheduling of ReFusion requests on vLLM's scheduler.

vLLM's scheduler sees a request as prompt + emitted tokens in position order and, every step, as
many draft tokens as the request's canvas may have rows. The device may have committed tokens ahead
of a gap; they are emitted once the gap closes, at the latest with their block. The gap's first slot
may have final tokens that are emitted before it is committed. So whole slots emitted are committed,
and of a slot emitted in part nothing need be in the KV cache. Of a request in serial mode all
tokens emitted are in the KV cache, in position order, but for the last one.

A request whose tokens follow a grammar (structured outputs, in serial mode) sits out while a pass
of it is in flight, and its drafts come with that pass's output: see ``grammar_masks``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.utils import strip_speculative_padding

from vllm_refusion.engine import compat
from vllm_refusion.engine.grammar_drafts import GrammarDrafts
from vllm_refusion.engine.request import RequestSpec
from vllm_refusion.engine.settings import (
    canvas_length,
    fuses_passes,
    position_slack,
    serial_rows,
    server_defaults,
)

LONGEST_PROMPT_TO_PLAN_WITH = 2048  # tokens in the last chunk
FIRST_ROWS_OF_ALL = 128  # of requests in serial mode together: drafts are dear where many run
NOT_YET = 2**62  # a step that never comes


def _constrained(request: Request) -> bool:
    """Whether its tokens follow a grammar: of requests in serial mode only."""
    return request.use_structured_output


class _CanvasScheduling:
    """What ReFusion adds to both of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.canvas_length = canvas_length(self.vllm_config)
        self.fuses_passes = fuses_passes(self.vllm_config)
        self.serial_rows = serial_rows(self.vllm_config)
        self.decoding_defaults = server_defaults(self.vllm_config.model_config)
        # by request: log-probabilities of prompts that nothing is delivered behind yet
        self._prompt_scores: dict[str, Any] = {}
        self._prompt_token_scores: dict[str, Any] = {}
        # by request: [1 + drafts, words] int32, what its grammar allows in the step under way
        self._allowed: dict[str, np.ndarray] = {}
        # whose limits leave nothing behind the tokens delivered, where their grammars may end
        self._complete: list[Request] = []
        self.grammar_drafts = GrammarDrafts(self.structured_output_manager, self.serial_rows - 2)
        compat.adapt_scheduler(
            self, position_slack(self.vllm_config), self._lookahead, self._cacheable
        )

    def canvas_width(self, request: Request) -> int:
        """Upper bound of the rows the request's next pass may have.

        That is what is left of its block, or more where there is room for riders. With them an
        operation of an infill may take a slot's rows more (``compose``).
        """
        spec = self._spec(request)
        if spec.serial:
            return self._serial_width()
        params = spec.decoding
        emitted = params.whole_slots(request.num_output_tokens)
        left = spec.budget - emitted
        if not self.scheduler_config.async_scheduling:
            left = min(params.block_length - emitted % params.block_length, left)
        # else the pass in flight may finish the block
        needed = min(params.block_length, left)
        if not self.fuses_passes:
            return needed
        if params.block_length + params.slot_size <= self.canvas_length:
            needed += params.slot_size
        share = self.max_num_scheduled_tokens // max(1, len(self.running))
        return max(needed, min(self.canvas_length, share))

    def _serial_width(self) -> int:
        """The same of all requests in serial mode: shares of one half, so that prompts get on."""
        share = self.max_num_scheduled_tokens // (2 * max(1, len(self.running)))
        return max(self.serial_rows, min(self.canvas_length, share))

    def _first_rows(self, request: Request) -> int:
        """Rows of its first canvas; where many requests run, not all masks of serial mode."""
        spec = self._spec(request)
        if spec.serial:
            return min(spec.first_rows, max(1, FIRST_ROWS_OF_ALL // len(self.running)))
        return spec.first_rows

    def _spec(self, request: Request) -> RequestSpec:
        spec = getattr(request, "refusion_spec", None)
        if spec is None:
            spec = request.refusion_spec = RequestSpec.of(
                request.sampling_params,
                request.num_prompt_tokens,
                self.decoding_defaults,
                self.vllm_config.model_config.max_model_len,
            )
        return spec

    def _lookahead(self, request: Request, scheduled_end: int) -> int:
        """KV entries to reserve past ``scheduled_end``, the end of what is scheduled now.

        A prompt is admitted only with room for its first canvas, else requests would evict each
        other in turn. Without riders a canvas never reaches past the last slot of the response.
        """
        if scheduled_end <= request.num_tokens:
            return self.canvas_width(request)
        if self.fuses_passes or self._spec(request).serial:
            return 0
        last = request.num_prompt_tokens + self._spec(request).budget
        return min(0, last - scheduled_end)

    def _cacheable(self, request: Request) -> int:
        """How many of its tokens may enter the prefix cache, whose blocks are in position order."""
        return request.num_tokens - 1 if self._spec(request).serial else request.num_prompt_tokens

    def add_request(self, request: Request) -> None:
        if not self._spec(request).serial:
            compat.stop_hashing_output(request)
        super().add_request(request)
        compat.count_passes(request, self.canvas_length)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        with compat.loras_of_all_running(self, NOT_YET):
            return super().schedule(*args, **kwargs)

    def _plan_with_prompts(self, scheduled: SchedulerOutput) -> None:
        """Adds the first canvas to requests whose prompt ends in this step; pages are reserved.

        Not to long prompts: they have attention kernels of their own, and gain little.
        """
        decoding = scheduled.scheduled_spec_decode_tokens
        for request_id, rows in scheduled.num_scheduled_tokens.items():
            if request_id in decoding:
                continue
            request = self.requests[request_id]
            prompt = request.num_prompt_tokens
            canvas = self._first_rows(request)
            if (
                rows <= LONGEST_PROMPT_TO_PLAN_WITH
                and request.num_computed_tokens + rows == prompt == request.num_tokens
                and not request.num_preemptions
                and prompt + canvas <= self.vllm_config.model_config.max_model_len
                and scheduled.total_num_scheduled_tokens + canvas <= self.max_num_scheduled_tokens
            ):
                scheduled.num_scheduled_tokens[request_id] += canvas
                scheduled.total_num_scheduled_tokens += canvas
                scheduled.scheduled_spec_decode_tokens[request_id] = [-1] * canvas
                compat.uncount_pass(request)  # it is the prompt's

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if self.fuses_passes:
            self._plan_with_prompts(scheduler_output)
        super()._update_after_schedule(scheduler_output)
        # What a canvas holds is decided on the device: vLLM only needs the number.
        serial_canvas = [-1] * self._serial_width()
        decoding = scheduler_output.scheduled_spec_decode_tokens
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            if request.is_prefill_chunk:
                continue
            if self._spec(request).serial:
                request.spec_token_ids = serial_canvas
            else:
                request.spec_token_ids = [-1] * self.canvas_width(request)
            if request_id in decoding and _constrained(request):
                request.next_decode_eligible_step = NOT_YET

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """What grammars allow behind the known tokens and the drafts of this step's requests."""
        drafts = {
            request_id: strip_speculative_padding(tokens)
            for request_id, tokens in scheduler_output.scheduled_spec_decode_tokens.items()
            if request_id in self.requests and _constrained(self.requests[request_id])
        }
        if not drafts:
            return None
        output = compat.grammar_output(self.structured_output_manager, self.requests, drafts)
        ends = np.cumsum([1 + len(tokens) for tokens in drafts.values()])
        self._allowed |= zip(drafts, np.split(output.grammar_bitmask, ends[:-1]))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Takes a step's tokens; constrained requests are eligible again, with drafts that fit."""
        proposed = compat.take_drafts(model_runner_output)  # they follow the tokens
        self._deliver_prompt_scores(model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._end_complete(outputs)
        for request_id in scheduler_output.scheduled_spec_decode_tokens:
            self._allowed.pop(request_id, None)
            request = self.requests.get(request_id)
            if request is None or not _constrained(request):
                continue
            request.next_decode_eligible_step = 0
            if request.status == RequestStatus.RUNNING:
                width, running = self._serial_width(), len(self.running)
                drafts = self.grammar_drafts.fit(request, proposed.get(request_id, []), running)
                request.spec_token_ids = [*drafts, *[-1] * (width - len(drafts))]
        return outputs

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        """Ends a request whose limits leave nothing that its grammar allows: algorithm section 7.

        The device picks a token that the grammar refuses then. It is dropped; the response is
        complete if the grammar could end there.
        """
        update = super()._update_request_with_output
        allowed = self._allowed.get(request.request_id)
        row = None if allowed is None else allowed[len(new_token_ids) - 1]
        if row is None or _in_mask(row, new_token_ids[-1]):
            return update(request, new_token_ids, *args, **kwargs)
        tokens, stopped = new_token_ids[:-1], False
        if tokens:
            tokens, stopped = update(request, tokens, *args, **kwargs)
        if stopped:
            return tokens, True
        complete = any(_in_mask(row, end) for end in request.sampling_params.all_stop_token_ids)
        if complete and tokens:
            self._complete.append(request)
            return tokens, False
        request.status = (
            RequestStatus.FINISHED_STOPPED if complete else RequestStatus.FINISHED_ABORTED
        )
        return tokens, True

    def _end_complete(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Ends them in an output of its own: of one with tokens the last would be no text.

        To vLLM's front end the last token of a stopped request is what stopped it.
        """
        complete, self._complete = self._complete, []
        for request in complete:
            self.finish_requests(request.request_id, RequestStatus.FINISHED_STOPPED)
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )

    def _deliver_prompt_scores(self, output: ModelRunnerOutput) -> None:
        """Holds log-probabilities of prompts back until tokens come: vLLM delivers them together.

        A prompt that was computed again after a preemption has its delivered already.
        """
        for held, new in (
            (self._prompt_scores, output.prompt_logprobs_dict),
            (self._prompt_token_scores, output.prompt_token_id_logprobs_dict),
        ):
            if not held and not new:
                continue
            held.update(new)
            new.clear()
            for name in list(held):
                request = self.requests.get(name)
                if request is None or request.num_output_tokens:
                    del held[name]
                elif name in output.req_id_to_index and _tokens_of(output, name):
                    new[name] = held.pop(name)

    def make_spec_decoding_stats(self, spec_decoding_stats: Any, *args: Any, **kwargs: Any) -> Any:
        """Canvas rows are no speculated tokens: vLLM's acceptance figures would mislead."""
        return spec_decoding_stats


def _in_mask(row: np.ndarray, token: int) -> bool:
    """Whether a row [words] int32 of a grammar's mask has the token."""
    return bool(row[token // 32] >> (token % 32) & 1)


def _tokens_of(output: ModelRunnerOutput, name: str) -> list[int]:
    return output.sampled_token_ids[output.req_id_to_index[name]]


class ReFusionScheduler(_CanvasScheduling, Scheduler):
    """Synchronous scheduling."""


class ReFusionAsyncScheduler(_CanvasScheduling, AsyncScheduler):
    """Schedules a step while the one before it still runs."""


def create_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """The value of ``scheduler_cls``: a factory, as async scheduling is settled late."""
    is_async = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (ReFusionAsyncScheduler if is_async else ReFusionScheduler)(*args, **kwargs)
