"""Lines of a samples file in the layouts that people have: glmq's own, OpenAI messages, ShareGPT and LLaVA, query and response.

    {"image": "a.png", "prompt": "What?", "text": "A chart."}                                    glmq's own
    {"messages": [{"role": "user", "content": [{"type": "image_url", ...}, {"type": "text", ...}]}, ...]}
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}]}
    {"query": "What?", "response": "A chart.", "images": ["a.png"]}

Calibration asks one question about one picture: of several questions, answers or pictures the first is taken, and said so.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from glmq.calibration.pictures import InlinePicture, PictureFile
from glmq.checkpoint.json_file import SURROGATE, JsonObject, JsonValue
from glmq.errors import SampleError

OWN_KEYS: Final = ("image", "prompt", "text")
_TURNS: Final = ("messages", "conversations")
_IMAGES: Final = ("image", "images")
_NOT_CALIBRATED: Final = ("video", "videos", "audio", "audios")
_PROMPTS: Final = ("prompt", "query", "question", "instruction")
_ANSWERS: Final = ("text", "response", "answer", "output")
_ABOUT: Final = frozenset({"id", "index", "source", "dataset", "category", "width", "height", "metadata"})
"""Keys that say nothing to the model."""
_SYSTEM, _USER, _ASSISTANT, _TOOL = "system", "user", "assistant", "tool"
_ROLES: Final = {
    "system": _SYSTEM,
    "developer": _SYSTEM,
    "user": _USER,
    "human": _USER,
    "assistant": _ASSISTANT,
    "gpt": _ASSISTANT,
    "model": _ASSISTANT,
    "bot": _ASSISTANT,
    "tool": _TOOL,
    "function": _TOOL,
    "function_call": _TOOL,
    "observation": _TOOL,
}
PLACEHOLDER: Final = "<image>"
"""Where other tools put the picture into the prompt; glmq's chat template has a place of its own for it."""
_TAG: Final = re.compile(r"(?:Picture [0-9]+: ?)?<img>(.*?)</img>[ \t]*\n?", re.DOTALL)
"""Where Qwen-VL's files name a picture within the prompt."""
_PLACEHOLDER: Final = re.compile(r"<image>[ \t]*\n?|\n<image>(?=$)")
_BASE64_STARTS: Final = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0")
"""Of JPEG, PNG, GIF, WebP and BMP files."""
_LONG: Final = 200
"""Characters: no file name is as long as a picture in base64."""


@dataclass(frozen=True, slots=True)
class OptionNames:
    """What the command that reads samples calls its options, for its messages."""

    lines: str
    """A samples file."""
    skip_bad: str | None
    """Pictures that cannot be used are left out; None: it has no such option."""


def check_prompt(what: str, prompt: str) -> None:
    """Raise SampleError, with `what` it is, for a prompt that no tokenizer takes: a byte that was typed is no UTF-8."""
    if not prompt.isascii() and SURROGATE.search(prompt):
        raise SampleError(
            f"{what} {prompt!a:.60} has half of a surrogate pair, which is no character; write it in UTF-8"
        )


class LineError(Exception):
    """Why a line is no sample; the sentence's end, without the line."""


class Left(Enum):
    """What of a line is not calibrated on."""

    TURNS = "only the first question and answer are used"
    IMAGES = "only the first picture is used"
    SYSTEM = "the system prompt is left out"


@dataclass(frozen=True, slots=True)
class Line:
    """One line, whatever its layout."""

    images: Sequence[str]
    """As the line names them."""
    prompt: str | None
    text: str | None
    """The answer, or plain text."""
    left: frozenset[Left] = frozenset()

    def image(self, folder: Path) -> PictureFile | None:
        """The first picture. Raises LineError if it lies where glmq does not read."""
        return locate_image(self.images[0], folder) if self.images else None


def parse_line(document: JsonValue) -> Line:
    """What a line says. Raises LineError for what is none of the layouts."""
    if not isinstance(document, dict):
        raise LineError(f"is a JSON {type(document).__name__}, an object is needed")
    for key in _NOT_CALIBRATED:
        if document.get(key):
            raise LineError(f"has {key}; texts and images are calibrated on")
    turns = next((key for key in _TURNS if key in document), None)
    line = _flat(document) if turns is None else _conversation(document, turns)
    if not line.images and line.prompt is not None and (tagged := _TAG.findall(line.prompt)):
        line = Line(tagged, _TAG.sub("", line.prompt), line.text, line.left)
    if not (line.images or line.prompt or line.text):
        raise LineError("has neither image nor prompt nor text; give at least one")
    if len(line.images) > 1:
        line = Line(line.images, line.prompt, line.text, line.left | {Left.IMAGES})
    if line.prompt is None or PLACEHOLDER not in line.prompt:
        return line
    if not line.images:
        if turns is None:
            return line
        raise LineError(f"says {PLACEHOLDER}, but names no image")
    return Line(line.images, _PLACEHOLDER.sub("", line.prompt), line.text, line.left)


def locate_image(named: str, folder: Path) -> PictureFile:
    """The picture that a line names: a path relative to `folder`, a file address, or the picture itself in base64.

    Raises:
        LineError: it lies elsewhere, or is no base64.
    """
    scheme, has_scheme, rest = named.partition(":")
    if has_scheme and scheme.lower() == "data":
        header, comma, payload = rest.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise LineError(f"image {shortened(named)} is a data URI without ;base64, which is needed")
        return _decoded(named, unquote(payload))
    if len(named) > _LONG and named.startswith(_BASE64_STARTS):
        return _decoded(named, named)
    if has_scheme and rest.startswith("//"):
        if scheme.lower() != "file":
            raise LineError(f"image {shortened(named)} lies elsewhere; glmq downloads nothing, save it as a file")
        named = f"/{unquote(rest[2:].partition('/')[2])}"  # no picture's address has a query or a fragment, many a name has #
    if "\0" in named:
        raise LineError(f"image {shortened(named)} has a name that no file can have")
    path = folder / named
    # Lists that were made on Windows.
    return folder / named.replace("\\", "/") if "\\" in named and not _exists(path) else path


def shortened(text: str) -> str:
    """A name, or the beginning of what is too long for one."""
    return text if len(text) <= _LONG else f"{text[:60]}... ({len(text)} characters)"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _decoded(named: str, payload: str) -> InlinePicture:
    compact = "".join(payload.split()).rstrip("=").replace("-", "+").replace("_", "/")  # of addresses, too
    try:
        data = base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise LineError(f"image {shortened(named)} is no base64 ({error})") from None
    return InlinePicture(data)


def _flat(document: JsonObject) -> Line:
    """A line whose keys are the sample's parts."""
    for key in document:
        if key not in {*_IMAGES, *_PROMPTS, *_ANSWERS, *_ABOUT, "input", "system", "history"}:
            raise LineError(f"unknown key {key!r:.60}; known are {', '.join(OWN_KEYS)}, and messages or conversations")
    prompt, text = _text(document, _PROMPTS), _text(document, _ANSWERS)
    extra = _text(document, ("input",))
    if extra:
        prompt = f"{prompt}\n{extra}" if prompt else extra
    left = {Left.SYSTEM} if _text(document, ("system",)) else set()
    history = document.get("history")
    if history:  # of earlier questions, without which this one may make no sense, but is text all the same
        left.add(Left.TURNS)
    return Line(_images_of(document), prompt, text, frozenset(left))


def _text(document: JsonObject, keys: Sequence[str]) -> str | None:
    """The one of these keys that is there."""
    found = [key for key in keys if document.get(key) is not None]
    if len(found) > 1:
        raise LineError(f"has both {found[0]} and {found[1]}, which mean the same; give one of them")
    if not found:
        return None
    value = document[found[0]]
    if not isinstance(value, str):
        raise LineError(f"{found[0]} is {value!r:.60}, a string or null is needed")
    return value


def _images_of(document: JsonObject) -> list[str]:
    return [name for key in _IMAGES for name in _names(key, document.get(key))]


def _names(key: str, value: JsonValue) -> list[str]:
    """Pictures of a value that names one or several; an empty one names none."""
    match value:
        case None | "":
            return []
        case str():
            return [value]
        case list():
            return [name for item in value for name in _names(key, item)]
        case dict() if found := [k for k in ("path", "url", "image", "bytes", "data") if isinstance(value.get(k), str)]:
            return _names(key, value[found[0]])
    raise LineError(f"{key} is {value!r:.60}, a string or null is needed")


def _conversation(document: JsonObject, key: str) -> Line:
    """The first question and its answer."""
    turns = document[key]
    if not isinstance(turns, list):
        raise LineError(f"{key} is {turns!r:.60}, a list of turns is needed")
    images, left, marks = _images_of(document), set[Left](), 0
    prompt: str | None = None
    text: str | None = None
    for turn in turns:
        if not isinstance(turn, dict):
            raise LineError(f"a turn of {key} is {turn!r:.60}, an object is needed")
        named = turn.get("role", turn.get("from"))
        role = _ROLES.get(named) if isinstance(named, str) else None
        if role is None:
            raise LineError(f"a turn of {key} is by {named!r:.60}; known are {', '.join(_ROLES)}")
        if text is not None or role == _TOOL:
            left.add(Left.TURNS)
            break
        said, shown, parts = _content(turn.get("content", turn.get("value")))
        images += shown
        marks += parts
        if role == _SYSTEM:
            left.add(Left.SYSTEM)
        elif role == _USER:
            prompt = said if prompt is None else f"{prompt}\n{said}"
        else:
            reasons = turn.get("reasoning_content")
            text = f"<think>{reasons}</think>{said}" if isinstance(reasons, str) and reasons else said
    if marks and not images:
        raise LineError("has a part that is an image, but names none")
    return Line(images, prompt, text, frozenset(left))


def _content(content: JsonValue) -> tuple[str, list[str], int]:
    """Text and pictures of one turn, and how many parts stand for a picture, be it named there or elsewhere."""
    if content is None or isinstance(content, str):
        return content or "", [], 0
    if not isinstance(content, list):
        raise LineError(f"the content of a turn is {content!r:.60}, a string or a list of parts is needed")
    texts: list[str] = []
    images: list[str] = []
    marks = 0
    for part in content:
        match part:
            case str():
                texts.append(part)
            case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
                texts.append(text)
            case {"type": "image" | "image_url" | "input_image"}:
                images += _part_images(part)
                marks += 1
            case _:
                kind = part.get("type") if isinstance(part, dict) else part
                raise LineError(f"a part of a turn is {kind!r:.60}; texts and images are calibrated on")
    return "\n".join(texts), images, marks


def _part_images(part: Mapping[str, JsonValue]) -> list[str]:
    """Of one part; none if it only marks the place of a picture that is named elsewhere."""
    for key in ("image", "image_url", "url", "path", "source"):
        if part.get(key) is not None:
            return _names(key, part[key])
    return []
