"""The ranks of one run, once all have met and are found to do the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch

from glmq.codec.codec import KERNELS
from glmq.machine import version_of
from glmq.numerics import gptq
from glmq.ranks import Place, Ranks
from glmq.version import __version__


@contextmanager
def join_ranks(place: Place, arguments: Mapping[str, object]) -> Iterator[Ranks]:
    """Meet the other ranks; none of them may have another version, other kernels, threads or arguments than rank 0.

    Args:
        place: of this process.
        arguments: of the run, by name; records count field by field.

    Raises:
        UsageError: a rank differs; says in what, with both values. On every rank, before any work.
        MeetingError: the others did not come.
    """
    settings = {
        "glmq": __version__,
        "torch": torch.__version__,
        "transformers": version_of("transformers") or "",
        "threads": str(torch.get_num_threads()),
        "rounding": gptq.rounding_kernel(),
        "codec": "compiled" if KERNELS else "numpy",
        **_flat(arguments),
    }
    with Ranks(place) as ranks:
        ranks.check_same(settings)
        yield ranks


def _flat(arguments: Mapping[str, object]) -> dict[str, str]:
    """Each argument as text, those within a record by their own names."""
    texts: dict[str, str] = {}
    for name, value in arguments.items():
        if is_dataclass(value):
            texts |= _flat({field.name: getattr(value, field.name) for field in fields(value)})
        else:
            texts[name] = str(value)
    return texts
