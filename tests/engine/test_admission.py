"""Requests that ReFusion cannot honour are refused when they are admitted, by name and value."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from vllm_refusion.engine.admission import BY_WHAT_STANDS_BEFORE, HONOURED, admit

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
MASK, VOCAB, EOS = 90, 100, 7
SERIAL = {"extra_args": {"mode": "serial"}}


class ModelConfig:
    """The parts of vLLM's ModelConfig that admission reads."""

    hf_text_config = SimpleNamespace(
        mask_token_id=MASK,
        vocab_size=VOCAB,
        eos_token_id=EOS,
        refusion_defaults={"slot_size": 4, "block_length": 16},
    )
    max_model_len = 64
    logprobs_mode = "raw_logprobs"

    def get_vocab_size(self):
        return VOCAB


CONFIG = SimpleNamespace(
    model_config=ModelConfig(),
    diffusion_config=SimpleNamespace(canvas_length=32),
    additional_config={},
)


def submit(prompt=(1, 2, 3), resumable=False, config=CONFIG, **params) -> SamplingParams:
    sampling_params = SamplingParams(**params)
    if params.get("bad_words"):  # what the tokenizer makes of them
        tokens = {
            "one": [[11]],
            "two words": [[11, 12]],
            "129 words": [[11, i] for i in range(129)],
            "1025 tokens": [[11] * 1025],
        }
        known = [ids for word in params["bad_words"] for ids in tokens.get(word, ())]
        sampling_params._bad_words_token_ids = known or None
    request = SimpleNamespace(
        sampling_params=sampling_params,
        pooling_params=None,
        prompt_token_ids=None if prompt is None else list(prompt),
        resumable=resumable,
    )
    admit(request, config)
    return sampling_params


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.7, "seed": -5, "n": 3},
        {"stop": ["a"], "stop_token_ids": [5], "include_stop_str_in_output": True},
        {"ignore_eos": True, "min_tokens": 3, "max_tokens": 5},
        {"detokenize": False, "skip_special_tokens": False},
        {"top_k": -1, "top_p": 1.0},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "temperature": 1},
        {"top_k": 2**40, "temperature": 1},
        {"logit_bias": {1: 2.0, MASK: 3.0}},
        {"allowed_token_ids": [1, EOS, MASK]},
        {"bad_words": ["one"]},
        {"logprobs": 0},
        {"logprobs": 20},
        {"logprobs": -1},
        {"logprob_token_ids": [1, 5]},
        {"prompt_logprobs": 1},
        {"presence_penalty": 0.5, "frequency_penalty": -2, "repetition_penalty": 1e-6, **SERIAL},
        {"bad_words": ["one", "two words"], **SERIAL},
        {"repetition_detection": RepetitionDetectionParams(3, 1, 4)},
        {"extra_args": {}},
        {"extra_args": {"slot_size": 8, "block_length": 32}},
        {"extra_args": {"preset": "gpqa"}},
        {"extra_args": {"preset": "mmlu-pro", "block_length": 32}},
        {"extra_args": {"trace": False}},
        {"extra_args": {"mode": "serial", "slot_size": 32}},
        {"extra_args": {"infill": "correct", "preset": "gpqa"}},
        {"extra_args": {"slot_threshold": 1, "token_threshold": 0.0}},
        {
            "structured_outputs": StructuredOutputsParams(regex="a+"),
            "extra_args": {"mode": "serial"},
        },
    ],
    ids=str,
)
def test_honoured(params):
    submit(**params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty=0.5"),
        ({"frequency_penalty": -0.5}, "frequency_penalty=-0.5"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"repetition_penalty": 1e-7, **SERIAL}, "repetition_penalty=1e-07"),
        ({"repetition_penalty": 1e7, **SERIAL}, "repetition_penalty=10000000.0"),
        ({"bad_words": ["129 words"], **SERIAL}, "129 sequences of 258 tokens"),
        ({"bad_words": ["1025 tokens"], **SERIAL}, "1 sequences of 1025 tokens"),
        ({"logit_bias": {1: math.nan}}, "logit_bias={1: nan}"),
        ({"logit_bias": {1: math.inf}}, "logit_bias={1: inf}"),
        ({"allowed_token_ids": [MASK]}, f"allowed_token_ids=[{MASK}]"),
        ({"allowed_token_ids": [EOS, MASK], "min_tokens": 1}, "allowed_token_ids="),
        ({"allowed_token_ids": [11], "bad_words": ["one"]}, "allowed_token_ids=[11]"),
        ({"bad_words": ["one", "two words"]}, "words of a single token of the model, or mode='ser"),
        ({"bad_words": ["unencoded"]}, "bad_words="),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, "structured_outputs="),
        ({"trace_decode_token_ids": [1]}, "trace_decode_token_ids="),
        ({"thinking_token_budget": 4}, "thinking_token_budget=4"),
        ({"thinking_token_budget": 4, **SERIAL}, "in the row of a mask"),
        ({"watermarking": True}, "watermarking=True"),
        ({"seed": 2**70}, "seed="),
        ({"resumable": True}, "resumable=True"),
        ({"stop_token_ids": list(range(70)), "min_tokens": 2}, "stop_token_ids=70"),
        # with the model's EOS one too many
        ({"stop_token_ids": list(range(10, 74)), "min_tokens": 2}, "stop_token_ids=65"),
        ({"extra_args": {"slot_sise": 8}}, "slot_sise=8"),
        ({"extra_args": {"kv_transfer_params": {}}}, "kv_transfer_params={}"),
        ({"extra_args": {"preset": "gsm9k"}}, "preset='gsm9k'"),
        ({"extra_args": {"preset": ["gsm8k"]}}, "preset=['gsm8k']"),
        ({"extra_args": {"preset": "gsm8k"}}, "block_length=128"),  # the canvas has 32
        ({"extra_args": {"trace": "yes"}}, "trace='yes'"),
        ({"extra_args": {"trace": True}}, "refusion_trace"),
        ({"extra_args": {"mode": "serial", "slot_threshold": 0.5}}, "slot_threshold=0.5"),
        ({"extra_args": {"mode": "serial", "infill": "correct"}}, "infill='correct'"),
        ({"extra_args": {"infill": "corrected"}}, "infill='corrected'"),
        ({"extra_args": {"mode": "fast"}}, "mode='fast'"),
        ({"extra_args": {"mode": "serial", "slot_size": 2**31}}, "slot_size=2147483648"),
        ({"extra_args": {"slot_start": "next"}}, "slot_start='next' is not supported"),
        ({"extra_args": {"slot_size": 0}}, "slot_size=0"),
        ({"extra_args": {"slot_size": -4}}, "slot_size=-4"),
        ({"extra_args": {"slot_size": 8.0}}, "slot_size=8.0"),
        ({"extra_args": {"slot_size": "8"}}, "slot_size='8'"),
        ({"extra_args": {"slot_size": True}}, "slot_size=True"),
        ({"extra_args": {"slot_size": None}}, "slot_size=None"),
        ({"extra_args": {"slot_size": 3}}, "block_length=16"),
        ({"extra_args": {"block_length": 36}}, "block_length=36"),
        ({"extra_args": {"block_length": 2**62}}, f"block_length={2**62}"),
        ({"extra_args": {"slot_threshold": 1.01}}, "slot_threshold=1.01"),
        ({"extra_args": {"slot_threshold": math.nan}}, "slot_threshold=nan"),
        ({"extra_args": {"token_threshold": -0.1}}, "token_threshold=-0.1"),
        ({"extra_args": {"token_threshold": math.inf}}, "token_threshold=inf"),
        ({"extra_args": {"token_threshold": [0.5]}}, "token_threshold=[0.5]"),
    ],
    ids=str,
)
def test_refused(params, message):
    with pytest.raises(VLLMValidationError) as error:
        submit(**params)
    assert message in str(error.value)
    assert any(w in str(error.value) for w in ("allowed", "allows", "known names", "does not"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, MASK, 2], f"prompt={MASK}"),
        ([1, VOCAB], f"prompt={VOCAB}"),
        ([-1], "prompt=-1"),
        (None, "prompt_embeds"),
    ],
)
def test_prompt_refused(prompt, message):
    with pytest.raises(VLLMValidationError, match=message):
        submit(prompt)


def test_every_sampling_params_field_is_decided():
    """A new field of a later vLLM must not be silently ignored: it is refused unless default."""
    fields = set(SamplingParams.__struct_fields__)
    assert fields >= HONOURED, HONOURED - fields
    params = SamplingParams()
    for name in fields - HONOURED - {"skip_reading_prefix_cache"}:
        changed = SamplingParams()
        setattr(changed, name, "not its default")
        request = SimpleNamespace(sampling_params=changed, prompt_token_ids=[1], resumable=False)
        with pytest.raises(VLLMValidationError, match=name):
            admit(request, CONFIG)
        assert getattr(params, name) != "not its default"


def documented_fields() -> dict[str, tuple[str, str]]:
    """What docs/serving.md says of each field in either mode: works, refused or internal."""
    fields = DOCS.read_text().split("## Engine options")[0]
    verdict = "(works|refused|internal)"
    rows = re.findall(rf"^\| (`.*?`) \| {verdict} \| {verdict} \|", fields, re.MULTILINE)
    return {name: modes for names, *modes in rows for name in re.findall(r"`(\w+)`", names)}


def test_the_docs_decide_every_field_of_the_installed_vllm():
    documented = documented_fields()
    assert set(documented) == set(SamplingParams.__struct_fields__)
    parallel, serial = (
        {name for name, verdicts in documented.items() if verdicts[mode] != "refused"}
        for mode in range(2)
    )
    assert serial == HONOURED
    assert serial - parallel == {*BY_WHAT_STANDS_BEFORE, "structured_outputs"}


def test_processed_logprobs_are_of_serial_mode():
    model = ModelConfig()
    model.logprobs_mode = "processed_logits"
    config = SimpleNamespace(**vars(CONFIG) | {"model_config": model})
    for asked in ({"logprobs": 0}, {"logprob_token_ids": [4]}):
        with pytest.raises(VLLMValidationError, match=f"{next(iter(asked))}=.*processed_logits"):
            submit(config=config, **asked)
        submit(config=config, **asked, **SERIAL)
    submit(config=config, prompt_logprobs=1)


def test_max_tokens_is_cut_to_the_model_length():
    assert submit([1] * 60, max_tokens=50).max_tokens == 4
    assert submit([1] * 60, max_tokens=None).max_tokens == 4
    assert submit([1] * 60, max_tokens=3).max_tokens == 3


def test_sampled_requests_get_a_seed():
    assert submit(temperature=1.0).seed is not None
    assert submit(temperature=1.0, seed=11).seed == 11
    assert submit(temperature=0.0).seed is None


def test_eos_of_the_model_without_a_tokenizer():
    assert submit().eos_token_id == EOS
    assert submit(ignore_eos=True).eos_token_id is None


@pytest.mark.parametrize("value", [True, 1, False, 0])
def test_drafts_may_be_withheld_in_serial_mode(value):
    submit(extra_args={"mode": "serial", "drafts": value})
    if value:
        submit(extra_args={"drafts": value})
    else:
        with pytest.raises(VLLMValidationError, match="drafts=False .*mode='parallel'"):
            submit(extra_args={"drafts": value})


def test_traces_are_granted_where_the_engine_records_them():
    config = SimpleNamespace(**vars(CONFIG) | {"additional_config": {"refusion_trace": True}})
    for value in (True, 1):  # HTTP has no booleans among vllm_xargs
        for mode in ("parallel", "serial"):
            submit(config=config, extra_args={"trace": value, "mode": mode})
