"""examples/own_questions.py: turns of the user that a model writes, drawn by stock vLLM."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vllm_refusion import stock

WRITER = """
import json, sys
what = json.load(open(sys.argv[1]))
end = what["eos_token_id"]
assert what["max_model_len"] == len(what["prompts"][0]) + what["max_tokens"][0]
turns = {turns}
with open(sys.argv[2], "w") as file:
    for number, _ in enumerate(what["prompts"]):
        turn = turns[number % len(turns)]
        file.write(json.dumps([end if token is None else token for token in turn]) + chr(10))
"""


@pytest.fixture
def program():
    path = Path(__file__).parents[2] / "examples/own_questions.py"
    spec = importlib.util.spec_from_file_location("own_questions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_turns_that_are_kept(program, tiny_checkpoint, tmp_path, monkeypatch):
    """Those that end, of some length, without special tokens, each once; a quarter is held out."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    good = [f"How many apples are in {word}?" for word in ("a box", "two boxes", "a bag", "a cart")]
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in [*good, "Why?"]}
    special = tokenizer.convert_tokens_to_ids("<|user|>")
    turns = [[*ids[text], None] for text in (*good, good[0], "Why?")]
    turns += [ids[good[1]], [special, *ids[good[2]], None], []]
    writer = tmp_path / "writer.py"
    writer.write_text(WRITER.format(turns=turns))
    run = stock.subprocess.run
    monkeypatch.setattr(
        stock.subprocess,
        "run",
        lambda command, **options: run([sys.executable, str(writer), *command[-2:]], **options),
    )
    command = ["own_questions.py", str(tiny_checkpoint), "-o", str(tmp_path / "q"), "--count", "18"]
    monkeypatch.setattr(sys, "argv", command)
    program.main()
    parts = {
        name: [json.loads(line) for line in (tmp_path / f"q/{name}.jsonl").read_text().splitlines()]
        for name in ("dev", "train")
    }
    assert parts["dev"] == [{"query": good[0]}]
    assert parts["train"] == [{"query": text} for text in good[1:]]


def test_the_turn_of_a_template(program, tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    opening, end = program.user_turn(tokenizer)
    assert tokenizer.convert_ids_to_tokens([*opening, end]) == ["<|user|>", "<|assistant|>"]
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="no user's turn between special tokens"):
        program.user_turn(tokenizer)


def test_an_exit_status_of_vllm_is_named(tmp_path, monkeypatch):
    run = stock.subprocess.run
    fails = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(stock.subprocess, "run", lambda _, **options: run(fails, **options))
    with pytest.raises(ValueError, match="^vLLM ended with exit status 3, see above$"):
        stock.responses({}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_few_prompts_take_little_of_the_device():
    """Of a device with room for them; what fills it takes what vLLM takes."""
    model = Path(__file__).parents[2] / "examples/stock-tiny"
    asked = {"model": str(model), "dtype": "float32", "prompts": [[1]] * 3}
    few = stock.cache_options(asked | {"max_model_len": 100})
    layers, kv_heads, size = 5, 1, 64  # of its config.json
    needed = 3 * (100 + stock.SPARE_TOKENS) * 2 * layers * kv_heads * size * 4
    assert few["kv_cache_memory_bytes"] == needed and few["max_num_seqs"] == 3
    assert stock.cache_options(asked | {"max_model_len": 10**9}) == {}
