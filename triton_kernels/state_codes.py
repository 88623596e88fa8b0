"""The codes of the device state as compile-time constants, for kernels.

Kernels must import the names themselves: Triton hashes those into the key of its cache on disk, but
not what is reached through a module.
"""

from __future__ import annotations

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
from vllm_refusion.triton_kernels.constant import Constant

NUM_FIELDS = Constant(len(Field))
F_PHASE = Constant(int(Field.PHASE))
F_RESUME = Constant(int(Field.RESUME))
F_PROMPT_LEN = Constant(int(Field.PROMPT_LEN))
F_SLOT_SIZE = Constant(int(Field.SLOT_SIZE))
F_BLOCK_LENGTH = Constant(int(Field.BLOCK_LENGTH))
F_BUDGET = Constant(int(Field.BUDGET))
F_MAX_TOKENS = Constant(int(Field.MAX_TOKENS))
F_EOS = Constant(int(Field.EOS))
F_BLOCK_START = Constant(int(Field.BLOCK_START))
F_LIMIT = Constant(int(Field.LIMIT))
F_EMITTED = Constant(int(Field.EMITTED))
F_COMMITTED = Constant(int(Field.COMMITTED))
F_ROWS = Constant(int(Field.ROWS))
F_DRAW = Constant(int(Field.DRAW))
F_PASSES = Constant(int(Field.PASSES))
F_CANVAS = Constant(int(Field.CANVAS))
F_KEPT = Constant(int(Field.KEPT))
F_TESTED = Constant(int(Field.TESTED))
F_PASSED = Constant(int(Field.PASSED))
F_TEST_BLOCK = Constant(int(Field.TEST_BLOCK))
F_CORRECTS = Constant(int(Field.CORRECTS))
F_MASKED_STARTS = Constant(int(Field.MASKED_STARTS))
F_DRAFTS = Constant(int(Field.DRAFTS))
F_TESTS = Constant(int(Field.TESTS))
F_MOST_TESTS = Constant(int(Field.MOST_TESTS))
F_LAST_TOKENS = Constant(int(Field.LAST_TOKENS))
F_MOST_MASKS = Constant(int(Field.MOST_MASKS))
F_SKIPS_KNOWN = Constant(int(Field.SKIPS_KNOWN))

NUM_FLOAT_FIELDS = Constant(len(FloatField))
FLOAT_SLOT_THRESHOLD = Constant(int(FloatField.SLOT_THRESHOLD))
FLOAT_TOKEN_THRESHOLD = Constant(int(FloatField.TOKEN_THRESHOLD))

NUM_POSITION_FIELDS = Constant(len(PositionField))
P_STATUS = Constant(int(PositionField.STATUS))
P_TOKEN = Constant(int(PositionField.TOKEN))
P_CONFIDENCE = Constant(int(PositionField.CONFIDENCE))
P_ROUNDS = Constant(int(PositionField.ROUNDS))
P_ORIGIN = Constant(int(PositionField.ORIGIN))
P_CANVAS_ROW = Constant(int(PositionField.CANVAS_ROW))
P_RIDER_ROW = Constant(int(PositionField.RIDER_ROW))
P_RIDER_WIDTH = Constant(int(PositionField.RIDER_WIDTH))
P_PICK_ROW = Constant(int(PositionField.PICK_ROW))
P_TESTED_TOKEN = Constant(int(PositionField.TESTED_TOKEN))
P_TEST_ROW = Constant(int(PositionField.TEST_ROW))
P_STAYS = Constant(int(PositionField.STAYS))

NUM_ROW_FIELDS = Constant(len(RowField))
R_POSITION = Constant(int(RowField.POSITION))
R_DRAW = Constant(int(RowField.DRAW))
R_CONTEXT = Constant(int(RowField.CONTEXT))
R_RUN_START = Constant(int(RowField.RUN_START))
R_RUN_END = Constant(int(RowField.RUN_END))
R_OWN_START = Constant(int(RowField.OWN_START))
R_TARGET = Constant(int(RowField.TARGET))

NUM_HISTORY_FIELDS = Constant(len(HistoryField))
H_RESPONSE = Constant(int(HistoryField.RESPONSE))
H_ORDER = Constant(int(HistoryField.ORDER))
H_GROUP_CONTEXT = Constant(int(HistoryField.GROUP_CONTEXT))

IDLE = Constant(int(Phase.IDLE))
PREFILL = Constant(int(Phase.PREFILL))
PLAN = Constant(int(Phase.PLAN))
VERIFY = Constant(int(Phase.VERIFY))
INFILL = Constant(int(Phase.INFILL))
REPLAY = Constant(int(Phase.REPLAY))
DONE = Constant(int(Phase.DONE))
START = Constant(int(Phase.START))
SERIAL = Constant(int(Phase.SERIAL))

MASKED = Constant(int(Status.MASKED))
CHOSEN = Constant(int(Status.CHOSEN))
ACCEPTED = Constant(int(Status.ACCEPTED))
COMMITTED = Constant(int(Status.COMMITTED))
DROPPED = Constant(int(Status.DROPPED))
BLANK = Constant(int(Status.BLANK))

COUNT_PLAN = Constant(int(Counter.PLAN))
COUNT_VERIFY = Constant(int(Counter.VERIFY))
COUNT_PREDICT = Constant(int(Counter.PREDICT))
COUNT_INFILL_VERIFY = Constant(int(Counter.INFILL_VERIFY))
COUNT_REPLAY = Constant(int(Counter.REPLAY))
COUNT_IDLE = Constant(int(Counter.IDLE))
COUNT_ROWS_FED = Constant(int(Counter.ROWS_FED))
COUNT_TOKENS = Constant(int(Counter.TOKENS))
COUNT_RIDER_ROWS_FED = Constant(int(Counter.RIDER_ROWS_FED))
COUNT_PLANS_RIDDEN = Constant(int(Counter.PLANS_RIDDEN))
COUNT_PREDICTS_RIDDEN = Constant(int(Counter.PREDICTS_RIDDEN))
COUNT_SLOTS_CHOSEN = Constant(int(Counter.SLOTS_CHOSEN))
COUNT_TOKENS_TESTED = Constant(int(Counter.TOKENS_TESTED))
COUNT_TOKENS_PASSED = Constant(int(Counter.TOKENS_PASSED))
COUNT_INFILLS = Constant(int(Counter.INFILLS))
COUNT_INFILL_ROUNDS = Constant(int(Counter.INFILL_ROUNDS))
COUNT_SERIAL = Constant(int(Counter.SERIAL))
COUNT_DRAFTS_TESTED = Constant(int(Counter.DRAFTS_TESTED))
COUNT_DRAFTS_PASSED = Constant(int(Counter.DRAFTS_PASSED))
