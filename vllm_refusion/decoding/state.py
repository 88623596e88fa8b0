"""Per-request decoding state on the device, and the meaning of every field.

A request is a small state machine that advances by one forward pass at a time. Each pass feeds a
*canvas*: a run of query rows placed behind the request's committed KV entries. The first ROWS rows
are what the phase asks for (algorithm section 3):

=============== ============================== ======================================= ==========
phase           rows of the canvas             what the pass decides                   rows kept
=============== ============================== ======================================= ==========
PLAN            masks of all remaining slots   which slots are chosen, their drafts    none
VERIFY          drafts of the chosen slots     how long a prefix is accepted           a prefix
INFILL          per slot, on its own: accepted proposals for the masks; how far the    what is next
                tokens, then masks or          proposals are accepted
                proposals                                                              to commit
REPLAY          committed tokens after a       nothing: rebuilds the KV                all
                preemption, in commit order
=============== ============================== ======================================= ==========

The rows kept are always a prefix of the canvas, so the KV of a committed token is written once, at
the index it will have for ever: index = commit order, RoPE position = prompt + response position.

Where rows are dear, an operation of an infill (or the verification of a single slot) is fed piece
by piece: tokens behind those under test, and masks behind those proposed for, wait until they are
needed. If they are, an accepted token is fed again to test the one behind it, and the operation's
masks are fed again for its other masks to see.

Behind the rows of the phase, up to CANVAS, the canvas may carry *riders*: the masks of an operation
that comes next if this pass turns out in one certain way, each seeing what it would see then. If it
does, that operation is done in the same pass. A rider is either

- the next plan, if just the slots up to a certain one are committed, or
- the next predict of a slot, if just its tokens up to a certain one are accepted.

All this changes the number of passes and rows and never a token: an operation's rows are the same
tokens at the same positions that see the same, whichever pass feeds them. The slots of an infill do
not see each other, so that one may be a step ahead of another.

Within a block everything is kept *by block position* (0 .. block_length-1); canvas rows are the
positions that take part, in ascending order. Positions written ``response position`` count from the
first response token.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from vllm_refusion.decoding.params import DecodingParams


class Phase(IntEnum):
    """What the request's next pass is."""

    IDLE = 0  # no request in this slot
    PREFILL = 1
    PLAN = 2
    VERIFY = 3
    INFILL = 4
    REPLAY = 5
    DONE = 6
    START = 7  # only as RESUME: begin the first block once the prompt is in
    SERIAL = 8  # serial decoding (section 7); its RESUME is this, too, throughout


class Status(IntEnum):
    """State of one position of the current block."""

    MASKED = 0
    CHOSEN = 1  # has a draft or proposal that is to be verified
    ACCEPTED = 2
    COMMITTED = 3
    DROPPED = 4
    BLANK = 5  # of a slot in infill, waits for a proposal


class Field(IntEnum):
    """Columns of ``DecodeState.ints``."""

    PHASE = 0
    RESUME = 1  # phase that follows PREFILL and REPLAY
    PROMPT_LEN = 2
    SLOT_SIZE = 3
    BLOCK_LENGTH = 4
    BUDGET = 5  # response positions to decode: max_tokens rounded up to whole slots
    MAX_TOKENS = 6
    EOS = 7  # -1: an ordinary token
    BLOCK_START = 8  # response position
    LIMIT = 9  # response positions at or past this are not wanted (budget, or after EOS)
    EMITTED = 10  # response tokens handed to the scheduler, always in position order
    COMMITTED = 11  # response tokens committed, in commit order
    ROWS = 12  # rows of the present canvas that its phase needs
    DRAW = 13  # plan and predict operations before the present infill (keys the sampling noise)
    PASSES = 14  # forward passes made, prompt and replay excluded
    CANVAS = 15  # rows of the present canvas with its riders
    KEPT = 16  # accepted tokens of the present infill whose KV is final: the first in commit order
    TESTED = 17  # tokens tested of late
    PASSED = 18  # of TESTED
    # of serial decoding
    MASKED_STARTS = 19  # whether a slot's first token is picked in the row of a mask
    DRAFTS = 20  # drafts at hand
    TESTS = 21  # of them, those in the present canvas
    MOST_TESTS = 22  # more are never fed at once
    EXPECTED = 23  # tokens that the present canvas is expected to bring, in 1/256


class Counter(IntEnum):
    """Entries of ``DecodeState.counters``, totals since start."""

    PLAN = 0
    VERIFY = 1
    PREDICT = 2
    INFILL_VERIFY = 3
    REPLAY = 4
    IDLE = 5  # passes that could decide nothing (truncated canvas, request already done)
    ROWS_FED = 6
    TOKENS = 7  # response tokens emitted
    RIDER_ROWS_FED = 8  # of ROWS_FED
    PLANS_RIDDEN = 9  # plans that needed no pass of their own
    PREDICTS_RIDDEN = 10  # proposals for a slot that needed no pass of their own
    SLOTS_CHOSEN = 11  # by plans
    TOKENS_TESTED = 12  # against the token threshold
    TOKENS_PASSED = 13  # of TOKENS_TESTED
    INFILLS = 14  # completed
    INFILL_ROUNDS = 15  # of completed infills: the most predicts that one of its slots took
    SERIAL = 16  # passes of serial decoding
    DRAFTS_TESTED = 17  # of serial decoding, up to the first that was refused
    DRAFTS_PASSED = 18  # of DRAFTS_TESTED


ACCEPTANCE_WINDOW = 128  # TESTED and PASSED are halved when so many have been tested
FIRST_MASKS = 8  # of serial decoding, fed with the end of a prompt
MAX_STOP_IDS = 64  # stop token ids that min_tokens can hold back, per request


class DecodeState:
    """State of up to ``max_requests`` requests, indexed by request slot.

    Attributes (device tensors; R = max_requests, W = canvas_length, P = max_response):
        ints: [R, len(Field)] int32.
        slot_threshold, token_threshold, temperature: [R] float32.
        seed: [R] int64. min_tokens: [R] int32. stop_ids: [R, MAX_STOP_IDS] int32, padded with -1.
        status, token: [R, W] int32, by block position.
        confidence: [R, W] float32, by block position: probability of ``token`` when it was picked.
        rounds: [R, W] int32, by block position: predict operations of its slot in this infill.
        origin: [R, W] int32, by block position that has or awaits a proposal: where the operation
            that proposes for it began. The token there is accepted without a test.
        canvas_row: [R, W] int32, by block position: its row among those of the phase, or -1.
        rider_row, rider_width: [R, W] int32, by block position: the canvas row of a rider's mask
            for it, -1 for none, and the number of masks from there on. At the first position of a
            slot: the plan if that slot is the last to be committed. At another: the predict of its
            slot if that is the first position not accepted.
        canvas_token: [R, W] int64, by canvas row.
        row_position: [R, W] int32, by canvas row: response position, -1 for an unused row.
        row_target: [R, W] int32, by canvas row: the response position that it picks a token for,
            -1 for an unused row. A mask's is its own, a token's in serial decoding the next one.
        row_draw: [R, W] int32, by canvas row: operations before the one that the row is of.
        row_context, row_run_start, row_run_end, row_own_start: [R, W] int32, by canvas row: it sees
            the context up to row_context, the canvas rows [row_run_start, row_run_end) and those
            from row_own_start to itself. Tokens kept by the present infill have rows below 0.
        response: [R, P] int32, committed or emitted token by response position.
        order: [R, P] int32, response position of the j-th committed token.
        group_context: [R, P] int32, for the j-th committed token: the number of committed
            response tokens its slot could see if it was committed by infill, else -1 (it saw all
            committed before it).
        counters: [len(Counter)] int64.

    Args:
        canvas_token: the tensor to use for ``canvas_token``; allocated when None.
    """

    def __init__(
        self,
        max_requests: int,
        canvas_length: int,
        max_response: int,
        mask_token_id: int,
        device: torch.device | str,
        canvas_token: torch.Tensor | None = None,
    ) -> None:
        self.max_requests = max_requests
        self.canvas_length = canvas_length
        self.max_response = max_response
        self.mask_token_id = mask_token_id
        self.device = torch.device(device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        shape = (max_requests, canvas_length)
        self.ints = zeros(max_requests, len(Field))
        self.slot_threshold = zeros(max_requests, dtype=torch.float32)
        self.token_threshold = zeros(max_requests, dtype=torch.float32)
        self.temperature = zeros(max_requests, dtype=torch.float32)
        self.seed = zeros(max_requests, dtype=torch.int64)
        self.min_tokens = zeros(max_requests)
        self.stop_ids = zeros(max_requests, MAX_STOP_IDS)
        self.status = zeros(*shape)
        self.token = zeros(*shape)
        if canvas_token is None:
            canvas_token = zeros(*shape, dtype=torch.int64)
        assert canvas_token.shape == shape and canvas_token.dtype == torch.int64
        self.canvas_token = canvas_token
        self.confidence = zeros(*shape, dtype=torch.float32)
        self.rounds = zeros(*shape)
        self.origin = zeros(*shape)
        self.canvas_row = zeros(*shape)
        self.rider_row = zeros(*shape)
        self.rider_width = zeros(*shape)
        self.row_position = zeros(*shape)
        self.row_target = zeros(*shape)
        self.row_draw = zeros(*shape)
        self.row_context = zeros(*shape)
        self.row_run_start = zeros(*shape)
        self.row_run_end = zeros(*shape)
        self.row_own_start = zeros(*shape)
        self.response = zeros(max_requests, max_response)
        self.order = zeros(max_requests, max_response)
        self.group_context = zeros(max_requests, max_response)
        self.counters = zeros(len(Counter), dtype=torch.int64)
        self._per_request = {
            name: tensor
            for name, tensor in vars(self).items()
            if isinstance(tensor, torch.Tensor) and name != "counters"
        }

    def add(
        self,
        slot: int,
        prompt_len: int,
        params: DecodingParams,
        max_tokens: int,
        eos_token_id: int | None,
        *,
        min_tokens: int = 0,
        stop_ids: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Starts a request in ``slot``: its prompt comes next, then (or with it) the first plan.

        Raises:
            ValueError: more stop ids than min_tokens can hold back.
        """
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"min_tokens holds back at most {MAX_STOP_IDS} stop token ids")
        budget = params.budget(max_tokens)
        ints = [0] * len(Field)
        ints[Field.PHASE] = Phase.PREFILL
        ints[Field.RESUME] = Phase.START
        ints[Field.PROMPT_LEN] = prompt_len
        ints[Field.SLOT_SIZE] = params.slot_size
        ints[Field.BLOCK_LENGTH] = params.block_length
        ints[Field.BUDGET] = ints[Field.LIMIT] = budget
        ints[Field.MAX_TOKENS] = max_tokens
        ints[Field.EOS] = -1 if eos_token_id is None else eos_token_id
        # The masks of the first block may be fed with the end of the prompt.
        first = params.first_block(max_tokens)
        ints[Field.ROWS] = ints[Field.CANVAS] = first
        padded_stop_ids = list(stop_ids) + [-1] * (MAX_STOP_IDS - len(stop_ids))
        self._write("ints", slot, ints)
        self._write("slot_threshold", slot, params.slot_threshold)
        self._write("token_threshold", slot, params.token_threshold)
        self._write("temperature", slot, temperature)
        self._write("seed", slot, seed)
        self._write("min_tokens", slot, min_tokens)
        self._write("stop_ids", slot, padded_stop_ids)
        self._write("canvas_token", slot, self.mask_token_id)
        positions = list(range(first)) + [-1] * (self.canvas_length - first)
        self._write("row_position", slot, positions)
        self._write("row_target", slot, positions)
        for name in ("row_draw", "row_context", "row_run_start", "row_run_end", "row_own_start"):
            self._write(name, slot, 0)

    def add_serial(
        self,
        slot: int,
        prompt_len: int,
        params: DecodingParams,
        max_tokens: int,
        eos_token_id: int | None,
        *,
        last_token: int,
        known: int = 0,
        most_tests: int | None = None,
        min_tokens: int = 0,
        stop_ids: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Starts or resumes a request in serial mode: its prompt comes next.

        Args:
            last_token: of the prompt and the ``known`` response tokens. The prefill is all of them,
                but for the last one where a response token is known: the canvas begins with that.
            most_tests: drafts that are fed at once at most.
        """
        self.add(
            slot,
            prompt_len,
            params,
            max_tokens,
            eos_token_id,
            min_tokens=min_tokens,
            stop_ids=stop_ids,
            temperature=temperature,
            seed=seed,
        )
        masked_starts = params.slot_start == "mask"
        masks = min(FIRST_MASKS, max_tokens - known)
        tokens = 1 if known or not masked_starts else 0
        width = tokens + masks
        most = self.canvas_length // 2 - 1
        for field, value in {
            Field.RESUME: Phase.SERIAL,
            Field.EMITTED: known,
            Field.MASKED_STARTS: int(masked_starts),
            Field.MOST_TESTS: most if most_tests is None else min(most, most_tests),
            Field.ROWS: 2 if tokens and masked_starts and known % params.slot_size == 0 else 1,
            Field.CANVAS: width,
        }.items():
            self.ints[slot, field].fill_(int(value))
        before = [known - 1] * tokens
        pad = [-1] * (self.canvas_length - width)
        self._write("row_position", slot, [*before, *range(known, known + masks), *pad])
        self._write("row_target", slot, [known] * tokens + [*range(known, known + masks)] + pad)
        # a prompt's last token is in the context already: fed again, it does not see itself there
        self._write(
            "canvas_token",
            slot,
            [last_token] * tokens + [self.mask_token_id] * (self.canvas_length - tokens),
        )
        again = tokens if not known else 0
        self._write("row_context", slot, [-again] * tokens + [0] * (self.canvas_length - tokens))
        self._write(
            "row_run_end", slot, [0] * tokens + [tokens - again] * (self.canvas_length - tokens)
        )
        self._write("row_own_start", slot, [0] * tokens + [tokens] * (self.canvas_length - tokens))
        self._write("rider_row", slot, [tokens] + [-1] * (self.canvas_length - 1))
        self._write("rider_width", slot, [masks] + [0] * (self.canvas_length - 1))
        self._write("response", slot, 0)
        if known:
            self.response[slot, known - 1].fill_(last_token)

    def save(self, slot: int) -> dict[str, torch.Tensor]:
        """A copy of everything about the request in ``slot``, for ``restore``; stays on device."""
        return {name: tensor[slot].clone() for name, tensor in self._per_request.items()}

    def restore(self, slot: int, saved: dict[str, torch.Tensor], emitted: int) -> None:
        """Continues a preempted request, whose KV is gone, in ``slot``.

        The prompt and as many committed tokens as the emitted whole slots have are fed as a
        prefill, the others as REPLAY canvases, all in commit order with the visibility they had;
        then decoding goes on where it was, in the middle of an operation too: emitted tokens stay.

        Args:
            saved: what ``save`` returned when the request was preempted.
            emitted: response tokens that the scheduler holds; tokens past them are emitted again.
        """
        for name, tensor in self._per_request.items():
            tensor[slot].copy_(saved[name])
        ints = self.ints[slot]
        phase = saved["ints"][Field.PHASE]
        suspended = (phase == Phase.PREFILL) | (phase == Phase.REPLAY)
        ints[Field.RESUME] = torch.where(suspended, saved["ints"][Field.RESUME], phase)
        ints[Field.PHASE].fill_(int(Phase.PREFILL))
        ints[Field.EMITTED].fill_(emitted)
        ints[Field.KEPT].fill_(0)

    def remove(self, slot: int) -> None:
        """Frees ``slot``; its KV is never written again."""
        self.ints[slot, Field.PHASE].fill_(int(Phase.IDLE))

    def _write(self, name: str, slot: int, value: float | list[int]) -> None:
        target = self._per_request[name][slot]
        if not isinstance(value, list):
            target.fill_(value)  # a kernel argument: no copy from the host
            return
        host = torch.tensor(value, dtype=target.dtype)
        if target.is_cuda:
            host = host.pin_memory()
        target.copy_(host, non_blocking=True)
