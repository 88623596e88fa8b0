"""Where kernels run: on the GPU if there is one, else on the CPU in Triton's interpreter."""

from __future__ import annotations

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
