"""glmq: quantize and compress GLM-4.1V for Ascend NPUs. No torch at import."""

__version__ = "0.1.0"
