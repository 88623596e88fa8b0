"""PyTorch twin of the kernel in ``allocation``."""

from __future__ import annotations

import torch

from vllm_refusion.decoding.state import DecodeState, Field, Phase

TOTALS = 4


def allocate_twin(
    state: DecodeState,
    num_computed: torch.Tensor,
    idx_mapping: torch.Tensor,
    scheduled: torch.Tensor,
    prompt_rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    logits_start: torch.Tensor,
    totals: torch.Tensor,
    num_decoding: int,
    rows: int,
    first: int,
) -> None:
    """Deals ``rows`` out to the first ``num_decoding`` requests of a batch; see ``allocation``.

    A canvas that pages are not reserved for is cut in the state.

    Args:
        num_computed: [max_requests] int32, KV entries of each request before this pass.
        idx_mapping: [R] int64, request index of each batch row.
        scheduled: [>= R] int32, the most decode rows of each request.
        prompt_rows: [>= R] int32, rows of a request that feed its prompt, before the others.
        query_start_loc: [>= R+1] int32, out: where each request's query rows start; those of
            requests that are not there behind all rows.
        logits_start: [R+1] int32, out: the same for decode rows.
        totals: [TOTALS] int32, out: rows needed by all phases, and with riders; requests past their
            prompt in serial mode, if they need rows, and the tokens of their last passes.
        rows: at most the sum of what is scheduled for decoding requests.
        first: the request that is first in line.
    """
    order = [(first + i) % num_decoding for i in range(num_decoding)]
    most, reqs = scheduled.tolist(), idx_mapping.tolist()
    needed, canvas = [0] * num_decoding, [0] * num_decoding
    serial = tokens = 0
    for request in order:
        ints = state.ints[reqs[request]]
        phase, committed = int(ints[Field.PHASE]), int(ints[Field.COMMITTED])
        if phase == Phase.REPLAY:
            replayed = int(num_computed[reqs[request]]) - int(ints[Field.PROMPT_LEN])
            needed[request] = canvas[request] = min(committed - replayed, most[request])
        elif phase == Phase.PREFILL:
            begins = ints[Field.RESUME] in (Phase.START, Phase.SERIAL) and not ints[Field.EMITTED]
            if begins and ints[Field.ROWS] <= most[request]:
                needed[request] = int(ints[Field.ROWS])
                canvas[request] = min(int(ints[Field.CANVAS]), most[request])
        elif phase not in (Phase.IDLE, Phase.DONE):
            # pages are reserved behind the whole slots that have been delivered
            delivered = int(ints[Field.EMITTED])
            delivered -= delivered % int(ints[Field.SLOT_SIZE])
            undelivered = committed + int(ints[Field.KEPT]) - delivered
            room = most[request] - (0 if phase == Phase.SERIAL else undelivered)
            if ints[Field.ROWS] <= room:
                needed[request] = int(ints[Field.ROWS])
                canvas[request] = max(min(int(ints[Field.CANVAS]), room), needed[request])
                ints[Field.CANVAS] = canvas[request]

        if needed[request] > 0 and phase == Phase.SERIAL:
            serial += 1
            tokens += int(ints[Field.LAST_TOKENS])

    given, total = [0] * num_decoding, 0
    for request in order:
        total += needed[request]
        if total <= rows:
            given[request] = needed[request]
    extras = [canvas[i] - needed[i] if given[i] else 0 for i in range(num_decoding)]
    left = rows - sum(given)
    for limit in (extras, None):
        for request in order:
            most_more = most[request] - given[request] if limit is None else limit[request]
            more = min(most_more, left)
            given[request] += more
            left -= more

    decode_lengths = given + [0] * (len(reqs) - num_decoding)
    lengths = [a + b for a, b in zip(decode_lengths, prompt_rows.tolist())]
    for starts, values in ((query_start_loc, lengths), (logits_start, decode_lengths)):
        starts[0] = 0
        starts[1 : len(values) + 1] = torch.tensor(values).cumsum(0)
    query_start_loc[len(reqs) + 1 :] = int(prompt_rows[: len(reqs)].sum()) + rows
    totals.copy_(torch.tensor([sum(needed), sum(canvas), serial, tokens]))
