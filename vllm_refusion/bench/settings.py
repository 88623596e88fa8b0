"""What a benchmark run is asked to do; travels to the child processes as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_refusion.decoding.params import PRESET_NAMES, DecodingParams
from vllm_refusion.rows import DataError, check_texts, read_objects

# "plain" is ReFusion without fused passes.
SIDES = ("stock", "plain", "refusion")


@dataclass(frozen=True)
class Preset:
    """Decoding parameters; with dummy weights the chances of outcomes (``acceptance.Profile``)."""

    slot_size: int
    block_length: int
    slot_threshold: float
    token_threshold: float
    chances: Mapping[str, float] | None = None
    mode: str = "parallel"
    infill: str = "propose"
    canvas: bool = False  # every pass feeds exactly one block: isolates the cost of a step

    def __post_init__(self) -> None:
        DecodingParams(**self.parameters)

    @property
    def parameters(self) -> dict[str, Any]:
        """The request's ``extra_args``."""
        if self.mode == "serial":
            return {"mode": self.mode, "slot_size": self.slot_size}
        return {name: getattr(self, name) for name in ("mode", *PRESET_NAMES, "infill")}

    @property
    def name(self) -> str:
        if self.mode == "serial":
            return f"serial/{self.slot_size}"
        values = [str(getattr(self, name)) for name in PRESET_NAMES]
        values += ["correct"] if self.infill == "correct" else []
        return f"canvas {self.block_length}" if self.canvas else "/".join(values)

    @property
    def acceptance(self) -> str:
        if self.chances is None:
            return "real"
        shown = ", ".join(f"{name} {value:g}" for name, value in self.chances.items())
        return f"replayed acceptance ({shown})"


@dataclass(frozen=True)
class Settings:
    """One offline run. Lists are swept; everything else holds for both sides.

    Attributes:
        models: checkpoint folder or name by side.
        adapter: folder of a mask adapter, beside its base on the ReFusion sides.
        requests: requests per level; None takes ``requests_at``.
        prompts: data file with real prompts, see ``read_prompts``; None draws token ids.
        phases: a load that moves, behind the levels: (concurrency, seconds) one after the other.
        conversations: of two turns, instead of all other measurements; 0: none.
        stop_at_eos: otherwise every response has ``output_len`` tokens.
        engine_args: vLLM engine arguments by side, on top of what both get.
        profile: folder for a torch profile of a few steps at ``profile_level``.
    """

    models: Mapping[str, str]
    presets: list[Preset]
    sides: tuple[str, ...] = ("stock", "refusion")
    adapter: str | None = None
    shape: str | None = None
    concurrency: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128, 256])
    canvas_concurrency: list[int] = field(default_factory=lambda: [1])
    requests: int | None = None
    phases: list[tuple[int, float]] = field(default_factory=list)
    conversations: int = 0
    input_len: int = 128
    output_len: int = 256
    canvas_output_len: int = 256
    warmup_tokens: int = 32
    prompts: str | None = None
    stop_at_eos: bool = False
    dtype: str = "auto"
    load_format: str = "auto"
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    quantization: str | None = None
    fast_start: bool = False
    speculative_config: Mapping[str, Any] | None = None
    engine_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    profile: str | None = None
    profile_level: int = 1

    def __post_init__(self) -> None:
        counts = {
            "--concurrency": self.concurrency,
            "--canvas-concurrency": self.canvas_concurrency,
            "--requests": [self.requests] if self.requests is not None else [1],
            "--input-len": [self.input_len],
            "--output-len": [self.output_len, self.canvas_output_len],
            "--moving-load": [1, *(concurrency for concurrency, _ in self.phases)],
        }
        for name, values in counts.items():
            if not values or min(values) < 1:
                raise ValueError(f"{name}: {values} must be positive integers.")
        unknown = set(self.sides) - set(SIDES)
        if unknown or not self.sides:
            raise ValueError(f"--sides: {self.sides}, known are {', '.join(SIDES)}.")
        if self.conversations < 0 or (self.conversations and self.prompts is not None):
            raise ValueError(
                f"--second-turn: {self.conversations}, allowed is a number of conversations, "
                "without --prompts."
            )
        if set(self.sides) != {"stock"} and not self.presets:
            raise ValueError("--presets: the ReFusion side needs one, or --canvas.")

    @property
    def canvas_length(self) -> int:
        return max(preset.block_length for preset in self.presets)

    @property
    def levels(self) -> list[int]:
        """Concurrencies that the stock side runs: those of the sweep and of the canvas mode."""
        return sorted({*self.concurrency, *self.canvas_concurrency})

    @property
    def most_requests(self) -> int:
        """At a time."""
        return max(*self.levels, *(concurrency for concurrency, _ in self.phases), 1)

    @property
    def longest_output(self) -> int:
        canvas = any(preset.canvas for preset in self.presets)
        return max(self.output_len, self.canvas_output_len if canvas else 1)

    def requests_at(self, concurrency: int) -> int:
        """At least one wave; four waves while that is at most 16 requests."""
        return self.requests or max(concurrency, min(4 * concurrency, 16))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Settings:
        presets = [Preset(**preset) for preset in values["presets"]]
        phases = [(requests, seconds) for requests, seconds in values["phases"]]
        exact = {"presets": presets, "phases": phases, "sides": tuple(values["sides"])}
        return Settings(**{**values, **exact})


def read_prompts(path: str) -> list[str]:
    """The texts ``prompt``, else ``query``, of a data file's rows.

    Raises:
        DataError: a row has neither, or the file has none; names file and line.
    """
    texts = []
    for row in read_objects([path]):
        key = "prompt" if "prompt" in row.values else "query"
        check_texts(row, [key])
        texts.append(row.values[key])
    if not texts:
        raise DataError(f"{path}: no rows")
    return texts
