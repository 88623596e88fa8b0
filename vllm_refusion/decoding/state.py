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

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch

from vllm_refusion.decoding.params import FIRST_MASKS, DecodingParams


class Phase(IntEnum):
    """What the request's next pass is."""

    IDLE = 0  # no request at this index
    PREFILL = 1
    PLAN = 2
    VERIFY = 3
    INFILL = 4
    REPLAY = 5
    DONE = 6
    START = 7  # only as RESUME: begin the first block once the prompt is in
    SERIAL = 8  # serial decoding (section 7), whose RESUME is this throughout


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
    TEST_BLOCK = 19  # BLOCK_START before the last pass
    # of serial decoding
    MASKED_STARTS = 20  # whether a slot's first token is picked in the row of a mask
    DRAFTS = 21  # drafts at hand
    TESTS = 22  # of them, those in the present canvas
    MOST_TESTS = 23  # more are never fed at once
    EXPECTED = 24  # tokens that the present canvas is expected to bring, in 1/256


class FloatField(IntEnum):
    """Columns of ``DecodeState.floats``."""

    SLOT_THRESHOLD = 0
    TOKEN_THRESHOLD = 1


class PositionField(IntEnum):
    """What ``DecodeState.by_position`` holds, by block position.

    Of serial decoding, TOKEN and CONFIDENCE are the drafts of the positions behind the known
    tokens, in their order. RIDER_ROW and RIDER_WIDTH are the chain (``serial_twin``) behind so
    many of them. CANVAS_ROW is by canvas row: the chain whose first mask is there, or -1.
    """

    STATUS = 0
    TOKEN = 1
    CONFIDENCE = 2  # float32 bits: probability of the token when it was picked
    ROUNDS = 3  # predict operations of its slot in this infill
    # Where it has or awaits a proposal: where the operation that proposes for it began. The token
    # there is accepted without a test.
    ORIGIN = 4
    CANVAS_ROW = 5  # its row among those of the phase, or -1
    # The canvas row of a rider's mask for it, -1 for none, and the number of masks from there on.
    # At the first position of a slot: the plan if that slot is the last to be committed. At
    # another: the predict of its slot if that is the first position not accepted.
    RIDER_ROW = 6
    RIDER_WIDTH = 7
    # Evidence of the last pass; rows count from the first one of the request that has statistics.
    PICK_ROW = 8  # the row that picked a token for it, taken or (in a plan) not; -1: none
    # By position of the block at TEST_BLOCK, which may be the one before:
    TESTED_TOKEN = 9  # the token that was under verification, -1: none
    TEST_ROW = 10  # the row that tested it, -1: none
    STAYS = 11  # 1 if it was accepted, for infill or for good


class RowField(IntEnum):
    """What ``DecodeState.by_row`` holds, by canvas row.

    A row sees the context up to CONTEXT, the canvas rows [RUN_START, RUN_END) and those from
    OWN_START to itself. Tokens kept by the present infill have rows below 0.
    """

    POSITION = 0  # response position, -1 for an unused row
    DRAW = 1  # operations before the one that the row is of
    CONTEXT = 2
    RUN_START = 3
    RUN_END = 4
    OWN_START = 5
    TARGET = 6  # response position that it picks a token for, -1 for an unused row


class HistoryField(IntEnum):
    """What ``DecodeState.history`` holds."""

    RESPONSE = 0  # by response position: the token committed or emitted
    ORDER = 1  # of the j-th committed token: its response position
    # Of the j-th committed token: the number of committed response tokens that its slot could see
    # if it was committed by infill, else -1 (it saw all committed before it).
    GROUP_CONTEXT = 2


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
MAX_STOP_IDS = 64  # stop token ids that min_tokens can hold back, per request


class DecodeState:
    """State of up to ``max_requests`` requests, by request index.

    What kernels read and write is packed, a tensor for each way of indexing; its parts by name are
    views.

    Attributes (device tensors; R = max_requests, W = canvas_length, P = max_response):
        ints: [R, len(Field)] int32.
        floats: [R, len(FloatField)] float32.
        by_position: [R, len(PositionField), W] int32.
        by_row: [R, len(RowField), W] int32.
        history: [R, len(HistoryField), P] int32.
        canvas_token: [R, W] int64, by canvas row.
        counters: [len(Counter)] int64.
        temperature: [R] float32. seed: [R] int64. min_tokens: [R] int32. stop_ids:
            [R, MAX_STOP_IDS] int32, padded with -1. How tokens are picked (``token_stats``).
        slot_threshold, token_threshold: [R] float32, of ``floats``.
        status, token, rounds, origin, canvas_row, rider_row, rider_width, pick_row, tested_token,
            test_row, stays: [R, W] int32, of ``by_position``; confidence: [R, W] float32.
        row_position, row_draw, row_context, row_run_start, row_run_end, row_own_start,
            row_target: [R, W] int32, of ``by_row``.
        response, order, group_context: [R, P] int32, of ``history``.

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

        self.ints = zeros(max_requests, len(Field))
        self.floats = zeros(max_requests, len(FloatField), dtype=torch.float32)
        self.by_position = zeros(max_requests, len(PositionField), canvas_length)
        self.by_row = zeros(max_requests, len(RowField), canvas_length)
        self.history = zeros(max_requests, len(HistoryField), max_response)
        if canvas_token is None:
            canvas_token = zeros(max_requests, canvas_length, dtype=torch.int64)
        assert canvas_token.shape == (max_requests, canvas_length)
        assert canvas_token.dtype == torch.int64 and canvas_token.is_contiguous()
        self.canvas_token = canvas_token
        self.temperature = zeros(max_requests, dtype=torch.float32)
        self.seed = zeros(max_requests, dtype=torch.int64)
        self.min_tokens = zeros(max_requests)
        self.stop_ids = zeros(max_requests, MAX_STOP_IDS)
        self._per_request = {  # all tensors so far
            name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        self.counters = zeros(len(Counter), dtype=torch.int64)
        self._name_views()

    def _name_views(self) -> None:
        self.slot_threshold = self.floats[:, FloatField.SLOT_THRESHOLD]
        self.token_threshold = self.floats[:, FloatField.TOKEN_THRESHOLD]

        self.status = self.by_position[:, PositionField.STATUS]
        self.token = self.by_position[:, PositionField.TOKEN]
        self.confidence = self.by_position.view(torch.float32)[:, PositionField.CONFIDENCE]
        self.rounds = self.by_position[:, PositionField.ROUNDS]
        self.origin = self.by_position[:, PositionField.ORIGIN]
        self.canvas_row = self.by_position[:, PositionField.CANVAS_ROW]
        self.rider_row = self.by_position[:, PositionField.RIDER_ROW]
        self.rider_width = self.by_position[:, PositionField.RIDER_WIDTH]
        self.pick_row = self.by_position[:, PositionField.PICK_ROW]
        self.tested_token = self.by_position[:, PositionField.TESTED_TOKEN]
        self.test_row = self.by_position[:, PositionField.TEST_ROW]
        self.stays = self.by_position[:, PositionField.STAYS]

        self.row_position = self.by_row[:, RowField.POSITION]
        self.row_draw = self.by_row[:, RowField.DRAW]
        self.row_context = self.by_row[:, RowField.CONTEXT]
        self.row_run_start = self.by_row[:, RowField.RUN_START]
        self.row_run_end = self.by_row[:, RowField.RUN_END]
        self.row_own_start = self.by_row[:, RowField.OWN_START]
        self.row_target = self.by_row[:, RowField.TARGET]

        self.response = self.history[:, HistoryField.RESPONSE]
        self.order = self.history[:, HistoryField.ORDER]
        self.group_context = self.history[:, HistoryField.GROUP_CONTEXT]

    def add(
        self,
        req: int,
        prompt_len: int,
        params: DecodingParams,
        max_tokens: int,
        eos_token_id: int | None,
        **picks: Any,
    ) -> None:
        """Starts a request at ``req``: its prompt comes next, then (or with it) the first plan.

        Args:
            picks: how tokens are picked, see ``_begin``.

        Raises:
            ValueError: more stop ids than min_tokens can hold back.
        """
        # The masks of the first block may be fed with the end of the prompt.
        first = params.first_rows(max_tokens)
        ints = _ints(prompt_len, params, max_tokens, eos_token_id)
        ints |= {Field.RESUME: Phase.START, Field.ROWS: first, Field.CANVAS: first}
        positions = [*range(first), *[-1] * (self.canvas_length - first)]
        rows = {RowField.POSITION: positions, RowField.TARGET: positions}
        tokens = [self.mask_token_id] * self.canvas_length
        self._begin(req, params, ints, tokens, rows, **picks)

    def add_serial(
        self,
        req: int,
        prompt_len: int,
        params: DecodingParams,
        max_tokens: int,
        eos_token_id: int | None,
        *,
        last_token: int,
        known: int = 0,
        most_tests: int | None = None,
        **picks: Any,
    ) -> None:
        """Starts or resumes a request in serial mode: its prompt comes next.

        Args:
            last_token: of the prompt and the ``known`` response tokens. The prefill is all of them,
                but for the last one where a response token is known: the canvas begins with that.
            most_tests: drafts that are fed at once at most.
            picks: how tokens are picked, see ``_begin``.
        """
        masked_starts = params.slot_start == "mask"
        masks = min(FIRST_MASKS, max_tokens - known)
        tokens = 1 if known or not masked_starts else 0
        starts_slot = masked_starts and known % params.slot_size == 0
        most = self.canvas_length // 2 - 1
        ints = _ints(prompt_len, params, max_tokens, eos_token_id)
        ints |= {
            Field.RESUME: Phase.SERIAL,
            Field.EMITTED: known,
            Field.MASKED_STARTS: int(masked_starts),
            Field.MOST_TESTS: most if most_tests is None else min(most, most_tests),
            Field.ROWS: tokens + starts_slot if known else 1,
            Field.CANVAS: tokens + masks,
            Field.EXPECTED: 256,
        }
        # the prompt's last token is in the context: fed again, it does not see itself there
        again = tokens if not known else 0
        rest = self.canvas_length - tokens
        targets = [*range(known, known + masks), *[-1] * (rest - masks)]
        rows = {
            RowField.POSITION: [known - 1] * tokens + targets,
            RowField.TARGET: [known] * tokens + targets,
            RowField.CONTEXT: [-again] * tokens + [0] * rest,
            RowField.RUN_END: [0] * tokens + [tokens - again] * rest,
            RowField.OWN_START: [0] * tokens + [tokens] * rest,
        }
        canvas = [last_token] * tokens + [self.mask_token_id] * rest
        self._begin(req, params, ints, canvas, rows, **picks)
        _write(self.rider_row[req], -1)
        _write(self.rider_row[req, :1], tokens)
        _write(self.rider_width[req, :1], masks)

    def _begin(
        self,
        req: int,
        params: DecodingParams,
        ints: Mapping[Field, int],
        canvas_token: list[int],
        rows: Mapping[RowField, list[int]],
        *,
        min_tokens: int = 0,
        stop_ids: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Writes a request's first state: in few copies, since they are what starting it costs."""
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"min_tokens holds back at most {MAX_STOP_IDS} stop token ids")
        nothing = [0] * self.canvas_length
        _write(self.ints[req], [ints.get(field, 0) for field in Field])
        _write(self.floats[req], [params.slot_threshold, params.token_threshold])
        _write(self.temperature[req], temperature)
        _write(self.seed[req], seed)
        _write(self.min_tokens[req], min_tokens)
        if min_tokens:
            _write(self.stop_ids[req], [*stop_ids, *[-1] * (MAX_STOP_IDS - len(stop_ids))])
        _write(self.canvas_token[req], canvas_token)
        _write(self.by_row[req], [rows.get(field, nothing) for field in RowField])

    def save(self, req: int) -> dict[str, torch.Tensor]:
        """A copy of everything about the request at ``req``, for ``restore``; stays on device."""
        return {name: tensor[req].clone() for name, tensor in self._per_request.items()}

    def restore(self, req: int, saved: dict[str, torch.Tensor], emitted: int) -> None:
        """Continues a preempted request, whose KV is gone, at ``req``.

        The prompt and as many committed tokens as the emitted whole slots have are fed as a
        prefill, the others as REPLAY canvases, all in commit order with the visibility they had;
        then decoding goes on where it was, in the middle of an operation too: emitted tokens stay.

        Args:
            saved: what ``save`` returned when the request was preempted.
            emitted: response tokens that the scheduler holds; tokens past them are emitted again.
        """
        for name, tensor in self._per_request.items():
            tensor[req].copy_(saved[name])
        ints = self.ints[req]
        phase = saved["ints"][Field.PHASE]
        suspended = (phase == Phase.PREFILL) | (phase == Phase.REPLAY)
        ints[Field.RESUME] = torch.where(suspended, saved["ints"][Field.RESUME], phase)
        ints[Field.PHASE].fill_(int(Phase.PREFILL))
        ints[Field.EMITTED].fill_(emitted)
        ints[Field.KEPT].fill_(0)

    def remove(self, req: int) -> None:
        """Frees ``req``; its KV is never written again."""
        self.ints[req, Field.PHASE].fill_(int(Phase.IDLE))


def _ints(
    prompt_len: int, params: DecodingParams, max_tokens: int, eos_token_id: int | None
) -> dict[Field, int]:
    budget = params.budget(max_tokens)
    return {
        Field.PHASE: Phase.PREFILL,
        Field.PROMPT_LEN: prompt_len,
        Field.SLOT_SIZE: params.slot_size,
        Field.BLOCK_LENGTH: params.block_length,
        Field.BUDGET: budget,
        Field.LIMIT: budget,
        Field.MAX_TOKENS: max_tokens,
        Field.EOS: -1 if eos_token_id is None else eos_token_id,
    }


def _write(target: torch.Tensor, value: float | list[Any]) -> None:
    if not isinstance(value, list):
        target.fill_(value)  # a kernel argument: no copy from the host
        return
    host = torch.tensor(value, dtype=target.dtype)
    if target.is_cuda:
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)
