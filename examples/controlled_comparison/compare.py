"""The controlled comparison: trains, decodes, times, and makes the tables and the plot.

python compare.py --data train.jsonl.gz --dev dev.jsonl.gz --output folder

With a GPU the number of training steps is what fits --train-seconds on this machine, the same for
all methods and seeds, unless --steps says it. --small, and a machine without a GPU, get a trial: it
shows that all of it works, and its figures mean nothing. Phases can be run one by one (--phases);
the tables hold what is known by then.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PHASES = ("train", "decode", "time", "report")
GPU_WORKERS = 3  # processes that decode LLaDA, whose passes are wide


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
    from objectives import METHODS
    from training_run import train_one

    folder = args.output
    for path in (*folder.glob("*-*.json"), *(folder / f"{k}.json" for k in ("go", "steps"))):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "models", ignore_errors=True)
    if args.small:
        for seed in range(args.seeds):
            for method in METHODS:
                train_one(settings, method, seed)
        return
    began = time.time()
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
    runs = {}
    for seed in range(args.seeds):
        for method in METHODS:
            command = [sys.executable, str(HERE / "training_run.py")]
            command += [json.dumps(asdict(settings)), method, str(seed)]
            runs[f"{method}-{seed}"] = subprocess.Popen(command, env=environment)
    deadline = began + args.train_seconds
    try:
        if settings.steps is None:
            _answers(folder, "ready", runs, began + 0.4 * args.train_seconds)
            print(f"all ready after {time.time() - began:.0f} s", flush=True)
            _tell(folder, "go", {"deadline": deadline})
            paces = _answers(folder, "pace", runs, began + 0.6 * args.train_seconds)
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
    from evaluation import jobs, work
    from variants import VARIANTS

    for path in args.output.glob("decoded-*.jsonl"):
        path.unlink()
    deadline = time.time() + args.decode_seconds
    context = multiprocessing.get_context("spawn")
    gpu = torch.cuda.is_available()
    make_queue = queue.Queue if args.small else context.Queue
    queues = {"cpu": make_queue(), "cuda": make_queue()}
    for job in jobs(range(args.seeds), args.problems, args.chunk):
        method = VARIANTS[job.variant].method
        if (args.output / "models" / f"{method}-{job.seed}").exists():
            queues["cuda" if gpu and method == "llada" else "cpu"].put(job)
    if args.small:
        return work(_place(args), "cpu", queues["cpu"], deadline, "cpu")
    devices = ["cuda"] * (GPU_WORKERS if gpu else 0)
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

    deadline = time.time() + args.time_seconds
    lines = measure(_place(args), 0, args.timed, deadline)
    (args.output / "timed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


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
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--train-seconds", type=float, default=1800)
    parser.add_argument("--decode-seconds", type=float, default=600)
    parser.add_argument("--time-seconds", type=float, default=120)
    parser.add_argument("--max-tokens", type=int, default=256, help="of a response")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=10, help="problems a decoding job has")
    parser.add_argument("--timed", type=int, default=5, help="problems decoded for seconds")
    parser.add_argument("--workers", type=int, help="decoding processes on the CPU")
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
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        generation_length=args.max_tokens,
        seconds=args.train_seconds,
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
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "about.json").write_text(json.dumps(about(args)))
    began = time.time()
    for phase in (name for name in PHASES if name in args.phases):
        if phase == "train":
            train(args, _settings(args))
        elif phase == "decode":
            decode(args)
        elif phase == "time":
            measure_time(args)
        else:
            write(args.output, args.output)
            print((args.output / "results.md").read_text())
        print(f"{phase} ended after {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
