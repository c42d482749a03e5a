"""The compiled inner loops. Everything else about the package stands in pyproject.toml.

Without a compiler the installation still succeeds, and numpy and torch do the work.
"""

import platform

from setuptools import Extension, setup

FLAGS = ["-O3", "-std=c11"]
if platform.system() == "Linux" and platform.machine() == "x86_64":
    # Kernels for newer processors are chosen at run time; a -march=native in CFLAGS would put their instructions everywhere.
    FLAGS.append("-march=x86-64")
# The two that sum floats fuse multiply and add where a target has both; the others' results do not depend on it.
FUSED = [*FLAGS, "-ffp-contract=fast"]
SHARED = ["glmq/_native.h"]
CODEC = ["glmq/codec/_count.h", "glmq/codec/_rans.h", "glmq/codec/_rans_neon.h", "glmq/codec/_tables.h"]

setup(
    ext_modules=[
        Extension(
            "glmq.numerics._rounding",
            ["glmq/numerics/_rounding.c"],
            depends=SHARED,
            extra_compile_args=FUSED,
            optional=True,
        ),
        Extension(
            "glmq.numerics._moments",
            ["glmq/numerics/_moments.c"],
            depends=SHARED,
            extra_compile_args=FLAGS,
            optional=True,
        ),
        Extension(
            "glmq.inspection._sums",
            ["glmq/inspection/_sums.c"],
            depends=[*SHARED, "glmq/codec/_count.h"],
            extra_compile_args=FUSED,
            optional=True,
        ),
        Extension(
            "glmq.codec._codec",
            ["glmq/codec/_codec.c"],
            depends=[*SHARED, *CODEC],
            extra_compile_args=FLAGS,
            optional=True,
        ),
    ]
)
