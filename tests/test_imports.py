"""The import rule of the architecture, read from the syntax trees: a room imports only from the rooms above it."""

import ast
import functools
import graphlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from helpers import loaded_after
from programs import start

import glmq

TESTS = Path(__file__).parent
PACKAGE = Path(glmq.__file__).parent
SOURCES = TESTS.parent / "glmq"
"""Where the C files are, which are not installed."""
MODULES = {
    ".".join(("glmq", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

ROWS = (
    "_native first_calls quoting threads version wording", "errors", "machine spec values",
    "cann engines records", "progress", "device ranks", "codec", "numerics", "checkpoint", "model",
    "calibration", "quantization", "compression", "inspection", "verification", "serve reporting",
    "jobs", "glmq", "cli", "__main__",
)  # fmt: skip
"""The house from its top: a module imports from the rows above its own, and not from others of its row. `glmq` is the package's
own module, `_native` what every C file includes."""

WORDS = {
    "errors",
    "quoting",
    "spec",
    "engines",
    "records",
    "progress",
    "version",
    "wording",
    "threads",
    "machine",
    "values",
}
ALLOWED = {
    "_native": set(),
    "quoting": set(),
    "wording": set(),
    "errors": {"quoting"},
    "version": set(),
    "machine": {"version", "wording"},
    "spec": {"errors"},
    "values": {"errors"},
    "engines": {"errors", "spec"},
    "records": {"errors", "spec"},
    "progress": {"records"},
    "threads": set(),
    "first_calls": set(),
    "cann": {"machine"},
    "device": {"errors", "machine", "cann", "first_calls"},
    "ranks": {"errors"},
    "codec": {"errors", "_native"},
    "numerics": WORDS | {"_native", "codec.codec", "first_calls"},
    "checkpoint": WORDS,
    "model": WORDS | {"checkpoint", "device"},
    "calibration": WORDS | {"model", "numerics", "checkpoint", "device", "ranks"},
    "quantization": WORDS
    | {"model", "numerics", "checkpoint", "device", "ranks", "calibration.stats", "calibration.manifest"},
    "compression": WORDS | {"checkpoint", "model", "ranks", "codec"},
    "inspection": WORDS
    | {"checkpoint", "numerics", "model", "compression", "codec", "calibration.stats", "_native"}
    | {"calibration.convergence"},
}
ALLOWED["verification"] = ALLOWED["inspection"] | {"inspection"}
ALLOWED["serve"] = WORDS | {"checkpoint", "numerics", "model", "compression", "verification"}
ALLOWED["reporting"] = ALLOWED["verification"] | {"verification", "quantization"}
ALLOWED["jobs"] = ALLOWED["reporting"] | {"calibration", "quantization", "cann", "device", "ranks", "reporting"}
ALLOWED["jobs"] |= {"serve"}
ALLOWED["cli"] = ALLOWED["jobs"] | {"jobs"}
ALLOWED["__main__"] = {"cli"}
ALLOWED["glmq"] = ALLOWED["jobs"] | {"jobs"}  # the package hands out what the rooms above it define
"""What each room may import of glmq, beside itself: some of what stands above it in the house."""

OWNERS = {
    "typer": ("glmq.cli",),
    "rich": ("glmq.cli",),
    "transformers": ("glmq.model",),
    "vllm": ("glmq.serve",),
    "torch_npu": ("glmq.device",),
    "glmq.model.glm4v": ("glmq.model",),  # others ask `config.family`
    "torch.distributed": ("glmq.ranks", "glmq.model.lean"),  # the second hides it from transformers
}
"""The only rooms or modules that may know a library, or the model family by name."""

NOWHERE = ("click", "torchvision", "pickle", "accelerate")
"""typer has its own click; the image processor needs no torchvision; nothing is ever unpickled; torch itself puts on meta."""


def imports_of(path: Path) -> list[str]:
    """Dotted names that a file imports anywhere in it, by statement, by `import_module`, or as `torch.distributed`."""
    return imports_in(path.read_text(encoding="utf-8"))


@functools.cache
def imports_in(source: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                found += [f"{'.' * level}{module or ''}.{alias.name}" for alias in names]
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                found.append(name)
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                found.append("torch.distributed")
    return found


def includes_of(path: Path) -> list[str]:
    """What a C file includes between quotation marks."""
    return re.findall(r'^[ \t]*#[ \t]*include[ \t]+"([^"\n]+)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def lies_in(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "glmq"


def arrows() -> dict[str, set[str]]:
    """By module of glmq, the modules of glmq that it imports, those for the type checker alone included."""

    def target(name: str) -> str | None:
        return next((known for known in (name, name.rpartition(".")[0]) if known in MODULES), None)

    return {
        module: {found for name in imports_of(path) if (found := target(name)) is not None}
        for module, path in MODULES.items()
    }


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle, the first again at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_belongs_to_a_room() -> None:
    rooms = [room for row in ROWS for room in row.split()]
    assert {room_of(module) for module in MODULES} <= set(rooms)
    assert rooms == sorted(ALLOWED, key=rooms.index)


def test_what_a_room_may_import_stands_above_it_in_the_house() -> None:
    row_of = {room: row for row, rooms in enumerate(ROWS) for room in rooms.split()}
    for room, allowed in ALLOWED.items():
        for other in allowed:
            assert row_of[other.partition(".")[0]] < row_of[room], f"{room} may import {other}"


@pytest.mark.slow
def test_no_modules_import_each_other_in_a_circle() -> None:
    assert find_circle(arrows()) == []


def test_a_circle_through_an_import_for_the_type_checker_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("from glmq.b import thing\n")
    (tmp_path / "b.py").write_text("import glmq.c\n")
    (tmp_path / "c.py").write_text("if TYPE_CHECKING:\n    from glmq.a import Thing\n")
    monkeypatch.setattr(sys.modules[__name__], "MODULES", {f"glmq.{name}": tmp_path / f"{name}.py" for name in "abc"})
    assert set(find_circle(arrows())) == {"glmq.a", "glmq.b", "glmq.c"}
    (tmp_path / "c.py").write_text("")
    assert find_circle(arrows()) == []


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.[ch]")), ids=lambda path: path.relative_to(SOURCES).as_posix())
def test_a_c_file_includes_only_from_the_rooms_above_its_own(path: Path) -> None:
    def room_of_file(file: Path) -> str:
        return (file if file.parent == SOURCES else file.parent).stem

    room = room_of_file(path)
    for name in includes_of(path):
        included = (path.parent / name).resolve()
        assert included.is_file(), f"{path.name} includes {name}, which is not there"
        assert room_of_file(included) in {room, *ALLOWED[room]}, f"{path.name} must not include {name}"


def test_the_reader_of_includes_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "module.c"
    path.write_text('#include <stdint.h>\n#include "a.h"\n  #  include\t"../b/c.h" // why\n')
    assert includes_of(path) == ["a.h", "../b/c.h"]
    assert includes_of(SOURCES / "inspection" / "_sums.c") == ["../_native.h", "../codec/_count.h"]


def test_every_room_has_its_room_of_tests() -> None:
    def rooms(folder: Path, pattern: str) -> set[str]:
        return {path.name for path in folder.iterdir() if any(path.glob(pattern))}

    tested = rooms(TESTS, "test_*.py")
    assert tested - {"cli"} == rooms(PACKAGE, "*.py") - {"cli"}  # the shell may be taken away
    assert "cli" in tested


def lies_under(place: str, *folders: Path) -> bool:
    return any(Path(place).is_relative_to(folder) for folder in folders)


def comes_from(module: ModuleType, *folders: Path) -> bool:
    """Whether a module, or the modules of a package, lie in one of these folders."""
    names = getattr(module, "__dict__", {})
    places = [names.get("__file__"), *(names.get("__path__") or ())]
    return any(lies_under(place, *folders) for place in places if isinstance(place, str))


@pytest.mark.slow
def test_without_the_shell_all_tests_but_its_own_can_be_collected(tmp_path: Path) -> None:
    for folder in (PACKAGE, TESTS):
        ignore = shutil.ignore_patterns("results")  # what is compiled already comes along
        shutil.copytree(folder, tmp_path / folder.name, ignore=ignore)
        shutil.rmtree(tmp_path / folder.name / "cli")
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)

    def collect() -> None:
        """pytest in that folder, as if nothing of glmq and its tests had been imported."""
        for name in [name for name, module in sys.modules.items() if comes_from(module, PACKAGE, TESTS)]:
            del sys.modules[name]
        kept = [path for path in sys.path if Path(path) != TESTS.parent and not lies_under(path, TESTS)]
        sys.path[:] = [str(tmp_path), *kept]
        # An editable installation would find the shell in the checkout, and the pytest at work rewrites its own tests.
        sys.meta_path[:] = [finder for finder in sys.meta_path if not re.search("Editable|Rewriting", str(finder))]
        del os.environ["PYTEST_CURRENT_TEST"]
        os.environ.pop("PYTEST_XDIST_WORKER", None)
        os.chdir(tmp_path)
        assert importlib.util.find_spec("glmq.cli") is None
        sys.exit(pytest.main(["--collect-only", "-qq", "-n", "0", "-p", "no:cacheprovider", "tests"]))

    done = start(collect)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_import_only_from_the_rooms_above_their_own() -> None:
    wrong = []
    for module, path in MODULES.items():
        room = room_of(module)
        known = [f"glmq.{other}" for other in {room, *ALLOWED.get(room, set())}]
        for name in imports_of(path):
            is_api = name == "glmq" and room == "cli"  # the shell uses it
            if name.startswith(".") or (
                lies_in(name, "glmq") and not is_api and not any(lies_in(name, allowed) for allowed in known)
            ):
                wrong.append(f"{module} must not import {name}")
    assert wrong == []


def test_a_library_is_known_in_its_own_room_only() -> None:
    wrong = [
        f"{module} must not import {name}"
        for module, path in MODULES.items()
        for name in imports_of(path)
        if any(lies_in(name, library) for library in NOWHERE)
        or any(
            lies_in(name, library) and not any(lies_in(module, owner) for owner in owners)
            for library, owners in OWNERS.items()
        )
    ]
    assert wrong == []


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("glmq", ("torch", "numpy", "typer")),
        ("glmq.spec", ("torch", "numpy", "typer")),
        ("glmq.records", ("torch", "numpy", "typer")),
        ("glmq.quantization.stream", ("transformers", "typer", "rich")),
        ("glmq.reporting.verification_page, glmq.reporting.comparison_page", ("torch", "transformers", "numpy")),
    ],
)
def test_importing_a_module_stays_light(module: str, absent: tuple[str, ...]) -> None:
    assert loaded_after(module, absent) == []
