"""Registration with vLLM."""

from __future__ import annotations

import logging
import re

from vllm_refusion.backbones import ARCHITECTURES, is_refusion, published
from vllm_refusion.engine import compat, cpu_step, metrics
from vllm_refusion.engine.adapter_option import take_adapter
from vllm_refusion.engine.admission import admit
from vllm_refusion.engine.config_hook import ReFusionConfig, route
from vllm_refusion.engine.settings import has_adapter
from vllm_refusion.triton_cpu_stub import INTERPRETER_NOTICE, interpreter_is_on

logger = logging.getLogger("vllm.refusion")

SUPPORTED_VLLM = ("0.32", "0.33")


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
            architectures=ARCHITECTURES.values(),
            config_hook=ReFusionConfig,
            route=route,
            is_ours=is_refusion,
            extends_texts=has_adapter,
            admit=admit,
            report=metrics.report,
            take_adapter=take_adapter,
            published=published,
            cpu_step=cpu_step,
            endpoints="vllm_refusion.viewer.play:PlayEndpoints",
        )
    )
    if interpreter_is_on():
        logger.warning(INTERPRETER_NOTICE)  # vLLM sets logging up later and would lose an info


def check_vllm_version() -> str:
    """The version of the vLLM that Python imports, whatever else is installed beside it.

    Raises:
        RuntimeError: there is none, or it is not supported.
    """
    try:
        from vllm import __version__ as found
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        found = "none"
    if any(re.match(rf"{re.escape(version)}(\.|$|\+)", found) for version in SUPPORTED_VLLM):
        return found
    raise RuntimeError(
        f"vllm-refusion needs vLLM {' or '.join(SUPPORTED_VLLM)}, found {found}. "
        f"Install it with: pip install 'vllm=={SUPPORTED_VLLM[-1]}.*' (GPU) or see the README for "
        "the CPU build, or uninstall vllm-refusion."
    )
