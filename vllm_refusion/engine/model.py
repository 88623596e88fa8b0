"""ReFusion models: stock vLLM backbones with our attention backend and decoding state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_refusion.adapters import check_base
from vllm_refusion.engine import compat
from vllm_refusion.engine.adapter_option import adapter_of
from vllm_refusion.engine.attention import CanvasAttentionBackend

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_refusion.engine.lora_rows import LoraRows


class ReFusionMixin:
    """Put before a stock causal LM class; the backbone itself is left as it is.

    Attributes:
        lora_rows: None where the engine has no LoRA.
    """

    lora_rows: LoraRows | None = None

    @staticmethod
    def get_model_state_cls() -> type:
        from vllm_refusion.engine.model_state import ReFusionModelState

        return ReFusionModelState

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with compat.attention_backend(CanvasAttentionBackend):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._vllm_config = vllm_config
        self._quantised = vllm_config.quant_config is not None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a checkpoint's weights; returns the names of the parameters that got theirs.

        Raises:
            ValueError: weights are unknown, of the wrong shape or missing (vLLM itself does not
                miss those of its linear layers), or of another model than the mask adapter's base;
                says which, and what to do.
        """
        name, shape = "", ()

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal name, shape
            for name, tensor in weights:
                shape = tuple(tensor.shape)
                yield name, tensor

        advice = "Download the checkpoint again, or convert it again."
        try:
            loaded = super().load_weights(noted())
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            # no file could be read, or quantising what was read failed
            if not name or (self._quantised and isinstance(error, RuntimeError)):
                raise
            raise ValueError(
                f"Weight {name} of shape {shape} does not fit the model that the checkpoint's "
                f"config.json describes. {error} {advice}"
            ) from error
        missing = {parameter for parameter, _ in self.named_parameters()} - loaded
        if missing and not self._quantised:
            shown = ", ".join(sorted(missing)[:5])
            raise ValueError(
                f"{len(missing)} weights are not in the checkpoint ({shown}, ...): it is "
                f"incomplete. {advice}"
            )
        self._check_download()
        return loaded

    def _check_download(self) -> None:
        """A base from the hub is on the disk only now; see ``take_adapter`` for others."""
        model = self._vllm_config.model_config
        adapter = adapter_of(model)
        if adapter is not None and not Path(model.model).is_dir():
            cache = self._vllm_config.load_config.download_dir
            folder = snapshot_download(
                model.model, revision=model.revision, cache_dir=cache, local_files_only=True
            )
            check_base(adapter, folder)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Passes the rows on: the sampler computes logits in chunks, to bound their memory.

        Args:
            hidden_states: [rows, hidden].
        """
        return hidden_states

    def row_logits(
        self, hidden_states: torch.Tensor, requests: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [rows, vocab] of hidden states [rows, hidden].

        Args:
            requests: [rows], whose rows they are, by req, for their LoRA; None: nobody's.
        """
        if self.lora_rows is not None:
            self.lora_rows.start_logits(requests, len(hidden_states))
        return super().compute_logits(hidden_states)


class ReFusionQwen3ForCausalLM(ReFusionMixin, Qwen3ForCausalLM):
    """ReFusion over Qwen3, the published backbone."""


class ReFusionQwen2ForCausalLM(ReFusionMixin, Qwen2ForCausalLM):
    """ReFusion over Qwen2 and Qwen2.5."""


class ReFusionLlamaForCausalLM(ReFusionMixin, LlamaForCausalLM):
    """ReFusion over Llama-type backbones."""
