"""How far two tensors are apart, and how many bits integers need. One unit each, named in the function."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from glmq.codec.codec import count_bytes


def relative_l2(candidate: Tensor, reference: Tensor) -> float:
    """||candidate - reference|| / ||reference||, in float64; 0 where both vanish, inf where only the reference does."""
    return error_of_energies(*error_energies(candidate, reference))


def error_energies(candidate: Tensor, reference: Tensor) -> tuple[float, float]:
    """||candidate - reference||^2 and ||reference||^2, in float64; those of parts add up to those of the whole."""
    noise = (candidate.double() - reference.double()).square().sum().item()
    return noise, reference.double().square().sum().item()


def error_of_energies(noise: float, signal: float) -> float:
    """The relative error that `error_energies` make: 0 where both vanish, inf where only the signal does."""
    if signal == 0:
        return 0.0 if noise == 0 else math.inf
    return math.sqrt(noise / signal)


def sqnr_db(relative_error: float) -> float:
    """Signal-to-quantization-noise ratio of a relative L2 error, in decibels: -20 log10(error)."""
    return math.inf if relative_error == 0 else -20 * math.log10(relative_error)


def cosine(candidate: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between two tensors read as vectors, summed in float64; 0 where one of them vanishes."""
    a, b = candidate.double().reshape(-1), reference.double().reshape(-1)
    norms = (a.norm() * b.norm()).item()
    return (a @ b).item() / norms if norms else 0.0


def count_int8(q: Tensor) -> Tensor:
    """How often each int8 value occurs: int64 [256], entry i counts the value i - 128."""
    counts = count_bytes(q.contiguous().numpy())
    return torch.from_numpy(np.concatenate((counts[128:], counts[:128])))  # two's complement order -> numeric order


def entropy_bits(counts: Tensor) -> float:
    """Zero-order entropy of a histogram of counts, in bits per symbol; 0 for an empty one."""
    found = counts.numpy()  # which takes a tenth of torch's time for so few numbers
    found = found[found > 0]
    total = found.sum()
    if total == 0:
        return 0.0
    p = torch.from_numpy(found / total)
    return abs(-(p * p.log2()).sum().item())


def top1(reference_logits: Tensor, candidate_logits: Tensor) -> float:
    """Share of positions whose largest logit has the same index. Logits float [T, V]."""
    return (reference_logits.argmax(-1) == candidate_logits.argmax(-1)).double().mean().item()
