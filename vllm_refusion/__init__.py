"""ReFusion for vLLM: a diffusion language model that decodes whole slots of tokens in parallel."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of ``vllm.general_plugins``: teaches vLLM to serve ReFusion checkpoints.

    vLLM calls it in every process, possibly more than once.

    Raises:
        RuntimeError: the installed vLLM is not supported; says what to install.
    """
    from vllm_refusion.engine.plugin import register

    register()
