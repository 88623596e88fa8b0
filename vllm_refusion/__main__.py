"""``python -m vllm_refusion``: the command ``vllm-refusion``."""

from vllm_refusion.cli import main

if __name__ == "__main__":
    main()
