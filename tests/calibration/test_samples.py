import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import PIL
import pytest
from PIL import Image

from glmq.calibration.samples import (
    WANTED_IMAGES,
    Rejected,
    Sample,
    default_images,
    digest,
    list_images,
    open_image,
    read_samples,
)
from glmq.errors import PictureError, SampleError

PROMPT = "What is it?"
SUFFIXES = "bmp, gif, jpeg, jpg, png, tif, tiff, webp"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, made in another order than their names'."""
    made = tmp_path / "images"
    made.mkdir()
    for shade, name in [(30, "c.png"), (10, "a.jpg"), (20, "B.png")]:
        Image.new("RGB", (40, 30), (shade, 0, 0)).save(made / name)
    return made


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def sha256(*parts: bytes) -> str:
    """Over each part's length in 8 little-endian bytes and the part itself."""
    joined = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.sha256(joined).hexdigest()


def test_images_come_sorted_by_name_whatever_the_folders_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list_images(folder, PROMPT, skip_bad=False, limit=None)
    assert [sample.name for sample in found.samples] == ["B.png", "a.jpg", "c.png"]
    names = [folder / "a.jpg", folder / "c.png", folder / "B.png"]
    for order in (names, names[::-1]):
        monkeypatch.setattr(Path, "iterdir", lambda _, order=order: iter(order))
        assert list_images(folder, PROMPT, skip_bad=False, limit=None) == found


def test_an_image_is_a_sample_with_the_prompt_and_no_answer(folder: Path) -> None:
    sample = list_images(folder, PROMPT, skip_bad=False, limit=None).samples[0]
    path = folder / "B.png"
    assert sample == Sample("B.png", path, PROMPT, None, sha256(path.read_bytes(), PROMPT.encode(), b""))
    image = open_image(sample)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (40, 30), (20, 0, 0))


def test_the_hash_of_a_sample_separates_its_parts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "s.jsonl", {"prompt": "ab", "text": "c"}, {"prompt": "a", "text": "bc"})
    first, second = read_samples(path, limit=None).samples
    assert first.digest == sha256(b"", b"ab", b"c")
    assert second.digest == sha256(b"", b"a", b"bc") != first.digest


def test_the_hash_of_a_set_depends_on_the_order_and_not_on_names(folder: Path) -> None:
    samples = list_images(folder, PROMPT, skip_bad=False, limit=None).samples
    assert digest(samples, None) == hashlib.sha256("".join(s.digest for s in samples).encode()).hexdigest()
    assert digest(samples, None) != digest(samples[::-1], None)
    shutil.copytree(folder, folder.with_name("other"))
    others = list_images(folder.with_name("other"), PROMPT, skip_bad=False, limit=None).samples
    assert digest(others, None) == digest(samples, None)


def test_the_hash_of_a_set_says_how_much_the_model_answers(folder: Path) -> None:
    samples = list_images(folder, PROMPT, skip_bad=False, limit=None).samples
    assert len({digest(samples, tokens) for tokens in (None, 1, 2)}) == 3


def test_a_limit_takes_the_first_images(folder: Path) -> None:
    assert [s.name for s in list_images(folder, PROMPT, skip_bad=False, limit=2).samples] == ["B.png", "a.jpg"]


def test_texts_and_hidden_files_and_folders_beside_the_images_are_passed_over(folder: Path) -> None:
    for name in ("SOURCES.md", "notes.TXT", "a.json", "answers.jsonl", ".DS_Store"):
        (folder / name).write_text("no image")
    (folder / "more").mkdir()
    found = list_images(folder, PROMPT, skip_bad=False, limit=None)
    assert [sample.name for sample in found.samples] == ["B.png", "a.jpg", "c.png"]
    assert found.rejected == ()


def test_a_file_that_decodes_is_an_image_whatever_its_name(folder: Path) -> None:
    shutil.copy(folder / "c.png", folder / "z.dat")
    assert [s.name for s in list_images(folder, PROMPT, skip_bad=False, limit=None).samples][-1] == "z.dat"


def test_files_that_do_not_decode_stop_the_run_by_name(folder: Path) -> None:
    (folder / "empty.png").touch()
    cut = (folder / "c.png").read_bytes()
    (folder / "cut.png").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(SampleError) as caught:
        list_images(folder, PROMPT, skip_bad=False, limit=None)
    assert str(caught.value) == (
        f"{folder}: 2 of 5 files are not usable images: "
        "cut.png (is cut off, its end is missing; copy or download it again); empty.png (is empty); "
        "remove them or pass --skip-bad-images"
    )


def test_a_prompt_that_is_no_utf8_is_refused(folder: Path) -> None:
    with pytest.raises(SampleError) as caught:
        list_images(folder, os.fsdecode("Était-".encode("latin-1")), skip_bad=False, limit=None)
    assert str(caught.value) == (
        r"the prompt '\udcc9tait-' has half of a surrogate pair, which is no character; write it in UTF-8"
    )


def test_at_most_five_bad_files_are_listed(folder: Path) -> None:
    for number in range(7):
        (folder / f"bad{number}.png").write_bytes(b"?")
    with pytest.raises(SampleError) as caught:
        list_images(folder, PROMPT, skip_bad=False, limit=None)
    reason = f"(is no picture that Pillow {PIL.__version__} reads)"
    listed = "; ".join(f"bad{number}.png {reason}" for number in range(5))
    assert str(caught.value) == (
        f"{folder}: 7 of 10 files are not usable images: {listed} and 2 more; remove them or pass --skip-bad-images"
    )


def test_bad_files_are_left_out_when_asked_to(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"?")
    found = list_images(folder, PROMPT, skip_bad=True, limit=None)
    assert [sample.name for sample in found.samples] == ["B.png", "a.jpg", "c.png"]
    assert found.rejected == (Rejected("bad.png", f"is no picture that Pillow {PIL.__version__} reads"),)


def test_a_dangling_link_is_named_and_not_passed_over(folder: Path) -> None:
    os.symlink(folder / "nowhere.png", folder / "link.png")
    assert list_images(folder, PROMPT, skip_bad=True, limit=None).rejected == (
        Rejected("link.png", "a link to a file that is not there"),
    )


def test_a_file_without_permission_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(SampleError) as caught:
        list_images(folder, PROMPT, skip_bad=False, limit=None)
    assert "B.png (no permission to read it)" in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SampleError) as caught:
        list_images(tmp_path / "none", PROMPT, skip_bad=False, limit=None)
    assert str(caught.value) == (
        f"{tmp_path / 'none'}: no such folder; give a folder of images as --calib-images, "
        "or a list of samples as --calib-samples"
    )


def test_a_file_for_a_folder_and_a_folder_for_a_file_are_said_so(folder: Path) -> None:
    with pytest.raises(SampleError) as caught:
        list_images(folder / "c.png", PROMPT, skip_bad=False, limit=None)
    assert str(caught.value) == (
        f"{folder / 'c.png'}: is a file; give the folder of the images as --calib-images, "
        "or a list of samples as --calib-samples"
    )
    with pytest.raises(SampleError) as caught:
        read_samples(folder, limit=None)
    assert str(caught.value) == f"{folder}: is a folder; give one of images as --calib-images, or a file of samples"


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_folder_without_images_is_refused(skip_bad: bool, tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(SampleError) as caught:
        list_images(tmp_path, PROMPT, skip_bad=skip_bad, limit=None)
    assert str(caught.value) == (
        f"{tmp_path}: holds no image ({SUFFIXES} are read); put some there, 30 are wanted for accuracy"
    )


def test_a_folder_of_which_everything_is_left_out_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.png").touch()
    with pytest.raises(SampleError) as caught:
        list_images(tmp_path, PROMPT, skip_bad=True, limit=None)
    assert str(caught.value) == f"{tmp_path}: holds no image that can be used: bad.png (is empty)"


def test_glmqs_own_pictures_are_as_many_as_are_wanted_small_and_each_with_its_source() -> None:
    found = list_images(default_images(), PROMPT, skip_bad=False, limit=None).samples
    assert len(found) == WANTED_IMAGES
    sources = (default_images() / "SOURCES.md").read_text(encoding="utf-8")
    assert [sample.name for sample in found] == sorted(re.findall(r"^\| (\S+\.jpg) \|", sources, flags=re.MULTILINE))
    assert all(sample.image is not None and max(open_image(sample).size) <= 640 for sample in found)
    assert sum(path.stat().st_size for path in default_images().iterdir()) < 6 * 2**20


def test_lines_keep_their_order_and_may_leave_fields_out(folder: Path) -> None:
    path = write_lines(
        folder / "s.jsonl",
        {"text": "plain text"},
        "",
        {"image": "c.png", "prompt": PROMPT, "text": "An answer."},
        {"image": None, "prompt": PROMPT},
        {"image": "a.jpg", "prompt": None, "text": None},
    )
    found = read_samples(path, limit=None)
    assert found.rejected == ()
    assert [(s.name, s.image, s.prompt, s.answer) for s in found.samples] == [
        ("s.jsonl:1", None, None, "plain text"),
        ("s.jsonl:3", folder / "c.png", PROMPT, "An answer."),
        ("s.jsonl:4", None, PROMPT, None),
        ("s.jsonl:5", folder / "a.jpg", None, None),
    ]
    assert found.samples[1].digest == sha256((folder / "c.png").read_bytes(), PROMPT.encode(), b"An answer.")
    assert read_samples(path, limit=2).samples == found.samples[:2]
    assert open_image(found.samples[0]) is None


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_only_line_feeds_separate_lines_and_a_byte_order_mark_is_skipped(
    line_end: str, start: bytes, tmp_path: Path
) -> None:
    texts = ["one\u2028paragraph", "next\x85line", "last"]
    lines = line_end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "s.jsonl").write_bytes(start + lines.encode())
    assert [sample.answer for sample in read_samples(tmp_path / "s.jsonl", limit=None).samples] == texts


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{'image': 1}", "is not valid JSON (Expecting property name enclosed in double quotes in column 2)"),
        ("[1]", "is a JSON list, an object is needed"),
        ('"a.png"', "is a JSON str, an object is needed"),
        ('{"answer": "x", "text": "y"}', "has both text and answer, which mean the same; give one of them"),
        ('{"promt": "x", "text": "y"}', "unknown key 'promt'; known are image, prompt, text, and messages or conversations"),
        ('{"image": 3}', "image is 3, a string or null is needed"),
        ('{"text": ["a"]}', "text is ['a'], a string or null is needed"),
        ("{}", "has neither image nor prompt nor text; give at least one"),
        ('{"image": null, "prompt": "", "text": null}', "has neither image nor prompt nor text; give at least one"),
        ('{"text": "' + "\\ud800" + '"}', "is not valid JSON ('\\ud800' has half of a surrogate pair, which is no character)"),
        ("[" * 9999, "is not valid JSON (more than 64 lists and objects lie within each other)"),
        ('{"text": ' + "9" * 5000 + "}", "is not valid JSON (a number has 5000 digits, 40 are read)"),
        ('{"text": [' + "9," * 99 + "9]}", f"text is [{'9, ' * 19}9,, a string or null is needed"),
        ('{"image": "."}', "image . is not usable (no regular file)"),
        ('{"text": "a", "text": "b"}', "is not valid JSON (the key 'text' appears twice)"),
        ('{"image": "none.png"}', "image none.png is not usable (no such file in FOLDER, from where names of images are "
         "followed)"),
        ('{"image": "a\\u0000.png"}', "image a\\x00.png has a name that no file can have"),
        ('{"image": "s.jsonl"}', "image s.jsonl is not usable (is text (JSON or XML), perhaps what a failed "
         "download left; download it again)"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_by_its_number(line: str, what: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "s.jsonl", {"text": "good"}, "", line)
    with pytest.raises(SampleError) as caught:
        read_samples(path, limit=None)
    assert str(caught.value) == f"{path}, line 3: {what.replace('FOLDER', str(tmp_path))}"


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "s.jsonl", "", "  ")
    with pytest.raises(SampleError) as caught:
        read_samples(path, limit=None)
    assert str(caught.value) == f"{path}: holds no sample; write one JSON object a line with image, prompt or text"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    with pytest.raises(SampleError) as caught:
        read_samples(path, limit=None)
    assert str(caught.value) == (
        f"{path}: cannot be read (No such file or directory); check the path and its permissions"
    )


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.jsonl")
    with pytest.raises(SampleError) as caught:
        read_samples(tmp_path / "s.jsonl", limit=None)
    assert str(caught.value) == f"{tmp_path / 's.jsonl'}: is a pipe, a regular file is needed; give the file itself"


def test_a_file_of_endless_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmq.calibration.samples_file.MAX_LINES_BYTES", 2**20)
    path = tmp_path / "s.jsonl"
    path.write_bytes(b" " * (2**20 + 1))
    with pytest.raises(SampleError) as caught:
        read_samples(path, limit=None)
    assert str(caught.value) == f"{path}: has more than 1 MiB, which no calibration needs; give fewer or shorter lines"


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"text": "a"}\n\xff')
    with pytest.raises(SampleError) as caught:
        read_samples(path, limit=None)
    assert str(caught.value) == (
        f"{path}, line 2: is not UTF-8 text ('utf-8' codec can't decode byte 0xff in position 14: invalid start byte); "
        "give a JSON-lines file as --calib-samples"
    )


def test_memory_that_is_used_up_is_no_defect_of_a_picture(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used_up(path: Path) -> None:
        raise MemoryError

    shutil.copy(pictures / "00.png", tmp_path)
    monkeypatch.setattr(Image, "open", used_up)
    with pytest.raises(MemoryError):
        list_images(tmp_path, "What?", skip_bad=True, limit=None)


def test_what_systems_leave_beside_pictures_is_passed_over(folder: Path) -> None:
    beside = ("Thumbs.db", "desktop.ini", "labels.CSV", "a.xml", "._a.jpg", "IMG_1.AAE", "data.yaml", "Icon\r")
    beside += ("Thumbs.db:encryptable",)
    for name in beside:
        (folder / name).write_bytes(b"\0\1")
    (folder / "__MACOSX").mkdir()
    (folder / "@eaDir").mkdir()
    found = list_images(folder, PROMPT, skip_bad=False, limit=None)
    assert [sample.name for sample in found.samples] == ["B.png", "a.jpg", "c.png"]
    assert found.notes == ()


def test_a_table_of_pictures_and_a_cameras_raw_file_are_called_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(SampleError) as caught:
        list_images(tmp_path, PROMPT, skip_bad=False, limit=None)
    assert str(caught.value) == (
        f"{tmp_path}: holds no image ({SUFFIXES} are read) but train-00000-of-00002.parquet, a table of a data set; save its "
        "pictures as files of their own"
    )
    Image.new("RGB", (160, 120)).save(tmp_path / "IMG_1.DNG", format="TIFF")  # as Pillow sees one
    with pytest.raises(PictureError) as raw:
        list_images(tmp_path, PROMPT, skip_bad=False, limit=None)
    assert str(raw.value) == (
        f"{tmp_path}: 1 of 1 files are not usable images: IMG_1.DNG (is a camera's raw file, which Pillow does not read; "
        "convert it to JPEG); remove them or pass --skip-bad-images"
    )


def test_folders_of_pictures_that_are_not_entered_are_named(folder: Path) -> None:
    for number in range(7):
        (folder / f"class{number}").mkdir()
    assert list_images(folder, PROMPT, skip_bad=False, limit=None).notes == (
        "7 sub-folders of pictures not entered: class0, class1, class2, class3, class4 and 2 more; --recursive enters them",
    )
    for path in folder.glob("*.*"):
        path.unlink()
    with pytest.raises(SampleError) as caught:
        list_images(folder, PROMPT, skip_bad=False, limit=None)
    assert str(caught.value) == (
        f"{folder}: holds no image ({SUFFIXES} are read); "
        "its sub-folders are not entered (class0, class1, class2, class3, class4 and 2 more): give one of them, or --recursive"
    )


def test_sub_folders_are_entered_in_their_place_among_the_names(folder: Path) -> None:
    for name in ("b/2.png", "b/deep/1.png", "b/.cache/no.png", "d/__MACOSX/no.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "c.png", folder / name)
    (folder / "b" / "link").symlink_to(folder)  # a circle is gone round once
    (folder / "b" / "bad.png").touch()
    counted: list[int] = []
    found = list_images(folder, PROMPT, skip_bad=True, limit=None, recursive=True, read=counted.append)
    assert [s.name for s in found.samples] == ["B.png", "a.jpg", "b/2.png", "b/deep/1.png", "c.png"]
    assert found.rejected == (Rejected("b/bad.png", "is empty"),)
    assert found.notes == ()
    assert counted == [1, 2, 3, 4, 5, 6]
    first = list_images(folder, PROMPT, skip_bad=True, limit=3, recursive=True)
    assert [s.name for s in first.samples] == ["B.png", "a.jpg", "b/2.png"]


def test_a_folder_that_may_not_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(SampleError) as caught:
        list_images(folder, PROMPT, skip_bad=False, limit=None)
    assert str(caught.value) == f"{folder}: cannot be listed (Permission denied); check its permissions"


def test_no_file_is_read_behind_the_last_that_a_limit_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    whole = Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path.name), whole(path))[1])
    (folder / "0.png").touch()
    (folder / "zzz.png").touch()
    found = list_images(folder, PROMPT, skip_bad=True, limit=2)
    assert ([sample.name for sample in found.samples], opened) == (["B.png", "a.jpg"], ["0.png", "B.png", "a.jpg"])


def test_pictures_that_lose_their_depth_are_named(folder: Path) -> None:
    Image.new("I;16", (40, 30), 999).save(folder / "x-ray.png")
    assert list_images(folder, PROMPT, skip_bad=False, limit=None).notes == (
        "1 picture with more than 8 bits a channel (x-ray.png): values are cut to 0 to 255, as transformers and the engines "
        "do, which leaves them nearly white or black; convert them to 8 bits",
    )


def test_names_that_are_no_utf_8_are_text_in_samples(folder: Path) -> None:
    named = os.fsencode(folder) + b"/" + "问题".encode("gbk")  # as an archive from Windows leaves them
    shutil.copy(folder / "c.png", named + b".png")
    names = [sample.name for sample in list_images(folder, PROMPT, skip_bad=False, limit=None).samples]
    assert names[-1] == r"\xce\xca\xcc\xe2.png"
    with open(named + b".jsonl", "w") as file:
        file.write('{"text": "a"}')
    assert read_samples(Path(os.fsdecode(named + b".jsonl")), limit=None).samples[0].name == r"\xce\xca\xcc\xe2.jsonl:1"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x28\xb5\x2f\xfd" + bytes(20), "is Zstandard-compressed; give"),
        (b"SQLite format 3\0" + bytes(100), "is an SQLite database; give"),
        (b"\x80\x04\x95" + bytes(20), "is a Python pickle; give"),
        (b"\1\2\0\3", "is no text; give a JSON-lines file as --calib-samples"),
        ('{"text": "a"}'.encode("utf-32"), "is UTF-32 text, UTF-8 is needed; convert it: iconv -f UTF-32"),
        ('{"text": "a"}'.encode("utf-16-le"), "is UTF-16 text, UTF-8 is needed; convert it: iconv -f UTF-16"),
        (' [{"text": "a"}]'.encode("utf-16-be"), "is UTF-16 text, UTF-8 is needed; convert it: iconv -f UTF-16"),
    ],
)
def test_a_file_that_is_no_utf8_text_is_called_by_its_kind(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(content)
    with pytest.raises(SampleError) as caught:
        read_samples(path, limit=None)
    assert str(caught.value).startswith(f"{path}: {what}")


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(SampleError) as caught:
        read_samples(Path("a\0b"), limit=None)
    assert str(caught.value) == "a\\x00b: no file can have such a name; give the name of one"
