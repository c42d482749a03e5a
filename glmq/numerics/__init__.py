"""Tensor -> tensor: ranges, smoothing, rounding, measures. No files, no names of models."""
