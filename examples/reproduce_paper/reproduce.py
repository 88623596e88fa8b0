"""The paper's benchmarks through the served engine, beside the stock model and the paper's figures.

python reproduce.py --output folder --run-code

serves GSAI-ML/ReFusion, answers seven benchmarks in three ways, serves Qwen3-8B, answers them once
more, and prints the tables. Repeated, it does what is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import BENCHMARKS, RESPONSE_BUDGET, STOCK, VARIANTS, request_fields
from paper_table import tables
from served import Served, server
from tqdm import tqdm

from vllm_refusion.files import read_json, write_text

REQUEST_SECONDS = 3600  # the last one of a crowd waits long


class Cell(NamedTuple):
    """What is run at once: a task of lm-eval, answered in one way."""

    variant: str
    preset: str
    task: str

    def path(self, output: Path) -> Path:
        return output / "cells" / self.variant / f"{self.task}.json"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--run-code", action="store_true", help="run code that the models wrote")
    parser.add_argument("--limit", type=int, help="only the first problems of each task")
    parser.add_argument("--concurrent", type=int, default=16, help="requests; default: 16")
    parser.add_argument("--model", default="GSAI-ML/ReFusion")
    parser.add_argument("--stock-model", default="Qwen/Qwen3-8B")
    parser.add_argument("--base-url", help="a server of the model that runs already")
    parser.add_argument("--stock-base-url", help="a server of the stock model that runs already")
    parser.add_argument(
        "--serve-options",
        default="--max-model-len 8192",
        help="of vllm serve, for both; default: --max-model-len 8192",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot work; says what to change."""
    try:
        importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError('this needs: pip install "vllm-refusion[reproduce]"') from error
    code = [preset for preset in args.benchmarks if BENCHMARKS[preset].runs_code]
    if code and not args.run_code:
        raise ValueError(
            f"{' and '.join(code)}: their tests run code that the models wrote. Allow it with "
            "--run-code, in a container, or leave them out with --benchmarks"
        )
    for name, least in (("limit", 1), ("concurrent", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: allowed is an integer of at least {least}")


def asked(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """What a cell's result depends on, and its speed."""
    return {
        "model": args.stock_model if cell.variant == STOCK else args.model,
        "request": request_fields(cell.variant, cell.preset),
        "limit": args.limit,
        "concurrent": args.concurrent,
        "lm_eval": importlib.metadata.version("lm-eval"),
    }


def finished(args: argparse.Namespace, cell: Cell) -> dict[str, Any] | None:
    """The cell's result, if there is one.

    Raises:
        ValueError: it is broken, or one of other settings.
    """
    path, advice = cell.path(args.output), "remove it to run it again"
    if not path.exists():
        return None
    result = read_json(path, advice)
    if not isinstance(result, dict) or result.get("asked") != asked(args, cell):
        raise ValueError(f"{path} is of other settings: name another --output, or {advice}")
    return result


@cache
def task_manager() -> Any:
    """lm-eval's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def task_of(cell: Cell) -> Any:
    """lm-eval's task, which a variant's requests then change."""
    from lm_eval.filters import build_filter_ensemble

    benchmark = BENCHMARKS[cell.preset]
    (task,) = task_manager().load(cell.task)["tasks"].values()
    if benchmark.reads is not None:
        name = benchmark.metric.partition(",")[2]
        reading = [["custom", {"filter_fn": benchmark.reads}]]
        task._filters = [build_filter_ensemble(name, reading)]
    return task


def run(args: argparse.Namespace, cell: Cell, served: Served) -> dict[str, Any]:
    """Answers and scores the problems of a cell."""
    from lm_eval import simple_evaluate

    benchmark, before = BENCHMARKS[cell.preset], served.counts()
    evaluated = simple_evaluate(
        model="local-chat-completions",
        model_args={
            "model": served.model,
            "base_url": f"{served.url}/v1/chat/completions",
            "num_concurrent": args.concurrent,
            "timeout": REQUEST_SECONDS,
            "max_gen_toks": RESPONSE_BUDGET,
        },
        tasks=[task_of(cell)],
        task_manager=task_manager(),
        limit=args.limit,
        apply_chat_template=True,
        gen_kwargs=request_fields(cell.variant, cell.preset),
        confirm_run_unsafe_code=benchmark.runs_code,
        bootstrap_iters=0,
    )
    counts = served.counts().since(before)
    samples = evaluated["samples"][cell.task]
    lines = "".join(json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples)
    path = args.output / "samples" / cell.variant / f"{cell.task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, lines)
    return {
        "asked": asked(args, cell),
        "score": float(evaluated["results"][cell.task][benchmark.metric]),
        "problems": evaluated["n-samples"][cell.task]["effective"],
        **counts._asdict(),
    }


@contextmanager
def place(args: argparse.Namespace, is_stock: bool) -> Iterator[Served]:
    """The server that answers, started unless one is named."""
    url = args.stock_base_url if is_stock else args.base_url
    if url:
        yield Served(url)
        return
    model = args.stock_model if is_stock else args.model
    log = args.output / f"server-{'stock' if is_stock else 'refusion'}.log"
    print(f"starting a server of {model}: {log}", file=sys.stderr)
    with server(model, args.serve_options.split(), log) as served:
        yield served


def reproduce(args: argparse.Namespace) -> str:
    """Runs what is missing; gives the tables, which are in ``results.md`` after each cell too."""
    cells = [
        Cell(variant, preset, task)
        for variant in VARIANTS
        for preset in BENCHMARKS
        for task in BENCHMARKS[preset].tasks
        if variant in args.variants and preset in args.benchmarks
    ]
    found = {cell: result for cell in cells if (result := finished(args, cell))}
    args.output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(cells), initial=len(found), desc="tasks", unit=" tasks") as bar:
        for is_stock in (False, True):
            missing = [c for c in cells if c not in found and (c.variant == STOCK) == is_stock]
            if not missing:
                continue
            with place(args, is_stock) as served:
                for cell in missing:
                    bar.set_description(f"{cell.variant} {cell.task}")
                    found[cell] = run(args, cell, served)
                    path = cell.path(args.output)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text(path, json.dumps(found[cell], indent=2) + "\n")
                    write_text(args.output / "results.md", text(args, found))
                    bar.update()
    write_text(args.output / "results.md", text(args, found))
    return text(args, found)


def text(args: argparse.Namespace, found: dict[Cell, dict[str, Any]]) -> str:
    about = f"{args.model}, stock model {args.stock_model}, {args.concurrent} requests at once"
    about += f", the first {args.limit} problems of each task" if args.limit else ""
    by_task = {(cell.variant, cell.task): result for cell, result in found.items()}
    return tables(by_task, args.variants, args.benchmarks, about + ".")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options()
    args = parser.parse_args(arguments)
    try:
        check(args)
        if args.run_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        print(reproduce(args))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
