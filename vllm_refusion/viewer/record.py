"""Makes trace documents with vLLM's ``LLM``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_refusion.engine.settings import TRACE_OPTION

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

FORMAT = "vllm-refusion trace"
VERSION = 2
TRACING = {"additional_config": {TRACE_OPTION: True}}  # options of an LLM that records


def record(llm: LLM, prompts: Sequence[str], sampling: SamplingParams, chat: bool = True) -> dict:
    """Decodes prompts one after another and returns the trace.

    Args:
        llm: a ReFusion model with its tokenizer, started with the options ``TRACING``.
        prompts: user messages for the chat template, or plain text without ``chat``.
        sampling: of every prompt; ``trace`` is added to its ``extra_args``.

    Raises:
        ValueError: ``sampling`` asks for several answers to a prompt.
    """
    if sampling.n != 1:
        raise ValueError(f"n={sampling.n}: a trace has one response to a prompt")
    tokenizer = llm.get_tokenizer()
    sampling = sampling.clone()
    sampling.extra_args = {**(sampling.extra_args or {}), "trace": True}
    requests = []
    for prompt in prompts:
        llm.collective_rpc("refusion_recordings")  # forgets what others left
        (output,) = llm.generate(
            {"prompt_token_ids": encode(tokenizer, prompt, chat)}, sampling, use_tqdm=False
        )
        (recording,) = llm.collective_rpc("refusion_recordings")[0]
        requests.append(_request(tokenizer, prompt, recording, output.outputs[0]))
    model_config = llm.llm_engine.model_config
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": _short_name(model_config.model),
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "device": device_name(),
        "mask_token_id": model_config.hf_text_config.mask_token_id,
        "vocabulary": _vocabulary(tokenizer, requests),
        "requests": requests,
    }


def add_autoregressive(
    trace: dict[str, Any], llm: LLM, sampling: SamplingParams, chat: bool = True
) -> None:
    """Decodes the prompts of ``trace`` with a stock model and adds its tokens and their times.

    The model's own tokenizer and chat template are used; each prompt runs alone.
    """
    from vllm import RequestOutput, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    tokenizer, engine = llm.get_tokenizer(), llm.llm_engine
    sampling = sampling.clone()
    sampling.extra_args, sampling.output_kind = None, RequestOutputKind.DELTA
    for number, request in enumerate(trace["requests"]):
        prompt = encode(tokenizer, request["prompt"]["text"], chat)
        tokens: list[int] = []
        seconds: list[float] = []
        start = time.perf_counter()
        engine.add_request(f"twin-{number}", TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                assert isinstance(output, RequestOutput)  # not one of pooling
                new = output.outputs[0].token_ids
                tokens += new
                seconds += [round(time.perf_counter() - start, 6)] * len(new)
        request["autoregressive"] = {
            "model": _short_name(engine.model_config.model),
            "output": _output(tokenizer, tokens),
            "seconds": seconds,
        }


def stock(model: str) -> dict[str, Any]:
    """Options of an ``LLM`` that decodes ``model`` token by token.

    This package would take a checkpoint with a mask token for a ReFusion model, even a twin that
    was only trained with the same tokenizer.
    """
    from transformers import AutoConfig

    return {"hf_overrides": {"architectures": AutoConfig.from_pretrained(model).architectures}}


def encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids of a user message, or of plain text without ``chat``."""
    if not chat:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def pieces(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    """The text that each token adds to those before it, see ``piecewise``."""
    return [*map(piecewise(tokenizer), tokens)]


def piecewise(tokenizer: Any) -> Callable[[int], str]:
    """A function that takes one token after another and returns the text that it adds.

    A token that ends inside a character adds nothing; the one that completes it adds all of it.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return lambda token: stream.step(tokenizer.backend_tokenizer, token) or ""


def device_name() -> str:
    """What the engine runs on, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _request(tokenizer: Any, prompt: str, recording: Mapping[str, Any], completion: Any) -> dict:
    tokens = list(completion.token_ids)
    # with async scheduling a request may make passes after its last token
    delivered = itertools.accumulate(entry["delivered"] for entry in recording["passes"])
    needed = next(i for i, count in enumerate(delivered, 1) if count >= len(tokens))
    return {
        "prompt": {"text": prompt, "tokens": recording["prompt"]},
        "parameters": recording["parameters"],
        "output": _output(tokenizer, tokens),
        "passes": recording["passes"][:needed],
    }


def _output(tokenizer: Any, tokens: list[int]) -> dict[str, Any]:
    return {
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": tokens,
        "pieces": pieces(tokenizer, tokens),
    }


def _vocabulary(tokenizer: Any, requests: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Text of every token that was drafted, proposed or committed, each decoded alone."""
    used: set[int] = set()
    for request in requests:
        for entry in request["passes"]:
            used.update(token for _, token in entry.get("committed", ()))
            for operation in entry["operations"]:
                for name in ("drafts", "proposals", "tests", "corrections", "picks"):
                    used.update(item[1] for item in operation.get(name, ()))
    return {str(token): tokenizer.decode([token]) for token in sorted(used)}


def _short_name(model: str) -> str:
    """The last two parts of a path or hub name: no folder of this machine."""
    parts = [part for part in str(model).split("/") if part]
    is_hub_name = len(parts) == 2 and not str(model).startswith(("/", "."))
    return "/".join(parts) if is_hub_name else parts[-1]
