"""Ask: one checkpoint, float or quantized, answers a question about a picture on the CPU, in the NPU's arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from PIL import Image

from glmq.calibration.lines import check_prompt
from glmq.calibration.pictures import PictureRules, examine_picture, load_picture
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import PictureError, SampleError, UsageError, WrongFolderError
from glmq.inspection.folder import Folder, Kind, scan_folder
from glmq.inspection.listing import describe_folder
from glmq.jobs.forecast import is_large
from glmq.jobs.watcher import Watcher
from glmq.machine import available_memory
from glmq.model.config import FAMILY, ModelConfig, read_config
from glmq.model.inputs import DEFAULT_PROMPT, ModelInputs, Preprocessor
from glmq.progress import PassPlan, StepPlan, Watch, resident_bytes
from glmq.records import BlockDone
from glmq.reporting.documents import Answer
from glmq.spec import assert_never
from glmq.values import LEAST_PIXELS, check_least, to_path
from glmq.verification.answering import Answering, AnswerPlan
from glmq.verification.checks import open_reference

KEPT_SHARE: Final = 0.7
"""Of the free memory that weights may fill which stay from token to token; the rest is for the picture and what passes by."""
GIB: Final = 2**30
READING: Final = "read the question"
ANSWERING: Final = "answer"
"""The passes of a question."""
_HALF_CHARACTER: Final = "\ufffd"
"""What a tokenizer makes of a character whose last bytes are in the next token."""


class Asker:
    """An opened model; made by `open_asker`. Questions stand alone: none knows of the one before it."""

    def __init__(
        self,
        folder: Folder,
        config: ModelConfig,
        model: Answering,
        preprocessor: Preprocessor,
        watcher: Watcher,
        *,
        tries: bool,
    ) -> None:
        self._folder, self._config, self._model = folder, config, model
        self._preprocessor, self._watcher, self._tries = preprocessor, watcher, tries

    @property
    def plan(self) -> AnswerPlan:
        """What one token takes."""
        return self._model.plan

    def ask(
        self,
        prompt: str,
        image: Path | None,
        *,
        max_new_tokens: int,
        tell: Callable[[str], None] | None = None,
        shrinks: bool = False,
    ) -> Answer:
        """One question, arguments and errors as of the function `ask`.

        Args:
            shrinks: pictures are shrunk before use, so that any number of pixels is read.
        """
        check_least("--max-new-tokens", max_new_tokens, 1)
        check_prompt("the question", prompt)
        try:
            inputs = self._preprocessor.encode(_picture(image, shrinks=shrinks), prompt, None)
        except PictureError:
            raise
        except SampleError as error:
            raise SampleError(f"the question {error}") from error
        if inputs.tokens + max_new_tokens > self._config.max_tokens:
            raise UsageError(
                f"--max-new-tokens {max_new_tokens}: the question has {inputs.tokens} tokens, and the model takes "
                f"{self._config.max_tokens} with its answer; allow fewer"
                + (", or shrink the picture with --max-pixels" if image is not None else "")
            )
        if self._watcher.is_watched:
            self._watcher.plan(self._passes(inputs, max_new_tokens))
        spoken = _Spoken(self._preprocessor, tell)
        steps = self._model.steps(inputs, max_new_tokens)
        started = time.perf_counter()
        with self._watcher.blocks(READING, blocks := self._model.prompt_blocks(inputs)) as advance:
            for _ in range(blocks):
                done = next(steps)
                assert not isinstance(done, int)
                advance(done)
        begun = last = time.perf_counter()
        is_complete = False
        with self._watcher.blocks(ANSWERING, max_new_tokens, "tokens") as advance:
            for index, token in enumerate(steps):
                assert isinstance(token, int)
                is_complete = token in self._config.eos_token_ids
                if not is_complete:
                    spoken.add(token)
                now = time.perf_counter()
                advance(BlockDone("", index, max_new_tokens, now - last, resident_bytes()))
                last = now
        spoken.finish()
        return Answer(
            folder=self._folder.directory,
            model=describe_folder(self._folder),
            image=image,
            prompt=prompt,
            text=spoken.text,
            tokens=len(spoken.ids),
            is_complete=is_complete,
            prompt_tokens=inputs.tokens,
            prompt_seconds=begun - started,
            seconds=time.perf_counter() - begun,
            plan=self._model.plan,
        )

    def _passes(self, inputs: ModelInputs, max_new_tokens: int) -> tuple[PassPlan, PassPlan]:
        """Reading the question, and the longest answer that is allowed."""
        token = StepPlan(ANSWERING, "other", max_new_tokens * self._model.plan.token_seconds)
        reading = PassPlan(READING, self._model.expect(inputs, tries=self._tries))
        return reading, PassPlan(ANSWERING, (token,), is_bound=True)


@contextmanager
def open_asker(
    folder: str | Path, *, max_pixels: int | None = None, chat_template: Path | None = None, watch: Watch | None = None
) -> Iterator[Asker]:
    """A model that can be asked more than once while the context lasts; arguments and errors as of `ask`."""
    check_least("--max-pixels", max_pixels, LEAST_PIXELS)
    chat_template = None if chat_template is None else Path(chat_template)
    scanned, watcher = scan_folder(to_path(folder)), Watcher(watch)
    source = _open(scanned)
    with source:
        config = read_config(scanned.directory)
        preprocessor = Preprocessor(
            scanned.directory, config, max_pixels=max_pixels, trust_remote_code=False, chat_template=chat_template
        )
        with Answering(source, config, memory_bytes=int(KEPT_SHARE * available_memory())) as model:
            watcher.note(describe_plan(model.plan))
            yield Asker(scanned, config, model, preprocessor, watcher, tries=is_large(source))


def ask(
    folder: str | Path,
    prompt: str = DEFAULT_PROMPT,
    *,
    image: str | Path | None = None,
    max_new_tokens: int = 256,
    max_pixels: int | None = None,
    chat_template: Path | None = None,
    tell: Callable[[str], None] | None = None,
    watch: Watch | None = None,
) -> Answer:
    """Ask a checkpoint, float or quantized: its own greedy answer, on the CPU in the NPU's arithmetic.

    Weights that do not fit into the memory are read again for every token, which a note says beforehand, with the tokens per
    second to expect.

    >>> import glmq
    >>> answer = glmq.ask("w8a8s", "What is on the table?", image="photos/00.png", max_new_tokens=8)
    >>> assert answer.tokens <= 8, answer.text

    Args:
        folder: a float or quantized checkpoint, un-compressed, with its tokenizer.
        prompt: the question.
        image: file of the picture it is about; None for a question without one.
        max_new_tokens: the longest answer.
        max_pixels: shrink a larger picture to this many pixels.
        chat_template: file of the chat template, for a base model that comes without one.
        tell: is called with each piece of the answer's text as it is made.
        watch: is called with the events of the run.

    Returns:
        The answer and how long it took.

    Raises:
        UsageError: question and answer would be longer than the model takes.
        InputError: a folder, a tokenizer or a picture that cannot be used, or a compressed checkpoint.
    """
    with open_asker(folder, max_pixels=max_pixels, chat_template=chat_template, watch=watch) as asker:
        return asker.ask(
            prompt,
            None if image is None else Path(image),
            max_new_tokens=max_new_tokens,
            tell=tell,
            shrinks=max_pixels is not None,
        )


def describe_plan(plan: AnswerPlan) -> str:
    """How fast the answer will come, and why, in one sentence."""
    again = plan.token_bytes - plan.kept_bytes
    speed = (
        f"{1 / plan.token_seconds:.1f} tokens per second"
        if plan.token_seconds < 1
        else f"{plan.token_seconds:.0f} s per token"
    )
    where = (
        f"its {_size(plan.token_bytes)} of weights stay in memory"
        if again == 0
        else f"{_size(again)} of its {_size(plan.token_bytes)} of weights do not fit into memory and are read again for each"
    )
    return f"expect about {speed}: {where}"


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.0f} MiB"


def _open(folder: Folder) -> Checkpoint:
    """The folder's tensors. Raises WrongFolderError for what cannot answer as it is."""
    directory = folder.directory
    match folder.kind:
        case Kind.FLOAT | Kind.FOREIGN:  # the second is refused there by its method, or dequantized
            return open_reference(directory)
        case Kind.QUANTIZED:
            return Checkpoint.open(directory)
        case Kind.STATISTICS:
            wrong = "holds calibration statistics, no weights; give a checkpoint"
        case Kind.PORTABLE:
            wrong = "is compressed; restore it first: `glmq compress --decompress IN OUT`"
        case Kind.PARTS | Kind.SHARDED:
            wrong = (
                "holds the parts of an engine's ranks, and ask runs un-sharded checkpoints; give the folder that they were "
                "made from"
            )
        case other:
            assert_never(other)
    raise WrongFolderError(f"{directory}: {wrong}")


def check_picture(file: Path | None, *, shrinks: bool) -> None:
    """Refuse a picture that cannot be asked about, before a model is opened.

    Raises:
        PictureError: it cannot be used.
    """
    defect = None if file is None else examine_picture(file, PictureRules(FAMILY, shrinks=shrinks)).defect
    if defect is not None:
        raise PictureError(f"{file}: {defect}")


def _picture(file: Path | None, *, shrinks: bool) -> Image.Image | None:
    """The decoded picture. Raises PictureError for one that cannot be used."""
    check_picture(file, shrinks=shrinks)
    return None if file is None else load_picture(file)


class _Spoken:
    """Tokens of an answer, told as text piece by piece."""

    def __init__(self, preprocessor: Preprocessor, tell: Callable[[str], None] | None) -> None:
        self._preprocessor, self._tell = preprocessor, tell
        self.ids: list[int] = []
        self.text = ""

    def add(self, token: int) -> None:
        """One more token: tells what it adds to the text, once its characters are whole."""
        self.ids.append(token)
        text = self._preprocessor.decode(self.ids)
        if text.startswith(self.text) and not text.endswith(_HALF_CHARACTER):
            self._say(text)

    def finish(self) -> None:
        """Tell what has been held back."""
        self._say(self._preprocessor.decode(self.ids))

    def _say(self, text: str) -> None:
        piece, self.text = text[len(self.text) :], text
        if piece and self._tell is not None:
            self._tell(piece)
