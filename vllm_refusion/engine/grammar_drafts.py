"""Structured outputs in the scheduler: drafts walked along a request's grammar."""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_refusion.engine import compat


class GrammarDrafts:
    """Makes the drafts of constrained requests fit what their grammars allow.

    Args:
        manager: vLLM's, with the grammars and their backend.
        most: drafts that a request feeds at once at most.
    """

    def __init__(self, manager: StructuredOutputManager, most: int) -> None:
        self.manager = manager
        self.most = most
        self._tokenizer: Any = getattr(manager, "tokenizer", None)

    def fit(self, request: Request, proposed: list[int]) -> list[int]:
        """The drafts up to the first that the grammar refuses, and what it forces behind them."""
        drafts = self.manager.validate_tokens(request, proposed[: self.most])
        while len(drafts) < self.most:
            forced = compat.forced_tokens(self.manager, request, drafts, self._tokenizer)
            fitting = self.manager.validate_tokens(request, [*drafts, *forced][: self.most])
            if len(fitting) <= len(drafts):
                break
            drafts = fitting
        return drafts
