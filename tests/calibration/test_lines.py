import base64
import json
import re
from pathlib import Path

import pytest

from glmq.calibration.lines import Left, LineError, locate_image, parse_line, shortened
from glmq.calibration.pictures import InlinePicture
from glmq.calibration.samples import read_samples
from glmq.errors import SampleError

ASKED = [{"type": "text", "text": "What?"}]
ANSWER = {"role": "assistant", "content": "A chart."}


def messages(content: object, *more: object, **beside: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}, ANSWER, *more], **beside}


def shares(value: str, *more: object, **beside: object) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A chart."}, *more], **beside}


@pytest.mark.parametrize(
    ("document", "images"),
    [
        ({"image": "a.png", "prompt": "What?", "text": "A chart."}, ["a.png"]),
        ({"image": "a.png", "prompt": "<image>\nWhat?", "text": "A chart."}, ["a.png"]),
        ({"image": "", "prompt": "What?", "text": "A chart."}, []),
        ({"images": [], "prompt": "What?", "text": "A chart."}, []),
        ({"image": ["a.png"], "prompt": "What?", "text": "A chart."}, ["a.png"]),
        (messages([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}, *ASKED]), ["x"]),
        (messages([{"type": "image", "source": {"type": "url", "url": "a.png"}}, *ASKED]), ["a.png"]),
        (messages([{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What?"}]), ["a.png"]),
        ({"image": {"path": "a.png", "bytes": None}, "prompt": "What?", "text": "A chart."}, ["a.png"]),
        ({"query": "What?", "response": "A chart.", "images": ["a.png"]}, ["a.png"]),
        ({"query": "<image>What?", "response": "A chart.", "images": "a.png", "id": 7}, ["a.png"]),
        ({"instruction": "What?", "input": "", "output": "A chart."}, []),
        ({"question": "What?", "answer": "A chart.", "image": "a.png"}, ["a.png"]),
        (messages("What?"), []),
        (messages(ASKED), []),
        (messages([{"type": "image", "image": "a.png"}, *ASKED]), ["a.png"]),
        (messages([{"type": "image", "url": "a.png"}, *ASKED]), ["a.png"]),
        (messages([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, *ASKED]), ["a.png"]),
        (messages([{"type": "input_image", "image_url": "a.png"}, *ASKED]), ["a.png"]),
        (messages([{"type": "image"}, *ASKED], images=["a.png"]), ["a.png"]),
        (messages("<image>What?", images=["a.png"]), ["a.png"]),
        (messages(["What?"]), []),
        (shares("<image>\nWhat?", image="a.png", id="1"), ["a.png"]),
        (shares("What?\n<image>", images=["a.png"]), ["a.png"]),
        (shares("What?"), []),
        (shares("What?", image=None), []),
        (shares("Picture 1: <img>a.png</img>\nWhat?"), ["a.png"]),
        ({"query": "<img>a.png</img>What?", "response": "A chart."}, ["a.png"]),
    ],
)  # fmt: skip
def test_layouts_of_other_tools_say_the_same(document: object, images: list[str]) -> None:
    line = parse_line(document)
    assert (list(line.images), line.prompt, line.text, line.left) == (images, "What?", "A chart.", frozenset())


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("document", "left"),
    [
        (messages("What?", {"role": "user", "content": "And?"}), {Left.TURNS}),
        (messages("What?", {"role": "tool", "content": "7"}), {Left.TURNS}),
        (shares("What?", {"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."}), {Left.TURNS}),
        ({"messages": [SYSTEM, *messages("What?")["messages"]]}, {Left.SYSTEM}),
        ({"query": "What?", "response": "A chart.", "history": [["Who?", "Me."]], "system": "x"}, {*Left} - {Left.IMAGES}),
        ({"prompt": "What?", "text": "A chart.", "images": ["a.png", "b.png"]}, {Left.IMAGES}),
        (messages([{"type": "image", "image": "a"}, {"type": "image", "image": "b"}, *ASKED]), {Left.IMAGES}),
    ],
)  # fmt: skip
def test_what_is_left_out_of_a_line_is_said(document: object, left: set[Left]) -> None:
    line = parse_line(document)
    assert (line.prompt, line.text, line.left) == ("What?", "A chart.", left)


def test_an_answer_alone_and_a_question_alone_are_samples() -> None:
    assert parse_line({"messages": [ANSWER]}).text == "A chart."
    assert parse_line({"messages": [{"role": "user", "content": "What?"}]}).text is None


def test_reasons_are_a_part_of_the_answer() -> None:
    answer = {"role": "assistant", "content": "A chart.", "reasoning_content": "It has bars."}
    line = parse_line({"messages": [{"role": "user", "content": "What?"}, answer]})
    assert line.text == "<think>It has bars.</think>A chart."


def test_a_placeholder_in_a_text_without_image_is_text() -> None:
    assert parse_line({"prompt": "What does <image> mean in XML?"}).prompt == "What does <image> mean in XML?"


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (shares("<image>\nWhat?"), "says <image>, but names no image"),
        ({"messages": "What?"}, "messages is 'What?', a list of turns is needed"),
        ({"messages": []}, "has neither image nor prompt nor text; give at least one"),
        ({"messages": ["What?"]}, "a turn of messages is 'What?', an object is needed"),
        ({"messages": [{"role": "critic", "content": "1"}]}, "a turn of messages is by 'critic'; known are system, developer, "
         "user, human, assistant, gpt, model, bot, tool, function, function_call, observation"),
        (messages([{"type": "video", "video": "a.mp4"}]), "a part of a turn is 'video'; texts and images are calibrated on"),
        ({"videos": ["a.mp4"], **messages("<video>What?")}, "has videos; texts and images are calibrated on"),
        ({"audio": "a.wav", "prompt": "What?"}, "has audio; texts and images are calibrated on"),
        (messages([{"type": "image"}, *ASKED]), "has a part that is an image, but names none"),
        (messages([{"type": "image", "source": {"type": "file", "file_id": "x"}}, *ASKED]),
         "source is {'type': 'file', 'file_id': 'x'}, a string or null is needed"),
        (messages(3), "the content of a turn is 3, a string or a list of parts is needed"),
        ({"image": {"mime": "x"}}, "image is {'mime': 'x'}, a string or null is needed"),
        ({"prompt": "a", "query": "b"}, "has both prompt and query, which mean the same; give one of them"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_sample_says_why(document: object, why: str) -> None:
    with pytest.raises(LineError) as caught:
        parse_line(document)
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("named", "path"),
    [
        ("a.png", "folder/a.png"),
        ("/data/a.png", "/data/a.png"),
        ("file:///data/a%20b.png", "/data/a b.png"),
        ("FILE://localhost/data/a.png", "/data/a.png"),
        ("file:///data/a#1?.png", "/data/a#1?.png"),
        ("images\\a.png", "folder/images/a.png"),
        ("a:b.png", "folder/a:b.png"),
    ],
)
def test_an_image_is_found_as_people_name_it(named: str, path: str) -> None:
    assert locate_image(named, Path("folder")) == Path(path)


def test_a_backslash_that_belongs_to_the_name_stays(tmp_path: Path) -> None:
    (tmp_path / "a\\b.png").touch()
    assert locate_image("a\\b.png", tmp_path) == tmp_path / "a\\b.png"


DATA = b"\xff\xd8\xff" + bytes(range(256))
BASE64 = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "named",
    [
        f"data:image/jpeg;base64,{BASE64}",
        f"DATA:image/jpeg;charset=x;BASE64,{BASE64}",
        f"data:;base64,{BASE64.rstrip('=')}",
        f"data:image/jpeg;base64,{BASE64[:60]}\n{BASE64[60:]}",
        "data:image/jpeg;base64," + BASE64.replace("+", "%2B").replace("/", "%2F"),
        BASE64,
    ],
)
def test_an_image_within_its_line_is_decoded(named: str) -> None:
    assert locate_image(named, Path("folder")) == InlinePicture(DATA)


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("http://h/a.png", "image http://h/a.png lies elsewhere; glmq downloads nothing, save it as a file"),
        ("s3://bucket/a.png", "image s3://bucket/a.png lies elsewhere; glmq downloads nothing, save it as a file"),
        ("data:image/png,abc", "image data:image/png,abc is a data URI without ;base64, which is needed"),
        ("data:image/png;base64,@@@@", "image data:image/png;base64,@@@@ is no base64 (PYTHON)"),
        ("data:image/png;base64,A", "image data:image/png;base64,A is no base64 (PYTHON)"),
        ("https://h/" + "a" * 10**6, "image https://h/" + "a" * 50 + "... (1000010 characters) lies elsewhere; "
         "glmq downloads nothing, save it as a file"),
    ],
)  # fmt: skip
def test_an_image_that_cannot_be_had_is_named_shortly(named: str, why: str) -> None:
    with pytest.raises(LineError) as caught:
        locate_image(named, Path("folder"))
    assert re.sub(r"base64 \(.+\)$", "base64 (PYTHON)", str(caught.value)) == why


def test_a_picture_in_a_message_does_not_appear_in_its_text() -> None:
    assert repr(InlinePicture(DATA)) == "InlinePicture()"
    assert shortened("x" * 200) == "x" * 200
    assert shortened("x" * 201) == "x" * 60 + "... (201 characters)"


LINE = json.dumps({"text": "café"}, ensure_ascii=False)
CONVERT = "UTF-8 is needed; convert it: iconv -f {} -t UTF-8 FOLDER/s.jsonl > FOLDER/s.utf8.jsonl"


@pytest.mark.parametrize(
    ("raw", "answers"),
    [
        (f"[{LINE}]".encode(), ["café"]),
        (f"\ufeff{LINE}\n\ufeff{LINE}\n".encode(), ["café"] * 2),
        (f"[\n  {LINE},\n  {LINE}\n]\n".encode(), ["café"] * 2),
        ("\ufeff[\r\n{}\r\n]".replace("{}", LINE).encode(), ["café"]),
        (f"{LINE}\r\n\r\n{LINE}".encode(), ["café"] * 2),
        (f"{LINE}\r{LINE}\r".encode(), ["café"] * 2),
        (b'{\n  "text": "caf\\u00e9"\n}\n', ["café"]),
        (b'\n\n{"text": "a"}', ["a"]),
    ],
)
def test_files_are_read_as_people_write_them(raw: bytes, answers: list[str], tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(raw)
    assert [sample.answer for sample in read_samples(tmp_path / "s.jsonl", limit=None).samples] == answers


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (LINE.encode("utf-16"), f": is UTF-16 text, {CONVERT.format('UTF-16')}"),
        (LINE.encode("utf-16-be"), f": is UTF-16 text, {CONVERT.format('UTF-16')}"),
        ('{"text": "a"}\n{"text": "问题"}'.encode("gbk"),
         f", line 2: is not UTF-8 text, perhaps GBK; {CONVERT.format('GB18030')}"),
        (b"\x1f\x8b\x08\0", ": is gzip-compressed; give a JSON-lines file as --calib-samples"),
        (b"PK\x03\x04", ": is a zip archive or a spreadsheet; give a JSON-lines file as --calib-samples"),
        (b"PAR1", ": is a Parquet file; give a JSON-lines file as --calib-samples"),
        (b"\x89PNG\r\n", ": is a picture; give a JSON-lines file as --calib-samples"),
        (b"[]", ": holds no sample; write one JSON object a line with image, prompt or text"),
        (b'[{"text": "a"},]', ": begins like a JSON array, but is not valid JSON (Illegal trailing comma before end of array: "
         "line 1 column 15 (char 14))"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_named_as_such(raw: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(raw)
    with pytest.raises(SampleError) as caught:
        read_samples(path, limit=None)
    expected = f"{path}{what}".replace("FOLDER", str(tmp_path))
    if "trailing comma" in what:  # Python before 3.13 has other words for it
        assert str(caught.value).startswith(expected.partition("(")[0])
    else:
        assert str(caught.value) == expected


def test_all_bad_lines_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(['{"text": "good"}', "{", '{"text": 1}', '{"image": "/no.png"}', *["{}"] * 4]))
    with pytest.raises(SampleError) as caught:
        read_samples(path, limit=None)
    nothing = "has neither image nor prompt nor text; give at least one"
    assert str(caught.value) == (
        f"{path}: 7 of 8 samples cannot be used: "
        "line 2 is not valid JSON (Expecting property name enclosed in double quotes in column 2); "
        "line 3 text is 1, a string or null is needed; line 4 image /no.png is not usable (no such file); "
        f"line 5 {nothing}; line 6 {nothing} and 2 more; correct them"
    )
    assert len(read_samples(path, limit=1).samples) == 1  # what is behind the limit is not looked at


def test_lines_whose_picture_is_bad_are_left_out_when_asked_to(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    good = json.dumps({"image": str(pictures / "00.png")})
    path.write_text("\n".join([good, '{"image": "/no.png"}', good]))
    found = read_samples(path, limit=None, skip_bad=True)
    assert [sample.name for sample in found.samples] == ["s.jsonl:1", "s.jsonl:3"]
    assert [(r.name, r.reason) for r in found.rejected] == [("line 2", "image /no.png is not usable (no such file)")]


def test_a_sample_with_an_inline_picture_has_the_hash_of_the_file(pictures: Path, tmp_path: Path) -> None:
    data = base64.b64encode((pictures / "00.png").read_bytes()).decode()
    path = tmp_path / "s.jsonl"
    path.write_text(
        "\n".join(json.dumps({"image": i}) for i in (str(pictures / "00.png"), f"data:image/png;base64,{data}"))
    )
    one, other = read_samples(path, limit=None).samples
    assert one.digest == other.digest


def test_the_notes_of_a_file_count_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(json.dumps(messages("What?", ANSWER)) for _ in range(3)))
    assert read_samples(path, limit=None).notes == (
        "s.jsonl: of 3 samples only the first question and answer are used",
    )
