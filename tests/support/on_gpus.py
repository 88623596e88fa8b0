"""What needs GPUs: tests, training and measurements in lanes, side by side on two of them.

    python tests/support/on_gpus.py OUT --data train.jsonl.gz --dev dev.jsonl.gz --gguf model.gguf

Each lane takes its steps one after the other, on cores and a GPU of its own; those whose figures
count have GPU 0 for themselves. A step that needs another waits for it. ``OUT/steps.txt`` says what
began and ended, ``OUT/NAME.log`` what a step wrote, ``OUT/*.json`` what was measured; nothing
begins once ``--minutes`` are over. vLLM and this package must be importable; run it outside of the
tree, which has a top-level triton_kernels. ``--trial`` does all of it with toys, on a CPU too.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RUN = (sys.executable, "-P", "-m", "vllm_refusion")
PYTEST = (sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--dist=loadfile")
SLOW = ("-m", "slow or not slow")
EXACT = (
    "serial_mode adapted_models stock_contract lora fp8_kv structured_outputs engine "
    "engine_scheduling engine_sampling early_delivery row_budget lora_rows"
)
NEXT = "signatures compat engine serial_mode structured_outputs lora adapted_models launch_keys"


@dataclass
class Step:
    """Args: seconds: at most; gpus: as CUDA_VISIBLE_DEVICES; needs: names of other steps."""

    name: str
    seconds: int
    command: Sequence[Any]
    gpus: str = "0"
    needs: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


class Runner:
    """Runs lanes of steps in threads."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.end = out, time.monotonic() + 60 * minutes
        self.began = time.monotonic()
        self.ended: dict[str, int] = {}
        self.news = threading.Condition()

    def say(self, line: str) -> None:
        with self.news, (self.out / "steps.txt").open("a") as file:
            file.write(f"{time.monotonic() - self.began:.0f} {line}\n")

    def lane(self, steps: Sequence[Step], cores: Sequence[int]) -> threading.Thread:
        thread = threading.Thread(target=lambda: [self._run(step, cores) for step in steps])
        thread.start()
        return thread

    def _run(self, step: Step, cores: Sequence[int]) -> None:
        with self.news:
            self.news.wait_for(
                lambda: all(name in self.ended for name in step.needs),
                timeout=max(0, self.end - time.monotonic()),
            )
            ready = all(self.ended.get(name) == 0 for name in step.needs)
        if not ready or time.monotonic() > self.end:
            self.say(f"left out {step.name}")
            status = -1
        else:
            self.say(f"start {step.name}")
            status = self._execute(step, cores)
            self.say(f"end {step.name}: {status}")
        with self.news:
            self.ended[step.name] = status
            self.news.notify_all()

    def _execute(self, step: Step, cores: Sequence[int]) -> int:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": step.gpus} | step.env
        with (self.out / f"{step.name}.log").open("w") as log:
            process = subprocess.Popen(
                [str(part) for part in step.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.out,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
            try:
                return process.wait(step.seconds)
            except subprocess.TimeoutExpired:
                return -signal.SIGKILL
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)  # servers and workers too
                except ProcessLookupError:
                    pass


def plan(options: argparse.Namespace, out: Path) -> dict[str, list[Step]]:
    """Lanes by name."""
    trial = options.trial
    base, plain = out / "base", out / "plain"
    data, dev = options.data.resolve(), options.dev.resolve()
    problems, questions = out / "dev.jsonl", out / "questions"
    small = {"kv_cache_memory_bytes": 2**27, "enforce_eager": True, "max_model_len": 512}
    toy = ("--engine-args", json.dumps(small)) if trial else ()
    shape = ("--shape", shape_file(out) if trial else "qwen3-8b")
    lengths = ("--input-len", 16, "--output-len", 8) if trial else ("--input-len", 128)
    bench = (*RUN, "bench", "--out", out, *toy)
    levels = ("--concurrency", "1,2" if trial else "1,4,16,64")
    share = () if trial else ("--gpu-memory-utilization", 0.4)
    large = (*bench, *shape, *lengths, "--fast-start", "--presets", "serial/32@0.866")
    large += () if trial else ("--gpu-memory-utilization", 0.8, "--max-num-batched-tokens", 16384)
    fp8 = () if trial else ("--quantization", "fp8")
    answers = ("--prompts", problems, "--stop-at-eos", "--input-len", 512, *share)
    answers += ("--output-len", 16, "--requests", 2) if trial else ("--output-len", 320)

    def adapter_bench(name: str, folder: Path, *more: Any) -> tuple[Any, ...]:
        serial = ("--presets", "serial/16")
        return (*bench, "--model", folder, *serial, *answers, *more, "--name", name)

    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    adapter, own = out / "adapter/adapter", out / "own/adapter"
    figures = [
        Step(
            "8b-fp8-serial",
            240,
            (*large, *fp8, "--concurrency", "1,16,64,128,256", "--name", "8b-fp8-serial"),
        ),
        Step(
            "8b-fp8-adapter",
            150,
            (
                *large,
                *fp8,
                *levels,
                "--sides",
                "refusion",
                "--adapter",
                "random:64",
                "--name",
                "8b-fp8-adapter",
            ),
        ),
        Step(
            "smollm2-adapter",
            300,
            adapter_bench("smollm2-adapter", adapter, *levels),
            needs=("adapter",),
        ),
        Step(
            "smollm2-ngram",
            150,
            adapter_bench(
                "smollm2-adapter-ngram",
                adapter,
                *levels,
                "--sides",
                "stock",
                "--speculative-config",
                json.dumps(ngram),
            ),
            needs=("adapter",),
        ),
        Step(
            "smollm2-natural",
            200,
            (
                *bench,
                "--model",
                own,
                "--presets",
                "serial/16",
                *answers,
                *levels,
                "--prompts",
                questions / "dev.jsonl",
                "--name",
                "smollm2-natural",
            ),
            needs=("own",),
        ),
        Step(
            "adapter-float32",
            150,
            adapter_bench(
                "smollm2-adapter-float32",
                adapter,
                "--dtype",
                "float32",
                "--concurrency",
                2 if trial else 64,
                *(() if trial else ("--requests", 390)),
                "--fast-start",
            ),
            needs=("adapter",),
        ),
        Step(
            "adapter-fp8",
            150,
            adapter_bench(
                "smollm2-adapter-fp8",
                adapter,
                *fp8,
                "--concurrency",
                2 if trial else 16,
                "--fast-start",
            ),
            needs=("adapter",),
        ),
        Step(
            "served",
            400,
            (sys.executable, "-P", __file__, out, "--served", *(("--trial",) if trial else ())),
        ),
        Step(
            "preemptions",
            200,
            (
                sys.executable,
                "-P",
                __file__,
                out,
                "--preemptions",
                *(("--trial",) if trial else ()),
                "--dev",
                dev,
            ),
        ),
    ]
    train = (*RUN, "train")
    common: tuple[Any, ...] = ("--quiet", "--save-every", 10**6)
    steps = (
        {"twin": 2, "adapter": 2, "own": 2, "sweep": 2}
        if trial
        else {"twin": 1000, "adapter": 900, "own": 500, "sweep": 300}
    )
    if trial:
        common += ("--batch-size", 4, "--micro-batch-size", 4)
    else:
        common += ("--bf16", "--compile", "--workers", 2, "--batch-size", 128)
        common += ("--micro-batch-size", 64, "--warmup-steps", 50)
    plainly = ("--objective", "autoregressive", "--learning-rate", 5e-4, "--adam-beta2", 0.99)
    masks = ("--mask-adapter", *common, "--dev", dev, "--eval-every", 2 if trial else 100)
    twin = out / "twin/model"
    convert = (*RUN, "convert", options.gguf)
    if trial:
        convert = (*RUN, "convert", EXAMPLES / "stock-tiny")
    models = [
        Step("base", 120, (*convert, "-o", base, "--slot-size", 8, "--block-length", 32)),
        Step(
            "twin",
            420,
            (
                *train,
                base,
                "-o",
                out / "twin",
                "--data",
                data,
                *common,
                *plainly,
                "--steps",
                steps["twin"],
            ),
            "1",
            ("base",),
        ),
        Step(
            "adapter",
            600,
            (
                *train,
                twin,
                "-o",
                out / "adapter",
                "--data",
                data,
                *masks,
                "--steps",
                steps["adapter"],
            ),
            "1",
            ("twin",),
        ),
        Step(
            "twin-answers",
            120,
            (
                sys.executable,
                "-P",
                EXAMPLES / "evaluate.py",
                twin,
                "--problems",
                dev,
                "--max-tokens",
                16 if trial else 320,
                "--token-by-token",
                *(("--count", 4) if trial else ()),
                "--json",
                out / "twin.json",
            ),
            "1",
            ("twin",),
        ),
        Step(
            "adapter-drafts",
            200,
            (
                sys.executable,
                "-P",
                EXAMPLES / "adapter_drafts.py",
                adapter,
                "--problems",
                dev,
                "--count",
                2 if trial else 390,
                "--max-tokens",
                16 if trial else 320,
            ),
            "1",
            ("adapter",),
        ),
    ]
    natural = [
        Step("plain", 120, (*convert, "-o", plain, "--plain")),
        Step(
            "questions",
            300,
            (
                sys.executable,
                "-P",
                EXAMPLES / "own_questions.py",
                plain,
                "-o",
                questions,
                "--count",
                60 if trial else 12000,
            ),
            "1",
            ("plain",),
        ),
        Step(
            "own",
            600,
            (
                *train,
                plain,
                "-o",
                out / "own",
                "--data",
                questions / "train.jsonl",
                *masks,
                "--dev",
                questions / "dev.jsonl",
                "--on-policy",
                "--max-tokens",
                16 if trial else 256,
                "--steps",
                steps["own"],
            ),
            "1",
            ("questions",),
        ),
        Step(
            "own-drafts",
            200,
            (
                sys.executable,
                "-P",
                EXAMPLES / "adapter_drafts.py",
                own,
                "--problems",
                questions / "dev.jsonl",
                "--max-tokens",
                16 if trial else 256,
            ),
            "1",
            ("own",),
        ),
    ]
    variants = {
        "base": (),
        "rank16": ("--rank", 16),
        "rank128": ("--rank", 128),
        "upper": ("--adapter-layers", "upper-half"),
        "chain8": ("--chain-length", 8),
        "chain32": ("--chain-length", 32),
        "kl": ("--labels", "kl"),
        "policy": ("--on-policy", "--max-tokens", 320, "--data", out / "part.jsonl"),
        "cuts16": ("--chains-per-row", 16),
    }
    sweeps = [
        Step(
            f"sweep-{name}",
            300,
            (
                *train,
                twin,
                "-o",
                out / f"sweep-{name}",
                "--data",
                data,
                *masks,
                "--steps",
                steps["sweep"],
                *more,
            ),
            "1",
            ("adapter",),
        )
        for name, more in variants.items()
    ]
    hybrid = (
        *common,
        *(() if trial else ("--micro-batch-size", 32)),
        "--learning-rate",
        5e-4,
        "--adam-beta2",
        0.99,
        "--data",
        data,
    )
    settings = ("serial/8", "serial/32", "8/32/0.9/0.4", "32/128/0.9/0.4", "8/16/0.8/0.2")
    settings += tuple(f"{setting}/correct" for setting in settings[2:])

    def hybrid_steps(name: str, seconds: int, count: int, gpu: str, *more: Any) -> list[Step]:
        trained = out / name
        evaluate = (sys.executable, "-P", EXAMPLES / "evaluate.py", trained / "model")
        evaluate += ("--problems", dev, "--json", out / f"{name}.json", "--settings")
        evaluate += settings[:1] if trial else settings
        evaluate += ("--count", 2, "--max-tokens", 16) if trial else ("--max-tokens", 320)
        return [
            Step(
                name,
                seconds,
                (*train, base, "-o", trained, *hybrid, "--steps", 2 if trial else count, *more),
                gpu,
                ("base",),
            ),
            Step(f"{name}-answers", 300, evaluate, gpu, (name,)),
        ]

    added = {
        "section6": (),
        "joined": ("--joined-slots", "--ordered-share", 0.25),
        "infill": ("--infill-weight", 1),
        "certainty": ("--slot-certainty", 2),
        "blocks": ("--block-share", 0.5),
    }
    hybrids, together = [], ()
    for name, more in added.items():
        together += more
        for seed in (1, 2):
            options_of = (*together, "--seed", seed)
            hybrids.append(hybrid_steps(f"hybrid-{name}-{seed}", 600, 1000, "1", *options_of))
    full = hybrid_steps("full", 1500, 4500, "0", *together)
    compare = (EXAMPLES / "controlled_comparison/compare.py", "--data", data, "--dev", dev)
    compare += ("--output", out / "comparison")
    if not trial:
        compare += ("--start-steps", 1000, "--train-seconds", 240, "--decode-seconds", 170)
        compare += ("--time-seconds", 45, "--problems", 200, "--main-only", "--gpu-workers", 6)
    comparison = [Step("comparison", 700, (sys.executable, *compare), "1")]
    tree = ("--rootdir", ROOT, "-c", ROOT / "pyproject.toml")
    engine = [ROOT / f"tests/engine/test_{name}.py" for name in EXACT.split()]
    newer = [
        ROOT / f"tests/{'kernels' if name == 'launch_keys' else 'engine'}/test_{name}.py"
        for name in NEXT.split()
    ]
    collect = ("--collect-only",) if trial else ("-n", 5)
    kernels = ROOT / "tests/kernels"
    pages = ("--kv-cache-memory-bytes", "1G")
    soak = (sys.executable, ROOT / "tests/support/soak.py", "--clients", 24)
    minutes = ("--minutes", 0.2 if trial else 5, "--requests", 4 if trial else 64)
    paths = os.environ.get("PYTHONPATH", "")
    newest = {"PYTHONPATH": f"{options.next}:{paths}", "VLLM_CACHE_ROOT": str(out / "cache-next")}
    tests = [
        Step("exact", 420, (*PYTEST, *tree, *collect, *SLOW, *engine), "1"),
        Step("kernels", 240, (*PYTEST, *tree, *collect, kernels), "1"),
        Step(
            "parallel",
            400,
            (
                *PYTEST,
                *tree,
                *collect[:1],
                *("0",) * (not trial),
                "-x",
                *SLOW,
                ROOT / "tests/engine/test_parallel.py",
            ),
            "1,0",
            ("served",),
        ),
    ]
    of_next = [
        Step("next-engine", 400, (*PYTEST, *tree, *collect, *newer), "1", env=newest),
        Step(
            "next-sweep",
            150,
            (
                *bench,
                *shape,
                *lengths,
                "--fast-start",
                "--presets",
                "serial/32@0.866",
                "32/128/0.9/0.4",
                "--concurrency",
                "1,2",
                *(() if trial else ("--gpu-memory-utilization", 0.3)),
                "--name",
                "next",
            ),
            "1",
            env=newest,
        ),
        Step("next-kernels", 300, (*PYTEST, *tree, *collect, kernels), "1", env=newest),
    ]
    soaks = [
        Step(
            "soak",
            600,
            (
                *soak,
                *minutes,
                "--without-lora",
                "--output",
                out / "soak.json",
                "--log",
                out / "soak-server.log",
                "--",
                *pages,
            ),
            "1",
        ),
        Step(
            "soak-lora",
            400,
            (
                *soak,
                "--minutes",
                0.2 if trial else 2,
                "--requests",
                4 if trial else 64,
                "--dtype",
                "bfloat16",
                "--output",
                out / "soak-lora.json",
                "--log",
                out / "soak-lora-server.log",
                "--",
                *pages,
            ),
            "1",
        ),
    ]
    if trial:  # the toy asks itself nothing
        natural, figures = [], [step for step in figures if step.name != "smollm2-natural"]
    lanes = {
        "figures": figures,
        "models": models,
        "natural": natural,
        "tests": tests,
        "soak": soaks,
        "sweeps": sweeps[::2],
        "more-sweeps": sweeps[1::2],
        "full": full,
        "hybrids": sum(hybrids[::2], []),
        "more-hybrids": sum(hybrids[1::2], []),
        "comparison": comparison,
    }
    return lanes | ({"next": of_next} if options.next else {})


def shape_file(out: Path) -> Path:
    config = json.loads((EXAMPLES / "refusion-tiny/config.json").read_text())
    (out / "shape.json").write_text(json.dumps(config))
    return out / "shape.json"


def served(out: Path, trial: bool) -> None:
    """Three servers of one small model, started together and measured one after the other."""
    model = EXAMPLES / "refusion-tiny"
    stock = json.dumps({"architectures": ["Qwen3ForCausalLM"]})
    serial = json.dumps({"mode": "serial", "slot_size": 32})
    sides: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
        "refusion": ((), {}, "--base-url"),
        "serial": (("--override-generation-config", serial), {}, "--base-url"),
        "stock": (("--hf-overrides", stock), {"VLLM_PLUGINS": "none"}, "--stock-base-url"),
    }
    servers = []
    try:
        for port, (name, (more, env, _)) in enumerate(sides.items(), 8101):
            command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
            command += ["--model", str(model), "--port", str(port), "--kv-cache-memory-bytes"]
            command += ["256M" if trial else "8G", "--gpu-memory-utilization", "0.05", *more]
            command += ["--enforce-eager"] if trial else []
            with (out / f"served-{name}-server.log").open("w") as log:
                servers.append(
                    subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log)
                )
        for port, (name, (_, _, url)) in enumerate(sides.items(), 8101):
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(1)
            lengths = ("--input-len", "128", "--output-len", "128")
            levels = ("--concurrency", "1" if trial else "1,16,64")
            command = [*RUN, "bench", "--out", str(out), "--model", str(model), *lengths, *levels]
            subprocess.run([*command, url, f"http://localhost:{port}", "--name", f"{name}-served"])
    finally:
        for server in servers:
            server.terminate()


def preemptions(out: Path, dev: Path, trial: bool) -> None:
    """Requests that share few pages: preempted and replayed, or admitted with all they may need."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_refusion.engine import compat

    count, most = (4, 60) if trial else (240, 1500)
    seen, original = [], Scheduler._preempt_request

    def preempt(self: Any, *args: Any, **more: Any) -> Any:
        seen.append(0)
        return original(self, *args, **more)

    Scheduler._preempt_request = preempt
    opened = gzip.open(dev, "rt") if dev.suffix == ".gz" else dev.open()
    questions = [json.loads(line)["query"] for line in opened][:count]
    chats: list[Any] = [[{"role": "user", "content": text}] for text in questions]
    modes: dict[str, dict[str, Any]] = {
        "parallel": dict(slot_size=4, block_length=16, slot_threshold=0.6, token_threshold=0.3),
        "serial": dict(mode="serial", slot_size=32),
    }
    for mode, parameters in modes.items():
        params = SamplingParams(temperature=0, max_tokens=most, extra_args=parameters)
        for pages in (200, 800):
            for way, together in (("replay", 64), ("reserve", pages * 16 // (100 + most))):
                llm = LLM(
                    str(EXAMPLES / "refusion-tiny"),
                    max_model_len=2048,
                    block_size=16,
                    num_gpu_blocks_override=pages,
                    kv_cache_memory_bytes=2**30,
                    gpu_memory_utilization=0.05,
                    max_num_seqs=together,
                    enable_prefix_caching=False,
                    enforce_eager=trial,
                )
                for _ in range(1 if trial else 3):
                    seen.clear()
                    began = time.perf_counter()
                    answers = llm.chat(chats, params, use_tqdm=False)
                    seconds = time.perf_counter() - began
                    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
                    line = dict(mode=mode, pages=pages, way=way, together=together, tokens=tokens)
                    line |= dict(tokens_per_s=round(tokens / seconds), preemptions=len(seen))
                    with (out / "preemptions.json").open("a") as file:
                        file.write(json.dumps(line) + "\n")
                compat.shut_down(llm)
                del llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="problems to train with")
    parser.add_argument("--dev", type=Path, help="problems to answer")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct")
    parser.add_argument("--next", type=Path, help="folder with another version of vLLM")
    parser.add_argument("--minutes", type=float, default=28)
    parser.add_argument("--lanes", help="with commas; default: all")
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--served", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--preemptions", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.served:
        served(out, options.trial)
        return
    if options.preemptions:
        preemptions(out, options.dev, options.trial)
        return
    opened = gzip.open(options.data, "rt") if options.data.suffix == ".gz" else options.data.open()
    with opened as rows:
        (out / "part.jsonl").write_text("".join(list(rows)[::12]))
    opened = gzip.open(options.dev, "rt") if options.dev.suffix == ".gz" else options.dev.open()
    with opened as rows:
        (out / "dev.jsonl").write_text(rows.read())
    os.environ.update(TRITON_F32_DEFAULT="ieee", VLLM_NO_USAGE_STATS="1", PYTHONUNBUFFERED="1")
    lanes = plan(options, out)
    chosen = options.lanes.split(",") if options.lanes else list(lanes)
    cores = sorted(os.sched_getaffinity(0))
    first = cores[: max(1, len(cores) // 4)]  # of the lane whose figures count
    others = cores[len(first) :] or cores
    runner = Runner(out, options.minutes)
    kept = [name for name in chosen if name != "figures"]
    threads = []
    if "figures" in chosen:
        threads.append(runner.lane(lanes["figures"], first))
    for i, name in enumerate(kept):
        threads.append(runner.lane(lanes[name], others[i :: len(kept)] or others))
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
