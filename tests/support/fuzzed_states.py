"""Batches of requests in random decoding states, for tests of the layout and transition kernels."""

from __future__ import annotations

import random

import torch

from vllm_refusion.decoding.speculation import Speculation
from vllm_refusion.decoding.state import ACCEPTANCE_WINDOW, DecodeState, Field, Phase, Status
from vllm_refusion.triton_kernels.compose_twin import INFILLED, OPEN, compose_twin

MASK_TOKEN_ID = 23
POISON = 1_000_003  # where nobody may look

PROBABILITIES = (0.0, 0.25, 0.5, 0.75, 1.0)  # few values, so that thresholds are hit exactly
TOKENS = 6  # so few that EOS is everywhere
DECODING = (Phase.PLAN, Phase.VERIFY, Phase.INFILL)
FUZZED = (Phase.IDLE, Phase.PREFILL, *DECODING, Phase.REPLAY, Phase.DONE)


class Fuzz:
    """A batch of requests in random states that decoding could have led to.

    Attributes: the arguments of ``layout`` and ``transition`` of the same names.

    Args:
        phases: what the phases of the requests are drawn from.
    """

    def __init__(self, rng: random.Random, phases: tuple[Phase, ...], canvas_length: int) -> None:
        self.rng = rng
        max_requests, requests = 11, rng.randint(1, 9)
        max_response = 3 * canvas_length
        self.state = DecodeState(max_requests, canvas_length, max_response, MASK_TOKEN_ID, "cpu")
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        for tensor in tensors(self.state).values():
            tensor.copy_(torch.randint(TOKENS, tensor.shape, generator=generator))
        reqs = rng.sample(range(max_requests), requests)
        self.num_computed = torch.full((max_requests,), POISON, dtype=torch.int32)
        self.prefill_len = torch.full((max_requests,), POISON, dtype=torch.int32)
        widths = [self.request(req, rng.choice(phases)) for req in reqs]
        self.idx_mapping = torch.tensor(reqs)
        # a batch may be padded with requests of no rows
        self.query_start_loc = starts([width for width, _ in widths] + [0] * rng.randint(0, 2))
        self.logits_start = starts([rows for _, rows in widths])
        rows = int(self.logits_start[-1])
        self.picked = torch.tensor([rng.randrange(TOKENS) for _ in range(rows)], dtype=torch.int32)
        self.picked_prob = torch.tensor([self.probability() for _ in range(rows)])
        self.given_prob = torch.tensor([self.probability() for _ in range(rows)])

    def probability(self) -> float:
        return self.rng.choice([*PROBABILITIES, self.rng.random()])

    def speculation(self) -> Speculation:
        free = self.rng.choice((0, 0, self.rng.randint(0, 200), 1000))
        return Speculation(free, self.rng.choice((0, 0, 30, 1000)))

    def request(self, req: int, phase: Phase) -> tuple[int, int]:
        """Puts a request in ``phase`` at ``req``; its rows in the pass and in the logits."""
        rng, state, width = self.rng, self.state, self.state.canvas_length
        size = rng.choice([n for n in (1, 2, 3, 4, 8, 32) if n <= width])
        block_length = size * rng.randint(1, width // size)
        slots = rng.randint(1, min(3 * block_length, state.max_response) // size)
        budget = size * slots
        block_start = block_length * rng.randint(0, (budget - 1) // block_length)
        length = min(block_length, budget - block_start)
        # an index without a request still holds what the one before left
        suspended = phase in (Phase.IDLE, Phase.PREFILL, Phase.REPLAY)
        resume = rng.choice((Phase.START, *DECODING, Phase.DONE) if suspended else (phase,))
        if size == 1 and resume == Phase.INFILL:  # a single token is never infilled
            resume = Phase.VERIFY
        corrects = rng.choice((0, 1))
        status, origin, limit = self.block(resume, size, length, corrects)
        state.status[req] = torch.tensor(status)
        state.origin[req] = torch.tensor(origin)
        state.confidence[req] = torch.tensor([self.probability() for _ in range(width)])
        state.slot_threshold[req] = rng.choice(PROBABILITIES)
        state.token_threshold[req] = rng.choice(PROBABILITIES)
        state.order[req] = torch.tensor(rng.sample(range(state.max_response), state.max_response))
        isolated = [rng.choice((-1, rng.randrange(50))) for _ in range(state.max_response)]
        state.group_context[req] = torch.tensor(isolated)

        committed = 0 if resume == Phase.START else block_start + status.count(Status.COMMITTED)
        contiguous = next((p for p, s in enumerate(status) if s != Status.COMMITTED), width)
        final = contiguous
        while final < min(contiguous + size - 1, length) and (
            status[final] == Status.ACCEPTED
            or (
                status[final] == Status.CHOSEN
                and (origin[final] == final and not corrects or final % size == 0)
            )
        ):
            final += 1
        emitted = max(0, min(block_start + final, budget) - rng.choice((0, 1, size, 40)))
        if resume == Phase.START:  # nothing has been decided yet
            emitted = 0
        prompt_len = rng.randint(1, 20)
        fields = {
            Field.PHASE: resume if phase in DECODING else phase,
            Field.RESUME: resume,
            Field.PROMPT_LEN: prompt_len,
            Field.SLOT_SIZE: size,
            Field.BLOCK_LENGTH: block_length,
            Field.BUDGET: budget,
            Field.MAX_TOKENS: budget - rng.randrange(size),
            Field.EOS: rng.choice((-1, -1, *range(TOKENS))),
            Field.BLOCK_START: block_start,
            Field.LIMIT: budget if limit is None else block_start + limit,
            Field.EMITTED: emitted,
            Field.COMMITTED: committed,
            Field.ROWS: 0,
            Field.CANVAS: 0,
            Field.KEPT: 0,
            Field.DRAW: rng.randrange(100),
            Field.PASSES: rng.randrange(100),
            Field.TESTED: (tested := rng.randrange(ACCEPTANCE_WINDOW)),
            Field.PASSED: rng.randint(0, tested),
            Field.TEST_BLOCK: rng.randrange(budget),
            Field.CORRECTS: corrects,
        }
        if phase == Phase.REPLAY and committed == 0:
            phase = fields[Field.PHASE] = Phase.PREFILL
        # serial decoding's may be those of the request before
        state.ints[req] = torch.tensor([fields.get(name, rng.randrange(99)) for name in Field])
        if phase == Phase.INFILL:
            slots = [s for s in status if s in INFILLED]
            leading = next(i for i, s in enumerate([*slots, None]) if s != Status.ACCEPTED)
            first = next((p for p, s in enumerate(status) if s in OPEN), None)
            # the token before one that takes a test is fed again
            if first is not None and (origin[first] < first or corrects):
                leading -= 1
            state.ints[req, Field.KEPT] = rng.randint(0, max(0, min(leading, len(slots) - 1)))
        if resume == Phase.START:
            first = min(block_length, budget)
            state.ints[req, [Field.ROWS, Field.CANVAS]] = first
            state.row_position[req] = -1
            state.row_position[req, :first] = torch.arange(first).int()
            state.row_target[req] = state.row_position[req]
        else:
            state.ints[req, Field.PHASE] = resume
            compose_twin(state, req, self.speculation())
            state.ints[req, Field.PHASE] = fields[Field.PHASE]
        needed, canvas = state.ints[req, [Field.ROWS, Field.CANVAS]].tolist()

        again = rng.randint(0, committed)
        self.prefill_len[req] = prompt_len + again
        self.num_computed[req] = prompt_len + committed
        if phase == Phase.PREFILL:
            self.num_computed[req] = computed = rng.randrange(prompt_len + again)
            left = prompt_len + again - computed
            beyond = rng.choice((0, needed, rng.randint(0, width)))
            return rng.choice(((left + beyond, beyond), (rng.randint(1, left), 0)))
        if phase == Phase.REPLAY:
            self.num_computed[req] = prompt_len + rng.randrange(committed)
            rows = rng.randint(1, width)
        elif rng.random() < 0.1:
            rows = rng.randint(0, max(0, needed - 1))
        else:
            rows = rng.choice((needed, canvas, rng.randint(needed, width)))
        # rows without statistics: of a prefill that the device does not need
        return rows, rows if rng.random() < 0.9 else 0

    def block(
        self, phase: Phase, size: int, length: int, corrects: int
    ) -> tuple[list[int], list[int], int | None]:
        """A block of ``length`` positions in ``phase``: statuses, origins, where EOS cut it."""
        rng = self.rng
        kinds = {
            Phase.PLAN: (Status.MASKED,),
            Phase.DONE: (),
            Phase.START: (Status.MASKED,),
        }.get(phase, (Status.CHOSEN, Status.MASKED))
        count = length // size
        of_slot = [rng.choice((Status.COMMITTED, *kinds)) for _ in range(count)]
        needed = rng.randrange(count)  # a slot that keeps the request in this phase
        if kinds:
            of_slot[needed] = kinds[0]
        status = [s for s in of_slot for _ in range(size)]
        origin = [p - p % size for p in range(self.state.canvas_length)]
        if phase == Phase.INFILL:
            for index, kind in enumerate(of_slot):
                if kind == Status.CHOSEN:
                    # a correction may have completed all slots, and is to be fed yet
                    most = size - 1 if index == needed and not corrects else size
                    done = rng.randint(1, most)
                    slot = slice(index * size, index * size + size)
                    proposed = rng.choice((0, size - done, rng.randint(0, size - done)))
                    kinds = (Status.ACCEPTED, Status.CHOSEN, Status.BLANK)
                    counts = (done, proposed, size - done - proposed)
                    status[slot] = [s for s, n in zip(kinds, counts) for _ in range(n)]
                    begun = rng.choice(
                        (done, rng.randint(0 if proposed == size - done else 1, done))
                    )
                    origin[slot] = [index * size + begun] * size
        limit = None
        if needed + 1 < count and rng.random() < 0.3:
            limit = rng.randint((needed + 1) * size + 1, length)
            ending = (limit - 1) // size * size
            accepted = phase == Phase.INFILL and rng.random() < 0.5
            kind = Status.ACCEPTED if accepted else Status.COMMITTED
            status[ending:limit] = [kind] * (limit - ending)
            status[limit:] = [
                s if s == Status.COMMITTED and p // size * size != ending else Status.DROPPED
                for p, s in enumerate(status[limit:], limit)
            ]
        return status + [Status.DROPPED] * (self.state.canvas_length - length), origin, limit


def tensors(state: DecodeState) -> dict[str, torch.Tensor]:
    """Every tensor of the state by its name."""
    return {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
