"""Log-probabilities of prompts: vLLM's own computation, given the rows that are a prompt's.

vLLM scores all rows of a step and finds those of a request by the host's layout. Here a step has
canvases too, and where they end only the device knows. So a batch of nothing but the prompts' rows
is made up for it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from vllm_refusion.decoding.sending import sent


class PromptScores(PromptLogprobsWorker):
    """Takes the place of vLLM's; a prompt's last result comes in the step that ends it.

    Args:
        model: whose ``row_logits`` the rows go through.
    """

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, device: torch.device) -> None:
        requests = vllm_config.scheduler_config.max_num_seqs
        super().__init__(requests, device, vllm_config.model_config.logprobs_mode)
        self._model = model

    def compute_prompt_logprobs(
        self,
        logits_fn: Any,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        all_token_ids: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        prompt_lens: np.ndarray,
    ) -> dict[str, LogprobsTensors]:
        asking = self.uses_prompt_logprobs[input_batch.idx_mapping_np]
        prompts = self._prompts(asking, hidden_states, input_batch, prompt_lens)
        if prompts is None:
            return {}
        rows, batch = prompts
        return super().compute_prompt_logprobs(
            self._logits_of(batch), rows, batch, all_token_ids, num_computed_tokens, prompt_lens
        )

    def compute_prompt_token_id_logprobs(
        self,
        logits_fn: Any,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        prompt_lens: np.ndarray,
    ) -> dict[str, torch.Tensor]:
        if not self.token_id_scores:
            return {}
        asking = np.array([req_id in self.token_id_scores for req_id in input_batch.req_ids])
        prompts = self._prompts(asking, hidden_states, input_batch, prompt_lens)
        if prompts is None:
            return {}
        rows, batch = prompts
        return super().compute_prompt_token_id_logprobs(
            self._logits_of(batch), rows, batch, prompt_lens
        )

    def _logits_of(self, batch: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """Logits of slices of the rows of ``batch``."""

        def logits(rows: torch.Tensor) -> torch.Tensor:
            start = rows.storage_offset() // rows.stride(0)
            return self._model.row_logits(rows, batch.requests[start : start + len(rows)])

        return logits

    def _prompts(
        self,
        asking: np.ndarray,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        prompt_lens: np.ndarray,
    ) -> tuple[torch.Tensor, Any] | None:
        """Rows of the prompts of the requests that ask for theirs, and a batch of just these."""
        if not asking.any():
            return None
        computed = input_batch.num_computed_prefill_tokens_np
        left = prompt_lens[input_batch.idx_mapping_np] - computed
        chosen = (asking & (left > 0)).nonzero()[0]
        if not len(chosen):
            return None
        fed = input_batch.num_scheduled_tokens[chosen]
        if input_batch.num_draft_tokens_per_req is not None:
            fed = fed - input_batch.num_draft_tokens_per_req[chosen]
        fed = np.minimum(fed, left[chosen]).astype(np.int32)
        starts = np.concatenate(([0], np.cumsum(fed))).astype(np.int32)
        total = int(starts[-1])
        of = np.repeat(chosen, fed)
        offset = np.arange(total) - np.repeat(starts[:-1], fed)
        sent = self._sent(np.stack((of, offset)))
        rows = hidden_states[input_batch.query_start_loc[sent[0]] + sent[1]]
        return rows, SimpleNamespace(
            req_ids=[input_batch.req_ids[i] for i in chosen],
            idx_mapping_np=input_batch.idx_mapping_np[chosen],
            idx_mapping=input_batch.idx_mapping[self._sent(chosen)],
            requests=input_batch.idx_mapping[sent[0]],
            num_tokens=total,
            num_scheduled_tokens=fed,
            num_computed_prefill_tokens_np=computed[chosen],
            prefill_len_np=input_batch.prefill_len_np[chosen],
            query_start_loc=self._sent(starts),
            query_start_loc_np=starts,
        )

    def _sent(self, values: np.ndarray) -> torch.Tensor:
        return sent(torch.from_numpy(values), self.device)
