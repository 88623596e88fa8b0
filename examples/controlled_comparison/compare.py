"""The controlled comparison: trains, decodes, times, and makes the tables and the plot.

python compare.py --data train.jsonl.gz --dev dev.jsonl.gz --output folder

With a GPU the number of training steps is what fits --train-seconds on this machine, the same for
all methods and seeds, unless --steps says it. --small, and a machine without a GPU, get a trial: it
shows that all of it works, and its figures mean nothing. Phases can be run one by one (--phases).
Every problem decoded or timed is a line of a file as soon as it is done: of a command that was
stopped, --phases report makes the tables of what is known, and --phases decode decodes the rest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PHASES = ("train", "decode", "time", "report")


def _tokenised(args: argparse.Namespace) -> Path:
    """The training data as token ids, made once."""
    from transformers import AutoTokenizer

    from vllm_refusion.training.data import Encoder, read_rows, write_store

    folder = args.store or args.output / "data"
    if not (folder / "about.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        encoder = Encoder(tokenizer, tokenizer.convert_tokens_to_ids(args.mask_token))
        rows = read_rows([args.data])
        if args.small:
            rows = (row for row, _ in zip(rows, range(256)))
        print(write_store(rows, encoder, folder, 1024), flush=True)
    return folder


def _answers(folder: Path, kind: str, runs: dict[str, subprocess.Popen], until: float) -> list[Any]:
    """What the runs that are alive have said, once all have or the time is over."""
    while time.time() < until:
        alive = {name for name, process in runs.items() if process.poll() is None}
        said = {p.stem.removeprefix(f"{kind}-") for p in folder.glob(f"{kind}-*.json")}
        if alive <= said:
            break
        time.sleep(0.1)
    return [json.loads(path.read_text()) for path in folder.glob(f"{kind}-*.json")]


def _tell(folder: Path, kind: str, value: Any) -> None:
    (folder / f"{kind}.part").write_text(json.dumps(value))
    (folder / f"{kind}.part").rename(folder / f"{kind}.json")


def agreed_steps(paces: list[float], seconds: float) -> int:
    """Steps that all runs make in ``seconds``, from seconds a step measured while all share a GPU.

    It is between what the slowest would make at that pace and what they would make if those that
    end early left all of their share to the others.
    """
    pace = (max(paces) + sum(paces) / len(paces)) / 2
    return max(100, int(seconds / pace))


def train(args: argparse.Namespace, settings: Any) -> None:
    from objectives import METHODS, START

    folder = args.output
    for path in (*folder.glob("*-*.json"), *folder.glob("*.jsonl")):
        path.unlink()
    shutil.rmtree(folder / "models", ignore_errors=True)
    settings = replace(settings, deadline=time.time() + args.train_seconds)
    if args.start_steps:  # few, by few runs: compiling takes longer than it saves
        first = replace(settings, steps=args.start_steps, start_steps=0, compiled=False)
        _train_side_by_side(args, first, [START])
    _train_side_by_side(args, settings, METHODS)


def _train_side_by_side(args: argparse.Namespace, settings: Any, methods: Sequence[str]) -> None:
    """One run for each method and seed; agrees on their steps unless ``settings`` say them."""
    from training_run import train_one

    names = [(method, seed) for seed in range(args.seeds) for method in methods]
    if args.small:
        for method, seed in names:
            train_one(settings, method, seed)
        return
    folder, deadline, began = args.output, settings.deadline, time.time()
    for kind in ("go", "steps"):
        (folder / f"{kind}.json").unlink(missing_ok=True)
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
    runs = {}
    for method, seed in names:
        command = [sys.executable, str(HERE / "training_run.py")]
        command += [json.dumps(asdict(settings)), method, str(seed)]
        runs[f"{method}-{seed}"] = subprocess.Popen(command, env=environment)
    try:
        if settings.steps is None:
            left = deadline - began
            _answers(folder, "ready", runs, began + 0.4 * left)
            print(f"all ready after {time.time() - began:.0f} s", flush=True)
            _tell(folder, "go", True)
            paces = _answers(folder, "pace", runs, began + 0.6 * left)
            steps = agreed_steps(paces, deadline - time.time() - 5) if paces else 100
            print(f"seconds a step {paces}: {steps} steps", flush=True)
            _tell(folder, "steps", steps)
        for process in runs.values():
            process.wait(max(0.1, deadline + 15 - time.time()))
    except subprocess.TimeoutExpired:
        print("training: out of time", flush=True)
    finally:
        for process in runs.values():
            if process.poll() is None:
                process.kill()


def _place(args: argparse.Namespace) -> Any:
    from evaluation import Place

    return Place(str(args.output), str(args.dev), str(args.model), args.max_tokens)


def decode(args: argparse.Namespace) -> None:
    import torch
    from decoders import WHOLE
    from evaluation import jobs, work
    from report import read_lines
    from variants import VARIANTS

    lines = read_lines(args.output.glob("decoded-*.jsonl"))
    done = {(line["variant"], line["seed"], line["problem"]) for line in lines}
    deadline = time.time() + args.decode_seconds
    context = multiprocessing.get_context("spawn")
    gpu = torch.cuda.is_available()
    make_queue = queue.Queue if args.small else context.Queue
    queues = {"cpu": make_queue(), "cuda": make_queue()}
    for job in jobs(range(args.seeds), args.problems, args.chunk, args.main_only):
        method = VARIANTS[job.variant].method
        left = tuple(n for n in job.problems if (job.variant, job.seed, n) not in done)
        if left and (args.output / "models" / f"{method}-{job.seed}").exists():
            queues["cuda" if gpu and method in WHOLE else "cpu"].put(job._replace(problems=left))
    if args.small:
        return work(_place(args), "cpu", queues["cpu"], deadline, "cpu")
    devices = ["cuda"] * (args.gpu_workers if gpu else 0)
    devices += ["cpu"] * (args.workers or max(1, (os.cpu_count() or 1) - len(devices)))
    workers = []
    for number, device in enumerate(devices):
        given = (_place(args), device, queues[device], deadline, f"{device}-{number}")
        worker = context.Process(target=work, args=given)
        worker.start()
        workers.append(worker)
    for worker in workers:
        worker.join(max(0.1, deadline + 10 - time.time()))
        if worker.is_alive():
            worker.kill()
    for waiting in queues.values():
        waiting.cancel_join_thread()


def measure_time(args: argparse.Namespace) -> None:
    from evaluation import measure
    from variants import MAIN, RECOMPUTED

    variants = MAIN if args.main_only else (*MAIN, *RECOMPUTED)
    deadline = time.time() + args.time_seconds
    with open(args.output / "timed.jsonl", "w") as file:
        for line in measure(_place(args), variants, 0, args.timed, deadline):
            file.write(json.dumps(line) + "\n")
            file.flush()


def about(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seeds": args.seeds,
        "longest response": args.max_tokens,
        "autoregressive start": f"{args.start_steps} steps" if args.start_steps else "none",
        "figures": "of a trial, they mean nothing" if args.small else "see README.md",
    }


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="training rows")
    parser.add_argument("--dev", type=Path, required=True, help="problems with an answer")
    parser.add_argument("--output", type=Path, required=True)
    default = HERE.parent / "refusion-tiny"
    parser.add_argument("--model", type=Path, default=default, help="tokenizer and shape")
    parser.add_argument("--mask-token", default="<|mask|>")
    parser.add_argument("--store", type=Path, help="folder of tokenised training data, if made")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int)
    help = "of an autoregressive model that all methods start from; 0: from random weights"
    parser.add_argument("--start-steps", type=int, default=0, help=help)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--train-seconds", type=float, default=1800)
    parser.add_argument("--decode-seconds", type=float, default=600)
    parser.add_argument("--time-seconds", type=float, default=120)
    parser.add_argument("--max-tokens", type=int, default=256, help="of a response")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=10, help="problems a decoding job has")
    parser.add_argument("--timed", type=int, default=5, help="problems decoded for seconds")
    parser.add_argument("--main-only", action="store_true", help="no rows but the main table's")
    parser.add_argument("--workers", type=int, help="decoding processes on the CPU")
    help = "decoding processes on a GPU, for LLaDA and Dream, whose passes are wide"
    parser.add_argument("--gpu-workers", type=int, default=3, help=help)
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--small", action="store_true", help="a trial for a CPU")
    args = parser.parse_args(given)
    args.phases = args.phases.split(",")
    if unknown := set(args.phases) - set(PHASES):
        parser.error(f"--phases {','.join(unknown)}: allowed are {', '.join(PHASES)}")
    return args


def _settings(args: argparse.Namespace) -> Any:
    from training_run import Settings

    settings = Settings(
        config=str(args.model),
        store=str(_tokenised(args)),
        output=str(args.output),
        steps=args.steps,
        start_steps=args.start_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        generation_length=args.max_tokens,
        compiled=True,
    )
    if args.small:
        small = {"steps": args.steps or 20, "batch_size": 8, "layers": 2, "hidden_size": 64}
        settings = replace(settings, **small, workers=0, compiled=False)
    return settings


def main(given: list[str] | None = None) -> None:
    import torch
    from report import write

    args = arguments(given)
    args.small |= not torch.cuda.is_available()
    if args.small:
        smaller = {"problems": 2, "timed": 1, "max_tokens": 64}
        vars(args).update({name: min(getattr(args, name), n) for name, n in smaller.items()})
    args.output.mkdir(parents=True, exist_ok=True)
    if args.phases != ["report"]:  # which may be made elsewhere
        (args.output / "about.json").write_text(json.dumps(about(args)))
    began = time.time()
    for phase in (name for name in PHASES if name in args.phases):
        if "report" in args.phases:  # of what is known so far
            write(args.output, args.output)
        if phase == "train":
            train(args, _settings(args))
        elif phase == "decode":
            decode(args)
        elif phase == "time":
            measure_time(args)
        else:
            print((args.output / "results.md").read_text())
        print(f"{phase} ended after {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
