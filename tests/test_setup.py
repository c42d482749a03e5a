"""How the compiled modules are built: kernels are chosen at run time, whatever the compiler is told for everything."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from glmq.codec import codec
from glmq.inspection import sums
from glmq.numerics import gptq, moments

ROOT = Path(__file__).parents[1]
SOURCES = ("numerics/_rounding.c", "numerics/_moments.c", "inspection/_sums.c", "codec/_codec.c")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() != "x86_64" or shutil.which("gcc") is None, reason="needs GCC on an x86-64 processor"
    ),
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("option", ["-mavx2", "-mfma", "-msse4.2"])
def test_newer_instructions_everywhere_are_refused_by_the_compiler(source: str, option: str) -> None:
    command = [
        "gcc",
        "-std=c11",
        "-fsyntax-only",
        "-Wfatal-errors",
        option,
        f"-I{sysconfig.get_path('include')}",
        ROOT / "glmq" / source,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "the kernels are chosen at run time: compile without -march=native, -mavx2 and the like" in result.stderr


def test_an_installation_with_march_native_has_the_same_kernels(tmp_path: Path) -> None:
    compiler = tmp_path / "gcc"  # no optimization, which takes most of its time and chooses no instructions
    compiler.write_text('#!/bin/sh\nexec gcc "$@" -O0\n')
    compiler.chmod(0o755)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path / "objects")],
        cwd=ROOT,
        env=os.environ | {"CC": str(compiler), "CFLAGS": "-march=native -O2"},
        check=True,
    )
    for name, kernels in (
        ("numerics/_rounding", gptq.KERNELS),
        ("numerics/_moments", moments.KERNELS),
        ("inspection/_sums", sums.KERNELS),
        ("codec/_codec", codec.KERNELS),
    ):
        (built,) = (tmp_path / "glmq").glob(f"{name}.*.so")
        module = built.name.split(".")[0]
        listing = f"import sys; sys.path[:0] = [{str(built.parent)!r}]; import {module}; print({module}.list_kernels())"
        result = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == str(kernels)
