"""The codes of the device state as compile-time constants, for kernels.

Kernels must import the names themselves: Triton hashes those into the key of its cache on disk, but
not what is reached through a module.
"""

from __future__ import annotations

import triton.language as tl

from vllm_refusion.decoding.state import (
    Counter,
    Field,
    FloatField,
    HistoryField,
    Phase,
    PositionField,
    RowField,
    Status,
)

NUM_FIELDS = tl.constexpr(len(Field))
F_PHASE = tl.constexpr(int(Field.PHASE))
F_RESUME = tl.constexpr(int(Field.RESUME))
F_PROMPT_LEN = tl.constexpr(int(Field.PROMPT_LEN))
F_SLOT_SIZE = tl.constexpr(int(Field.SLOT_SIZE))
F_BLOCK_LENGTH = tl.constexpr(int(Field.BLOCK_LENGTH))
F_BUDGET = tl.constexpr(int(Field.BUDGET))
F_MAX_TOKENS = tl.constexpr(int(Field.MAX_TOKENS))
F_EOS = tl.constexpr(int(Field.EOS))
F_BLOCK_START = tl.constexpr(int(Field.BLOCK_START))
F_LIMIT = tl.constexpr(int(Field.LIMIT))
F_EMITTED = tl.constexpr(int(Field.EMITTED))
F_COMMITTED = tl.constexpr(int(Field.COMMITTED))
F_ROWS = tl.constexpr(int(Field.ROWS))
F_DRAW = tl.constexpr(int(Field.DRAW))
F_PASSES = tl.constexpr(int(Field.PASSES))
F_CANVAS = tl.constexpr(int(Field.CANVAS))
F_KEPT = tl.constexpr(int(Field.KEPT))
F_TESTED = tl.constexpr(int(Field.TESTED))
F_PASSED = tl.constexpr(int(Field.PASSED))
F_TEST_BLOCK = tl.constexpr(int(Field.TEST_BLOCK))
F_CORRECTS = tl.constexpr(int(Field.CORRECTS))
F_MASKED_STARTS = tl.constexpr(int(Field.MASKED_STARTS))
F_DRAFTS = tl.constexpr(int(Field.DRAFTS))
F_TESTS = tl.constexpr(int(Field.TESTS))
F_MOST_TESTS = tl.constexpr(int(Field.MOST_TESTS))
F_LAST_TOKENS = tl.constexpr(int(Field.LAST_TOKENS))
F_MOST_MASKS = tl.constexpr(int(Field.MOST_MASKS))
F_SKIPS_KNOWN = tl.constexpr(int(Field.SKIPS_KNOWN))

NUM_FLOAT_FIELDS = tl.constexpr(len(FloatField))
FLOAT_SLOT_THRESHOLD = tl.constexpr(int(FloatField.SLOT_THRESHOLD))
FLOAT_TOKEN_THRESHOLD = tl.constexpr(int(FloatField.TOKEN_THRESHOLD))

NUM_POSITION_FIELDS = tl.constexpr(len(PositionField))
P_STATUS = tl.constexpr(int(PositionField.STATUS))
P_TOKEN = tl.constexpr(int(PositionField.TOKEN))
P_CONFIDENCE = tl.constexpr(int(PositionField.CONFIDENCE))
P_ROUNDS = tl.constexpr(int(PositionField.ROUNDS))
P_ORIGIN = tl.constexpr(int(PositionField.ORIGIN))
P_CANVAS_ROW = tl.constexpr(int(PositionField.CANVAS_ROW))
P_RIDER_ROW = tl.constexpr(int(PositionField.RIDER_ROW))
P_RIDER_WIDTH = tl.constexpr(int(PositionField.RIDER_WIDTH))
P_PICK_ROW = tl.constexpr(int(PositionField.PICK_ROW))
P_TESTED_TOKEN = tl.constexpr(int(PositionField.TESTED_TOKEN))
P_TEST_ROW = tl.constexpr(int(PositionField.TEST_ROW))
P_STAYS = tl.constexpr(int(PositionField.STAYS))

NUM_ROW_FIELDS = tl.constexpr(len(RowField))
R_POSITION = tl.constexpr(int(RowField.POSITION))
R_DRAW = tl.constexpr(int(RowField.DRAW))
R_CONTEXT = tl.constexpr(int(RowField.CONTEXT))
R_RUN_START = tl.constexpr(int(RowField.RUN_START))
R_RUN_END = tl.constexpr(int(RowField.RUN_END))
R_OWN_START = tl.constexpr(int(RowField.OWN_START))
R_TARGET = tl.constexpr(int(RowField.TARGET))

NUM_HISTORY_FIELDS = tl.constexpr(len(HistoryField))
H_RESPONSE = tl.constexpr(int(HistoryField.RESPONSE))
H_ORDER = tl.constexpr(int(HistoryField.ORDER))
H_GROUP_CONTEXT = tl.constexpr(int(HistoryField.GROUP_CONTEXT))

IDLE = tl.constexpr(int(Phase.IDLE))
PREFILL = tl.constexpr(int(Phase.PREFILL))
PLAN = tl.constexpr(int(Phase.PLAN))
VERIFY = tl.constexpr(int(Phase.VERIFY))
INFILL = tl.constexpr(int(Phase.INFILL))
REPLAY = tl.constexpr(int(Phase.REPLAY))
DONE = tl.constexpr(int(Phase.DONE))
START = tl.constexpr(int(Phase.START))
SERIAL = tl.constexpr(int(Phase.SERIAL))

MASKED = tl.constexpr(int(Status.MASKED))
CHOSEN = tl.constexpr(int(Status.CHOSEN))
ACCEPTED = tl.constexpr(int(Status.ACCEPTED))
COMMITTED = tl.constexpr(int(Status.COMMITTED))
DROPPED = tl.constexpr(int(Status.DROPPED))
BLANK = tl.constexpr(int(Status.BLANK))

COUNT_PLAN = tl.constexpr(int(Counter.PLAN))
COUNT_VERIFY = tl.constexpr(int(Counter.VERIFY))
COUNT_PREDICT = tl.constexpr(int(Counter.PREDICT))
COUNT_INFILL_VERIFY = tl.constexpr(int(Counter.INFILL_VERIFY))
COUNT_REPLAY = tl.constexpr(int(Counter.REPLAY))
COUNT_IDLE = tl.constexpr(int(Counter.IDLE))
COUNT_ROWS_FED = tl.constexpr(int(Counter.ROWS_FED))
COUNT_TOKENS = tl.constexpr(int(Counter.TOKENS))
COUNT_RIDER_ROWS_FED = tl.constexpr(int(Counter.RIDER_ROWS_FED))
COUNT_PLANS_RIDDEN = tl.constexpr(int(Counter.PLANS_RIDDEN))
COUNT_PREDICTS_RIDDEN = tl.constexpr(int(Counter.PREDICTS_RIDDEN))
COUNT_SLOTS_CHOSEN = tl.constexpr(int(Counter.SLOTS_CHOSEN))
COUNT_TOKENS_TESTED = tl.constexpr(int(Counter.TOKENS_TESTED))
COUNT_TOKENS_PASSED = tl.constexpr(int(Counter.TOKENS_PASSED))
COUNT_INFILLS = tl.constexpr(int(Counter.INFILLS))
COUNT_INFILL_ROUNDS = tl.constexpr(int(Counter.INFILL_ROUNDS))
COUNT_SERIAL = tl.constexpr(int(Counter.SERIAL))
COUNT_DRAFTS_TESTED = tl.constexpr(int(Counter.DRAFTS_TESTED))
COUNT_DRAFTS_PASSED = tl.constexpr(int(Counter.DRAFTS_PASSED))
