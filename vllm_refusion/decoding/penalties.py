"""What the tokens before a position do to the row that picks its token, in serial mode.

For a row of logits x that picks the token behind the response r, float32:

    s[t] = x[t] + bias[t]
    s[t] = s[t] * (1 / repetition) if s[t] > 0 else s[t] * repetition      t in the prompt or in r
    s[t] = s[t] - frequency * (how often t is in r) - presence             t in r
    s[t] = -inf              where a bad word is the last tokens of r and t

Picks go by s from there on (``picking.py``). Parallel mode has none of this: there a token is
picked before those ahead of it are known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_refusion.decoding.sending import sent

# Bad words of several tokens, and their tokens together, of one request: vLLM's own limits.
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 1024


class Penalties:
    """The penalties, bad words and biases of requests that have penalties or bad words.

    Attributes (device tensors; R = max_requests, B = such requests at once so far, V = vocab):
        index: [R] int32, the request's row of the tables below; 0 for none.
        factors: [1 + B, 3] float32: repetition, frequency and presence.
        bias: [1 + B, V] float32.
        seen: [1 + B, V] int32: twice the times that a token is in the response so far, and 1 if it
            is in the prompt.
        word_start, word_length: [1 + B, MAX_BAD_WORDS] int32, of bad words in ``word_tokens``;
            length 0 for none.
        word_tokens: [1 + B, MAX_BAD_WORD_TOKENS] int32.
    """

    def __init__(self, max_requests: int, vocab: int, device: torch.device | str) -> None:
        self.vocab, self.device = vocab, torch.device(device)
        self.index = torch.zeros(max_requests, dtype=torch.int32, device=self.device)
        self._row_of: dict[int, int] = {}
        self._tables = {
            "factors": self._zeros(3, torch.float32),
            "bias": self._zeros(vocab, torch.float32),
            "seen": self._zeros(vocab, torch.int32),
            "words": self._zeros(2 * MAX_BAD_WORDS + MAX_BAD_WORD_TOKENS, torch.int32),
        }
        self._name_tables()

    def _zeros(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, width, dtype=dtype, device=self.device)

    def _name_tables(self) -> None:
        self.factors, self.bias = self._tables["factors"], self._tables["bias"]
        self.seen, words = self._tables["seen"], self._tables["words"]
        self.word_start = words[:, :MAX_BAD_WORDS]
        self.word_length = words[:, MAX_BAD_WORDS : 2 * MAX_BAD_WORDS]
        self.word_tokens = words[:, 2 * MAX_BAD_WORDS :]

    @property
    def used(self) -> Penalties | None:
        """These, or None while no request has any: then nothing has to be read."""
        return self if self._row_of else None

    def add(
        self,
        req: int,
        prompt: Sequence[int],
        response: Sequence[int],
        *,
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
        bad_words: Sequence[Sequence[int]] = (),
        bias: torch.Tensor | None = None,
    ) -> None:
        """Starts or resumes the request at ``req``, of whose response that much is known.

        Args:
            bad_words: token ids of each, at most MAX_BAD_WORDS with MAX_BAD_WORD_TOKENS together.
            bias: as ``bias_row`` returns it.
        """
        row = self._take_row(req)
        starts: list[int] = []
        tokens: list[int] = []
        for word in bad_words:
            starts.append(len(tokens))
            tokens += word
        words = torch.zeros(self._tables["words"].shape[1], dtype=torch.int32)
        words[: len(starts)] = torch.tensor(starts)
        words[MAX_BAD_WORDS:][: len(starts)] = torch.tensor([len(word) for word in bad_words])
        words[2 * MAX_BAD_WORDS :][: len(tokens)] = torch.tensor(tokens)
        self._tables["words"][row] = sent(words, self.device)
        self.factors[row] = sent(torch.tensor([repetition, frequency, presence]), self.device)
        self.bias[row] = 0.0 if bias is None else sent(bias, self.device)
        seen = self.seen[row].zero_()
        seen.index_fill_(0, sent(torch.tensor(prompt, dtype=torch.int64), self.device), 1)
        twice = torch.full((len(response),), 2, dtype=torch.int32, device=self.device)
        seen.index_add_(0, sent(torch.tensor(response, dtype=torch.int64), self.device), twice)
        self.index[req].fill_(row)

    def _take_row(self, req: int) -> int:
        taken = set(self._row_of.values())
        row = next(r for r in range(1, len(self.seen) + 1) if r not in taken)
        if row == len(self.seen):  # doubled, so that growing is rare
            for name, table in self._tables.items():
                more = table.new_zeros(row, table.shape[1])
                self._tables[name] = torch.cat([table, more])
            self._name_tables()
        self._row_of[req] = row
        return row

    def remove(self, req: int) -> None:
        """Ends what the request at ``req`` has, if it has any."""
        if self._row_of.pop(req, None) is not None:
            self.index[req].fill_(0)

    def count(self, req_of: torch.Tensor, tokens: torch.Tensor, number: torch.Tensor) -> None:
        """Counts tokens that requests have got; waits for nothing.

        Args:
            req_of: [N] int, requests. tokens: [N, W] int32, of which the first ``number`` [N] hold.
        """
        row = self.index[req_of].to(torch.int64)[:, None]
        lane = torch.arange(tokens.shape[1], device=self.device)
        counts = (lane < number[:, None]) & (row > 0)
        place = torch.where(counts, row * self.vocab + tokens, 0)
        self.seen.view(-1).index_add_(0, place.flatten(), 2 * counts.flatten().int())
