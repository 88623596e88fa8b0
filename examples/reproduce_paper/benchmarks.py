"""What is asked, and what the paper has: seven benchmarks, four ways to answer them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_refusion.decoding.params import PRESETS

RESPONSE_BUDGET = 512  # tokens; the published presets are for it
PREFIXED = {"add_generation_prompt": False, "continue_final_message": True}
MATH = (
    *("algebra", "counting_and_prob", "geometry", "intermediate_algebra"),
    *("num_theory", "prealgebra", "precalc"),
)
MMLU_PRO = (
    *("biology", "business", "chemistry", "computer_science", "economics", "engineering", "health"),
    *("history", "law", "math", "other", "philosophy", "physics", "psychology"),
)


def program(response: str) -> str:
    """The code in a response that goes on behind an opened fence; it may open one of its own."""
    code, fence, behind = response.partition("```")
    opened = re.match(r"\w+[ \t]*\n", behind)
    if fence and (opened or not code.strip()):
        code = behind[opened.end() if opened else 0 :].partition("```")[0]
    return code


def programs(responses: Sequence[Sequence[str]], _: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """In place of the filter of lm-eval's mbpp_instruct, which takes a first word for a language.

    It makes `` f(n):`` of an answer that begins with ``def f(n):``: all such are wrong there.
    """
    return [[program(response) for response in of_problem] for of_problem in responses]


@dataclass(frozen=True)
class Benchmark:
    """A column of the tables.

    Attributes:
        tasks: stock tasks of lm-eval; its score is their mean, weighted with their problems.
        metric: of these tasks, as lm-eval's results name it.
        problems: of all tasks.
        score, speed: of the published checkpoint in the paper, in % and tokens/s.
        stock_speed: of Qwen3-8B there, tokens/s.
        fields: of the request, beside what all have.
        reads: the answers, in place of the filter that the metric names.
        runs_code: that the model wrote, to tell whether it is right.
    """

    title: str
    tasks: tuple[str, ...]
    metric: str
    problems: int
    score: float
    speed: float
    stock_speed: float
    fields: dict[str, Any] = field(default_factory=dict)
    runs_code: bool = False
    reads: Callable[..., list[list[str]]] | None = None


# By preset. The paper's figures are those of docs/algorithm.md, section 5.
BENCHMARKS = {
    "gsm8k": Benchmark(
        *("GSM8K", ("gsm8k_cot_zeroshot",), "exact_match,flexible-extract", 1319),
        *(84.91, 81.24, 31.20),
    ),
    "math": Benchmark(
        *("MATH", tuple(f"minerva_math_{part}" for part in MATH), "math_verify,none", 5000),
        *(54.22, 81.77, 30.11),
    ),
    "humaneval": Benchmark(
        *("HumanEval", ("humaneval_instruct",), "pass@1,create_test", 164),
        *(78.66, 103.90, 30.95, PREFIXED, True),
    ),
    "mbpp": Benchmark(
        *("MBPP", ("mbpp_instruct",), "pass_at_1,extract_code", 500),
        *(68.20, 92.09, 30.07, PREFIXED, True),
        reads=programs,
    ),
    "gpqa": Benchmark(
        *("GPQA", ("gpqa_main_cot_zeroshot",), "exact_match,flexible-extract", 448),
        *(35.49, 64.11, 30.43),
    ),
    "arc-c": Benchmark(
        *("ARC-C", ("arc_challenge_chat",), "exact_match,remove_whitespace", 1172),
        *(89.76, 32.46, 42.78, PREFIXED),
    ),
    "mmlu-pro": Benchmark(
        *("MMLU-Pro", tuple(f"mmlu_pro_{part}" for part in MMLU_PRO)),
        *("exact_match,custom-extract", 12032, 45.94, 52.74, 31.42),
    ),
}

STOCK = "stock"
VARIANTS = {
    "propose": "ReFusion, parallel",
    "correct": "ReFusion, parallel, corrected infill",
    "serial": "ReFusion, serial",
    STOCK: "stock model",
}


def request_fields(variant: str, preset: str) -> dict[str, Any]:
    """Of a request, as lm-eval takes them: its generation arguments."""
    fields = {
        "max_gen_toks": RESPONSE_BUDGET,
        "temperature": 0.0,
        "do_sample": False,
        "chat_template_kwargs": {"enable_thinking": False},
        **BENCHMARKS[preset].fields,
    }
    options: dict[str, Any] = {
        "propose": {"preset": preset},
        "correct": {"preset": preset, "infill": "correct"},
        "serial": {"mode": "serial", "slot_size": PRESETS[preset].slot_size},
        STOCK: {},
    }[variant]
    return fields | ({"vllm_xargs": options} if options else {})
