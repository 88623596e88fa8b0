"""An autoregressive checkpoint in, a ReFusion one to be trained out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_refusion.backbones import ARCHITECTURES
from vllm_refusion.decoding.params import DecodingParams, expand_preset
from vllm_refusion.files import publish, write_text

DTYPES = ("auto", "bfloat16", "float16", "float32")
MASK_TOKEN, PAD_TOKEN = "<|mask|>", "<|pad|>"


def convert(
    source: str,
    output: Path,
    *,
    mask_token: str | None = None,
    pad_token: str | None = None,
    decoding: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    plain: bool = False,
) -> dict[str, Any]:
    """Writes the ReFusion form of ``source`` to the folder ``output``; says what it did.

    The mask token, a pad token where there is none, and their embeddings, each the mean of the old
    rows; the configuration with ``mask_token_id`` under the backbone's own architecture name; a
    generation config with the ``decoding`` parameters (or a preset). Nothing is written to
    ``output`` before all of it is complete.

    Args:
        source: a folder, a name on the Hugging Face hub, or a GGUF file.
        mask_token: the tokenizer's own if it has one, else ``<|mask|>``.
        pad_token: for a tokenizer without one; else ``<|pad|>``.
        dtype: of the weights; "auto" keeps theirs, for GGUF it is bfloat16.
        plain: a GGUF file is unpacked, and nothing is added: the base of a mask adapter.

    Raises:
        ValueError: the source cannot be converted, or ``output`` exists; says why.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists already")
    parameters = expand_preset(decoding or {})
    parameters = vars(DecodingParams().updated(decoding)) if parameters else {}
    where = _location(source)
    if plain and ("gguf_file" not in where or mask_token or pad_token or decoding):
        raise ValueError(
            "--plain: allowed is a GGUF file alone, without tokens and decoding defaults"
        )
    config = _load(AutoConfig, source, where)
    if (mask := getattr(config, "mask_token_id", None)) is not None:
        raise ValueError(f"{source} is a ReFusion checkpoint already: its mask_token_id is {mask}")
    check_backbone(source, config)
    tokenizer = _load(AutoTokenizer, source, where)
    if "gguf_file" in where and isinstance(config.eos_token_id, int):
        # transformers before 5.19 takes the file's BOS for EOS here, not in the configuration
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    old_words = len(tokenizer)
    if not plain:
        _add_tokens(source, tokenizer, mask_token, pad_token)
    model = _load_model(source, where, dtype)
    old_rows = model.get_input_embeddings().weight.shape[0]
    config, eos, pad = model.config, tokenizer.eos_token_id, tokenizer.pad_token_id
    if not plain:
        _resize(model, tokenizer, old_words)
        config.mask_token_id = tokenizer.mask_token_id
    config.eos_token_id, config.pad_token_id = eos, pad
    # Not the source's: sampling defaults of an autoregressive model say nothing here.
    generation = {"eos_token_id": eos, "pad_token_id": pad, **parameters}
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        write_text(part / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        part.chmod(0o755)
        publish(part, output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return {
        "mask_token": (tokenizer.mask_token, tokenizer.mask_token_id),
        "pad_token": (tokenizer.pad_token, pad),
        "eos_token": (tokenizer.eos_token, eos),
        "embedding_rows": (old_rows, model.get_input_embeddings().weight.shape[0]),
        "chat_template": bool(tokenizer.chat_template),
    }


def _location(source: str) -> dict[str, str]:
    path = Path(source)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": source}
    if not path.is_file():
        raise ValueError(f"{source}: no such file")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError('GGUF files need: pip install "vllm-refusion[train]"') from error
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _load(auto: Any, source: str, where: Mapping[str, str], **options: Any) -> Any:
    try:
        return auto.from_pretrained(**where, **options)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"transformers cannot load {source}: {error}") from error


def _load_model(source: str, where: Mapping[str, str], dtype: str) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    from_gguf = "gguf_file" in where
    if from_gguf:
        options["dtype"] = "bfloat16" if dtype == "auto" else dtype
        if hasattr(transformers, "GgufConfig"):  # older versions unpack the weights unasked
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, loaded = _load(AutoModelForCausalLM, source, where, **options)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{source} lacks weights: {', '.join(missing[:5])}")
    if not from_gguf:
        return model
    # Unpacked or not, transformers calls what came from GGUF quantised and will not save it.
    config = type(model.config).from_dict(model.config.to_dict())
    for name in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(name, None)
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def check_backbone(source: str, config: Any) -> None:
    """Raises ValueError if a model of this configuration cannot be trained; says why."""
    # GGUF files name no architecture; what transformers would load is what counts there.
    stock: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    names = config.architectures or ([stock.__name__] if stock else [])
    if not set(names) & set(ARCHITECTURES):
        raise ValueError(
            f"{source} has the architecture {', '.join(names) or config.model_type}; supported "
            f"are {', '.join(ARCHITECTURES)}"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{source} is quantised, which cannot be trained: take the full weights")
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if layers or getattr(config, "use_sliding_window", False):
        raise ValueError(f"{source} has layers without full attention ({', '.join(layers)})")


def _add_tokens(source: str, tokenizer: Any, mask: str | None, pad: str | None) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {source} has no EOS token, which ends every response")
    for name, wanted, default in (("mask", mask, MASK_TOKEN), ("pad", pad, PAD_TOKEN)):
        present = getattr(tokenizer, f"{name}_token")
        if present is not None and wanted not in (None, present):
            raise ValueError(f"--{name}-token {wanted}: the tokenizer's {name} token is {present}")
        tokenizer.add_special_tokens({f"{name}_token": present or wanted or default})
    others = {"EOS": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, token in others.items():
        if token == tokenizer.mask_token_id:
            raise ValueError(
                f"--mask-token {tokenizer.mask_token} is the {name} token: name another"
            )


@torch.no_grad()
def _resize(model: Any, tokenizer: Any, old_words: int) -> None:
    """Rows for all words; those that are new are the mean of the old rows.

    Tables that grow get a multiple of 64 rows: matrix products of odd widths are slow.
    """
    old_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > old_rows:
        options = {"pad_to_multiple_of": 64, "mean_resizing": False}
        model.resize_token_embeddings(len(tokenizer), **options)
    new = [i for i in (tokenizer.mask_token_id, tokenizer.pad_token_id) if i >= old_words]
    rows = model.get_input_embeddings().weight.shape[0]
    new += [i for i in range(old_rows, rows) if i not in new]
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if layers[0].weight is layers[1].weight:  # the mean must not include a row set before
        layers.pop()
    for layer in layers:
        layer.weight[new] = layer.weight[:old_rows].float().mean(0).to(layer.weight.dtype)
    model.config.vocab_size = len(layers[0].weight)
