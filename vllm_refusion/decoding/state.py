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

A correction (section 8) is accepted by the pass that picks it and fed by the next one: only then
can its KV be kept. No predict rides with the verify that may lead to it, since its masks see it.

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

import numpy as np
import torch

from vllm_refusion.decoding.params import FIRST_MASKS, DecodingParams
from vllm_refusion.decoding.sending import sent
from vllm_refusion.decoding.speculation import MAX_CHAIN


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
    CORRECTS = (
        20  # whether an infill tests every token and picks the one that fails anew (section 8)
    )
    # of serial decoding
    MASKED_STARTS = 21  # whether a slot's first token is picked in the row of a mask
    DRAFTS = 22  # drafts at hand
    TESTS = 23  # of them, those in the present canvas
    MOST_TESTS = 24  # more are never fed at once
    LAST_TOKENS = 25  # tokens that its last pass brought
    MOST_MASKS = 26  # of a chain
    SKIPS_KNOWN = 27  # whether chains leave out a position whose token is picked without its mask


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
    # there is accepted without a test, unless CORRECTS has all of an infill tested.
    ORIGIN = 4
    CANVAS_ROW = 5  # its row among those of the phase, or -1
    # The canvas row of a rider's mask for it, -1 for none, and the number of masks from there on.
    # At the first position of a slot: the plan if that slot is the last to be committed. At
    # another: the predict of its slot if that is the first position not accepted.
    RIDER_ROW = 6
    RIDER_WIDTH = 7
    # Evidence of the last pass; rows count from the first one of the request that has statistics.
    # The row that picked a token for it, taken or (in a plan) not, -1: none; of a token that failed
    # and was corrected, that which tested it.
    PICK_ROW = 8
    # By position of the block at TEST_BLOCK, which may be the one before:
    TESTED_TOKEN = 9  # the token that was under verification, -1: none
    TEST_ROW = 10  # the row that tested it, -1: none
    STAYS = 11  # 1 if it was accepted, for infill or for good, and not corrected


class RowField(IntEnum):
    """What ``DecodeState.by_row`` holds, by canvas row.

    A row sees the context up to CONTEXT, the canvas rows [RUN_START, RUN_END) and those from
    OWN_START to itself. Tokens kept by the present infill have rows below 0.
    """

    POSITION = 0  # response position, -1 for an unused row
    DRAW = 1  # operations before the one that the row is of, or before a correction by it
    CONTEXT = 2
    RUN_START = 3
    RUN_END = 4
    OWN_START = 5
    TARGET = 6  # response position that it picks a token for, at its DRAW; -1 for an unused row


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
_TORCH_TYPES = {"<i4": torch.int32, "<i8": torch.int64, "<f4": torch.float32}


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

    ``gathers_starts``, False at first, says whether requests that are added wait for
    ``write_starts``, which writes many of them as fast as one.
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
        self.gathers_starts = False
        self._starts: list[np.ndarray] = []
        self._start_type = np.dtype(
            [
                ("seed", "<i8"),
                ("req", "<i4"),
                ("min_tokens", "<i4"),
                ("temperature", "<f4"),
                ("floats", "<f4", (len(FloatField),)),
                ("ints", "<i4", (len(Field),)),
                ("stop_ids", "<i4", (MAX_STOP_IDS,)),
                ("by_row", "<i4", (len(RowField), canvas_length)),
                ("chains", "<i4", (2, canvas_length)),
                ("canvas_token", "<i4", (canvas_length,)),
            ],
            align=True,  # whole seeds: else a view of several starts as int64 is refused
        )

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
        start = self._begin(req, params, ints, **picks)
        start["by_row"][[RowField.POSITION, RowField.TARGET], :first] = np.arange(first)
        self._start(start)

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
        chain_length: int = MAX_CHAIN,
        skips_known: bool = False,
        **picks: Any,
    ) -> None:
        """Starts or resumes a request in serial mode: its prompt comes next.

        Args:
            last_token: of the prompt and the ``known`` response tokens. The prefill is all of them,
                but for the last one where a response token is known: the canvas begins with that.
            most_tests: drafts that are fed at once at most.
            chain_length: masks of consecutive positions at most, of 2 to MAX_CHAIN; or 1, which
                without ``skips_known`` draft nothing.
            skips_known: whether chains begin behind the position whose token the pass picks in any
                case, where no mask is needed for it: of mask adapters that are trained so.
            picks: how tokens are picked, see ``_begin``.
        """
        masked_starts = params.slot_start == "mask"
        tokens = 1 if known or not masked_starts else 0
        starts_slot = masked_starts and known % params.slot_size == 0
        first = known + int(skips_known and not starts_slot)
        masks = max(0, min(FIRST_MASKS, chain_length, max_tokens - first))
        most = self.canvas_length // 2 - 1
        ints = _ints(prompt_len, params, max_tokens, eos_token_id)
        ints |= {
            Field.RESUME: Phase.SERIAL,
            Field.EMITTED: known,
            Field.MASKED_STARTS: int(masked_starts),
            Field.MOST_TESTS: most if most_tests is None else min(most, most_tests),
            Field.ROWS: tokens + starts_slot if known else 1,
            Field.CANVAS: tokens + masks,
            Field.MOST_MASKS: chain_length,
            Field.SKIPS_KNOWN: int(skips_known),
        }
        # the prompt's last token is in the context: fed again, it does not see itself there
        again = tokens if not known else 0
        start = self._begin(req, params, ints, **picks)
        by_row, masks_end = start["by_row"], tokens + masks
        targets = np.arange(first, first + masks)
        by_row[[RowField.POSITION, RowField.TARGET], tokens:masks_end] = targets
        by_row[RowField.POSITION, :tokens] = known - 1
        by_row[RowField.TARGET, :tokens] = known
        by_row[RowField.CONTEXT, :tokens] = -again
        by_row[RowField.RUN_END, tokens:] = tokens - again
        by_row[RowField.OWN_START, tokens:] = tokens
        start["canvas_token"][:tokens] = last_token
        start["chains"][0] = -1
        start["chains"][:, 0] = (tokens, masks) if masks else (-1, 0)
        self._start(start)

    def recall_response(self, req: int, tokens: Sequence[int]) -> None:
        """Restores what a resumed serial request has said, for what depends on it."""
        known = torch.tensor(tokens, dtype=torch.int32)
        self.response[req, : len(tokens)] = sent(known, self.device)

    def _begin(
        self,
        req: int,
        params: DecodingParams,
        ints: Mapping[Field, int],
        *,
        min_tokens: int = 0,
        stop_ids: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> np.ndarray:
        """A request's first state, of a canvas without rows."""
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"min_tokens holds back at most {MAX_STOP_IDS} stop token ids")
        start = np.zeros((), self._start_type)
        start["req"], start["temperature"], start["seed"] = req, temperature, seed
        start["floats"] = params.slot_threshold, params.token_threshold
        start["min_tokens"], start["stop_ids"] = min_tokens, -1
        start["stop_ids"][: len(stop_ids)] = stop_ids
        start["ints"][list(ints)] = list(ints.values())
        start["by_row"][[RowField.POSITION, RowField.TARGET]] = -1
        start["canvas_token"] = self.mask_token_id
        return start

    def _start(self, start: np.ndarray) -> None:
        self._starts.append(start)
        if not self.gathers_starts:
            self.write_starts()

    def write_starts(self) -> None:
        """Writes what ``add`` and ``add_serial`` have gathered: in one copy from the host."""
        if not self._starts:
            return
        host = torch.from_numpy(
            np.stack(self._starts).view(np.int32).reshape(len(self._starts), -1)
        )
        self._starts.clear()
        packed = sent(host, self.device)

        fields = self._start_type.fields
        assert fields is not None

        def part(name: str) -> torch.Tensor:
            kind, offset = fields[name][:2]
            flat = packed[:, offset // 4 : (offset + kind.itemsize) // 4]
            dtype = _TORCH_TYPES[kind.base.str]
            return flat.contiguous().view(dtype).view(len(packed), *kind.shape)

        reqs = part("req").long()
        chains = self.by_position[:, PositionField.RIDER_ROW : PositionField.RIDER_WIDTH + 1]
        for name, target in (
            ("ints", self.ints),
            ("floats", self.floats),
            ("by_row", self.by_row),
            ("chains", chains),
            ("canvas_token", self.canvas_token),
            ("temperature", self.temperature),
            ("seed", self.seed),
            ("min_tokens", self.min_tokens),
            ("stop_ids", self.stop_ids),
        ):
            target.index_copy_(0, reqs, part(name).to(target.dtype))

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
        Field.CORRECTS: int(params.infill == "correct"),
    }
