"""transformers without torch_npu, and without the parts of torch that only a compiler or a sharded tensor needs.

The model code of transformers imports `torch._dynamo` (for decorators that say "do not compile me") and
`torch.distributed.tensor` (for its tensor parallelism), and with them sympy: 70 MiB and two seconds of every command, for
features that glmq does not use.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from glmq.device import without_npu

_COMPILER = "torch._dynamo"


ALONE: Final = threading.RLock()
"""Held while transformers is imported or builds a model, which changes what all threads of the process see."""


@contextmanager
def lean_transformers() -> Iterator[None]:
    """Import transformers inside. On a CPU it takes torch_npu for not installed, which may be there without its libraries.

    What stands in for packages meanwhile is seen by every thread, so one at a time may be inside.
    """
    with ALONE, without_npu(), no_compiler():
        import_module("transformers.utils").is_torch_npu_available()  # it keeps its answer
        yield


@contextmanager
def no_compiler() -> Iterator[None]:
    """Keep `torch._dynamo` and `torch.distributed.tensor` from being imported inside, as far as nobody needs them.

    Inside, `torch._dynamo` is a stand-in whose decorators return the function that they are given: a function that is never
    compiled needs no mark that says so. Whoever asks the stand-in for anything else gets the real package. Afterwards the
    stand-in is gone, and an import of the real package works as ever. Nothing happens where the compiler is there already, or
    where torchvision is installed: transformers imports that, and it imports modules of the compiler that need its package.
    """
    if _COMPILER in sys.modules or find_spec("torchvision") is not None:
        yield
        return
    stand_in = _Compiler()
    has_distributed = torch.distributed.is_available
    sys.modules[_COMPILER] = stand_in
    torch._dynamo = stand_in
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = has_distributed
        if sys.modules.get(_COMPILER) is stand_in:
            _remove_stand_in()


def _unchanged(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


class _Compiler(types.ModuleType):
    """A package whose modules are torch's own, but whose `__init__` has not run."""

    def __init__(self) -> None:
        super().__init__(_COMPILER)
        self.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove_stand_in()
        return getattr(import_module(_COMPILER), name)

    @staticmethod
    def disable(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
        return _unchanged if fn is None else fn

    assume_constant_result = allow_in_graph = staticmethod(_unchanged)


def _remove_stand_in() -> None:
    del sys.modules[_COMPILER]
    del torch._dynamo
