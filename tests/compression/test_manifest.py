import json
from pathlib import Path

import pytest

from glmq.checkpoint.checksums import document_digest
from glmq.compression.layouts import Unsharded
from glmq.compression.manifest import (
    MANIFEST,
    CodecKind,
    FileRecord,
    Manifest,
    RankFile,
    checked_bytes,
    read_manifest,
    record_files,
    write_manifest,
)
from glmq.errors import CheckpointError

AGAIN = "the folder is damaged or incomplete, copy it again"
PART = RankFile(0, "part0-of-1/w.safetensors", 12, "ab", {"a": "cd", "b.gqsc": "ef"}, {"b.gqsc": (3, 4)})
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


RANK = {"rank": 0, "file": "w", "bytes": 8, "header": "", "tensors": {}, "matrices": {}}


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
    assert str(caught.value) == (f"{tmp_path / 'config.json'}: is no file, but the manifest lists it; {AGAIN}")


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
        ("codec", "zip", "'codec' is 'zip', wanted one of the names that this glmq knows"),
        ("layout", "flat", "'layout' is 'flat', wanted one of the names that this glmq knows"),
        ("world_size", -1, "'world_size' is -1, wanted a count"),
        ("world_size", True, "'world_size' is True, wanted a count"),
        ("world_size", 10**30, f"'world_size' is {10**30}, wanted a count"),
        ("source", 5, "'source' is 5, wanted a text"),
        ("parts", {}, "'parts' is {}, wanted a list of objects"),
        ("parts", [5], "'parts' is [5], wanted a list of objects"),
        ("parts", [{}], "parts 0: 'tensors' is missing, wanted an object"),
        ("parts", [RANK | {"matrices": {"w": [3]}}], "parts 0: matrices: 'w' is [3], wanted a list of 2 counts"),
        ("parts", [RANK | {"matrices": {"w": [0, 3]}}], "'w' holds 0 x 3 weights, which no linear has"),
        ("parts", [RANK | {"matrices": {"w": [2**62, 8]}}], f"'w' holds {2**62} x 8 weights, which no linear has"),
        ("parts", [RANK | {"tensors": {"w": 1}}], "parts 0: tensors: 'w' is 1, wanted a text"),
        ("parts", [RANK | {"file": "../w"}], "lists '../w', which is no path inside the folder"),
        ("files", {"../x": {}}, "lists '../x', which is no path inside the folder"),
        ("files", {"/x": {}}, "lists '/x', which is no path inside the folder"),
        ("files", {"x\x1b[2J": {}}, r"lists 'x\x1b[2J', which is no path inside the folder"),
        ("files", {"x": {"bytes": 1}}, "files: x: 'digest' is missing, wanted a text"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, key: str, value: object, what: str) -> None:
    write_manifest(tmp_path, GOOD)
    path = tmp_path / MANIFEST
    document = json.loads(path.read_text())
    del document["digest"]
    document[key] = value
    path.write_text(json.dumps(document | {"digest": document_digest(document)}))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == f"{path}: {what}; {AGAIN}"


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"schema": "glmq.compress/9"}')
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / MANIFEST}: schema is 'glmq.compress/9', this glmq reads 'glmq.compress/1'; use the glmq that wrote it"
    )
