import json
from pathlib import Path

import pytest

from glmq.compression.layouts import Unsharded
from glmq.compression.manifest import (
    MANIFEST,
    CodecKind,
    FileRecord,
    Manifest,
    PartRecord,
    _document_digest,
    checked_bytes,
    read_manifest,
    record_files,
    write_manifest,
)
from glmq.errors import CheckpointError

AGAIN = "the folder is damaged or incomplete, copy it again"
PART = PartRecord(0, "part0-of-1/w.safetensors", 12, "ab", {"a": "cd", "b.gqsc": "ef"}, {"b.gqsc": (3, 4)})
FILES = {"config.json": FileRecord(2, "99aa06d3014798d86001c324468d497f"), "x/y.csv": FileRecord(0, "aa")}
GOOD = Manifest(CodecKind.PORTABLE, Unsharded.SOURCE, 1, "f00", (PART,), FILES)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, GOOD)
    assert read_manifest(tmp_path) == GOOD
    document = json.loads((tmp_path / MANIFEST).read_text())
    assert document["note"] == (
        "W8A8S weights in glmq's own lossless storage form. No serving engine reads it: restore it with "
        "`glmq compress --decompress`."
    )
    assert list(document)[:5] == ["schema", "glmq", "codec", "layout", "world_size"]


def test_files_are_recorded_by_sorted_path(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "big").write_bytes(b"weights")
    (tmp_path / "x" / "b").write_bytes(b"")
    (tmp_path / "config.json").write_bytes(b"{}")
    # xxh3-128 of nothing, from the algorithm's own test vectors
    empty = FileRecord(0, "99aa06d3014798d86001c324468d497f")
    files = record_files(tmp_path, exclude=["x/big"])
    assert list(files) == ["config.json", "x/b"]
    assert files["x/b"] == empty
    assert checked_bytes(tmp_path, "config.json", files["config.json"]) == b"{}"


def test_a_small_file_that_is_altered_or_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    record = record_files(tmp_path, exclude=[])["config.json"]
    (tmp_path / "config.json").write_bytes(b"{ ")
    with pytest.raises(CheckpointError) as caught:
        checked_bytes(tmp_path, "config.json", record)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: its checksum is not the one in {MANIFEST}; {AGAIN}"
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        checked_bytes(tmp_path, "config.json", record)
    assert str(caught.value) == (
        f"{tmp_path / 'config.json'}: cannot be read (No such file or directory), but the manifest lists it; {AGAIN}"
    )


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: has no glmq_manifest.json, so it was not written by `glmq compress`; give the folder that was"
    )


def test_an_altered_manifest_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, GOOD)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == f"{path}: its checksum does not fit its contents; {AGAIN}"


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("codec", "zip", "'zip' is not a valid CodecKind"),
        ("layout", "flat", "'flat' is not a valid Engine"),
        ("world_size", -1, "-1 where a count is needed"),
        ("world_size", True, "True where a count is needed"),
        ("source", 5, "5 where a text is needed"),
        ("parts", {}, "{} where a list is needed"),
        ("parts", [5], "5 where an object is needed"),
        ("parts", [{}], "'matrices'"),
        ("files", {"../x": {}}, "'../x' where a path inside the folder is needed"),
        ("files", {"/x": {}}, "'/x' where a path inside the folder is needed"),
        ("files", {"x": {"bytes": 1}}, "'digest'"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, key: str, value: object, what: str) -> None:
    write_manifest(tmp_path, GOOD)
    path = tmp_path / MANIFEST
    document = json.loads(path.read_text())
    del document["digest"]
    document[key] = value
    path.write_text(json.dumps(document | {"digest": _document_digest(document)}))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == f"{path}: is not a manifest ({what}); {AGAIN}"


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"schema": "glmq.compress/9"}')
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / MANIFEST}: schema is 'glmq.compress/9', this glmq reads 'glmq.compress/1'; use the glmq that wrote it"
    )
