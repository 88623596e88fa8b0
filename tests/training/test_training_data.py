"""Reading training data: what is taken, what is refused and where, and the order it is seen in."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from vllm_refusion.training.collator import Example, autoregressive
from vllm_refusion.training.data import (
    DataError,
    Encoder,
    Row,
    TokenStore,
    read_rows,
    stored,
    write_store,
)
from vllm_refusion.training.order import Course

ROWS = [{"query": f"What is {n}?", "response": f"It is {n}.\n#### {n}"} for n in range(9)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, tokenizer.mask_token_id)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\n\n")),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=3)),
        ("a.jsonl.gz", LINES),
        ("a.json.gz", json.dumps(ROWS)),
    ],
)
def test_formats(tmp_path, name, content):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row.values for row in read_rows([tmp_path / name])] == ROWS


def test_places_in_an_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[:3], indent=1))  # an object takes 4 lines
    assert [row.place for row in read_rows([path])] == [f"{path}:{line}" for line in (2, 6, 10)]
    path.write_text("[ ]")
    assert list(read_rows([path])) == []


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", LINES + '{"query": "x", "response": ""}', ":10: empty response"),
        ("a.jsonl", LINES + '{"query": "x", "response": " \\n"}', ":10: empty response"),
        ("a.jsonl", '{"query": "x", "answer": "y"}', ":1: no response; its keys are query, answer"),
        ("a.jsonl", LINES + '{"prompt": "x"}', ":10: no query and no response"),
        ("a.jsonl", '{"query": 3, "response": "y"}', ":1: query must be text, not int"),
        ("a.jsonl", LINES + '\n["x", "y"]', ":11: a row must be an object, not list"),
        ("a.jsonl", LINES + '{"query": "x", ', ":10: not JSON: "),
        ("a.jsonl", LINES.encode() + b'{"query": "\xff"}', ":10: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-20], ": truncated or damaged gz file"),
        ("a.jsonl.gz", LINES, ":1: truncated or damaged gz file"),
        ("a.json", '[\n{"query": "x", "response": "y"}\n', ":3: not a JSON array of rows: the end"),
        ("a.json", '[\n{"query": "x" "response": "y"}\n]', ":2: not JSON: "),
        ("a.json", '{"query": "x"}', ":1: not a JSON array of rows: '{', not '['"),
        ("a.json", '[\n{"query": "x", "response": ""}]', ":2: empty response"),
        ("a.txt", LINES, ": allowed are files ending in .jsonl"),
        (
            "a.json",
            '[{"query": "x", "response": "y"}]\n[]',
            ":2: not a JSON array of rows: '[' beh",
        ),
        ("a.json", json.dumps(ROWS)[:-1], ":1: not a JSON array of rows: the end of the file"),
        ("a.json", '[{"query": "x", "response": "y"},]', ":1: not JSON: "),
        ("a.jsonl", LINES.encode("utf-16"), ":1: not UTF-8"),
        ("a.jsonl", LINES + "\ufeff" + LINES, ":10: not JSON: Unexpected UTF-8 BOM"),
    ],
)
def test_bad_data_is_refused_with_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        list(read_rows([path]))
    assert str(error.value).startswith(str(path)) and message in str(error.value)


BAD_VALUES = {
    "a missing key": ("{}", "no query and no response; it is empty"),
    "a name that is half a character": (r'{"\ud83d": 1}', r"its keys are \ud83d"),
    "half a character": (
        r'{"query": "a \ud83d b", "response": "c"}',
        r"query has \ud83d, half of a character, at character 2",
    ),
    "another half": (r'{"query": "a", "response": "\udc00"}', r"response has \udc00, half"),
    "5000 digits": ('{"query": "a", "response": "b", "n": %s}' % ("9" * 5000), "4300 digits"),
    "deep lists": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "a number": ("3", "a row must be an object, not int"),
    "nothing": ("null", "a row must be an object, not NoneType"),
    "a list as text": ('{"query": "a", "response": ["b"]}', "response must be text, not list"),
    "true as text": ('{"query": true, "response": "b"}', "query must be text, not bool"),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("bad, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values_are_refused_with_file_and_line(tmp_path, name, bad, message):
    path, good = tmp_path / name, json.dumps(ROWS[0])
    content = (f"[{good},\n{bad}]" if name == "a.json" else f"{good}\n{bad}\n").encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = read_rows([path])
    next(rows)
    with pytest.raises(DataError) as error:
        next(rows)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    str(error.value).encode()  # can be printed


def test_truncated_gz_says_how_far_it_goes(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = "".join(
        json.dumps({"query": str(n), "response": str(n * 7919)}) + "\n" for n in range(20000)
    )
    path.write_bytes(gzip.compress(lines.encode())[:-4000])
    rows = read_rows([path])
    count = 0
    with pytest.raises(DataError) as error:
        for _ in rows:
            count += 1
    assert count > 1000
    assert str(error.value).startswith(f"{path}:{count + 1}: ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: No such file"):
        list(read_rows([tmp_path / "nowhere.jsonl"]))


def test_store_holds_template_response_and_eos(tmp_path, encoder, tokenizer):
    report = write_store([Row("a:1", ROWS[0])], encoder, tmp_path, 100)
    (example,) = TokenStore(tmp_path)
    assert tokenizer.decode(example.prompt) == "<|user|>What is 0?<|assistant|>"
    assert tokenizer.decode(example.response) == ROWS[0]["response"] + tokenizer.eos_token
    assert (report.kept, report.response_tokens) == (1, len(example.response))


def test_long_rows_are_left_out_and_reported(tmp_path, encoder):
    long = {"query": "x", "response": "word " * 50}
    rows = [Row(f"a.jsonl:{n}", long if n % 2 else ROWS[0]) for n in range(1, 20)]
    report = write_store(rows, encoder, tmp_path, 40)
    assert report.kept == len(TokenStore(tmp_path)) == 9
    assert "10 rows left out, of more than 40 tokens" in str(report)
    assert "a.jsonl:1: " in str(report) and "and 5 more" in str(report)
    with pytest.raises(DataError, match="no row is left\n(.*\n)*.*a.jsonl:1: "):
        write_store(rows[::2], encoder, tmp_path, 40)
    with pytest.raises(DataError, match="hold no rows"):
        write_store([], encoder, tmp_path, 40)


def test_text_with_the_mask_token_is_refused(tmp_path, encoder, tokenizer):
    row = Row("a.jsonl:7", {"query": "x", "response": f"a {tokenizer.mask_token}"})
    with pytest.raises(DataError, match="a.jsonl:7: the text contains the mask token"):
        write_store([row], encoder, tmp_path, 40)


@pytest.mark.parametrize("ending, refused", [("", None), ("<|endoftext|>" * 2, None),
    ("<|endoftext|> more", "a:1: the response goes on behind <|endoftext|>")])  # fmt: skip
def test_eos_ends_a_response_once(encoder, tokenizer, ending, refused):
    rows = [Row("a:1", {"query": "x", "response": "It is." + ending})]
    if refused:
        with pytest.raises(DataError, match=re.escape(refused)):
            encoder.encode(rows)
    else:
        (example,) = encoder.encode(rows)
        assert tokenizer.decode(example.response) == "It is.<|endoftext|>"


def test_eos_alone_is_an_empty_response(encoder):
    with pytest.raises(DataError, match="a:1: empty response"):
        encoder.encode([Row("a:1", {"query": "x", "response": "<|endoftext|>"})])


def test_a_plain_prompt_is_tokenised_as_the_server_does_it(tiny_checkpoint):
    """vLLM's completions add what the tokenizer adds to a text; chat templates write it."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", 3)]
    )
    bos = tokenizer.convert_tokens_to_ids("<|user|>")
    assert (
        tokenizer("What?")["input_ids"][0] != tokenizer.encode("What?", add_special_tokens=False)[0]
    )
    row = Row("a:1", {"query": "What?", "response": "That."})
    assert CompletionRequest(prompt="What?").add_special_tokens
    plain, templated = Encoder(tokenizer, 1, plain=True), Encoder(tokenizer, 1)
    assert plain.prompt("What?") == plain.encode([row])[0].prompt == tokenizer("What?")["input_ids"]
    assert templated.prompt("What?").count(bos) == 1
    for encoder in (plain, templated):
        assert bos not in encoder.encode([row])[0].response


def test_a_chat_template_that_fails_is_named(tokenizer):
    options = {"chat_template": "{{ raise_exception('no such role') }}"}
    with pytest.raises(DataError, match="a:1: the chat template fails: no such role"):
        Encoder(tokenizer, 1, options).encode([Row("a:1", ROWS[0])])


@pytest.mark.parametrize("name", ["about.json", "bounds.npy", "tokens.bin"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_damaged_store_is_none(tmp_path, encoder, name, damage):
    write_store([Row("a:1", ROWS[0])], encoder, tmp_path, 100, key="key")
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    assert stored(tmp_path, "key") is None
    write_store([Row("a:1", ROWS[0])], encoder, tmp_path, 100, key="key")
    assert stored(tmp_path, "key") and len(TokenStore(tmp_path)) == 1


def test_stores_differ_by_fingerprint(tmp_path, encoder):
    def fingerprint(rows):
        write_store([Row("a:1", row) for row in rows], encoder, tmp_path, 100)
        return TokenStore(tmp_path).fingerprint

    assert fingerprint(ROWS) == fingerprint(ROWS) != fingerprint(ROWS[::-1])


def test_no_chat_template(tokenizer, tiny_checkpoint):
    other = AutoTokenizer.from_pretrained(tiny_checkpoint)
    other.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(other, 1)
    assert tokenizer.decode(Encoder(other, 1, plain=True).prompt("What?")) == "What?"


def test_course_is_a_function_of_seed_and_index():
    examples = [Example([n], list(range(100 + n, 140 + n))) for n in range(11)]

    def course(seed=5, mask=99):
        return Course(examples, 33, seed, (4, 8), mask)

    one, other = course(), course()
    assert [one[i] for i in range(33)] == [other[i] for i in reversed(range(33))][::-1]
    assert [one[i] for i in range(33)] != [course(seed=6)[i] for i in range(33)]
    orders = [[one[i].input_ids[0] for i in range(11 * e, 11 * e + 11)] for e in range(3)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    # the same example in other epochs is masked and ordered anew
    seen = [next(r for i in range(11 * e, 11 * e + 11) if (r := one[i]).input_ids[0] == 3)
            for e in range(3)]  # fmt: skip
    assert seen[0] != seen[1] != seen[2]
    assert course(mask=None)[0] == autoregressive(course().example(0))


@pytest.mark.parametrize("infill", [False, True])
@pytest.mark.parametrize("certainty", [False, True])
def test_steps_sorted_by_length_see_the_same(infill, certainty):
    """Longest first within a step; what is seen, and how it is masked, stays."""
    examples = [Example([n], list(range(100, 101 + n * 7 % 30))) for n in range(1, 12)]
    lengths = [len(e.prompt) + len(e.response) for e in examples]
    extras = {"infill": infill, "certainty": certainty, "joined": True, "ordered_share": 0.3}
    plain = Course(examples, 33, 5, (4, 8), 99, **extras)
    sorting = {"batch_size": 6, "lengths": lengths}
    by_length = Course(examples, 33, 5, (4, 8), 99, **extras, **sorting)
    for first in range(0, 33, 6):
        step = range(first, min(first + 6, 33))
        ours, expected = [by_length[i] for i in step], [plain[i] for i in step]
        assert sorted(ours, key=repr) == sorted(expected, key=repr)
        fed = [len(row.input_ids) for row in ours]
        assert fed == sorted(fed, reverse=True)


def test_what_is_tokenised_is_kept_until_something_changes(tmp_path, encoder, tokenizer):
    path, folder = tmp_path / "a.jsonl", tmp_path / "store"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    key = encoder.key([path], 100)
    assert stored(folder, key) is None
    report = write_store(read_rows([path]), encoder, folder, 100, key=key)
    assert stored(folder, key) == str(report)
    others = [encoder.key([path], 99), Encoder(tokenizer, 1, plain=True).key([path], 100)]
    others += [Encoder(tokenizer, 1, {"enable_thinking": False}).key([path], 100)]
    path.write_text(json.dumps(ROWS[1]) + "\n")
    others += [encoder.key([path], 100)]
    assert len({key, *others}) == 5 and not any(stored(folder, other) for other in others)
    with pytest.raises(DataError):  # a store that was being written is none
        write_store(iter([]), encoder, folder, 100, key=key)
    assert stored(folder, key) is None
