"""What `glmq verify` promises: it passes nothing that it has not looked at, and with checksums it finds every changed bit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import W8A8S, edit_json, quantize
from random_w8a8s import write_stand_in

import glmq
from glmq.checkpoint.checksums import CHECKSUMS, OLD_SCHEMA, SCHEMA, read_checksums
from glmq.checkpoint.json_file import write_json
from glmq.checkpoint.sidecar import PROCESSOR_FILES
from glmq.compression.manifest import MANIFEST, read_manifest, record_files, write_manifest
from glmq.reporting.documents import verification_document


@pytest.fixture(scope="module")
def w8a8s(small: Path, small_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(small, small_stats, tmp_path_factory.mktemp("promises") / "w8a8s", **W8A8S)


@pytest.fixture(scope="module")
def portable(w8a8s: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glmq.compress(w8a8s, out=tmp_path_factory.mktemp("promises") / "portable", codec="portable", tp=2).folder


@pytest.fixture
def copy(w8a8s: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(w8a8s, tmp_path / "copy"))


@pytest.fixture
def packed(portable: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(portable, tmp_path / "packed"))


def verdict(folder: Path, reference: Path | None = None) -> tuple[bool, list[str], dict]:
    """Whether it passed, what is wrong, and the whole document."""
    found = glmq.verify(folder, reference=reference)
    document = json.loads(json.dumps(verification_document(found)))
    assert document["passed"] == found.passed
    return found.passed, [f"{finding.tensor} {finding.message}" for finding in found.findings], document


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


def test_a_pass_says_what_was_checked(w8a8s: Path, small: Path, portable: Path) -> None:
    tensors = len(read_checksums(w8a8s).tensors)
    files = sum(path.suffix != ".safetensors" and path.name != CHECKSUMS for path in w8a8s.iterdir())
    assert verdict(w8a8s)[2]["checked"] == [
        f"names, dtypes, shapes and values of {tensors} tensors",
        f"the bytes of {tensors} tensors and {files} files by glmq_checksums.json",
        "the integers of 10 linears",
    ]
    against = verdict(w8a8s, small)[2]["checked"]
    assert against[-1] == "the integers of 10 linears and their distance from the float weights"
    manifest = read_manifest(portable)
    stored = sum(len(part.tensors) for part in manifest.rank_files)
    assert verdict(portable)[2]["checked"] == [
        f"the bytes of {stored} tensors and {len(manifest.files)} files by glmq_manifest.json"
    ]


def test_what_was_left_out_is_not_said_to_be_checked(copy: Path) -> None:
    tensors = len(read_checksums(copy).tensors)
    every = f"names, dtypes, shapes and values of {tensors} tensors"
    edit_json(copy / "quant_model_description.json", lambda d: d.update(model_quant_type=3))
    document = verdict(copy)[2]
    assert every not in document["checked"]
    assert f"{every} (an error in a file that says what they must be)" in document["not_checked"]
    (weights,) = copy.glob("*.safetensors")
    weights.write_bytes(b"")
    document = verdict(copy)[2]
    assert document["checked"] == []
    assert document["not_checked"][0] == "tensors and integers (the weight files cannot be read)"


def touch(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).touch()


STRAYS = {
    "a file like a part": ("part0-of-1", touch("part0-of-1")),
    "an empty part": ("part0-of-1", lambda folder: (folder / "part0-of-1").mkdir()),
    "any part": ("partial-of-it", touch("partial-of-it")),
    "a file like a rank's": ("model-rank-0-part-0.safetensors", touch("model-rank-0-part-0.safetensors")),
    "any rank": ("model-rank-x-part-y.safetensors", touch("model-rank-x-part-y.safetensors")),
    "a manifest": (MANIFEST, touch(MANIFEST)),
}


@pytest.mark.parametrize(("name", "add"), STRAYS.values(), ids=STRAYS)
def test_a_folder_of_two_kinds_is_an_error_and_its_weights_are_checked_all_the_same(
    copy: Path, name: str, add: Callable[[Path], object]
) -> None:
    add(copy)
    (weights,) = copy.glob("quant_model_weight*.safetensors")
    flip(weights, weights.stat().st_size - 5)
    passed, wrong, _ = verdict(copy)
    assert not passed
    assert any(f" {name} does not belong to a quantized checkpoint" in sentence for sentence in wrong)
    if not name.endswith(
        ".safetensors"
    ):  # an unreadable weight file, itself an error, keeps the others from being read
        assert any("its bytes were changed since it was written" in sentence for sentence in wrong)


def test_weights_beside_compressed_ones_are_an_error(packed: Path, w8a8s: Path) -> None:
    (weights,) = w8a8s.glob("*.safetensors")
    shutil.copy(weights, packed)
    passed, wrong, _ = verdict(packed)
    assert not passed
    assert any(f" {MANIFEST} does not belong to a quantized checkpoint" in sentence for sentence in wrong)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "none": lambda folder: None,
    "truncated": lambda folder: (path := next(folder.glob("part1*/*.gqsc.*"))).write_bytes(path.read_bytes()[:-9]),
    "removed": lambda folder: shutil.rmtree(folder / "part1-of-2"),
    "flipped": lambda folder: flip(path := next(folder.glob("part1*/*.gqsc.*")), path.stat().st_size // 2),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_portable_folder_without_its_manifest_never_passes(packed: Path, damage: Callable[[Path], object]) -> None:
    damage(packed)
    (packed / MANIFEST).unlink()
    passed, wrong, document = verdict(packed)
    assert not passed
    assert document["checked"] == []
    assert any(f"{MANIFEST} is missing, `glmq compress` writes one" in sentence for sentence in wrong)


@pytest.mark.parametrize("name", PROCESSOR_FILES)
def test_a_portable_folder_without_what_an_engine_needs_never_passes(packed: Path, name: str) -> None:
    manifest = read_manifest(packed)
    (packed / name).unlink()
    write_manifest(
        packed, replace(manifest, files={file: manifest.files[file] for file in manifest.files if file != name})
    )
    assert verdict(packed)[:2] == (False, [f" {name} is missing; the engine cannot build its processor without it"])


@pytest.mark.slow
def test_every_file_of_the_output_is_covered(w8a8s: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in w8a8s.iterdir() if path.name != CHECKSUMS)
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "glmq_report.json", "glmq_report.csv"} <= {*names}
    own = [
        name for name in names if name.endswith(".safetensors") or name.startswith(("config", "quant_model", "glmq"))
    ]
    for together in (*([name] for name in own), [name for name in names if name not in own]):
        folder = tmp_path / "flipped"
        shutil.copytree(w8a8s, folder)
        for name in together:
            size = (folder / name).stat().st_size
            flip(folder / name, 30 if name.endswith(".safetensors") else size - 2)
        passed, wrong, _ = verdict(folder)
        assert not passed, together
        for name in together:
            assert any(name in sentence for sentence in wrong), (name, wrong)
        shutil.rmtree(folder)


def test_a_changed_byte_of_the_weight_files_header_is_found(copy: Path) -> None:
    (weights,) = copy.glob("*.safetensors")
    raw = weights.read_bytes()
    weights.write_bytes(raw.replace(b'"format":"pt"', b'"format":"qt"', 1))
    assert weights.read_bytes() != raw
    passed, wrong, _ = verdict(copy)
    assert not passed
    assert any(f"{weights.name} has checksum" in w and "its header was changed" in w for w in wrong)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("config.json", lambda d: d.update(auto_map={"AutoModel": "evil.Model"})),
        ("config.json", lambda d: d["text_config"].update(rms_norm_eps=1e-3)),
        ("config.json", lambda d: d.update(eos_token_id=[1])),
        ("preprocessor_config.json", lambda d: d.update(image_mean=[0.1, 0.2, 0.3])),
        ("tokenizer.json", lambda d: d["model"].update(merges=d["model"]["merges"][1:])),
    ],
)
def test_an_edited_config_or_side_file_is_found_without_a_reference(
    copy: Path, name: str, edit: Callable[[dict], object]
) -> None:
    edit_json(copy / name, edit)
    passed, wrong, _ = verdict(copy)
    assert not passed
    assert any(f" {name} has checksum" in sentence for sentence in wrong)


def test_a_lost_side_file_is_found_and_one_that_glmq_did_not_write_is_listed(copy: Path) -> None:
    (copy / "modeling_x.py").write_text("import os")
    passed, wrong, document = verdict(copy)
    assert passed, wrong
    assert "modeling_x.py (not written by glmq)" in document["not_checked"]
    (copy / "chat_template.jinja").unlink()
    passed, wrong, _ = verdict(copy)
    assert not passed
    assert any("chat_template.jinja is missing, glmq_checksums.json lists it" in sentence for sentence in wrong)


def test_parts_without_the_processors_files_fail_without_a_reference(small: Path, w8a8s: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sc"
    glmq.compress(w8a8s, out=folder, codec="ascend", options=glmq.CompressionOptions(executor=write_stand_in(tmp_path)))
    assert verdict(folder)[0]
    for path in (*folder.glob("glmq*"), folder / "README.md", folder / "preprocessor_config.json"):
        path.unlink(missing_ok=True)  # as the engine's own compress command leaves it
    passed, wrong, _ = verdict(folder)
    assert not passed
    assert wrong == [" preprocessor_config.json is missing; the engine cannot build its processor without it"]


def test_checksums_of_an_older_glmq_are_read_and_what_they_lack_is_said(copy: Path) -> None:
    import xxhash

    checksums = read_checksums(copy)
    document = {"schema": OLD_SCHEMA, "glmq": "0.1", "tensors": dict(checksums.tensors)}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    write_json(copy / CHECKSUMS, {**document, "digest": digest}, indent=1)
    edit_json(copy / "glmq_report.json", lambda report: report.update(checksums=digest))
    passed, wrong, found = verdict(copy)
    assert passed, wrong
    assert any("config.json and side files" in text for text in found["not_checked"])
    (weights,) = copy.glob("*.safetensors")
    flip(weights, weights.stat().st_size - 5)
    assert not verdict(copy)[0]
    assert json.loads((copy / CHECKSUMS).read_text())["schema"] != SCHEMA


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_compressed_folders_are_held_to_their_reference_with_config_and_side_files(
    packed: Path, w8a8s: Path, name: str
) -> None:
    if name == "config.json":
        edit_json(packed / name, lambda d: d["text_config"].update(num_attention_heads=2))
    else:
        (packed / name).write_text("{}")
    manifest = read_manifest(packed)  # signed again by somebody who knows glmq
    files = record_files(packed, exclude=[MANIFEST, *(part.file for part in manifest.rank_files)])
    (packed / MANIFEST).unlink()
    write_manifest(packed, type(manifest)(**{f: getattr(manifest, f) for f in manifest.__slots__} | {"files": files}))
    assert verdict(packed)[0]
    passed, wrong, _ = verdict(packed, w8a8s)
    assert not passed
    assert any("num_attention_heads" in w if name == "config.json" else f"{name} differs" in w for w in wrong)
