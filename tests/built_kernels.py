"""Are the kernels of the installed glmq there? For a wheel's environment, which has no compiler. Prints them."""

from importlib import import_module

# The first is the fastest, the last runs on every processor of the architecture.
for name in ("glmq.numerics._rounding", "glmq.numerics._moments", "glmq.inspection._sums", "glmq.codec._codec"):
    print(name, *import_module(name).list_kernels())
