"""Tensor -> tensor: ranges, smoothing, rounding, measures. No files, no names of models."""

from glmq.first_calls import make_first_calls

make_first_calls()  # as glmq.device does
