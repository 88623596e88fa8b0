"""One side of a benchmark in a process of its own: one engine start, then all levels.

Usage: python -P -m vllm_refusion.bench.child SIDE SETTINGS.json RESULT.json

The result is written after every level. Lines that start with ``bench:`` are for the user.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_refusion.bench.environment import environment, gpu_memory_mib
from vllm_refusion.bench.load import Load, ask, over_time, run_load, run_phases, summarise
from vllm_refusion.bench.settings import Preset, Settings, read_prompts
from vllm_refusion.bench.shapes import matrix_parameters
from vllm_refusion.engine import compat
from vllm_refusion.engine.settings import ADAPTER_OPTION, SCHEDULE_OPTION
from vllm_refusion.files import read_json, write_text

# Without torch.compile vLLM's own attention takes prompts in no graph: in FULL ones its answers are
# nonsense (vLLM 0.32, bfloat16, FlashAttention 3).
FAST_START = {
    side: {"mode": 0, "cudagraph_mode": mode}
    for side, mode in {"stock": "FULL_DECODE_ONLY", "refusion": "FULL", "plain": "FULL"}.items()
}
PROFILED_TOKENS = 32
# what a second turn adds to the first and its answer; how long it is answered
SECOND_PROMPT, SECOND_ANSWER = 32, 16


def say(text: str) -> None:
    print(f"bench: {text}", flush=True)


def digest(token_ids: Sequence[int]) -> str:
    """Tells answers apart."""
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:12]


def engine_args(settings: Settings, side: str, context: int, token_budget: int) -> dict[str, Any]:
    """vLLM engine arguments of a side.

    Args:
        context: max_model_len.
        token_budget: max_num_batched_tokens if the user set none.
    """
    args: dict[str, Any] = {
        "model": settings.models[side],
        "dtype": settings.dtype,
        "load_format": settings.load_format,
        "max_model_len": context,
        "max_num_seqs": settings.most_requests,
        "max_num_batched_tokens": settings.max_num_batched_tokens or token_budget,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "quantization": settings.quantization,
        # levels and presets share their prompts, conversations do not
        "enable_prefix_caching": settings.conversations > 0,
        "seed": settings.seed,
        "disable_log_stats": True,
    }
    if settings.prompts is None:
        args["skip_tokenizer_init"] = True
    if settings.gpu_memory_utilization is not None:
        args["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.fast_start:
        args["compilation_config"] = dict(FAST_START[side])
    if settings.profile is not None:
        folder = Path(settings.profile).resolve() / side
        args["profiler_config"] = {"profiler": "torch", "torch_profiler_dir": str(folder)}
    if side == "stock" and settings.speculative_config is not None:
        args["speculative_config"] = dict(settings.speculative_config)
        args["disable_log_stats"] = False  # vLLM counts drafted tokens there
    if side != "stock":
        schedule = "plain" if side == "plain" else "fused"
        canvas = settings.canvas_length if side == "plain" else max(256, settings.canvas_length)
        args["diffusion_config"] = {"canvas_length": canvas}
        args["additional_config"] = {SCHEDULE_OPTION: schedule}
        if settings.adapter is not None:
            args["additional_config"][ADAPTER_OPTION] = settings.adapter
        # the server's default block must fit the canvas too
        args["override_generation_config"] = settings.presets[0].parameters
        if any(preset.chances for preset in settings.presets):
            from vllm_refusion.engine.acceptance import Profile, to_config

            profiles = [Profile(**preset.chances) for preset in settings.presets if preset.chances]
            args["additional_config"] |= to_config(profiles)
    return args | dict(settings.engine_args.get(side, {}))


class Side:
    """The engine of one side and the levels to run on it."""

    def __init__(self, settings: Settings, side: str) -> None:
        from vllm import LLM, envs

        self.settings, self.side = settings, side
        budget = max(8192, settings.most_requests * settings.canvas_length)
        prompts = Prompts(settings, side)
        longest = prompts.longest + settings.longest_output
        if settings.conversations:
            longest += SECOND_PROMPT + SECOND_ANSWER
        args = engine_args(settings, side, longest, budget)
        if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            self.in_process = True
        else:
            self.in_process = False
            args["disable_log_stats"] = False  # so that every step, even a silent one, is reported
        say(f"{side}: starting the engine")
        begin = time.perf_counter()
        self.llm = LLM(**args)
        self.start_s = time.perf_counter() - begin
        say(f"{side}: started in {self.start_s:.0f} s")
        # as vLLM's server: a collection of all that was imported would hold a step up
        gc.collect()
        gc.freeze()
        self.prompts = prompts
        prompts.prepare(self.llm)
        self.args = args
        self.watch = None
        if self.in_process:
            self.watch = compat.ScheduleWatch(compat.engine_core_of(self.llm).scheduler)

    def describe(self) -> dict[str, Any]:
        config = self.llm.llm_engine.vllm_config
        cache = config.cache_config
        return {
            "side": self.side,
            "engine_args": self.args,
            "engine_in_process": self.in_process,
            "model_runner_v2": config.use_v2_model_runner,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "cudagraph_capture_sizes": config.compilation_config.cudagraph_capture_sizes,
            "compilation_mode": str(config.compilation_config.mode),
            "start_s": self.start_s,
            "matrix_parameters": matrix_parameters(config.model_config.hf_text_config),
            "kv_cache_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
            "gpu_memory_mib": gpu_memory_mib(),
            "levels": [],
            "moving": [],
            "turns": [],
        }

    @property
    def speculation(self) -> str | None:
        """What stock decoding speculates with."""
        config = self.settings.speculative_config
        return None if config is None else str(config.get("method", "speculative"))

    def label(self, preset: Preset | None) -> str:
        return self.side if preset is None else f"{self.side} {preset.name}"

    def who(self, preset: Preset | None) -> dict[str, Any]:
        """Whose a figure is, as reports read it."""
        return {
            "side": self.side,
            "preset": self.speculation if preset is None else preset.name,
            "acceptance": "-" if preset is None else preset.acceptance,
        }

    def sampling(self, index: int, preset: Preset | None, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        seed = None
        if preset is not None and preset.chances is not None:
            from vllm_refusion.engine.acceptance import seed_of

            drawn = [p for p in self.settings.presets if p.chances]
            seed = seed_of(drawn.index(preset), self.settings.seed * 100_003 + index)
        return SamplingParams(
            temperature=0.0,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=not self.settings.stop_at_eos,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if preset is None else preset.parameters,
        )

    def run_level(self, preset: Preset | None, concurrency: int) -> tuple[dict[str, Any], str]:
        """Warm-up and measurement of a level: its figures, and a line about them."""
        settings, engine = self.settings, self.llm.llm_engine
        canvas = preset is not None and preset.canvas
        count = concurrency if canvas else settings.requests_at(concurrency)
        length = settings.canvas_output_len if canvas else settings.output_len
        prompts = self.prompts.take(max(count, concurrency))
        label = f"{self.label(preset)} x{concurrency}"

        def load(name: str, number: int, max_tokens: int) -> Load:
            requests = [(prompts[i], self.sampling(i, preset, max_tokens)) for i in range(number)]
            return run_load(engine, requests, concurrency, f"{label} {name}", self.watch)

        load("warm-up", concurrency, min(settings.warmup_tokens, length))
        before, rows_before = self.counters(), self.rows_run()
        measured = load("measured", count, length)
        counters = {name: value - before[name] for name, value in self.counters().items()}
        level = {
            **self.who(preset),
            "canvas": preset.block_length if preset is not None and canvas else None,
            "concurrency": concurrency,
            "requests": count,
            "prompt_tokens": sum(map(len, (p["prompt_token_ids"] for p in prompts[:count]))),
            "max_tokens": length,
            **summarise(measured),
            "answers": [digest(trace.token_ids) for trace in measured.traces],
            "counters": counters,
            "gpu_memory_mib": gpu_memory_mib(),
        }
        level |= self.per_token(level, self.rows_run() - rows_before)
        if settings.profile is not None and concurrency == settings.profile_level and not canvas:
            name = label.replace("/", "-").replace(" ", "_")
            self.llm.start_profile(name)
            load("profiled", concurrency, min(PROFILED_TOKENS, length))
            self.llm.stop_profile()
        step = "-" if level["step_ms"] is None else f"{level['step_ms']:.2f}"
        return level, (
            f"{label}: {level['tokens_per_s']:.0f} tokens/s, {step} ms a step, "
            f"{level['tokens_per_forward']:.2f} tokens per forward, {level['wall_s']:.1f} s"
        )

    def run_moving(self, preset: Preset | None) -> dict[str, Any]:
        """What the engine does while the load moves, see ``run_phases``."""
        settings = self.settings
        prompts = self.prompts.take(settings.most_requests)
        label = f"{self.label(preset)} moving"

        def request(number: int) -> tuple[Any, Any]:
            params = self.sampling(number, preset, settings.output_len)
            return prompts[number % len(prompts)], params

        traces = run_phases(self.llm.llm_engine, request, settings.phases, label)
        return {
            **self.who(preset),
            "bins": over_time(traces),
        }

    def run_turns(self, preset: Preset | None) -> dict[str, Any]:
        """First tokens of conversations, of which the first is not counted."""
        settings, engine = self.settings, self.llm.llm_engine
        found: dict[str, list[float]] = {"first_ttft_ms": [], "second_ttft_ms": [], "cached": []}
        label = f"{self.label(preset)} turns"
        for number in range(settings.conversations + 1):
            prompt = self.prompts.draw(settings.input_len)
            first, _ = ask(
                engine,
                {"prompt_token_ids": prompt},
                self.sampling(number, preset, settings.output_len),
                f"{label} {number} first",
            )
            known = [*prompt, *first.token_ids, *self.prompts.draw(SECOND_PROMPT)]
            second, cached = ask(
                engine,
                {"prompt_token_ids": known},
                self.sampling(number, preset, SECOND_ANSWER),
                f"{label} {number} second",
            )
            if number:
                found["cached"].append(cached / len(known))
                for turn, trace in (("first", first), ("second", second)):
                    waited = trace.deliveries[0][0] - trace.added
                    found[f"{turn}_ttft_ms"].append(1e3 * waited)
        return {
            **self.who(preset),
            **found,
        }

    def counters(self) -> dict[str, int]:
        """Counters of the engine that a level's figures are differences of."""
        if self.side != "stock":
            from vllm_refusion.engine.metrics import snapshot

            return snapshot(self.llm)
        if self.settings.speculative_config is None:
            return {}
        from vllm.v1.metrics.reader import Counter

        drafted = "vllm:spec_decode_num_draft_tokens"
        found = [m for m in self.llm.get_metrics() if isinstance(m, Counter) and m.name == drafted]
        return {"drafted_tokens": sum(metric.value for metric in found)}

    def rows_run(self) -> int:
        """Decode rows of all passes so far, with those that no request used."""
        return 0 if self.side == "stock" else self.llm.collective_rpc("refusion_rows_run")[0]

    def per_token(self, level: dict[str, Any], rows_run: int) -> dict[str, Any]:
        """Tokens per forward of a request; tokens fed, prompts apart, per token delivered."""
        tokens, counters = level["output_tokens"], level["counters"]
        # The prompt's pass gives stock decoding its first token.
        passes = level["deliveries"] - level["requests_done"]
        fed = passes + counters.get("drafted_tokens", 0)
        decoded = tokens - level["requests_done"]
        if self.side != "stock":
            passes, fed, decoded = counters["forward_passes"], counters["rows_fed"], tokens
        return {
            "tokens_per_forward": decoded / max(1, passes),
            "fed_per_token": fed / tokens,
            "run_per_token": None if self.side == "stock" else rows_run / tokens,
        }


class Prompts:
    """The same prompts for both sides: random token ids, or those of a file in turn."""

    def __init__(self, settings: Settings, side: str) -> None:
        self.settings = settings
        self.model = settings.models[side]
        self.texts: list[str] = []
        self.token_ids: list[list[int]] = []
        self.longest = settings.input_len
        self._generator = random.Random(settings.seed)
        if settings.prompts is not None:
            self.texts = read_prompts(settings.prompts)

    def prepare(self, llm: Any) -> None:
        settings = self.settings
        if self.texts:
            tokenizer = llm.get_tokenizer()
            for text in self.texts:
                chat = [{"role": "user", "content": text}]
                ids = tokenizer.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=True, return_dict=False
                )
                if len(ids) > settings.input_len:
                    raise ValueError(
                        f"A prompt of {settings.prompts} has {len(ids)} tokens: raise --input-len."
                    )
                self.token_ids.append(list(ids))
            return
        config = llm.llm_engine.model_config.hf_text_config
        self._special = {getattr(config, name, None) for name in ("mask_token_id", "eos_token_id")}
        vocab = llm.llm_engine.model_config.get_vocab_size()
        self._ordinary = vocab - len(self._special) - 1
        for _ in range(max(settings.requests_at(c) for c in settings.levels)):
            self.token_ids.append(self.draw(settings.input_len))

    def draw(self, length: int) -> list[int]:
        """Random token ids, none of them special."""
        ids = [self._generator.randrange(self._ordinary) for _ in range(length)]
        return [self._ordinary if token in self._special else token for token in ids]

    def take(self, count: int) -> list[dict[str, list[int]]]:
        chosen = (self.token_ids[i % len(self.token_ids)] for i in range(count))
        return [{"prompt_token_ids": list(ids)} for ids in chosen]


def levels_of(settings: Settings, side: str) -> list[tuple[Preset | None, int]]:
    """What a side runs, in order."""
    if settings.conversations:
        return []
    if side == "stock":
        return [(None, concurrency) for concurrency in settings.levels]
    return [
        (preset, concurrency)
        for preset in settings.presets
        # with riders a pass is wider than its block
        if not (preset.canvas and side == "refusion" and "plain" in settings.sides)
        for concurrency in (settings.canvas_concurrency if preset.canvas else settings.concurrency)
    ]


def main(side: str, settings_file: str, result_file: str) -> None:
    settings = Settings.from_json(read_json(Path(settings_file)))
    running = Side(settings, side)
    result = running.describe() | {"environment": environment()}
    target = Path(result_file)
    for preset, concurrency in levels_of(settings, side):
        level, line = running.run_level(preset, concurrency)
        result["levels"].append(level)
        write_text(target, json.dumps(result, default=str))
        say(line)
    presets = [None] if side == "stock" else [p for p in settings.presets if not p.canvas]
    more = {"moving": running.run_moving, "turns": running.run_turns}
    asked = {"moving": bool(settings.phases), "turns": settings.conversations > 0}
    for kind in (kind for kind, wanted in asked.items() if wanted):
        for preset in presets:
            result[kind].append(more[kind](preset))
            write_text(target, json.dumps(result, default=str))
            say(f"{side}: {kind}")
    compat.shut_down(running.llm)


if __name__ == "__main__":
    main(*sys.argv[1:])
