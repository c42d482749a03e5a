import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from glmq.checkpoint.checksums import (
    CHECKSUMS,
    cover_new_files,
    document_digest,
    read_checksums,
    write_checksums,
)
from glmq.errors import CheckpointError
from glmq.version import __version__

TENSORS = {"layers.9.weight": "1" * 32, "layers.10.weight": "0" * 32}
SOURCE = {"layers.9.weight": "2" * 32, "layers.10.weight": "3" * 32}


def test_checksums_are_written_by_sorted_name_with_their_own_digest(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    for name in ("b.json", "a.txt", ".hidden", CHECKSUMS):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path, TENSORS, SOURCE)
    text = (tmp_path / CHECKSUMS).read_text()
    raw = (tmp_path / "model.safetensors").read_bytes()
    headers = {"model.safetensors": xxhash.xxh3_128_hexdigest(raw[:-8])}
    files = {name: xxhash.xxh3_128_hexdigest(name.encode()) for name in ("a.txt", "b.json")}
    document = {
        "schema": "glmq.checksums/2", "glmq": __version__, "tensors": TENSORS, "headers": headers, "files": files,
        "source": SOURCE,
    }  # fmt: skip
    digest = xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    tensors, source = ({name: d[name] for name in ("layers.10.weight", "layers.9.weight")} for d in (TENSORS, SOURCE))
    assert text == json.dumps({**document, "tensors": tensors, "source": source, "digest": digest}, indent=1) + "\n"
    assert (tmp_path / CHECKSUMS).stat().st_mode & 0o777 == 0o640
    found = read_checksums(tmp_path)
    assert (found.tensors, found.digest, found.files, found.source) == (TENSORS, digest, files, SOURCE)
    (tmp_path / "c.csv").write_text("new")
    cover_new_files(tmp_path)
    again = read_checksums(tmp_path)
    assert (again.tensors, again.source, list(again.files)) == (TENSORS, SOURCE, ["a.txt", "b.json", "c.csv"])
    assert again.tensors_digest == found.tensors_digest != again.digest


def test_checksums_of_a_glmq_that_did_not_note_the_source_are_read(tmp_path: Path) -> None:
    write_checksums(tmp_path, TENSORS, SOURCE)
    document = json.loads((tmp_path / CHECKSUMS).read_text())
    del document["digest"], document["source"]
    (tmp_path / CHECKSUMS).write_text(json.dumps(document | {"digest": document_digest(document)}))
    found = read_checksums(tmp_path)
    assert (found.tensors, found.source) == (TENSORS, {})


def test_a_checksum_that_is_no_text_is_refused_even_if_signed(tmp_path: Path) -> None:
    write_checksums(tmp_path, TENSORS, SOURCE)
    path = tmp_path / CHECKSUMS
    document = json.loads(path.read_text())
    del document["digest"]
    name = next(iter(document["tensors"]))
    document["tensors"][name] = 5
    path.write_text(json.dumps(document | {"digest": document_digest(document)}))
    with pytest.raises(CheckpointError) as caught:
        read_checksums(tmp_path)
    assert str(caught.value) == f"{path}: tensors: {name!r} is 5, wanted a text; copy it again"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1111", "1112", "its digest does not fit its contents; it was altered, copy it again"),
        ("layers.9", "layers.8", "its digest does not fit its contents; it was altered, copy it again"),
        ("sums/2", "sums/3", "schema is 'glmq.checksums/3', this glmq reads 'glmq.checksums/2'; use the glmq that wrote it"),
    ],
)  # fmt: skip
def test_an_altered_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_checksums(tmp_path, TENSORS, SOURCE)
    path = tmp_path / CHECKSUMS
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CheckpointError) as caught:
        read_checksums(tmp_path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_digest_is_of_the_text_that_docs_formats_describes() -> None:
    text = b'{"a\\u00e9":[1,true],"b":"\\ud834\\udd1e"}'
    assert document_digest({"b": "\U0001d11e", "aé": [1, True]}) == xxhash.xxh3_128_hexdigest(text)
