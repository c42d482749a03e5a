"""Make this Python see a processor with AVX2 and nothing newer; a folder for PYTHONPATH (`GLMQ_ENGINE_ISA=avx2 .ci/engine`).

vLLM picks its extension, and PyTorch and oneDNN pick their kernels, by what these say. The instructions themselves stay
there: a library that asks the processor on its own would still find them.
"""

import os

os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

import torch.cpu

for name in dir(torch.cpu):
    if name.startswith(("_is_avx512", "_is_amx", "_is_vnni")):
        setattr(torch.cpu, name, lambda: False)
