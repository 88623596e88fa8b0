"""``vllm-refusion doctor``: whether this machine can serve ReFusion, and what to do if not."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

HELP = "check whether this machine can serve ReFusion models, and say what to do if not"
ANSWER_SECONDS = 600
TOKENS = 5
PROMPT = (5, 6, 7)
MASK, EOS, VOCABULARY = 1, 0, 128


class Check(NamedTuple):
    """One line of the report; ``advice`` where ``ok`` is False."""

    name: str
    ok: bool
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"ok   {self.name}: {self.found}" if self.ok else (
            f"bad  {self.name}: {self.found}\n     {self.advice}"
        )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="also answer with this model; default: a tiny random one"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the checks; 1 if one fails."""
    good = True
    for check in checks(args.model):
        print(check, flush=True)
        good &= check.ok
    return 0 if good else 1


def checks(model: str | None = None) -> Iterator[Check]:
    """What is looked at, in order; an answer is only asked for where all else is well."""
    good = True
    for look in (vllm, torch, triton, gpu, plugin, variables, folder):
        try:
            check = look()
        except Exception as error:  # whatever a broken installation raises is what was found
            reason = f"{type(error).__name__}: {error}"
            check = Check(look.__name__, False, reason, "Install it anew: see the README.")
        yield check
        good &= check.ok
    if good:
        yield answer(model)


def vllm() -> Check:
    """A version that this package was made for."""
    from vllm_refusion.engine.plugin import SUPPORTED_VLLM, check_vllm_version

    try:
        found = check_vllm_version()
    except RuntimeError as error:
        problem, _, advice = str(error).partition(". ")
        return Check("vllm", False, problem, advice)
    return Check("vllm", True, f"{found}, supported are {' and '.join(SUPPORTED_VLLM)}")


def torch() -> Check:
    """PyTorch, built for what vLLM is built for."""
    from vllm_refusion.triton_cpu_stub import vllm_is_cpu_build

    cuda = importlib.import_module("torch").version.cuda
    built = f"{_versions('torch')}, built for {f'CUDA {cuda}' if cuda else 'the CPU'}"
    if not cuda and not vllm_is_cpu_build():
        advice = "vLLM's GPU build needs PyTorch's: pip install --force-reinstall torch, or vllm."
        return Check("torch", False, built, advice)
    return Check("torch", True, built)


def triton() -> Check:
    """What kernels are written in; on the CPU build of vLLM its interpreter."""
    importlib.import_module("triton")
    from vllm_refusion.triton_cpu_stub import vllm_is_cpu_build

    how = ", in its interpreter: exact but slow" if vllm_is_cpu_build() else ""
    return Check("triton", True, _versions("triton") + how)


def gpu() -> Check:
    """A GPU that PyTorch can use, where vLLM is built for one."""
    from vllm_refusion.bench.environment import nvidia_smi
    from vllm_refusion.triton_cpu_stub import vllm_is_cpu_build

    driver = nvidia_smi("driver_version")
    shown = f"driver {driver.splitlines()[0]}" if driver else "no NVIDIA driver found"
    if vllm_is_cpu_build():
        return Check("gpu", True, f"not used by the CPU build of vLLM; {shown}")
    cuda = importlib.import_module("torch").cuda
    if not cuda.is_available():
        advice = (
            "Upgrade the driver to one for the CUDA version above, or make the GPU visible "
            "(CUDA_VISIBLE_DEVICES)."
            if driver
            else "Install a driver; in a container, pass the GPUs on (docker run --gpus all). "
            "Without a GPU, install the CPU build: see the README."
        )
        return Check("gpu", False, f"PyTorch sees none; {shown}", advice)
    free, total = (number / 2**30 for number in cuda.mem_get_info())
    name = f"{cuda.device_count()} x {cuda.get_device_name()}"
    return Check("gpu", True, f"{name}, {free:.0f} of {total:.0f} GiB free; {shown}")


def plugin() -> Check:
    """vLLM finds this package through its entry point and may load it."""
    found = metadata.entry_points(group="vllm.general_plugins", name="refusion")
    values = {entry.value for entry in found}
    if values != {"vllm_refusion:register"}:
        shown = f"the entry point vllm.general_plugins is {', '.join(sorted(values)) or 'missing'}"
        return Check("plugin", False, shown, "Install this package: pip install vllm-refusion.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "refusion" not in allowed.split(","):
        advice = "Unset it, or add refusion to it."
        return Check("plugin", False, f"VLLM_PLUGINS={allowed} keeps it out", advice)
    for entry in found:
        entry.load()
    return Check("plugin", True, f"vllm-refusion {metadata.version('vllm-refusion')}, found")


def variables() -> Check:
    """None that turns off what ReFusion needs of vLLM or Triton."""
    bad = {"VLLM_USE_V2_MODEL_RUNNER": "0", "TRITON_BACKENDS_IN_TREE": "1"}
    wrong = [f"{name}={value}" for name, value in bad.items() if os.environ.get(name) == value]
    if wrong:
        advice = "Unset it: ReFusion needs vLLM's Model Runner V2, which needs Triton."
        return Check("variables", False, " ".join(wrong), advice)
    return Check("variables", True, "none is in the way")


def folder() -> Check:
    """No folder here that hides a package of vLLM's from Python."""
    spec = util.find_spec("triton_kernels")
    origin = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), ""))
    if origin and Path(origin).resolve().is_relative_to(Path.cwd().resolve()):
        advice = "Run commands in another folder, or with python -P."
        return Check("folder", False, f"{origin} hides vLLM's package of that name", advice)
    return Check("folder", True, "hides no package")


def answer(model: str | None) -> Check:
    """An engine in a process of its own starts and answers."""
    command = [sys.executable, "-P", "-m", "vllm_refusion.doctor", *([model] if model else [])]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    environment.setdefault("TRITON_F32_DEFAULT", "ieee")  # as exact as the reference
    with tempfile.TemporaryDirectory() as outside:
        try:
            ended = subprocess.run(
                command,
                cwd=None if model else outside,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=ANSWER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            advice = "See what the engine does: VLLM_LOGGING_LEVEL=DEBUG vllm serve ..."
            return Check("answer", False, f"none within {ANSWER_SECONDS} s", advice)
    last = (ended.stdout.splitlines() or [""])[-1]
    if ended.returncode == 0 and last.startswith("{"):
        return Check("answer", **json.loads(last))
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line] or lines or ["no message"]
    advice = "\n     ".join(["The last lines of the engine:", *lines[-10:]])
    return Check("answer", False, f"exit status {ended.returncode}: {told[-1].strip()}", advice)


def _versions(*packages: str) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or f"{packages[0]} of unknown version"


def _answer_of_a_random_model(folder: Path) -> dict[str, object]:
    """Fields of a ``Check``: five tokens from an engine, which the reference decoder must give."""
    from vllm import LLM, SamplingParams

    from vllm_refusion.decoding.params import DecodingParams
    from vllm_refusion.decoding.reference import decode

    params = DecodingParams(4, 8)
    ids = {"mask_token_id": MASK, "eos_token_id": EOS}
    expected = decode(_random_model(folder), PROMPT, params, max_tokens=TOKENS, **ids).tokens
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_batched_tokens=64,
        max_num_seqs=2,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=2**26,
        diffusion_config={"canvas_length": 16},
        override_generation_config={"slot_size": 4, "block_length": 8},
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": list(PROMPT)}, sampling, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    return {
        "ok": tokens == expected,
        "found": f"{len(tokens)} tokens of a tiny random model, the reference decoder's"
        if tokens == expected
        else f"{tokens} of a tiny random model, where the reference decoder says {expected}",
        "advice": "Report it, with this output: the engine does not decode as it should here.",
    }


def _random_model(folder: Path) -> object:
    """Writes it to ``folder``; its answer has no near ties."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.5,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def _answer_of(model: str) -> dict[str, object]:
    """Fields of a ``Check``: five tokens of text."""
    from vllm import LLM, SamplingParams

    from vllm_refusion.backbones import is_refusion

    llm = LLM(
        model,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        kv_cache_memory_bytes=2**29,  # of one request; else most of what the machine has
    )
    if not is_refusion(llm.llm_engine.model_config):
        advice = "Make a ReFusion checkpoint of it, with vllm-refusion convert and train."
        return {"ok": False, "found": f"{model} is no ReFusion model", "advice": advice}
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    (output,) = llm.chat(chat, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
    return {"ok": True, "found": f"{output.outputs[0].text!r} from {model}"}


def _child(model: str | None) -> None:
    """The process that ``answer`` starts; its last line is the check."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if model:
        print(json.dumps(_answer_of(model)))
        return
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(_answer_of_a_random_model(Path(name))))


if __name__ == "__main__":
    _child(sys.argv[1] if len(sys.argv) > 1 else None)
