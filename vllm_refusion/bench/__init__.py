"""``vllm-refusion bench``: stock autoregressive decoding and ReFusion on the same vLLM.

``command`` starts one child process per side (``child``), each with one engine that runs all levels
of concurrency (``load``); ``report`` renders what they measured.
"""
