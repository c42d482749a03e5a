"""`glmq ask`: what a checkpoint answers, before it reaches an NPU."""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmq.cli import options as o
from glmq.cli.help import Tier
from glmq.cli.streams import without_echo
from glmq.values import LEAST_PIXELS

if TYPE_CHECKING:
    from glmq.cli.progress import ProgressView
    from glmq.jobs.ask import Asker
    from glmq.reporting.documents import Answer

QUESTION = "Question"


def ask(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of a float or quantized checkpoint, un-compressed.", metavar="FOLDER", show_default=False
        ),
    ],
    image: Annotated[
        Path | None,
        typer.Option("--image", help="Picture that the question is about.", rich_help_panel=QUESTION),
        Tier.USUAL,
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            help="The question; without one, questions are read from the terminal, one a line. Where input or output is no "
            "terminal, the picture is to be described.",
            rich_help_panel=QUESTION,
            show_default=False,
        ),
        Tier.USUAL,
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", min=1, help="Stop an answer after this many tokens.", rich_help_panel=QUESTION
        ),
        Tier.USUAL,
    ] = 256,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=LEAST_PIXELS,
            help="Shrink a larger picture to this many pixels, which saves time.",
            rich_help_panel=QUESTION,
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            "--chat-template",
            help="File of the chat template, for a base model that comes without one.",
            rich_help_panel=QUESTION,
            show_default="the folder's own",
        ),
    ] = None,
    json_output: o.JsonOutput = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the answer and errors only.", rich_help_panel=o.RUN)
    ] = False,
    log_file: o.LogFile = None,
    debug: o.Debug = False,
) -> None:
    """Let a checkpoint answer on the CPU, in the NPU's arithmetic: token by token, the same answer each time.

    One question, or one after the other:

        glmq ask W8A8S --image PHOTOS/00.png --prompt "What is on the table?"
        glmq ask FLOAT --image PHOTOS/00.png
    """
    from glmq.cli.progress import ProgressView
    from glmq.errors import UsageError
    from glmq.jobs.ask import ANSWERING, READING, check_picture, open_asker
    from glmq.model.inputs import DEFAULT_PROMPT

    is_interactive = prompt is None and not json_output and sys.stdin.isatty() and sys.stdout.isatty()
    if prompt is None and not is_interactive:
        if image is None:
            raise UsageError("give a question with --prompt, a picture with --image, or both")
        prompt = DEFAULT_PROMPT
    check_picture(image, shrinks=max_pixels is not None)
    hidden = {ANSWERING} if sys.stdout.isatty() else set[str]()
    view = ProgressView(quiet=quiet or json_output, hidden=hidden, fleeting={READING, ANSWERING})
    with ExitStack() as opened:
        with without_echo(sys.stdin) if is_interactive else nullcontext(), view:
            asker = opened.enter_context(
                open_asker(folder, max_pixels=max_pixels, chat_template=chat_template, watch=view)
            )
        question = _Question(asker, image, max_new_tokens, shrinks=max_pixels is not None)
        if prompt is None:
            question.answer_lines(view)
        else:
            with view:
                question.answer(prompt, json_output=json_output, quiet=quiet)


class _Question:
    """What is asked about one picture, and how long answers may be."""

    def __init__(self, asker: Asker, image: Path | None, max_new_tokens: int, *, shrinks: bool) -> None:
        self._asker, self._image, self._max_new_tokens, self._shrinks = asker, image, max_new_tokens, shrinks

    def answer(self, prompt: str, *, json_output: bool, quiet: bool) -> None:
        """Answer one question on stdout."""
        from glmq.cli.console import stderr
        from glmq.cli.render import print_json
        from glmq.reporting.documents import answer_document

        found = self._ask(prompt, tells=not json_output)
        if json_output:
            print_json(dict(answer_document(found)))
        elif not quiet:
            stderr.say(answer_line(found))

    def answer_lines(self, view: ProgressView) -> None:
        """Answer what is typed, line by line, until the input ends. Ctrl-C ends an answer or a line, an error one question."""
        from glmq.cli.console import stderr
        from glmq.errors import SampleError, UsageError

        about = "" if self._image is None else f" about {self._image}"
        stderr.say(
            f"Type a question{about}, one a line; none knows of those before it. Ctrl-C stops an answer, Ctrl-D leaves."
        )
        with suppress(ImportError):
            import readline  # noqa: F401  `input` edits the line with it
        while True:
            try:
                prompt = input("> ").strip()
            except EOFError:
                stderr.print()
                return
            except KeyboardInterrupt:
                stderr.print()
                continue
            if not prompt:
                continue
            try:
                with without_echo(sys.stdin), view:  # which stops a bar
                    self.answer(prompt, json_output=False, quiet=False)
            except KeyboardInterrupt:
                stderr.say("stopped")
            except (SampleError, UsageError) as error:
                stderr.say(f"error: {error}")

    def _ask(self, prompt: str, *, tells: bool) -> Answer:
        from glmq.cli.render import Streamed

        streamed = Streamed()
        try:
            answer = self._asker.ask(
                prompt,
                self._image,
                max_new_tokens=self._max_new_tokens,
                tell=streamed.add if tells else None,
                shrinks=self._shrinks,
            )
        except KeyboardInterrupt:
            if streamed.has_begun:
                streamed.end()
            raise
        if tells:
            streamed.end()
        return answer


def answer_line(answer: Answer) -> str:
    """How long an answer took, and why it ended."""
    end = "" if answer.is_complete else "; cut off there, --max-new-tokens allows more"
    rate = f" ({answer.tokens / answer.seconds:.1f} tokens per second)" if answer.seconds > 0 else ""
    return (
        f"{answer.prompt_tokens} tokens read in {answer.prompt_seconds:.1f} s, {answer.tokens} written in "
        f"{answer.seconds:.1f} s{rate}{end}"
    )
