"""lm-evaluation-harness with an engine of its own: stock vLLM's answers and likelihoods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TASKS = ("word_problems", "solution_choices")  # generates; compares likelihoods
SERIAL = {"override_generation_config": {"mode": "serial"}}
NEXT = {"override_generation_config": {"mode": "serial", "slot_start": "next"}}
PROBLEMS = 3


class Evaluated:
    """What lm-eval found: scores by task, and of each problem what the model answered."""

    def __init__(self, folder: Path, model: str, plugins: str | None = None, **options: Any):
        arguments = {"pretrained": str(ROOT / "examples" / model), "max_model_len": 512}
        arguments |= {"dtype": "float32", "enforce_eager": True} | options
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "vllm", "--model_args"]
        command += [json.dumps(arguments), "--include_path", "examples/lm_eval", "--tasks"]
        command += [",".join(TASKS), "--apply_chat_template", "--limit", str(PROBLEMS)]
        command += ["--batch_size", "auto", "--output_path", str(folder), "--log_samples"]
        environment = os.environ | ({"VLLM_PLUGINS": plugins} if plugins else {})
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        (results,) = folder.glob("*/results_*.json")
        self.scores = json.loads(results.read_text())["results"]
        answers = {}
        for task in TASKS:
            (path,) = folder.glob(f"*/samples_{task}_*.jsonl")
            samples = map(json.loads, path.read_text().splitlines())
            answers[task] = {sample["doc_id"]: sample["resps"] for sample in samples}
        texts, choices = answers.values()
        self.texts = {number: text for number, ((text,),) in texts.items()}
        # by problem and solution: the log-likelihood, and whether it is what the model would say
        self.likelihoods = {
            (number, i): (float(score), greedy == "True")
            for number, solutions in choices.items()
            for i, ((score, greedy),) in enumerate(solutions)
        }
        assert len(self.texts) == PROBLEMS and len(self.likelihoods) == 4 * PROBLEMS

    def assert_same_likelihoods(self, other: Evaluated) -> None:
        assert self.likelihoods.keys() == other.likelihoods.keys()
        for at, (score, greedy) in self.likelihoods.items():
            assert score == pytest.approx(other.likelihoods[at][0], abs=1e-3)
            assert greedy == other.likelihoods[at][1]


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    pytest.importorskip("lm_eval")
    return lambda *args, **options: Evaluated(tmp_path_factory.mktemp("out"), *args, **options)


@pytest.mark.slow
def test_scores_of_stock_vllm(evaluate):
    """Without this package; with it the same weights, with a mask token or a mask adapter."""
    stock = evaluate("stock-tiny", plugins="none")
    masked = evaluate("stock-tiny", hf_overrides={"mask_token_id": 1}, **NEXT)
    adapter = {"refusion_adapter": str(ROOT / "examples/stock-tiny-adapter")}
    adapted = evaluate("stock-tiny", additional_config=adapter)
    for ours in (masked, adapted):
        assert ours.scores == stock.scores
        assert ours.texts == stock.texts
        ours.assert_same_likelihoods(stock)


@pytest.mark.slow
def test_both_modes(evaluate, reference, dev_problems_file):
    """Answers are the mode's; likelihoods are the backbone's in both."""
    parallel, serial = evaluate("refusion-tiny"), evaluate("refusion-tiny", **SERIAL)
    assert parallel.scores["solution_choices"] == serial.scores["solution_choices"]
    serial.assert_same_likelihoods(parallel)
    problems = map(json.loads, dev_problems_file.read_text().splitlines())
    for number, problem in zip(range(PROBLEMS), problems):
        assert parallel.texts[number] == reference.text(problem["query"])
