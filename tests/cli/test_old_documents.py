"""Who reads a JSON document of glmq finds tomorrow what an older one had: each key, with the same kind of value."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from cli.command_line import run

import glmq
from glmq.checkpoint.folder import OutputFolder
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.run_note import RunNote

FILES = Path(__file__).parents[1] / "old_files"
PAGES = Path(__file__).parents[2] / "docs"
FORMATS, REPORT = PAGES / "formats.md", PAGES / "report.md"
SCHEMA = re.compile(r'"(glmq\.[a-z-]+/\d+)"')
SECTIONS = {
    "statistics.json": {"statistics-1/statistics.json", "statistics-2/statistics.json", "calibrate-1.json"},
    "glmq_report.json": {"report-1/glmq_report.json", "quantize-1.json"},
    "glmq_sweep.json": {"sweep-1.json"},
    "glmq_checksums.json": {"checksums-1/glmq_checksums.json", "checksums-2/glmq_checksums.json"},
    "glmq_manifest.json": {"portable-1/glmq_manifest.json"},
    "glmq_compress_report.json": {"compress-report-1.json"},
    "glmq_slices.json": {"portable-1/glmq_source/glmq_slices.json"},
    "inspect --json": {"inspect-1.json", "inspect-statistics-1.json"},
    "inspect A B --json": {"compare-1.json"},
    "inspect A B --json, of statistics": {"compare-statistics-1.json"},
    "verify --json": {"verify-1.json", "verify-checks-1.json"},
    "ask --json": {"ask-1.json"},
    "doctor --json": {"doctor-1.json"},
    "clean --json": {"clean-1.json"},
    "compress --decompress --json": {"decompress-1.json"},
    "--dry-run --json": {
        *("calibration-plan-1.json", "plan-1.json", "sweep-plan-1.json", "compress-plan-1.json"),
        "decompress-plan-1.json",
    },
    "Events": {"events-1.jsonl"},
}
"""Which old files a section of the page of formats speaks of."""
MAPS = {"versions", "packages", "disks", "kernels", "counts", "schemes", "weights", "inputs"}
"""Keys whose objects have names of the data for keys."""
KINDS = {dict: "object", list: "list", bool: "truth", int: "number", float: "number", str: "text", type(None): "null"}


def test_every_schema_that_glmq_names_has_an_old_file_and_is_among_the_formats() -> None:
    named = {name for path in Path(glmq.__file__).parent.rglob("*.py") for name in SCHEMA.findall(path.read_text())}
    kept = {name for path in FILES.rglob("*.json*") for name in SCHEMA.findall(path.read_text())}
    assert named == kept
    said = FORMATS.read_text(encoding="utf-8")
    older = {"glmq.statistics/1", "glmq.checksums/1"}
    assert {name for name in named - older if f"`{name}`" not in said} == set()


def test_every_key_of_an_old_document_is_in_the_section_of_its_format() -> None:
    documents = {str(path.relative_to(FILES)) for path in FILES.rglob("*.json*") if SCHEMA.search(path.read_text())}
    assert set().union(*SECTIONS.values()) == documents
    for title, names in SECTIONS.items():
        (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", FORMATS.read_text(), flags=re.M | re.S)
        keys = {key for name in names for key in read_old(FILES / name)}
        assert (title, keys - {"schema"} - named(section)) == (title, set())


def named(text: str) -> set[str]:
    """What a page sets in backquotes."""
    return set(re.findall(r"`([^`]+)`", text))


def read_old(path: Path) -> dict[str, object]:
    text = path.read_text(encoding="utf-8")
    return by_event(text) if path.suffix == ".jsonl" else json.loads(text)


def documents(folder: Path, small: Path, stats: Path, pictures: Path) -> dict[str, object]:
    """What glmq of today writes and prints of the small model, by the name of the old file."""

    def said(*args: object) -> object:
        return json.loads(run(*args, "--json").stdout)

    w8a8s, packed, unpacked = folder / "w8a8s", folder / "packed", folder / "unpacked"
    sparse = ("--model_path", small, "--is_lowbit", "True", "--w_bit", 4, "--torch_dtype", "fp16")
    events = ("--events", folder / "events")
    given = ("--calib_images", pictures, "--limit", 1, "--no-texts")
    recipes = folder / "recipes.toml"
    recipes.write_text('[[recipe]]\nname = "plain"\nw_bit = 8\n')
    swept = (recipes, "--model-path", small, "--stats", stats, "--out", folder / "swept", "--calib-images", pictures)
    found = {
        "calibration-plan": said("calibrate", "--model-path", small, "--stats", folder / "stats", *given, "--dry-run"),
        "calibrate": said("calibrate", "--model-path", small, "--stats", folder / "stats", *given),
        "plan": said("quantize", *sparse, "--save_directory", w8a8s, "--stats", stats, "--dry-run"),
        "quantize": said("quantize", *sparse, "--save_directory", w8a8s, *given, *events),
        "compress-plan": said("compress", w8a8s, packed, "--codec", "portable", "--tp", 1, "--dry-run"),
        "compress-report": said("compress", w8a8s, packed, "--codec", "portable", "--tp", 1, *events),
        "decompress-plan": said("compress", "--decompress", packed, unpacked, "--dry-run"),
        "decompress": said("compress", "--decompress", packed, unpacked),
        "inspect": said("inspect", w8a8s, "--values"),
        "inspect-statistics": said("inspect", stats),
        "compare": said("inspect", small, w8a8s),
        "compare-statistics": said("inspect", stats, stats),
        "verify": said("verify", w8a8s, "--reference", small, "--calib-images", pictures, "--limit", 1, "--max-kl", 0),
        "sweep-plan": said("sweep", *swept, "--limit", 1, "--dry-run"),
        "sweep": said("sweep", *swept, "--limit", 1),
        "verify-checks": said("verify", "--list-checks"),
        "ask": said("ask", small, "--image", pictures / "00.png", "--prompt", "What?", "--max-new-tokens", 2),
        "doctor": said("doctor"),
    }
    with (
        suppress(KeyboardInterrupt),
        OutputFolder(folder / "a", overwrite=False, run=RunNote("quantize", "", {})) as out,
    ):
        Journal(out.work, {}).record("a block", {})
        raise KeyboardInterrupt
    found["clean"] = said("clean", folder / "a")
    found["events"] = by_event((folder / "events").read_text(encoding="utf-8"))
    return found


def by_event(lines: str) -> dict[str, list[object]]:
    """The lines of a file of events, by the kind of event."""
    found: dict[str, list[object]] = {}
    for line in map(json.loads, lines.splitlines()):
        found.setdefault(line["event"], []).append(line)
    return found


def shape(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Every place of a document and a kind of what stands there; items of a list, and of a map, are one place."""
    yield place, KINDS[type(value)]
    if isinstance(value, list):
        for item in value:
            yield from shape(item, f"{place}[]")
    elif isinstance(value, dict):
        is_map = place.rpartition(".")[2] in MAPS
        for key, item in value.items():
            yield from shape(item, f"{place}[]" if is_map else f"{place}.{key}")


def kinds(document: object) -> dict[str, set[str]]:
    """What stands at each place of a document; a null tells nothing."""
    found: dict[str, set[str]] = {}
    for place, kind in shape(document):
        found.setdefault(place, set()).update({kind} - {"null"})
    return found


def missed(old: object, new: object) -> list[str]:
    """Where a reader of the old document finds nothing in the new one, or what it did not expect."""
    has = kinds(new)
    return sorted(
        place for place, wanted in kinds(old).items() if place not in has or (wanted and not has[place] <= wanted)
    )


def test_documents_of_one_schema_have_the_same_keys_or_all_that_the_others_have() -> None:
    by_schema: dict[str, list[set[str]]] = {}
    for path in FILES.rglob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and "schema" in document:
            by_schema.setdefault(document["schema"], []).append(set(document))
    shared = {schema: sorted(keys, key=len) for schema, keys in by_schema.items() if len(keys) > 1}
    assert {"glmq.inspect/1", "glmq.quantize/1"} <= set(shared)
    assert [schema for schema, keys in shared.items() if any(not a <= b for a, b in pairwise(keys))] == []


@pytest.fixture(scope="module")
def today(
    small: Path, small_stats: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    return documents(tmp_path_factory.mktemp("today"), small, small_stats, pictures)


@pytest.mark.slow
def test_what_an_older_document_has_is_in_one_of_today(today: dict[str, object]) -> None:
    olds = {path.name.rpartition("-")[0]: path for path in FILES.glob("*.json*")}
    assert set(olds) == set(today)
    for name, path in olds.items():
        assert (name, missed(read_old(path), today[name])) == (name, [])


@pytest.mark.slow
def test_every_key_of_today_at_any_depth_is_on_a_page(today: dict[str, object]) -> None:
    """Columns of the error table are on the page of the report."""
    on_pages = named(FORMATS.read_text(encoding="utf-8") + REPORT.read_text(encoding="utf-8"))
    for name, document in today.items():
        keys = {place.rpartition(".")[2].removesuffix("[]") for place, _ in shape(document)}
        assert (name, {key.removesuffix("[]") for key in keys} - {"", "schema"} - on_pages) == (name, set())


def test_a_key_that_is_gone_or_of_another_kind_is_missed() -> None:
    old = {"a": [{"b": 1, "c": None}], "versions": {"torch": "2"}}
    assert missed(old, {"a": [{"b": 1.5, "c": "x"}, {}], "versions": {"numpy": "1"}, "d": 1}) == []
    assert missed(old, {"a": [{"b": "1"}], "versions": {}}) == [".a[].b", ".a[].c", ".versions[]"]
