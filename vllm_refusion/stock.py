"""Stock vLLM in a process of its own, and the responses that it writes to prompts there.

``responses`` runs this file: ``python -m vllm_refusion.stock ASKED WRITTEN``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_refusion.backbones import head_shape
from vllm_refusion.files import read_json, write_text, writing

REQUESTS = 256  # answered at a time
SPARE_TOKENS = 256  # of the last pages of a request
LITTLE = 0.25  # of the memory that is free


def stock_environment() -> dict[str, str]:
    """Of a process in which vLLM runs without this plugin, as if it were not installed."""
    from vllm_refusion.triton_cpu_stub import vllm_is_cpu_build

    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    plugins = metadata.entry_points(group="vllm.general_plugins")
    allowed = environment.get("VLLM_PLUGINS")
    names = allowed.split(",") if allowed is not None else plugins.names
    environment["VLLM_PLUGINS"] = ",".join(sorted(set(names) - {"refusion"}))
    if vllm_is_cpu_build():
        environment.pop("TRITON_INTERPRET", None)
        environment["TRITON_BACKENDS_IN_TREE"] = "1"  # keeps the plugin's interpreter off
    return environment


def responses(asked: Mapping[str, Any], folder: Path | None = None) -> list[list[int]]:
    """Token ids of the response to each prompt, EOS included where it was said.

    The device's memory is free afterwards.

    Args:
        asked: ``model``, ``dtype``, ``prompts`` and ``max_tokens`` of each, ``max_model_len``,
            ``temperature``, ``seed`` and ``eos_token_id``.
        folder: where files lie meanwhile, if not where temporary ones do.

    Raises:
        ValueError: vLLM failed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as meanwhile:
        request, answer = Path(meanwhile, "asked.json"), Path(meanwhile, "written.jsonl")
        write_text(request, json.dumps(asked))
        command = [sys.executable, "-m", "vllm_refusion.stock", str(request), str(answer)]
        ended = subprocess.run(command, env=stock_environment(), stdout=sys.stderr)
        if ended.returncode:
            raise ValueError(f"vLLM ended with exit status {ended.returncode}, see above")
        return [json.loads(line) for line in answer.read_text().splitlines()]


def cache_options(what: Mapping[str, Any]) -> dict[str, Any]:
    """Of vLLM: pages for what is asked, where that is little, so that others may use the device.

    Nor does vLLM then look for what is left of it. Otherwise it takes what it takes.
    """
    import psutil
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(what["model"]).get_text_config()
    _, kv_heads, size = head_shape(config)
    of_token = 2 * config.num_hidden_layers * kv_heads * size
    of_token *= 4 if what["dtype"] == "float32" else 2
    together = min(len(what["prompts"]), REQUESTS)
    needed = together * (what["max_model_len"] + SPARE_TOKENS) * of_token
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    if needed > LITTLE * free:
        return {}
    return {
        "max_num_seqs": together,
        "kv_cache_memory_bytes": needed,
        "gpu_memory_utilization": 0.05,  # only checked
    }


def main(asked: Path, written: Path) -> None:
    from vllm import LLM, SamplingParams

    what = read_json(asked)
    names = ("model", "dtype", "max_model_len", "seed")
    llm = LLM(**{name: what[name] for name in names}, **cache_options(what))
    limits = [
        SamplingParams(
            temperature=what["temperature"],
            max_tokens=tokens,
            stop_token_ids=[what["eos_token_id"]],
            detokenize=False,
        )
        for tokens in what["max_tokens"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in what["prompts"]]
    with writing(written) as file:
        for output in llm.generate(prompts, limits):
            file.write(json.dumps(list(output.outputs[0].token_ids)) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
