"""Serving a mask adapter: ``vllm serve FOLDER``, or ``refusion_adapter`` beside its base.

What the user said is turned into the base's model, with ``refusion_adapter`` among the overrides of
its configuration: that is where the parser of checkpoints sees it, and it travels to all processes.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_refusion.adapters import MaskAdapter, check_base, find_base, is_adapter, read_adapter
from vllm_refusion.decoding.speculation import MAX_CHAIN
from vllm_refusion.engine.settings import ADAPTER_OPTION

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

LEAST_CHAIN = 2  # a first mask may draft nothing

logger = logging.getLogger("vllm.refusion")


def take_adapter(args: EngineArgs) -> None:
    """Puts the base in the place of an adapter's folder, and notes the adapter in ``args``.

    May be called again with the same ``args``. Does nothing where they name no adapter.

    Raises:
        ValueError: the adapter is broken, its base is not found, or the model is not its base.
    """
    options = args.additional_config if isinstance(args.additional_config, dict) else {}
    named = options.get(ADAPTER_OPTION)
    if is_adapter(args.model):
        if named is not None:
            raise ValueError(
                f"additional_config has {ADAPTER_OPTION}={named!r}, but the model {args.model} is "
                "an adapter itself: allowed is one of them."
            )
        adapter = read_adapter(args.model)
        args.served_model_name = args.served_model_name or args.model
        args.model = find_base(adapter)
        logger.info("Mask adapter %s on its base %s.", adapter.folder, args.model)
    elif named is None:
        return
    elif not isinstance(named, str) or not Path(named).is_dir():
        raise ValueError(
            f"additional_config has {ADAPTER_OPTION}={named!r}: allowed is an adapter's folder."
        )
    else:
        adapter = read_adapter(named)
    folder = str(adapter.folder.resolve())
    if Path(args.model).is_dir() and args.load_format != "dummy":
        check_base(adapter, args.model)  # one on the hub is checked once it is downloaded
    args.additional_config = {**options, ADAPTER_OPTION: folder}
    args.hf_overrides = _with_adapter(args.hf_overrides, folder)


def _with_adapter(overrides: Any, folder: str) -> Any:
    if getattr(overrides, "func", None) is _override:
        return overrides
    if callable(overrides):
        return functools.partial(_override, overrides, folder)
    for name in ("mask_token_id", "architectures"):
        if name in (overrides or {}):
            raise ValueError(
                f"hf_overrides has {name}={overrides[name]!r}: beside a mask adapter allowed is to "
                "leave it out."
            )
    return {**(overrides or {}), ADAPTER_OPTION: folder}


def _override(overrides: Any, folder: str, config: Any) -> Any:
    config = overrides(config)
    setattr(config, ADAPTER_OPTION, folder)
    return config


def adapter_of(model_config: ModelConfig) -> MaskAdapter | None:
    """The mask adapter that a model is served with; None without one. Reads its configuration."""
    folder = getattr(model_config.hf_text_config, ADAPTER_OPTION, None)
    return None if folder is None else read_adapter(folder)


def chains_of(adapter: MaskAdapter) -> dict[str, Any]:
    """The masks that it was trained for, as ``DecodeState.add_serial`` takes them."""
    return {
        "chain_length": min(max(adapter.chain_length, LEAST_CHAIN), MAX_CHAIN),
        "skips_known": adapter.skips_known,
    }


def shape_of(adapter: MaskAdapter) -> dict[str, Any]:
    """What of it shapes the computation, for the hash that compiled graphs are kept under."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(adapter).items()
        if name in ("rank", "scale", "target_modules", "layers")
    }
