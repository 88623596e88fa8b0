"""Triton kernels of vllm_refusion; always imported as ``vllm_refusion.triton_kernels``.

The folder's own name must never be importable at top level: vLLM imports a different package
called ``triton_kernels``, and this one would shadow it.
"""
