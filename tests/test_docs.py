"""The documentation holds: links, paths and cited sections exist; every command is run.

A command is run here, or by the test named here.

``python tests/test_docs.py`` lists the commands and what runs them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import openai
import pytest

from vllm_refusion.cli import build_parser
from vllm_refusion.decoding.params import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_refusion"
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/README.md",
    ROOT / "triton_kernels/README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
]
# What is said there is checked as well; its commands train for hours.
PAGES = [
    *DOCUMENTS,
    ROOT / "examples/controlled_comparison/README.md",
    ROOT / "examples/reproduce_paper/README.md",
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PUBLISHED = "GSAI-ML/ReFusion"  # tests put the bundled checkpoint in its place

RUN, SLOW = "test_command", "test_slow_command"
# The first entry that a command starts with says what runs it.
RUN_BY = {
    "make demo": "test_make",
    "make test": "test_make",
    "pip install": "test_installation",
    "vllm serve FOLDER": "test_servers_of_mask_adapters",
    "vllm serve Qwen/Qwen3-8B": "test_servers_of_mask_adapters",
    "vllm serve examples/": "test_client",
    "vllm serve": "test_server_and_its_clients",
    "vllm chat": "test_client",
    "vllm complete": "test_client",
    "vllm bench serve": "test_client",
    "vllm run-batch": "test_client",
    "lm_eval": "test_client",
    "curl http://localhost:8000": "test_server_and_its_clients",
    "vllm-refusion bench --shape": "test_benchmark_commands_parse",  # hours on a GPU
    "vllm-refusion bench --model": "test_benchmark_commands_parse",
    "vllm-refusion bench --base-url": "test_benchmark_of_a_server",
    "vllm-refusion bench --stock-base-url": "test_benchmark_commands_parse",
    "vllm-refusion bench-report": "test_benchmark_commands_parse",
    "vllm-refusion convert": "test_training_commands_parse",  # test_convert.py runs it
    "vllm-refusion train": "test_training_commands_parse",  # hours on a GPU; test_train.py
    "accelerate launch": "test_training_commands_parse",
    "vllm-refusion doctor": RUN,
    "vllm-refusion view": RUN,
    "vllm-refusion trace": SLOW,
    "vllm-refusion play": "test_play_commands_parse",  # tests/serving/test_play.py has such servers
    "python -m vllm_refusion.bench.trace_cost": "test_cost_of_traces",
    "python examples/evaluate.py": "test_measurement",
    "python -m vllm_refusion.bench.contributions": "test_measurement",
    "python examples/adapter_drafts.py": "test_drafts_of_an_adapter",
    "python examples/own_questions.py": "test_questions_of_a_model",
    "python examples/": SLOW,
    "python tests/support/soak.py": "test_soak",
    "ruff": RUN,
    "pytest -m slow": "test_make",
}


def blocks(document: Path) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(script: str) -> list[str]:
    """The commands of a shell script; quotes and backslashes may carry them over lines."""
    found, pending = [], ""
    for line in script.splitlines():
        pending += line + "\n"
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote is open
            continue
        if words:
            found.append(pending.strip())
        pending = ""
    assert not pending, f"unfinished: {pending}"
    return found


def documented(language: str) -> list[tuple[str, str]]:
    """(document, command or program) of all blocks in a language, each once."""
    seen: dict[str, str] = {}
    for document in DOCUMENTS:
        for found, content in blocks(document):
            if found == language:
                items = commands(content) if language == "sh" else [content]
                seen |= {
                    item: str(document.relative_to(ROOT)) for item in items if item not in seen
                }
    return [(document, item) for item, document in seen.items()]


def run_by(command: str) -> str | None:
    return next((test for start, test in RUN_BY.items() if command.startswith(start)), None)


def chosen(test: str) -> list:
    """Parameters: the commands that a test runs."""
    return [
        pytest.param(command, id=f"{document}: {' '.join(command.split())[:60]}")
        for document, command in documented("sh")
        if run_by(command) == test
    ]


def test_every_command_is_run_by_a_test():
    found = documented("sh")
    assert len(found) > 20
    assert not [command for _, command in found if run_by(command) is None]
    for start, test in RUN_BY.items():
        assert any(command.startswith(start) for _, command in found), f"not documented: {start}"
        assert callable(globals().get(test)), test


def test_no_command_hides_in_another_kind_of_block():
    for document in DOCUMENTS:
        for language, _ in blocks(document):
            assert language in ("sh", "python", "text", "json"), f"{document}: {language!r}"


def anchors(document: Path) -> set[str]:
    """What a link to a heading of ``document`` may say behind ``#``."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def missing_paths(text: str) -> set[str]:
    """Paths of the repository in ``text`` that lead nowhere; also ones given within the package."""
    folders = "vllm_refusion|triton_kernels|tests|docs|examples|decoding|engine|training|viewer"
    paths = set(re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", text))
    return {p for p in paths if not (ROOT / p).exists() and not (PACKAGE / p).exists()}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_exist(page):
    assert not missing_paths(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_modules_exist(page):
    """Dotted names, of modules or of what is in them."""
    for dotted in re.findall(r"\bvllm_refusion(?:\.\w+)+", page.read_text()):
        parent, _, name = dotted.rpartition(".")
        try:
            found = importlib.util.find_spec(dotted)
        except ModuleNotFoundError:  # the parent is no package
            found = getattr(importlib.import_module(parent), name, None)
        assert found, dotted


def commented() -> list[tuple[str, str]]:
    """(file, text) of every comment and docstring of the code and its tests, but of this file."""
    found = []
    for folder in (PACKAGE, ROOT / "triton_kernels", ROOT / "tests", ROOT / "examples"):
        for path in sorted(set(folder.rglob("*.py")) - {Path(__file__).resolve()}):
            with tokenize.open(path) as file:
                tokens = list(tokenize.generate_tokens(file.readline))
            found += [
                (str(path.relative_to(ROOT)), token.string.strip('#" '))
                for token in tokens
                if token.type == tokenize.COMMENT or token.string.startswith('"""')
            ]
    return found


def test_paths_in_comments_exist():
    found = [(where, missing_paths(text)) for where, text in commented()]
    assert not [entry for entry in found if entry[1]]


NUMBER = r"\d+(?:\.\d+)?"
CITED = (
    re.compile(rf"\b[Ss]ections? ({NUMBER}(?:(?:, | and | to |-)[1-9](?:\.\d+)?(?![\d/]))*)"),
    re.compile(r"^([1-9]\.[1-9])\b(?!\.)|\bfrom ([1-9]\.[1-9])\b(?!\.)"),  # without the word
)


def citations(text: str) -> list[str]:
    """The numbers of the algorithm's sections that a comment, docstring or paragraph cites."""
    found = [match[0] for pattern in CITED for match in pattern.finditer(" ".join(text.split()))]
    return re.findall(NUMBER, " ".join(found))


def test_citations_are_found():
    assert citations("sections 3.1 to\n3.3, and section 5.") == ["3.1", "3.3", "5"]
    assert citations("3.2: slots, from 3.3 if none") == ["3.2", "3.3"]
    assert citations("algorithm section 12, 40 problems at 8/32") == ["12"]
    assert not citations("2.4.1 is of 0.5, takes 1.3 times as long; 8/32/0.9/0.4")


def test_cited_sections_exist():
    """docs/algorithm.md has them, whoever cites them: the code, its tests or a document."""
    law = (ROOT / "docs/algorithm.md").read_text()
    sections = set(re.findall(rf"^#+ ({NUMBER})\.? \w", law, re.MULTILINE))
    texts = commented() + [(str(page.relative_to(ROOT)), page.read_text()) for page in PAGES]
    cited = {(where, section) for where, text in texts for section in citations(text)}
    assert ("vllm_refusion/decoding/reference.py", "3.3") in cited
    assert not {(where, section) for where, section in cited if section not in sections}


def test_presets_are_documented():
    rows = (ROOT / "docs/parameters.md").read_text()
    columns = re.search(r"^\| preset \| (.*) \|$", rows, re.MULTILINE)[1].split(" | ")
    for name, preset in PRESETS.items():
        values = " | ".join(str(getattr(preset, column)) for column in columns)
        assert f"| `{name}` | {values} |" in rows
        assert f"`{name}`" in (ROOT / "README.md").read_text()


def test_citation_has_the_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"version: {importlib.metadata.version('vllm-refusion')}" in text


@pytest.fixture
def copy(tmp_path):
    """A folder that looks like the repository and may be written to."""
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(command: str, folder: Path) -> str:
    """Runs a documented command in ``folder`` with this environment's programs."""
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("TRITON_INTERPRET", None)  # the plugin itself has to set it
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # the command has to say it
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def written(command: str) -> list[str]:
    """The files that a command says it writes."""
    return re.findall(r"--(?:output|page) (\S+)", command)


@pytest.mark.parametrize("command", chosen(RUN))
def test_command(command, copy):
    if command.startswith("ruff") and not (Path(sys.executable).parent / "ruff").exists():
        pytest.skip("ruff is not installed here")
    run(command, ROOT if command.startswith("ruff") else copy)
    for name in written(command):
        assert (copy / name).stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("command", chosen(SLOW))
def test_slow_command(command, copy):
    output = run(command, copy)
    assert output.strip()
    for name in written(command):
        assert (copy / name).stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("command", chosen("test_measurement"))
def test_measurement(command, copy):
    """With fewer or shorter requests, and the bundled model for one that the reader has trained."""
    command = re.sub(r"[\w-]+/model", "examples/refusion-tiny", command)
    command = command.replace("gsm_symbolic_dev.jsonl.gz", "examples/dev_problems.jsonl")
    less = " --count 2" if "evaluate.py" in command else " --max-tokens 32 --requests 1"
    assert run(command + less, copy).strip()


def make(target: str) -> str:
    """What make would run."""
    command = ["make", "--dry-run", "--always-make", target]
    environment = {name: value for name, value in os.environ.items() if name != "VENV"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_make():
    """`make test` runs what this test is part of, `make demo` examples; see test_slow_command."""
    assert ".venv/bin/pytest -n 2" in make("test")
    demos = re.findall(r"^\.venv/bin/(python examples/\S+)$", make("demo"), re.MULTILINE)
    assert len(demos) == 2
    for demo in demos:
        assert any(command.startswith(demo) for _, command in documented("sh"))
    options = (ROOT / "pyproject.toml").read_text()
    assert 'addopts = ["--strict-markers", "-m", "not slow"]' in options


def test_installation():
    """The documented installation is the one that `make test` has made, or an extra that exists."""
    made = " ".join(make("test").replace("--requirement", "-r").split())
    extras = importlib.metadata.metadata("vllm-refusion").get_all("Provides-Extra")
    for _, command in documented("sh"):
        if not command.startswith("pip install"):
            continue
        extra = re.search(r'"\.\[(.*)\]"', command)
        if extra:
            assert set(extra[1].split(",")) <= set(extras)
        elif command != "pip install .":  # there: in editable form
            on_gpu = "vllm==" in made
            assert on_gpu or f"-m {command}" in made


def test_benchmark_commands_parse():
    """The command line takes them; test_bench.py runs the command itself on tiny models."""
    parser = build_parser()
    for _, command in documented("sh"):
        if command.startswith("vllm-refusion bench"):
            words = shlex.split(command.replace("\\\n", " "), comments=True)
            assert parser.parse_args(words[1:]).run


def test_bundled_models_leave_memory_to_others():
    """On a CPU vLLM starts no engine where less than 92% of the memory is free, unless told."""
    starts = ("vllm serve ", "vllm run-batch ", "lm_eval run --model vllm ", "vllm-refusion play ")
    starts += ("vllm-refusion trace ", "python -m vllm_refusion.bench.trace_cost ")
    for start in starts:
        found = [command for _, command in documented("sh") if command.startswith(start)]
        found = [command for command in found if "examples/refusion-tiny" in command]
        assert found, start
        for command in found:
            assert re.search("kv.cache.memory.bytes", command), command


def test_play_commands_parse():
    from vllm_refusion.viewer.play_command import serve_command

    parser, found = build_parser(), 0
    for _, command in documented("sh"):
        if command.startswith("vllm-refusion play"):
            args = parser.parse_args(shlex.split(command, comments=True)[1:])
            assert serve_command(args)[-1] != args.model
            found += 1
    assert found


@pytest.mark.slow
@pytest.mark.parametrize("command", chosen("test_cost_of_traces"))
def test_cost_of_traces(command, copy):
    """The command runs; what it measures on a busy machine is no test."""
    few = re.sub(r"--rounds 6 --output-len 128", "--rounds 1 --output-len 16", command)
    assert few != command
    (line,) = [line for line in run(few, copy).splitlines() if line.startswith("{")]
    assert {"wall_cost", "processor_cost"} <= set(json.loads(line))


def test_training_commands_parse():
    """The command line takes them and their settings are allowed."""
    from vllm_refusion.training.train_command import settings_from

    parser = build_parser()
    for _, command in documented("sh"):
        if run_by(command) != "test_training_commands_parse":
            continue
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        launched = "vllm_refusion" if words[0] == "accelerate" else "vllm-refusion"
        args = parser.parse_args(words[words.index(launched) + 1 :])
        if args.command == "train":
            assert settings_from(args)


@pytest.mark.slow
def test_drafts_of_an_adapter(tiny_checkpoint, copy):
    """The documented program, with an adapter of the bundled checkpoint."""
    from mask_adapters import write_adapter

    write_adapter(copy / "run/adapter", tiny_checkpoint, size=0.01)
    for _, command in documented("sh"):
        if run_by(command) == "test_drafts_of_an_adapter":
            command = re.sub(r"--problems \S+", "--problems examples/dev_problems.jsonl", command)
            found = json.loads(run(f"{command} --count 2 --max-tokens 8", copy))
            assert found["responses"] == 2 and found["chains"] == 16


@pytest.mark.slow
def test_questions_of_a_model(copy):
    """Stock vLLM writes the turns; tests/training/test_own_questions.py says which are kept."""
    for _, command in documented("sh"):
        if run_by(command) == "test_questions_of_a_model":
            program, script, _, *options = shlex.split(command)
            asked = [program, script, "examples/stock-tiny", *options, "--count", "8"]
            run(shlex.join([*asked, "--dtype", "float32"]), copy)
            assert {path.name for path in (copy / "questions").iterdir()} == {
                "train.jsonl",
                "dev.jsonl",
            }


@pytest.mark.slow
def test_server_and_its_clients(tiny_checkpoint, tmp_path):
    """Starts each documented server, with the bundled checkpoint, and sends it every request."""
    from server import serve

    requests = [command for _, command in documented("sh") if command.startswith("curl")]
    run_here = "test_server_and_its_clients"
    servers = [c for _, c in documented("sh") if c.startswith("vllm") and run_by(c) == run_here]
    assert requests and servers
    for command in servers:
        program, verb, model, *options = shlex.split(command)
        assert (program, verb, model) == ("vllm", "serve", PUBLISHED)
        with serve(tiny_checkpoint, tmp_path, *options, "--served-model-name", PUBLISHED) as server:
            url = str(server.http.base_url).rstrip("/")
            for request in requests:
                answer = json.loads(run(request.replace("http://localhost:8000", url), tmp_path))
                assert answer["choices"][0]["finish_reason"] in ("stop", "length"), answer


@pytest.mark.slow
def test_servers_of_mask_adapters(tmp_path):
    """A random adapter's folder, and its base with the option, answer as the base does."""
    import torch
    from mask_adapters import write_adapter
    from server import MODEL_NAME, serve
    from transformers import AutoModelForCausalLM

    from conformance import build_model

    base, adapter = build_model("qwen3-gqa2", tmp_path / "base"), tmp_path / "adapter"
    config = json.loads((base / "config.json").read_text())
    del config["mask_token_id"]
    (base / "config.json").write_text(json.dumps(config))
    write_adapter(adapter, base)
    prompt = [5, 70, 33, 8]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)
    test = "test_servers_of_mask_adapters"
    servers = [command for _, command in documented("sh") if run_by(command) == test]
    assert len(servers) == 2
    for command in servers:
        _, _, model_name, *options = shlex.split(command.replace("FOLDER", str(adapter)))
        served = adapter if model_name == str(adapter) else base
        with serve(served, tmp_path, *options) as server:

            def complete(**extra):
                return server.client.completions.create(
                    model=MODEL_NAME,
                    prompt=prompt,
                    max_tokens=30,
                    temperature=0,
                    extra_body={"return_token_ids": True} | extra,
                )

            assert complete().choices[0].token_ids == expected[0, len(prompt) :].tolist()
            with pytest.raises(openai.BadRequestError, match="mode='parallel'.*mask adapter"):
                complete(vllm_xargs={"mode": "parallel"})


@pytest.mark.slow
def test_benchmark_of_a_server(tiny_checkpoint, tmp_path):
    """The documented sweep, with two short requests a level, of a server of the bundled model."""
    from server import serve

    (command,) = (c for _, c in documented("sh") if run_by(c) == "test_benchmark_of_a_server")
    with serve(tiny_checkpoint, tmp_path, "--served-model-name", PUBLISHED) as server:
        url = str(server.http.base_url).rstrip("/")
        command = command.replace("http://localhost:8000", url)
        command += f" --tokenizer {tiny_checkpoint} --concurrency 1,2 --requests 2"
        command += " --input-len 16 --output-len 16 --presets 8/32/0.9/0.4 --out out"
        run(command, tmp_path)
    found = json.loads((tmp_path / "out/refusion-served.json").read_text())
    assert found["kind"] == "server" and found["sides"][0]["error"] is None
    levels = found["sides"][0]["levels"]
    assert [level["concurrency"] for level in levels] == [1, 2]
    assert [level["output_tokens"] for level in levels] == [32, 32]
    assert all(level["tokens_per_s"] > 0 and level["ttft_ms"] > 0 for level in levels)


@pytest.mark.slow
def test_soak(copy):
    """The documented load, with fewer requests and for half a minute: every answer is right."""
    found = [command for _, command in documented("sh") if run_by(command) == "test_soak"]
    assert found
    for command in found:
        for option, value in (("minutes", 0.5), ("clients", 4), ("requests", 8)):
            command = re.sub(rf"--{option} \S+", f"--{option} {value}", command)
        # too short to judge memory by, which the exit status does
        output = run(f"{command} || true", copy)
        result = json.loads(output[: output.index("\n}") + 2])
        assert result["finished"] > 0
        for fault in ("wrong", "failed", "starved", "requests_left", "kv_cache_usage_left"):
            assert not result[fault], output


URL = "http://localhost:8000"


@pytest.fixture(scope="module")
def bundled(tiny_checkpoint, tmp_path_factory):
    """Where a server of the bundled model listens, under the name that the documentation uses."""
    from server import serve

    folder = tmp_path_factory.mktemp("server")
    with serve(tiny_checkpoint, folder, name="examples/refusion-tiny") as server:
        yield str(server.http.base_url).rstrip("/")


@pytest.mark.slow
@pytest.mark.parametrize("command", chosen("test_client"))
def test_client(command, copy, bundled):
    """Clients are no requirement of this package: those are tried that are installed."""
    program, verb, *_ = shlex.split(command)
    if not Path(sys.executable).with_name(program).exists():
        pytest.skip(f"{program} is not installed here")
    if verb != "serve":
        output = run(command.replace(URL, bundled) + URL_OPTION.get(verb, "").format(bundled), copy)
        assert EXPECTED[verb] in output
    if verb == "run-batch":
        answers = map(json.loads, (copy / "answers.jsonl").read_text().splitlines())
        assert [answer["response"]["status_code"] for answer in answers] == [200, 200, 400]


URL_OPTION = {"chat": " --url {}/v1", "complete": " --url {}/v1"}
# in what a client prints or writes
EXPECTED = {"chat": "####", "complete": "", "bench": "Failed requests:                         0"}
EXPECTED |= {"run-batch": "", "run": "|word_problems"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [pytest.param(item, id=document) for document, item in documented("python")]
)
def test_program(program, copy, request):
    asks = URL in program
    if asks:
        program = program.replace(URL, request.getfixturevalue("bundled"))
    for module in re.findall(r"^(?:from|import) (\w+)", program, re.MULTILINE):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed here")
    # what names the published checkpoint is for a GPU, where memory is not shared as on a CPU
    gibibytes = "VLLM_CPU_KVCACHE_SPACE=1 " if PUBLISHED in program else ""
    program = program.replace(f'"{PUBLISHED}"', '"examples/refusion-tiny"')
    # in a folder of its own: Python puts that on sys.path
    (copy / "programs").mkdir()
    (copy / "programs/program.py").write_text(program)
    output = run(f"{gibibytes}python programs/program.py", copy)
    if asks:
        assert "\n#### " in output


if __name__ == "__main__":
    for document, command in documented("sh"):
        print(f"{document:28} {run_by(command)!s:28} {' '.join(command.split())[:100]}")
    for document, _ in documented("python"):
        print(f"{document:28} {'test_program':28} a Python program")
