"""The import rule of the architecture, read from the syntax trees: a room imports only from the rooms above it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PACKAGES

import glmq

PACKAGE = Path(glmq.__file__).parent
MODULES = {
    ".".join(("glmq", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

WORDS = {"errors", "spec", "engines", "records", "progress", "version"}
ALLOWED = {
    "errors": set(),
    "version": set(),
    "spec": {"errors"},
    "engines": {"errors", "spec"},
    "records": {"errors", "spec"},
    "progress": {"records"},
    "device": {"errors"},
    "ranks": {"errors"},
    "codec": {"errors"},
    "numerics": WORDS,
    "checkpoint": WORDS,
    "model": WORDS | {"checkpoint", "device"},
    "calibration": WORDS | {"model", "numerics", "checkpoint", "device", "ranks"},
    "quantization": WORDS | {"model", "numerics", "checkpoint", "device", "ranks", "calibration.stats"},
    "compression": WORDS | {"checkpoint", "model", "ranks", "codec"},
    "inspection": WORDS | {"checkpoint", "numerics", "model", "compression", "codec", "calibration.stats"},
}
ALLOWED["verification"] = ALLOWED["inspection"] | {"inspection"}
ALLOWED["reporting"] = ALLOWED["verification"] | {"verification"}
ALLOWED["jobs"] = ALLOWED["reporting"] | {"calibration", "quantization", "device", "ranks", "reporting"}
ALLOWED["cli"] = ALLOWED["jobs"] | {"jobs"}
ALLOWED["__main__"] = {"cli"}
ALLOWED[""] = ALLOWED["cli"]  # the package hands out what the rooms below the shell define
"""What each room may import of glmq, beside itself and the package's version."""

OWNERS = {
    "typer": ("glmq.cli",),
    "rich": ("glmq.cli",),
    "transformers": ("glmq.model",),
    "torch_npu": ("glmq.device",),
    "torch.distributed": ("glmq.ranks", "glmq.model.lean"),  # the second hides it from transformers
}
"""The only rooms or modules that may know a library."""

NOWHERE = ("click", "torchvision", "pickle", "accelerate")
"""typer has its own click; the image processor needs no torchvision; nothing is ever unpickled; torch itself puts on meta."""


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it, by statement, by `import_module`, or as `torch.distributed`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield "torch.distributed"


def lies_in(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_belongs_to_a_room() -> None:
    assert {room_of(module) for module in MODULES} <= {"", *ALLOWED}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_rooms_above_its_own(module: str) -> None:
    room = room_of(module)
    known = [f"glmq.{other}" for other in {room, *ALLOWED.get(room, set())}]
    for name in imports_of(MODULES[module]):
        assert not name.startswith("."), f"{module} imports {name} relatively"
        if lies_in(name, "glmq") and not (name == "glmq" and room == "cli"):
            assert any(lies_in(name, allowed) for allowed in known), f"{module} must not import {name}"


@pytest.mark.parametrize("module", MODULES)
def test_a_library_is_known_in_its_own_room_only(module: str) -> None:
    for name in imports_of(MODULES[module]):
        for library, owners in OWNERS.items():
            if lies_in(name, library):
                assert any(lies_in(module, owner) for owner in owners), f"{module} must not import {name}"
        assert not any(lies_in(name, library) for library in NOWHERE), f"{module} must not import {name}"


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b as c\n"
        "from d import e, f\n"
        "from . import g\n"
        "def late():\n"
        "    import h\n"
        "    importlib.import_module('i')\n"
        "    torch.distributed.init()\n"
    )
    assert sorted(imports_of(path)) == ["..g", "a.b", "d.e", "d.f", "h", "i", "torch.distributed"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("glmq", ("torch", "numpy", "typer")),
        ("glmq.spec", ("torch", "numpy", "typer")),
        ("glmq.records", ("torch", "numpy", "typer")),
        ("glmq.cli.app", ("torch", "transformers", "numpy", "safetensors", "PIL")),
        ("glmq.quantization.stream", ("transformers", "typer", "rich")),
        (
            "glmq.reporting.verification_page, glmq.reporting.comparison_page, glmq.cli.inspect_view",
            ("torch", "transformers", "numpy"),
        ),
    ],
)
def test_importing_a_module_stays_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGES)
    assert done.stdout == "[]\n"
