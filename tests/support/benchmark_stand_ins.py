"""Tiny local stand-ins for the benchmarks' data: folders called as the data sets are on the hub.

Stock tasks of lm-eval, run where these lie, read them in place of the hub's.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import MATH, MMLU_PRO

CODE_EVAL = '''"""Stands for the hub's metric: a candidate passes if its tests run through."""

import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        features = {
            "predictions": datasets.Sequence(datasets.Value("string")),
            "references": datasets.Value("string"),
        }
        return evaluate.MetricInfo("", "", datasets.Features(features))

    def _compute(self, predictions, references, k):
        def passes(program):
            try:
                exec(program, {})
            except BaseException:
                return False
            return True

        right = [
            passes(candidate + "\\n" + tests)
            for candidates, tests in zip(predictions, references)
            for candidate in candidates
        ]
        return {"pass@1": sum(right) / len(right)}, {}
'''


def write_stand_ins(folder: Path, problems: int = 2) -> None:
    """Data sets with so many problems in each task, and the metric that runs code."""
    for name, configurations in data_sets(problems).items():
        root, described = folder / name, []
        for configuration, splits in configurations.items():
            files = []
            for split, rows in splits.items():
                path = root / configuration / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                files.append({"split": split, "path": f"{configuration}/{split}.jsonl"})
            described.append({"config_name": configuration, "data_files": files})
        # YAML takes JSON
        (root / "README.md").write_text(f"---\n{json.dumps({'configs': described})}\n---\n")
    (folder / "code_eval").mkdir()
    (folder / "code_eval/code_eval.py").write_text(CODE_EVAL)


def data_sets(problems: int) -> dict[str, dict[str, dict[str, list[dict]]]]:
    """By name, configuration and split, the rows."""
    count = range(problems)
    sums = [
        {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in count
    ]
    math = [
        {
            "problem": f"What is ${n} + 1$?",
            "level": "1",
            "type": "x",
            "solution": rf"$\boxed{{{n + 1}}}$",
        }
        for n in count
    ]
    functions = [
        {
            "task_id": f"T/{n}",
            "prompt": f"def f{n}():\n",
            "entry_point": f"f{n}",
            "test": f"def check(f):\n    assert f() == {n}\n",
            "canonical_solution": "",
        }
        for n in count
    ]
    programs = [
        {
            "task_id": n,
            "text": f"Write f{n}, which gives {n}.",
            "code": f"def f{n}():\n    return {n}",
            "test_list": [f"assert f{n}() == {n}"] * 3,
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for n in count
    ]
    wrong = {f"Incorrect Answer {i}": f"{i} birds" for i in (1, 2, 3)}
    science = [{"Question": f"Which, {n}?", "Correct Answer": "a fish", **wrong} for n in count]
    choices = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}
    arc = [{"id": f"{n}", "question": f"{n}?", "choices": choices, "answerKey": "B"} for n in count]
    mmlu = [
        {
            "question_id": n,
            "question": f"Which, {n}?",
            "options": ["a", "b", "c"],
            "answer": "B",
            "answer_index": 1,
            "cot_content": "A: Let's think step by step. The answer is (B).",
            "category": part.replace("_", " "),
            "src": "",
        }
        for part in MMLU_PRO
        for n in count
    ]
    subjects = {"counting_and_prob": "counting_and_probability", "num_theory": "number_theory"}
    subjects |= {"precalc": "precalculus"}
    return {
        "openai/gsm8k": {"main": {"train": sums, "test": sums}},
        "EleutherAI/hendrycks_math": {
            subjects.get(part, part): {"train": math, "test": math} for part in MATH
        },
        "openai/openai_humaneval": {"openai_humaneval": {"test": functions}},
        "google-research-datasets/mbpp": {
            "full": {name: programs for name in ("train", "test", "validation", "prompt")}
        },
        "Idavidrein/gpqa": {"gpqa_main": {"train": science}},
        "allenai/ai2_arc": {
            "ARC-Challenge": {name: arc for name in ("train", "validation", "test")}
        },
        "TIGER-Lab/MMLU-Pro": {"default": {"test": mmlu, "validation": mmlu * 3}},
    }
