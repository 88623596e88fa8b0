"""What needs GPUs: tests, training and measurements in lanes, side by side on two of them.

    python tests/support/on_gpus.py OUT --data train.jsonl.gz --dev dev.jsonl.gz --gguf model.gguf

Each lane takes its steps one after the other; those whose figures count have a quarter of the
cores, and GPU 0 while they last. A step that needs another, or a file under way, waits for it.
``OUT/steps.txt`` says what began and ended, ``OUT/NAME.log`` what a step wrote, ``OUT/*.json`` what
was measured; nothing begins once ``--minutes`` are over. vLLM and this package must be importable;
run it outside of the tree, which has a top-level triton_kernels. ``--trial`` does all of it with
toys, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_refusion.rows import read_objects

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
EXACT = "serial_mode adapted_models stock_contract lora lora_rows fp8_kv structured_outputs"
ENGINE = "engine engine_scheduling engine_sampling early_delivery row_budget"
NEXT = "signatures compat engine serial_mode structured_outputs lora adapted_models"


@dataclass
class Step:
    """Args:
    seconds: At most.
    gpus: As CUDA_VISIBLE_DEVICES.
    needs: Names of steps that must have gone well before.
    after: Names of steps that must have ended before, however.
    """

    name: str
    seconds: int
    command: Sequence[Any]
    gpus: str = "0"
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


class Runner:
    """Runs lanes of steps in threads."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.end = out, time.monotonic() + 60 * minutes
        self.began = time.monotonic()
        self.ended: dict[str, int] = {}
        self.news = threading.Condition()
        self.running: set[int] = set()  # process groups

    def stop(self, *_: Any) -> None:
        """Ends everything, as a handler of a signal."""
        for group in list(self.running):
            os.killpg(group, signal.SIGKILL)
        os._exit(1)

    def say(self, line: str) -> None:
        with self.news, (self.out / "steps.txt").open("a") as file:
            file.write(f"{time.monotonic() - self.began:.0f} {line}\n")

    def lane(self, steps: Sequence[Step], cores: Collection[int]) -> threading.Thread:
        thread = threading.Thread(target=lambda: [self._run(step, cores) for step in steps])
        thread.start()
        return thread

    def _run(self, step: Step, cores: Collection[int]) -> None:
        with self.news:
            self.news.wait_for(
                lambda: all(name in self.ended for name in step.needs + step.after),
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

    def _execute(self, step: Step, cores: Collection[int]) -> int:
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
            self.running.add(process.pid)
            try:
                return process.wait(step.seconds)
            except subprocess.TimeoutExpired:
                return -signal.SIGKILL
            finally:
                self.running.discard(process.pid)
                try:
                    os.killpg(process.pid, signal.SIGKILL)  # servers and workers too
                except ProcessLookupError:
                    pass


def plan(options: argparse.Namespace, out: Path) -> dict[str, list[Step]]:
    """Lanes by name."""
    trial = options.trial

    def sized(real: Any, toy: Any) -> Any:
        return toy if trial else real

    python, run = f"{sys.executable} -P", f"{sys.executable} -P -m vllm_refusion"
    data, dev = options.data.resolve(), options.dev.resolve()
    start = EXAMPLES / "stock-tiny" if trial else options.gguf.resolve()
    base, twin, adapter = out / "base", out / "twin/model", out / "adapter/adapter"
    plain, questions, own = out / "plain", out / "questions", out / "own/adapter"
    lanes: dict[str, list[Step]] = {}

    def waiting(*paths: Path) -> str:
        there = " -a ".join(f"-e {path}" for path in paths)
        return f"bash -c 'until test {there}; do sleep 1; done'"

    def add(
        lane: str,
        name: str,
        seconds: int,
        command: str,
        gpus: str = "1",
        needs: str = "",
        after: str = "",
        **env: str,
    ) -> None:
        before = tuple(needs.split()), tuple(after.split())
        step = Step(name, seconds, shlex.split(command), gpus, *before, env)
        lanes.setdefault(lane, []).append(step)

    # figures
    small = {"kv_cache_memory_bytes": 2**27, "enforce_eager": True, "max_model_len": 512}
    bench = f"{run} bench --out {out}" + sized("", f" --engine-args '{json.dumps(small)}'")
    shape = f"--fast-start --shape {sized('qwen3-8b', EXAMPLES / 'refusion-tiny/config.json')}"
    shape += sized(" --input-len 128", " --input-len 16 --output-len 8")
    large = f"{bench} {shape} --presets serial/32@0.866" + sized(
        " --quantization fp8 --gpu-memory-utilization 0.8 --max-num-batched-tokens 16384", ""
    )
    levels = f"--concurrency {sized('1,4,16,64', '1,2')}"
    answers = f"{bench} --stop-at-eos --presets serial/16 --input-len 512" + sized(
        " --output-len 320 --gpu-memory-utilization 0.4", " --output-len 16 --requests 2"
    )
    adapted = f"{answers} --model {adapter} --prompts {dev}"
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    fp8, whole = sized("--quantization fp8", ""), sized("64 --requests 390", "2")

    def figure(name: str, seconds: int, command: str, needs: str = "") -> None:
        # what needs nothing comes before others train and test on this GPU too
        after = "parallel" if needs else ""
        add("figures", name, seconds, f"{command} --name {name}", "0", needs, after)

    figure("8b-fp8-serial", 300, f"{large} --concurrency 1,16,64,128,256")
    figure("8b-fp8-adapter", 200, f"{large} {levels} --sides refusion --adapter random:64")
    # its folder is on sys.path, as the soak's below: not with -P
    mine = f"{sys.executable} {__file__} {out} --dev {dev}" + sized("", " --trial")
    add("figures", "served", 400, f"{mine} --served", "0")
    figure("smollm2-adapter", 300, f"{adapted} {levels}", "adapter")
    speculating = f"--sides stock --speculative-config '{json.dumps(ngram)}'"
    figure("smollm2-ngram", 150, f"{adapted} {levels} {speculating}", "adapter")
    rounded = f"{fp8} --fast-start --concurrency {sized(16, 2)}"
    figure("smollm2-fp8", 150, f"{adapted} {rounded}", "adapter")
    asked = f"--model {own} --prompts {questions}/dev.jsonl"
    if not trial:  # the toy asks itself nothing
        figure("smollm2-natural", 200, f"{answers} {levels} {asked}", "own")
    add("figures", "preemptions", 200, f"{mine} --preemptions", "0")
    exactly = f"--dtype float32 --fast-start --concurrency {whole}"
    figure("smollm2-float32", 150, f"{adapted} {exactly}", "adapter")

    # mask adapters
    train = f"{run} train --quiet --save-every 1000000" + sized(
        " --bf16 --compile --workers 2 --batch-size 128 --micro-batch-size 64 --warmup-steps 50",
        " --batch-size 4 --micro-batch-size 4",
    )
    masks = f"{train} --mask-adapter --dev {dev} --eval-every {sized(100, 2)}"
    convert = f"{run} convert {start}"
    add("base", "files", 600, waiting(start, data))
    command = f"{convert} -o {base} --slot-size 8 --block-length 32"
    add("base", "base", 120, command, needs="files")
    twins = f"{train} {base} -o {out}/twin --data {data} --objective autoregressive"
    rates = "--learning-rate 5e-4 --adam-beta2 0.99"
    twins += f" {rates} --steps {sized(700, 2)}"
    add("twin", "twin", 480, twins, "0", "base")
    masked = f"{masks} {twin} --data {data}"
    run_of = f"-o {out}/adapter --steps {sized(900, 2)}"
    # on the GPU of the figures, while there are none
    add("models", "adapter", 600, f"{masked} {run_of}", "0", "twin", "served")
    evaluate = f"{python} {EXAMPLES}/evaluate.py --problems {dev}"
    evaluate += sized(" --max-tokens 320", " --max-tokens 16 --count 2")
    twins = f"{evaluate} {twin} --token-by-token --json {out}/twin.json"
    add("twin", "twin-answers", 120, twins, needs="twin")
    drafts = f"{python} {EXAMPLES}/adapter_drafts.py --max-tokens {sized(320, 16)}"
    counted = f"{drafts} {adapter} --problems {dev} --count {sized(390, 2)}"
    add("models", "adapter-drafts", 200, counted, needs="adapter")
    if not trial:
        add("natural", "plain", 120, f"{convert} -o {plain} --plain", needs="files")
        asks = f"{python} {EXAMPLES}/own_questions.py {plain} -o {questions} --count 12000"
        add("natural", "questions", 300, asks, needs="plain")
        writes = f"{masks} {plain} -o {out}/own --on-policy --max-tokens 256 --steps 600"
        writes += f" --data {questions}/train.jsonl --dev {questions}/dev.jsonl"
        add("natural", "own", 700, writes, needs="questions", after="twin")
        counted = f"{drafts} {own} --problems {questions}/dev.jsonl"
        add("natural", "own-drafts", 200, counted, needs="own")
    # a twelfth, for the backbone to answer
    part = f"zcat -f {data} | awk NR%12==1 >{out}/part.jsonl"
    add("sweeps", "part", 120, f'bash -c "{part}"', needs="files")
    variants = {
        "base": "",
        "rank16": "--rank 16",
        "rank128": "--rank 128",
        "upper": "--adapter-layers upper-half",
        "chain8": "--chain-length 8",
        "chain32": "--chain-length 32",
        "kl": "--labels kl",
        "policy": f"--on-policy --max-tokens 320 --data {out}/part.jsonl",
        "cuts16": "--chains-per-row 16",
    }
    for i, (name, more) in enumerate(variants.items()):
        name = f"sweep-{name}"
        command = f"{masked} -o {out}/{name} --steps {sized(400, 2)} {more}"
        command += sized(" --batch-size 32 --micro-batch-size 32", "")
        after = sized("own exact", "exact")  # whose GPU they would slow
        add(("sweeps", "more-sweeps")[i % 2], name, 240, command, "1", "twin part", after)

    # the hybrid objective, from the twin: what each option adds to those before it
    in_order = ["serial/8", "serial/32"]
    presets = ["8/32/0.9/0.4", "32/128/0.9/0.4", "8/16/0.8/0.2", "4/16/0.6/0.3"]

    def hybrid(
        lane: int, name: str, steps: int, seed: int, options: str, presets: Sequence[str]
    ) -> None:
        gpu = "1" if lane else "0"
        command = f"mkdir {out}/{name} && cp -r {out}/twin/data {out}/{name} && exec "  # token ids
        command += f"{train} {twin} -o {out}/{name} --resume --data {data} {rates}"
        command = f"bash -c '{command} --steps {sized(steps, 2)} --seed {seed} {options}'"
        # the comparison trains so many models side by side that others would get no share
        add(f"hybrids-{lane}", name, 1400, command, gpu, "twin", "comparison-train" if lane else "")
        asked = f"{evaluate} {out}/{name}/model --json {out}/{name}.json"
        settings = in_order + [one + way for one in presets for way in ("", "/correct")]
        command = f"{asked} --settings {' '.join(sized(settings, settings[:1]))}"
        add(f"answers-{lane}", f"{name}-answers", 400, command, gpu, name)
        other = "mask" if "--joined-slots" in options else "next"  # than the checkpoint's own
        command = f"{asked} --slot-start {other} --settings {' '.join(in_order)}"
        add(f"starts-{lane}", f"{name}-starts", 200, command, gpu, name)

    added = {
        "section6": "",
        "joined": "--joined-slots --ordered-share 0.25",
        "infill": "--infill-weight 1",
        "certainty": "--slot-certainty 2",
        "blocks": "--block-share 0.5",
    }
    together = ""
    for name, more in added.items():
        together = f"{together} {more}"
        for seed in (1, 2):
            hybrid(seed, f"hybrid-{name}-{seed}", 500, seed, together, presets[:2])
    every = added | {"certainty": "--slot-certainty 4", "weights": "--ar-weight 2 --mdm-weight 0.5"}
    hybrid(0, "full", 2700, 3, " ".join(every.values()), presets)

    compare = f"{sys.executable} {EXAMPLES}/controlled_comparison/compare.py --data {data}"
    compare += f" --dev {dev} --output {out}/comparison" + sized(
        " --start-steps 1000 --train-seconds 350 --decode-seconds 200 --time-seconds 45"
        " --problems 200 --main-only --gpu-workers 6 --workers 16",
        "",
    )
    add("comparison", "comparison-files", 600, waiting(data))
    add("comparison", "comparison-train", 480, f"{compare} --phases train")
    phases = "--phases decode,time,report"
    add("comparison", "comparison", 400, f"{compare} {phases}", needs="comparison-train")

    # tests
    pytest = f"{python} -m pytest -v --tb=short -p no:cacheprovider"
    pytest += f" --rootdir {ROOT} -c {ROOT}/pyproject.toml"
    pytest += sized("", " --collect-only")
    several, slow = f"{pytest} -n 5 --dist loadfile", '-m "slow or not slow"'
    several = sized(several, pytest)

    def files(names: str) -> str:
        return " ".join(f"{ROOT}/tests/engine/test_{name}.py" for name in names.split())

    add("tests", "exact", 480, f"{several} {slow} {files(EXACT)}")
    # on both GPUs, while there are no figures
    parallel = f"{pytest} {slow} {files('parallel')}"
    add("tests", "parallel", 400, parallel, "1,0", after="served")
    add("tests", "engine", 400, f"{several} {slow} {files(ENGINE)}")
    add("tests", "kernels", 240, f"{several} {ROOT}/tests/kernels")
    if options.next:
        paths = f"{options.next}:{os.environ.get('PYTHONPATH', '')}"
        newer = {"PYTHONPATH": paths, "VLLM_CACHE_ROOT": f"{out}/cache-next"}
        add("next", "next-files", 900, waiting(options.next / "vllm"), after="exact")
        add("next", "next-engine", 400, f"{several} {files(NEXT)}", **newer)
        sweep = f"{bench} {shape} --presets serial/32@0.866 32/128/0.9/0.4 --concurrency 1,16"
        sweep += sized(" --gpu-memory-utilization 0.3", "")
        add("next", "next-sweep", 150, f"{sweep} --name next", **newer)
        add("next", "next-kernels", 300, f"{several} {ROOT}/tests/kernels", **newer)
    soak = f"{sys.executable} {ROOT}/tests/support/soak.py --requests {sized(64, 4)}"
    for name, minutes, more in (
        ("soak", 5, "--without-lora"),
        ("soak-lora", 2, "--dtype bfloat16"),
    ):
        command = f"{soak} --minutes {sized(minutes, 0.2)} {more} --output {out}/{name}.json"
        # so little that vLLM's prefix cache, whose entries count as objects, is soon full
        command += f" --log {out}/{name}-server.log -- --kv-cache-memory-bytes 128M"
        command += " --gpu-memory-utilization 0.1"  # only checked
        add("soak", name, 60 * minutes + 240, command, after="twin")
    return lanes


def served(out: Path, trial: bool) -> None:
    """Two servers of one small model, started together and measured one after the other."""
    from server import Server

    model = EXAMPLES / "refusion-tiny"
    stock = json.dumps({"architectures": ["Qwen3ForCausalLM"]})
    presets = ("--presets", "32/128/0.9/0.4", "serial/32")
    # of the server and its environment; of the benchmark, before the server's address
    sides: dict[str, tuple[tuple[str, ...], dict[str, str], tuple[str, ...]]] = {
        "refusion": ((), {}, (*presets, "--base-url")),
        "stock": (("--hf-overrides", stock), {"VLLM_PLUGINS": "none"}, ("--stock-base-url",)),
    }
    servers = []
    try:
        for port, (name, (more, env, _)) in enumerate(sides.items(), 8101):
            command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
            command += ["--model", str(model), "--port", str(port), "--kv-cache-memory-bytes"]
            command += ["256M" if trial else "8G", "--gpu-memory-utilization", "0.05", *more]
            command += ["--enforce-eager"] if trial else []
            path = out / f"served-{name}-server.log"
            with path.open("w") as log:
                process = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log)
            servers.append(Server(process, f"http://127.0.0.1:{port}", path))
        for one in servers:
            one.wait_until_ready()
        for port, (name, (_, _, more)) in enumerate(sides.items(), 8101):
            lengths = ("--input-len", "128", "--output-len", "128")
            levels = ("--concurrency", "1" if trial else "1,16,64")
            command = [sys.executable, "-P", "-m", "vllm_refusion", "bench", "--out", str(out)]
            command += ["--model", str(model), *lengths, *levels, "--name", f"{name}-served"]
            subprocess.run([*command, *more, f"http://127.0.0.1:{port}"])
    finally:
        for one in servers:
            one.terminate()


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
    rows = list(read_objects([dev]))[:count]
    chats: list[Any] = [[{"role": "user", "content": row.values["query"]}] for row in rows]
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
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # steps share cores
    os.environ.update(TRITON_F32_DEFAULT="ieee", VLLM_NO_USAGE_STATS="1", PYTHONUNBUFFERED="1")
    lanes = plan(options, out)
    chosen = options.lanes.split(",") if options.lanes else list(lanes)
    steps = [step for name in chosen for step in lanes[name]]
    planned = {step.name for step in steps}
    for step in steps:
        step.after = tuple(name for name in step.after if name in planned)
        if missing := set(step.needs) - planned:
            parser.error(f"--lanes: {step.name} needs {min(missing)}, which is in none of them")
    cores = sorted(os.sched_getaffinity(0))
    count = max(1, len(cores) // 4) if "figures" in chosen else 0
    first, others = cores[:count], cores[count:] or cores  # of the lane whose figures count
    runner = Runner(out, options.minutes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    kept = [name for name in chosen if name != "figures"]
    threads = []
    if "figures" in chosen:
        threads.append(runner.lane(lanes["figures"], first))
    for name in kept:
        threads.append(runner.lane(lanes[name], others))
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
