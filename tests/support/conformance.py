"""Tiny models and the requests that every engine must answer like the reference decoder.

Everything is a function of names and constants in this file, so that the models, the requests and
the expected answers are the same wherever they are built.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import Decoded, decode
from vllm_refusion.files import writing

MAX_MODEL_LEN = 512


@dataclass(frozen=True)
class _Model:
    """A random model; ``_draw`` says what its last three fields do to the weights."""

    vocab_size: int
    head_dim: int
    kv_heads: int
    mask_token_id: int
    eos_token_id: int
    stop_token_ids: tuple[int, ...]  # tokens that it often says
    seed: int
    llama: bool = False
    shared: float = 0.8
    sharpness: float = 4.0
    contrast: float = 7.0


MODELS = {
    "qwen3-gqa1": _Model(101, 32, 4, 90, 94, (9, 100), seed=6),
    "qwen3-gqa2": _Model(113, 64, 2, 112, 108, (40, 91), seed=7),
    "llama-gqa4": _Model(127, 128, 1, 3, 101, (51, 57), seed=4, llama=True),
}


@dataclass(frozen=True)
class Case:
    """One request. EOS is the model's ``eos_token_id``, an ordinary token if ``ignore_eos``."""

    label: str
    prompt_ids: tuple[int, ...]
    params: DecodingParams
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0  # this and what follows, but for logprobs: of serial mode
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None


def build_model(name: str, directory: str | Path) -> Path:
    """Writes the checkpoint of ``MODELS[name]`` in float32, with a tokenizer of words t0 t1 ..."""
    spec, directory = MODELS[name], Path(directory)
    config_class, model_class = (
        (LlamaConfig, LlamaForCausalLM) if spec.llama else (Qwen3Config, Qwen3ForCausalLM)
    )
    model = model_class(
        config_class(
            vocab_size=spec.vocab_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=MAX_MODEL_LEN,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=spec.eos_token_id,
            mask_token_id=spec.mask_token_id,
        )
    ).float()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(_draw(spec, key, weight.shape))
    model.save_pretrained(directory)
    write_tokenizer(directory, spec.vocab_size, spec.eos_token_id)
    return directory


def write_tokenizer(directory: Path, vocab_size: int, eos_token_id: int) -> None:
    """A tokenizer of words t0 t1 ..."""
    words = models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    eos = f"t{eos_token_id}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(directory)


def _draw(spec: _Model, key: str, shape: torch.Size) -> torch.Tensor:
    """The weight called ``key``, scaled so that all branches of the algorithm run.

    A draft comes from masks and is tested by tokens. In a random model the two agree only by
    chance, so embeddings are small and have a ``shared`` part: rows then differ by what they see
    more than by what they are. ``sharpness`` of attention makes what they see differ, and
    ``contrast`` spreads the probabilities.
    """
    # Uniform: unlike normal numbers, their bits do not depend on the machine's vector units.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.seed} {key}".encode()))
    unit = (torch.rand(shape, generator=generator) * 2 - 1) * 3**0.5
    scaled = unit * shape[-1] ** -0.5
    if key.endswith(("q_norm.weight", "k_norm.weight")):
        return (1 + 0.1 * unit) * spec.sharpness**0.5
    if key.endswith("norm.weight"):
        return 1 + 0.1 * unit
    if "embed_tokens" in key:
        common = (torch.rand(shape[-1], generator=generator) * 2 - 1) * 3**0.5
        return 0.05 * (unit + spec.shared * common)
    if "lm_head" in key:
        return spec.contrast * scaled
    if spec.llama and ("q_proj" in key or "k_proj" in key):
        return spec.sharpness**0.5 * scaled
    return 0.5 * scaled if "mlp" in key else scaled


# slot size, block length, slot threshold, token threshold, prompt length, max_tokens
_GREEDY = (
    (4, 4, 0.5, 0.1, 1, 16),
    (4, 8, 0.3, 0.05, 2, 30),
    (4, 8, 0.9, 0.4, 17, 33),
    (4, 16, 0.2, 0.05, 30, 64),
    (4, 16, 0.5, 0.2, 5, 61),
    (4, 16, 0.6, 0.3, 64, 50),
    (4, 32, 0.1, 0.05, 3, 70),
    (4, 32, 0.4, 0.1, 100, 45),
    (4, 64, 0.05, 0.05, 33, 64),
    (4, 128, 0.3, 0.1, 16, 130),
    (4, 128, 0.95, 0.95, 9, 40),
    (8, 8, 0.8, 0.1, 40, 50),
    (8, 16, 0.2, 0.05, 12, 63),
    (8, 16, 0.5, 0.1, 1, 65),
    (8, 16, 0.8, 0.2, 150, 40),
    (8, 32, 0.3, 0.05, 80, 96),
    (8, 32, 0.9, 0.4, 25, 70),
    (8, 64, 0.4, 0.05, 7, 100),
    (8, 64, 0.15, 0.1, 55, 77),
    (8, 128, 0.25, 0.05, 31, 128),
    (8, 128, 0.7, 0.3, 200, 60),
    (16, 16, 0.5, 0.05, 10, 48),
    (16, 32, 0.3, 0.1, 128, 90),
    (16, 64, 0.2, 0.05, 45, 100),
    (16, 128, 0.9, 0.4, 20, 130),
    (32, 32, 0.5, 0.1, 60, 33),
    (32, 64, 0.8, 0.6, 15, 64),
    (32, 128, 0.9, 0.3, 30, 128),
    (32, 128, 0.3, 0.05, 90, 160),
    (32, 128, 0.9, 0.4, 66, 100),
    (1, 1, 0.5, 0.5, 13, 12),
    (1, 8, 0.5, 0.3, 21, 30),
    (2, 2, 0.4, 0.3, 6, 15),
    (2, 16, 0.3, 0.1, 48, 41),
    (4, 12, 0.4, 0.1, 70, 31),
    (12, 24, 0.4, 0.05, 11, 50),
)
_TIGHT = (
    # prompt + max_tokens = max_model_len; the last slot of the budget ends at it or reaches past
    (8, 32, 0.3, 0.05, 200, 312),
    (32, 128, 0.4, 0.05, 256, 256),
    (4, 16, 0.3, 0.05, 181, 331),
    (16, 64, 0.5, 0.1, 200, 312),
    (8, 128, 0.6, 0.1, 508, 4),
    (32, 32, 0.5, 0.1, 511, 1),
)
_WARM = (
    (4, 16, 0.3, 0.05, 20, 60),
    (4, 32, 0.2, 0.1, 5, 64),
    (8, 16, 0.3, 0.05, 60, 50),
    (8, 32, 0.5, 0.1, 1, 70),
    (8, 64, 0.2, 0.02, 110, 90),
    (16, 32, 0.4, 0.05, 14, 50),
    (16, 128, 0.3, 0.05, 37, 128),
    (32, 64, 0.3, 0.02, 28, 64),
    (32, 128, 0.9, 0.4, 8, 100),
    (2, 8, 0.3, 0.1, 90, 33),
)
_TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
_ENDINGS = (
    # the same, then ignore_eos, min_tokens, whether there are stop tokens
    (4, 8, 0.6, 0.3, 3, 64, True, 0, False),
    (4, 16, 0.3, 0.05, 10, 64, True, 0, False),
    (8, 16, 0.3, 0.05, 100, 90, True, 0, False),
    (8, 32, 0.4, 0.1, 35, 80, True, 0, False),
    (16, 64, 0.3, 0.05, 75, 120, True, 0, False),
    (32, 128, 0.6, 0.1, 4, 128, True, 0, False),
    (4, 16, 0.2, 0.05, 12, 80, False, 80, False),
    (4, 16, 0.3, 0.05, 22, 60, False, 41, False),
    (8, 32, 0.3, 0.05, 50, 64, False, 30, False),
    (8, 64, 0.5, 0.1, 18, 70, False, 70, False),
    (16, 64, 0.3, 0.05, 90, 100, False, 55, False),
    (16, 32, 0.3, 0.05, 120, 60, False, 13, True),
    (4, 32, 0.3, 0.1, 29, 50, False, 33, True),
    (4, 8, 0.4, 0.1, 44, 40, False, 0, True),
    (8, 16, 0.3, 0.05, 65, 60, True, 0, True),
    (32, 64, 0.4, 0.05, 160, 90, True, 17, True),
)
_CORRECTED = (
    # the same, then the temperature
    (4, 16, 0.3, 0.1, 14, 60, True, 0, False, 0.0),
    (8, 32, 0.9, 0.4, 52, 70, False, 0, False, 0.0),
    (2, 8, 0.6, 0.3, 9, 40, True, 0, False, 0.7),
    (8, 16, 0.2, 0.2, 100, 60, False, 21, False, 1.0),
    (4, 32, 0.2, 0.4, 33, 64, False, 0, True, 0.0),
    (16, 64, 0.3, 0.05, 71, 90, True, 0, False, 0.0),
    (8, 32, 0.3, 0.3, 312, 200, True, 0, False, 0.3),
    (12, 24, 0.4, 0.1, 18, 50, True, 0, False, 1.5),
    (32, 128, 0.9, 0.3, 6, 96, False, 0, False, 0.0),
    (4, 4, 0.5, 0.5, 41, 18, True, 0, False, 0.0),
    (4, 16, 0.4, 0.2, 2, 64, False, 40, True, 1.0),
    (8, 128, 0.25, 0.1, 25, 120, True, 0, False, 0.0),
)

answers_folder: Path | None = None  # of this run of the tests: its processes share answers

# By label: how often the prompt was drawn again because a decision was a near tie.
_REDRAWN: dict[str, dict[str, int]] = {
    "qwen3-gqa1": {
        "ending-8-32-0.4-0.1-35-80-ignore_eos": 1,
        "ending-16-64-0.3-0.05-75-120-ignore_eos": 1,
        "ending-8-16-0.3-0.05-65-60-stop_token_ids-ignore_eos": 1,
        "corrected-4-16-0.4-0.2-2-64-stop_token_ids-min_tokens-temperature": 1,
    },
    "qwen3-gqa2": {},
    "llama-gqa4": {
        "tight-8-32-0.3-0.05-200-312-ignore_eos": 1,
        "warm-16-128-0.3-0.05-37-128-temperature": 1,
        "ending-32-128-0.6-0.1-4-128-ignore_eos": 1,
        "ending-8-64-0.5-0.1-18-70-min_tokens": 1,
    },
}


@cache
def cases(name: str) -> tuple[Case, ...]:
    """The requests for ``MODELS[name]``."""
    made = [_case(name, "greedy", row) for row in _GREEDY]
    made += [_case(name, "tight", row, ignore_eos=i % 2 == 0) for i, row in enumerate(_TIGHT)]
    for i, row in enumerate(_WARM):
        temperature = _TEMPERATURES[i % len(_TEMPERATURES)]
        made.append(_case(name, "warm", row, temperature=temperature, seed=1000003 * i + 17))
    for *row, ignore_eos, min_tokens, stops in _ENDINGS:
        options = _ending(name, ignore_eos, min_tokens, stops)
        made.append(_case(name, "ending", row, **options))
    return (*made, *corrected_cases(name))


@cache
def corrected_cases(name: str) -> tuple[Case, ...]:
    """Of ``cases``, those with corrected infill, the last ones."""
    made = []
    for i, (*row, ignore_eos, min_tokens, stops, temperature) in enumerate(_CORRECTED):
        options = _ending(name, ignore_eos, min_tokens, stops)
        options |= {"temperature": temperature, "seed": 1000003 * i + 19 if temperature else 0}
        case = _case(name, "corrected", row, **options)
        made.append(replace(case, params=replace(case.params, infill="correct")))
    return tuple(made)


def _ending(name: str, ignore_eos: bool, min_tokens: int, stops: bool) -> dict[str, Any]:
    options = {"stop_token_ids": MODELS[name].stop_token_ids} if stops else {}
    return options | {"ignore_eos": ignore_eos, "min_tokens": min_tokens}


def _case(name: str, group: str, row: Sequence[float], **options: Any) -> Case:
    *params, prompt_length, max_tokens = row
    numbers = "-".join(f"{number:g}" for number in row)
    extras = [key for key, value in options.items() if value and key != "seed"]
    label = "-".join([group, numbers, *extras])
    spec = MODELS[name]
    source = random.Random(f"{name} {label} {_REDRAWN[name].get(label, 0)}")
    words = [token for token in range(spec.vocab_size) if token != spec.mask_token_id]
    prompt = tuple(source.choices(words, k=prompt_length))
    return Case(label, prompt, DecodingParams(*params), max_tokens, **options)


def expected(model: str | Path, requests: Sequence[Case]) -> list[Decoded]:
    """What the reference decoder answers, on the CPU in float32.

    Args:
        model: a name in ``MODELS`` or a checkpoint's directory.
    """
    if str(model) in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            return expected(build_model(str(model), directory), requests)
    key = hashlib.sha256(repr(list(requests)).encode())
    for name in ("config.json", "model.safetensors"):
        key.update((Path(model) / name).read_bytes())
    kept = answers_folder / key.hexdigest() if answers_folder else None
    if kept is not None and kept.exists():
        return pickle.loads(kept.read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    answers = [_decode(loaded, request) for request in requests]
    if kept is not None:
        with writing(kept, "wb") as file:
            pickle.dump(answers, file)
    return answers


def _decode(model: Any, case: Case) -> Decoded:
    return decode(
        model,
        case.prompt_ids,
        case.params,
        mask_token_id=model.config.mask_token_id,
        eos_token_id=None if case.ignore_eos else model.config.eos_token_id,
        ignored_eos_token_id=model.config.eos_token_id if case.ignore_eos else None,
        max_tokens=case.max_tokens,
        temperature=case.temperature,
        seed=case.seed,
        min_tokens=case.min_tokens,
        stop_token_ids=case.stop_token_ids,
        top_k=case.top_k,
        top_p=case.top_p,
        min_p=case.min_p,
        logit_bias=dict(case.logit_bias),
        allowed_token_ids=case.allowed_token_ids,
        repetition_penalty=case.repetition_penalty,
        frequency_penalty=case.frequency_penalty,
        presence_penalty=case.presence_penalty,
        bad_words=case.bad_words,
        logprobs=case.logprobs,
    )
