"""Structured outputs in the scheduler: drafts walked along a request's grammar."""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_refusion.engine import compat

# Masks that the host fills in a step for the drafts of all requests: others wait for it.
MASKS_OF_ALL = 256


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

    def fit(self, request: Request, proposed: list[int], running: int) -> list[int]:
        """The drafts up to the first that the grammar refuses, and what it forces behind them.

        Fewer where many requests are ``running``, for whom drafts are dear in any case.
        """
        most = min(self.most, MASKS_OF_ALL // max(1, running))
        drafts = self._fitting(request, proposed[:most])
        while len(drafts) < most:
            forced = compat.forced_tokens(self.manager, request, drafts, self._tokenizer)
            fitting = self._fitting(request, [*drafts, *forced][:most])
            if len(fitting) <= len(drafts):
                break
            drafts = fitting
        return drafts

    def _fitting(self, request: Request, tokens: list[int]) -> list[int]:
        """The beginning that the grammar allows.

        What ends the grammar, but not the response, comes last in its pass: guidance does not take
        it together with tokens that follow.
        """
        params = request.sampling_params
        fitting = self.manager.validate_tokens(request, tokens)
        ends = params.all_stop_token_ids if params.ignore_eos else ()
        end = next((i for i, token in enumerate(fitting) if token in ends), len(fitting))
        return fitting[:end]
