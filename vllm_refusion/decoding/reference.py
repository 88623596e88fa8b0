"""The reference decoder: sections 3, 7 and 8 of the algorithm for one request, written to be read.

It is the oracle of the project: in float32 an engine must give the same tokens. Nothing is fused:
each plan, verify and infill operation is one forward pass. *Response positions* count from 0 after
the prompt; RoPE positions add the prompt's length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.picking import bias_row, lowest_kept_score

_SlotTokens = list[tuple[int, list[int]]]  # per slot: first response position, tokens


class Pass(NamedTuple):
    """One forward pass and the rows it fed.

    Kinds: "plan", "verify", "predict" and "infill_verify"; in serial mode "start", the mask of a
    slot's first position, and "token".
    """

    kind: str
    width: int


class Round(NamedTuple):
    """From a plan to the commit it led to, and how close its decisions were.

    ``committed`` counts the response tokens committed before it. ``threshold_margin`` is the
    smallest distance of a probability from what it was compared with, ``argmax_margin`` the
    smallest lead in score on the runner-up, over all picks that had a say.
    """

    committed: int
    threshold_margin: float
    argmax_margin: float


@dataclass(frozen=True)
class Decoded:
    """What one request gave.

    Attributes:
        tokens: in position order, cut after EOS, after a stop token and at ``max_tokens``.
        committed: token by response position, in the order committed, i.e. of the KV cache behind
            the prompt; holds positions that ``tokens`` cuts off.
        passes: the forward passes, without the prompt's.
        branches: names of the branches of the algorithm that ran.
        rounds: the plans and how close the decisions after each were.
        picks: in serial mode, the (position, token, probability) of all tokens as they are decided.
        logprobs: of each of ``tokens``, if asked for: of itself and of the likeliest tokens, by
            token, of the row whose probability accepted it (see ``decoding/logprobs.py``).
    """

    tokens: list[int]
    committed: dict[int, int]
    passes: list[Pass]
    branches: frozenset[str]
    rounds: list[Round]
    picks: list[tuple[int, int, float]] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None

    @property
    def commit_order(self) -> list[int]:
        return list(self.committed)

    @property
    def threshold_margin(self) -> float:
        return min(r.threshold_margin for r in self.rounds)

    @property
    def argmax_margin(self) -> float:
        return min(r.argmax_margin for r in self.rounds)

    @property
    def tpf(self) -> float:
        """Tokens delivered per forward pass."""
        return len(self.tokens) / len(self.passes)


@torch.inference_mode()
def decode(
    model: Any,
    prompt_ids: Sequence[int],
    params: DecodingParams,
    *,
    mask_token_id: int,
    eos_token_id: int | None = None,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    min_tokens: int = 0,
    stop_token_ids: Collection[int] = (),
    ignored_eos_token_id: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    allowed_token_ids: Collection[int] | None = None,
    banned_token_ids: Collection[int] = (),
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    bad_words: Collection[Sequence[int]] = (),
    logprobs: int | None = None,
    allowed: Callable[[list[int]], torch.Tensor] | None = None,
) -> Decoded:
    """Decodes one request with ``model``, a transformers causal LM.

    ``eos_token_id=None`` makes EOS an ordinary token. Stop tokens are ordinary while decoding and
    cut the output. Neither is picked at a response position below ``min_tokens``, nor is an ignored
    EOS in serial mode. What the parameters behind them do: see
    ``vllm_refusion/decoding/picking.py``. In serial mode penalties and ``bad_words``, token ids of
    each, act; ``allowed`` may say which tokens, [V] bool, a grammar allows behind the response so
    far.
    """
    if not prompt_ids or max_tokens < 1:
        raise ValueError(f"{len(prompt_ids)=} and {max_tokens=} must both be at least 1")
    ends = [eos_token_id, ignored_eos_token_id if params.mode == "serial" else None]
    barred = {*stop_token_ids, *(token for token in ends if token is not None)}
    biases = (logit_bias, allowed_token_ids, banned_token_ids)
    bias = bias_row(model.config.vocab_size, *biases) if any(biases) else None
    cuts = (top_k, top_p, min_p)
    past = _Past(
        set(prompt_ids), repetition_penalty, frequency_penalty, presence_penalty, bad_words
    )
    rules = _PickRules(mask_token_id, barred, min_tokens, temperature, seed, cuts, bias, past)
    request = _Request(_Canvas(model, prompt_ids), params, rules, eos_token_id, max_tokens)
    request.num_logprobs = logprobs
    if params.mode == "serial":
        request.decode_serially(max_tokens, allowed)
    else:
        request.decode_blocks()
    tokens = [request.tokens[position] for position in range(min(request.end, max_tokens))]
    stop = next((i for i, token in enumerate(tokens) if token in stop_token_ids), len(tokens))
    passes, branches = request.canvas.passes[1:], frozenset(request.branches)
    tokens = tokens[: stop + 1]
    scores = [request.logprobs[p] for p in range(len(tokens))] if logprobs is not None else None
    return Decoded(tokens, request.tokens, passes, branches, request.rounds, request.picks, scores)


class _Canvas:
    """Feeds rows behind the committed context of a request and keeps the KV of committed rows."""

    def __init__(self, model: Any, prompt_ids: Sequence[int]) -> None:
        self._model, self._cache = model, DynamicCache()
        self._context, self._fed, self._prompt_length = 0, 0, len(prompt_ids)
        self.passes: list[Pass] = []
        (rows,) = self.feed("prompt", [(-len(prompt_ids), list(prompt_ids))])
        self.last_row = rows[-1:]  # [1, V], of the prompt's last token
        self.keep(len(prompt_ids))

    def feed(self, kind: str, slots: _SlotTokens, isolated: bool = False) -> list[torch.Tensor]:
        """Feeds slots in one pass; returns the logits of each, float32 [tokens, V].

        A row sees the context and the rows before it: of its own slot if ``isolated``, else all.
        """
        self.keep(0)
        lengths = [len(tokens) for _, tokens in slots]
        ids = [token for _, tokens in slots for token in tokens]
        where = [start + i for start, tokens in slots for i in range(len(tokens))]
        visible = torch.ones(len(ids), len(ids)).tril()
        if isolated:
            visible *= torch.block_diag(*(torch.ones(n, n) for n in lengths))
        # Always an explicit mask: without one transformers takes a jump in the positions for the
        # start of another packed sequence and cuts attention there.
        mask = torch.zeros(len(ids), self._context + len(ids), dtype=self._model.dtype)
        mask[:, self._context :].masked_fill_(visible == 0, torch.finfo(mask.dtype).min)
        self._fed = len(ids)
        self.passes.append(Pass(kind, len(ids)))
        output = self._model(
            input_ids=torch.tensor([ids]).to(self._model.device),
            position_ids=torch.tensor([where]).to(self._model.device) + self._prompt_length,
            attention_mask=mask[None, None].to(self._model.device),
            past_key_values=self._cache,
            use_cache=True,
        )
        return list(output.logits[0].float().split(lengths))

    def keep(self, rows: int) -> None:
        """Commits the first ``rows`` rows of the last pass and drops the KV of the others."""
        if self._fed > rows:
            self._cache.crop(rows - self._fed)
        self._context, self._fed = self._context + rows, 0


@dataclass
class _Past:
    """Section 7: what the tokens before a position do to its scores."""

    prompt: set[int]
    repetition: float
    frequency: float
    presence: float
    bad_words: Collection[Sequence[int]]

    def act(self, scores: torch.Tensor, response: list[int]) -> torch.Tensor:
        """Scores [V] of the token behind ``response``."""
        said = list(self.prompt.union(response))
        counts = torch.bincount(torch.tensor(response, dtype=torch.int64), minlength=len(scores))
        counts = counts.to(scores.device)
        scale = torch.ones_like(scores)
        scale[said] = self.repetition
        scores = scores * torch.where(scores > 0, 1 / scale, scale)
        scores = scores - self.frequency * counts - self.presence * (counts > 0)
        for *before, last in self.bad_words:
            if response[len(response) - len(before) :] == before:
                scores[last] = -math.inf
        return scores


@dataclass
class _PickRules:
    """How drafts and proposals are picked."""

    mask_token_id: int
    barred: set[int]  # EOS and stop tokens: never picked below min_tokens
    min_tokens: int
    temperature: float
    seed: int
    cuts: tuple[int, float, float] = (0, 1.0, 0.0)  # top_k, top_p, min_p
    bias: torch.Tensor | None = None  # [V]
    past: _Past | None = None  # of serial mode
    draw: int = 0  # plan and predict operations so far

    def pick(
        self, logits: torch.Tensor, where: list[int], before: list[int] | None = None
    ) -> list[tuple[int, float, float]]:
        """Per row of ``logits`` [rows, V]: the token, its raw probability, its lead in score.

        ``before``: of serial mode, the response before the one position there is.
        """
        positions = torch.tensor(where, device=logits.device)
        scores = logits.clone() if self.bias is None else logits + self.bias.to(logits.device)
        if before is not None and self.past is not None:
            scores = self.past.act(scores[0], before)[None]
        if self.mask_token_id < logits.shape[-1]:  # that of a mask adapter is no token
            scores[:, self.mask_token_id] = -math.inf
        for token in self.barred:
            scores[positions < self.min_tokens, token] = -math.inf
        if self.temperature > 0:
            from vllm_refusion.decoding.noise import gumbel_noise

            scores /= self.temperature
            top_k, top_p, min_p = (scores.new_tensor(cut).expand(len(where)) for cut in self.cuts)
            lowest = lowest_kept_score(scores, top_k, top_p, min_p.log())
            scores[scores < lowest[:, None]] = -math.inf
            scores += gumbel_noise(self.seed, self.draw, positions, logits.shape[-1])
        self.draw += 1
        picked = scores.argmax(-1)  # the lowest id on a tie
        probabilities = logits.softmax(-1).gather(1, picked[:, None])[:, 0]
        leads = -scores.topk(2).values.diff()[:, 0]
        return list(zip(picked.tolist(), probabilities.tolist(), leads.tolist()))


@dataclass
class _Slot:
    """A chosen slot. Its tokens are drafts or proposals but for the first ``accepted``."""

    start: int
    tokens: list[int]  # cut right after an accepted EOS
    leads: list[float]
    logits: list[torch.Tensor]  # of each token, the row that proposed or, later, accepted it
    accepted: int = 0
    failed: torch.Tensor | None = None  # [V], the row that failed a token in the last test
    corrected: int | None = None  # the token picked anew since the slot was last fed

    @property
    def complete(self) -> bool:
        return self.accepted == len(self.tokens)

    @property
    def ends_unfed(self) -> bool:
        """Whether its last token is a correction whose KV no pass has computed yet."""
        return self.corrected == len(self.tokens) - 1


class _Request:
    """What is decoded of a request so far, and the operations of section 3 on it."""

    def __init__(
        self, canvas: _Canvas, params: DecodingParams, rules: _PickRules, eos: int | None, n: int
    ) -> None:
        self.canvas, self.params, self.rules, self.eos = canvas, params, rules, eos
        # Probabilities are float32: so must be what they are compared with.
        self.slot_threshold = torch.tensor(params.slot_threshold).item()
        self.token_threshold = torch.tensor(params.token_threshold).item()
        self.budget = self.end = params.budget(n)  # EOS puts the end right behind itself
        self.tokens: dict[int, int] = {}  # by response position, in the order committed
        self.branches: set[str] = set()
        self.rounds: list[Round] = []
        self.picks: list[tuple[int, int, float]] = []  # of serial mode
        self.distances: list[float] = []  # of probabilities compared in this round
        self.leads: list[float] = []  # of this round's picks that had a say
        self.num_logprobs: int | None = None
        self.logprobs: dict[int, dict[int, float]] = {}  # by response position

    def decode_blocks(self) -> None:
        length, size = self.params.block_length, self.params.slot_size
        for block in range(0, self.budget, length):
            slots = range(block, min(block + length, self.budget), size)
            while left := [s for s in slots if s not in self.tokens and s < self.end]:
                self._branch("later_block", block > 0)
                self._branch("short_last_block", block + length > self.budget)
                committed, self.distances, self.leads = len(self.tokens), [], []
                self._commit(self._verify(self._plan(left)), left)
                self.rounds.append(Round(committed, min(self.distances), min(self.leads)))
        self._branch("no_eos", self.eos not in self.tokens.values())

    def decode_serially(
        self, max_tokens: int, allowed: Callable[[list[int]], torch.Tensor] | None = None
    ) -> None:
        """Section 7: token by token in position order, one row a pass."""
        size, masked_starts = self.params.slot_size, self.params.slot_start == "mask"
        row = self.canvas.last_row
        for position in range(max_tokens):
            if masked_starts and position % size == 0:
                row = self.canvas.feed("start", [(position, [self.rules.mask_token_id])])[0]
                self.canvas.keep(0)
            if allowed is not None:
                row = row.masked_fill(~allowed(list(self.tokens.values())), -math.inf)
            # the noise depends on seed and position only
            before = [self.tokens[p] for p in range(position)]
            rules = replace(self.rules, draw=0)
            ((token, probability, lead),) = rules.pick(row, [position], before)
            if allowed is not None and math.isnan(lead):  # nothing is left to pick
                self.end = position
                break
            self.picks.append((position, token, probability))
            self.rounds.append(Round(position, math.inf, lead))
            self._note(position, token, row[0])
            if token == self.eos:
                self.end = position + 1
                break
            row = self.canvas.feed("token", [(position, [token])])[0]
            self.canvas.keep(1)

    def _plan(self, masked: list[int]) -> list[_Slot]:
        """3.1: drafts every masked slot (given by its start) and returns the chosen ones."""
        size = self.params.slot_size
        masks = [(start, [self.rules.mask_token_id] * size) for start in masked]
        logits = torch.cat(self.canvas.feed("plan", masks))
        picks = self.rules.pick(logits, [start + i for start in masked for i in range(size)])
        _, certainty, leads = zip(*picks[::size])
        self.distances += [abs(c - self.slot_threshold) for c in certainty]
        self.leads += leads
        chosen = [i for i, c in enumerate(certainty) if c > self.slot_threshold]
        self._branch("several_slots", len(chosen) > 1)
        if not chosen:
            self._branch("forced_slot")
            best, *others = sorted(certainty, reverse=True)
            self.distances += [best - c for c in others]
            chosen = [certainty.index(best)]
        slots = []
        for i in chosen:
            rows = slice(i * size, (i + 1) * size)
            tokens, _, leads = zip(*picks[rows])
            slots.append(_Slot(masked[i], list(tokens), list(leads), list(logits[rows])))
        return slots

    def _verify(self, chosen: list[_Slot]) -> list[_Slot]:
        """3.2: tests all drafts in one pass; returns the slots to commit, from 3.3 if none."""
        self._test("verify", chosen)
        whole = next((i for i, slot in enumerate(chosen) if not slot.complete), len(chosen))
        # The accepted prefix ends in the slot after the whole ones: its first token is in it.
        if until_eos := self._until_eos(chosen[: whole + 1]):
            self._branch("eos_in_verify")
            return until_eos
        self._branch("whole_prefix", whole == len(chosen))
        self._branch("partial_prefix", 0 < whole < len(chosen))
        if whole:
            return chosen[:whole]
        self._correct(chosen[:1])  # rows of the others saw other slots
        return self._infill(chosen)

    def _infill(self, chosen: list[_Slot]) -> list[_Slot]:
        """3.3: goes on until all slots are complete; returns those that EOS does not drop."""
        slots, rounds = self._until_eos(chosen) or chosen, 0
        self._branch("infill_complete_on_entry", any(slot.complete for slot in slots))
        # 3.2 left the first slot incomplete or ended by a correction, so there is a last pass here:
        # with the KV of final tokens.
        while not all(slot.complete for slot in slots):
            rounds += 1
            self._predict([slot for slot in slots if not slot.complete])
            self._test("infill_verify", slots, isolated=True)
            self._correct(slots)
            slots = self._until_eos(slots) or slots
        if any(slot.ends_unfed for slot in slots):
            self._branch("correction_ends_infill")
            self._test("infill_verify", slots, isolated=True)
        names = ("infill_without_round", "infill_one_round", "infill_many_rounds")
        self._branch(names[min(rounds, 2)])
        self._branch("infill_drops_slots", len(slots) < len(chosen))
        self._branch("eos_in_infill", slots[-1].tokens[-1] == self.eos)
        return slots

    def _predict(self, slots: list[_Slot]) -> None:
        """3.3, predict: proposes tokens for what is not accepted of each slot."""
        blanks = [(slot, i) for slot in slots for i in range(slot.accepted, len(slot.tokens))]
        for slot, i in blanks:
            slot.tokens[i] = self.rules.mask_token_id
        rows = self.canvas.feed("predict", [(s.start, s.tokens) for s in slots], isolated=True)
        logits = torch.cat([row[slot.accepted :] for slot, row in zip(slots, rows)])
        picks = self.rules.pick(logits, [slot.start + i for slot, i in blanks])
        for (slot, i), (token, _, lead), row in zip(blanks, picks, logits):
            slot.tokens[i], slot.leads[i], slot.logits[i] = token, lead, row

    def _test(self, kind: str, slots: list[_Slot], isolated: bool = False) -> None:
        """Feeds the slots; accepts in each one more token untested, then tokens while they pass.

        By section 8 only the first token of a slot is accepted untested.
        """
        rows = self.canvas.feed(kind, [(slot.start, slot.tokens) for slot in slots], isolated)
        for slot, logits in zip(slots, rows):
            slot.failed = slot.corrected = None
            untested = 0 if self.params.infill == "correct" else slot.accepted
            given = logits.softmax(-1)
            for i in range(slot.accepted, len(slot.tokens)):
                self.leads.append(slot.leads[i])
                if i > untested:
                    probability = given[i - 1, slot.tokens[i]].item()
                    self.distances.append(abs(probability - self.token_threshold))
                    if probability <= self.token_threshold:
                        slot.failed = logits[i - 1]
                        break
                    slot.logits[i] = logits[i - 1]
                slot.accepted += 1

    def _correct(self, slots: list[_Slot]) -> None:
        """Section 8: where a token failed, accepts another one, picked in the row that failed it.

        It takes the noise of the next operation, which proposes nothing for this position.
        """
        for slot in slots if self.params.infill == "correct" else []:
            if slot.failed is not None:
                i = slot.corrected = slot.accepted
                (pick,) = replace(self.rules).pick(slot.failed[None], [slot.start + i])
                slot.tokens[i], _, slot.leads[i] = pick
                slot.logits[i] = slot.failed
                slot.accepted += 1
                self.leads.append(slot.leads[i])
                self._branch("correction_is_eos", slot.tokens[i] == self.eos)

    def _until_eos(self, slots: list[_Slot]) -> list[_Slot]:
        """The slots up to the first with an accepted EOS, that one cut; none without such EOS."""
        for index, slot in enumerate(slots):
            if self.eos in slot.tokens[: slot.accepted]:
                slot.accepted = slot.tokens.index(self.eos) + 1
                del slot.tokens[slot.accepted :]
                return slots[: index + 1]
        return []

    def _commit(self, slots: list[_Slot], masked: list[int]) -> None:
        """Commits complete slots, the first rows of the last pass; EOS drops what is behind it."""
        self.canvas.keep(sum(len(slot.tokens) for slot in slots))
        eos_before = self.eos in self.tokens.values()
        for slot in slots:
            for position, token in enumerate(slot.tokens, slot.start):
                self._note(position, token, slot.logits[position - slot.start])
        last = slots[-1]
        if last.tokens[-1] == self.eos:
            self.end = last.start + len(last.tokens)
            left = [start for start in masked if start < self.end and start not in self.tokens]
            self._branch("early_eos_with_masked_slots_before", bool(left))
            self._branch("eos_before_committed_eos", eos_before)

    def _note(self, position: int, token: int, logits: torch.Tensor) -> None:
        """A token is final; ``logits`` [V]: the row that picked or accepted it."""
        self.tokens[position] = token
        if self.num_logprobs is not None:
            row = logits.log_softmax(-1)
            likely = row.topk(self.num_logprobs).indices.tolist()
            self.logprobs[position] = {t: row[t].item() for t in (token, *likely)}

    def _branch(self, name: str, ran: bool = True) -> None:
        self.branches |= {name} if ran else set()
