"""``refusion-8b``: found under the published name, known to clients by the one that was typed."""

from __future__ import annotations

import huggingface_hub
import pytest
from server import serve
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.tokenizers import get_tokenizer

from vllm_refusion import backbones, register
from vllm_refusion.bench.server import serve_command
from vllm_refusion.cli import build_parser
from vllm_refusion.engine import compat

NAME = "refusion-8b"
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}


@pytest.fixture(params=[True, False], ids=["offline", "online"])
def stand_in(request, tiny_checkpoint, tmp_path, monkeypatch):
    """The bundled checkpoint under the short name, outside the tree."""
    register()
    monkeypatch.setitem(backbones.SHORT_NAMES, NAME, str(tiny_checkpoint))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", request.param)
    monkeypatch.chdir(tmp_path)
    return str(tiny_checkpoint)


def cached(checkpoint, folder):
    """The cache of the Hugging Face Hub, with the bundled checkpoint as the published one."""
    home = folder / ("models--" + backbones.SHORT_NAMES[NAME].replace("/", "--"))
    (home / "snapshots").mkdir(parents=True)
    (home / "snapshots" / "0123").symlink_to(checkpoint)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123")
    return str(folder)


def test_what_is_published():
    """As the documentation names it."""
    assert backbones.SHORT_NAMES == {NAME: "GSAI-ML/ReFusion"}


def test_engine_options(stand_in):
    config = EngineArgs(NAME, **OPTIONS).create_engine_config().model_config
    assert (config.model, config.tokenizer) == (stand_in, stand_in)
    assert config.served_model_name == NAME and backbones.is_refusion(config)
    config = EngineArgs(NAME, served_model_name=["a", "b"], **OPTIONS).create_engine_config()
    assert config.model_config.served_model_name == "a"
    options = {"tokenizer": NAME, "hf_config_path": NAME, "served_model_name": "a"}
    config = EngineArgs(stand_in, **options, **OPTIONS).create_engine_config().model_config
    assert (config.tokenizer, config.hf_config_path) == (stand_in, stand_in)
    assert config.served_model_name == "a"
    config = EngineArgs(stand_in, **OPTIONS).create_engine_config()
    assert config.model_config.served_model_name == stand_in


def test_the_tokenizer_of_a_client(stand_in):
    """`vllm bench serve`, and our benchmark of a server, name the model by it."""
    assert get_tokenizer(NAME).get_vocab() == get_tokenizer(stand_in).get_vocab()
    options = ["bench", "--base-url", "http://x", "--model", NAME]
    for more in ([], ["--tokenizer", NAME]):
        arguments = build_parser().parse_args([*options, *more])
        command = serve_command(arguments, "http://x", NAME, None, 1)
        assert command[command.index("--model") + 1] == NAME
        assert command[command.index("--tokenizer") + 1] == stand_in


def test_a_folder_goes_first(stand_in, tmp_path):
    (tmp_path / NAME).symlink_to(stand_in)
    backbones.SHORT_NAMES[NAME] = "nowhere/nothing"
    config = EngineArgs(NAME, **OPTIONS).create_engine_config().model_config
    assert (config.model, config.served_model_name) == (NAME, NAME)


def test_an_answer_without_the_hub(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", cached(tiny_checkpoint, tmp_path)
    )
    llm = LLM(NAME, **OPTIONS)
    try:
        (output,) = llm.chat(
            [{"role": "user", "content": "What is 2 + 3?"}], SamplingParams(max_tokens=8)
        )
    finally:
        compat.shut_down(llm)
    assert len(output.outputs[0].token_ids) > 0


@pytest.mark.slow
def test_a_server_and_its_clients(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", cached(tiny_checkpoint, tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with serve(NAME, tmp_path, name=None) as server:
        (model,) = server.client.models.list()
        assert model.id == NAME
        answer = server.client.completions.create(model=NAME, prompt="What", max_tokens=4)
        assert answer.model == NAME and answer.usage.completion_tokens > 0
