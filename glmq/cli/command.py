"""The command class of every verb: the vendor's spellings of booleans, and the one place where errors are caught."""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from glmq.cli.complaint import ANSWERED, complain, describe_failure, say, say_stopped
from glmq.cli.config_file import MAY_BE_EMPTY, dump_config, read_config_file
from glmq.cli.files import check_files
from glmq.cli.help import HELP_ALL, help_of_group, help_of_verb
from glmq.cli.presets import defaults_of
from glmq.cli.stopped import remember_command
from glmq.cli.streams import silence
from glmq.errors import INTERRUPTED, TERMINATED, GlmqError, UsageError
from glmq.machine import logging_to
from glmq.values import DTYPE_WORDS

log = logging.getLogger(__name__)

TRUE_WORDS: Final = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS: Final = frozenset({"false", "0", "no", "off"})
BOOLEAN_WORDS: Final = TRUE_WORDS | FALSE_WORDS
WANTED: Final = {
    r"Input should be a valid integer.*": "a whole number is needed",
    r"Input should be a valid number.*": "a number is needed",
    r"Input should be greater than or equal to (.*)": r"at least \1 is needed",
    r"Input should be less than or equal to (.*)": r"at most \1 is needed",
}
"""What pydantic says of a value -> what the user is told, for re.sub."""

SAID: Final = {
    r"No such command (.+)\. Did you mean (.+)\?": r"\1: no such verb, did you mean \2",
    r"No such command (.+)": r"\1: no such verb",
    r"No such option: (\S+) \(Possible options: (.+)\)": r"\1: no such option, did you mean \2",
    r"No such option: (\S+)": r"\1: no such option",
    r"Missing (?:option|argument) (\S+)": r"\1: missing",
    r"Option (\S+) requires an argument": r"\1: a value is needed",
    r"Got unexpected extra argument(?:s|\(s\))? \((.+)\)": r"\1: not expected",
}
"""What typer says of a command line -> what the user is told, for re.sub."""

LAST_WORD: Final = "glmq.last_word"
"""Key of typer's context: the last complete word of the command line, while a shell asks for completions."""
CONTEXT: Final = {
    # --model_path and --model-path are one option.
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}

EXIT_CODES: Final = (
    "Exit codes: 0 done, 1 unexpected failure, 2 wrong usage, 3 verify found problems, 4 bad input "
    "(model, images, statistics), 5 disk, memory or device missing, 130 Ctrl-C, 143 terminated."
)


ARGUMENTS: Final = "glmq.arguments"
"""Key of a context's `meta`: the arguments as they were typed."""


class Terminated(BaseException):
    """SIGTERM arrived."""


class GlmqGroup(TyperGroup):
    """The commands together: `glmq help VERB` is `glmq VERB --help`, and wrong usage is one sentence."""

    # Any: as in GlmqCommand.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        if args[:1] == [HELP_ALL]:
            args = ["--help"]
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(2)
        with usage_errors(args, ctx.command_path):
            return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        verbs = {name: (self.commands[name].help or "").partition("\n\n")[0] for name in self.list_commands(ctx)}
        options = [
            (", ".join(sorted(one.opts, key=len)), getattr(one, "help", None) or "") for one in self.get_params(ctx)
        ]
        formatter.write(help_of_group(ctx.command_path, self.help or "", verbs, options, EXIT_CODES))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        with usage_errors(args, ctx.command_path):
            return super().resolve_command(ctx, args)


class GlmqCommand(TyperCommand):
    """A command that takes `--flag True` beside `--flag`, and turns errors into one sentence and an exit code."""

    # Any: the base class is typed with classes of typer's vendored click, which have no public name.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[LAST_WORD] = args[-1:]
        if ctx.resilient_parsing:  # a shell asks what could come next
            return super().parse_args(ctx, args)
        if HELP_ALL in map(_dashed, args):
            typer.echo(self._help(ctx, everything=True), nl=False)
            raise typer.Exit
        ctx.meta[ARGUMENTS] = list(args)
        can_resume = any(isinstance(param, TyperOption) and param.name == "resume" for param in self.params)
        remember_command(ctx.command_path.split(), _without_resume(args), can_resume=can_resume)
        with usage_errors(args, ctx.command_path):
            _refuse_empty(args)
            args = _spell_dtypes(_spell_booleans(args, self.params))
            file = _value_of("--config", args)
            chosen = read_config_file(file, self.params) if file is not None else {}
            ctx.default_map = {**defaults_of(_value_of("--preset", args) or chosen.get("preset")), **chosen}
            with _of_file(file, chosen, args):
                return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(self._help(ctx, everything=False))

    def _help(self, ctx: Any, *, everything: bool) -> str:
        assert self.callback is not None
        return help_of_verb(ctx.command_path, self.callback, EXIT_CODES, everything=everything)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """What may come next, options spelled with underscores where the word so far is: the vendor's spelling."""
        before = [_dashed(word) for word in ctx.meta.get(LAST_WORD, [])]
        for param in self.params if not incomplete.startswith("-") else ():
            if isinstance(param, TyperOption) and not param.is_flag and before[:1] and before[0] in param.opts:
                return param.shell_complete(ctx, incomplete)
        found = super().shell_complete(ctx, _dashed(incomplete))
        for item in found if "_" in incomplete else ():
            item.value = "--" + item.value[2:].replace("-", "_")
        return found

    def invoke(self, ctx: Any) -> Any:
        how = {"json_wanted": bool(ctx.params.get("json_output")), "debug": bool(ctx.params.get("debug"))}
        signal.signal(signal.SIGTERM, _raise_terminated)
        ANSWERED.set(False)
        try:
            if ctx.params.get("dump_config"):
                typer.echo(dump_config(ctx.params).encode(), nl=False)  # TOML is UTF-8, whatever stdout is
                raise typer.Exit
            _check_process()
            check_files(ctx.params)
            with _logged(ctx.params.get("log_file")):
                return super().invoke(ctx)
        except GlmqError as error:
            complain(error.code, _as_spelled(str(error), ctx.meta[ARGUMENTS]), **how)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            _ignore_signals()
            say_stopped(INTERRUPTED, "Ctrl-C", ctx.params, **how)
            raise typer.Exit(130) from error
        except Terminated as error:
            say_stopped(TERMINATED, "SIGTERM", ctx.params, **how)
            raise typer.Exit(143) from error
        except BrokenPipeError:
            # The reader of our output went away, as `| head` does.
            silence(sys.stdout)
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort, SystemExit):
            raise
        except BaseException as error:  # a panic of a library written in Rust is no Exception
            if _is_usage_error(error):  # typer prints it
                raise
            code, message, exit_code = describe_failure(error)
            complain(code, message, **how)
            raise typer.Exit(exit_code) from error


@contextmanager
def _of_file(file: str | None, chosen: Mapping[str, object], args: Sequence[str]) -> Iterator[None]:
    """Name the file of --config where what typer finds wrong is a value of it."""
    typed = {arg.partition("=")[0] for arg in map(_dashed, args)}  # before typer empties the list
    try:
        yield
    except Exception as error:
        words = [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        sentence = usage_sentence(error, words) or ""
        option = sentence.partition(":")[0].partition(" ")[0]
        if option in words[::2] and option not in typed:
            raise typer.BadParameter(f"--config {file}: {sentence}") from error
        raise


@contextmanager
def usage_errors(args: Sequence[str], command: str) -> Iterator[None]:
    """Say what typer finds wrong with the arguments as every other error is said, and exit with 2."""
    try:
        yield
    except Exception as error:
        message = usage_sentence(error, args)
        if message is None:
            raise
        json_wanted = "--json" in args
        if not json_wanted:
            message = f"{message}; see `{command} --help`"
        complain(UsageError.code, message, json_wanted=json_wanted, debug=False)
        raise typer.Exit(2) from error


def usage_sentence(error: BaseException, args: Sequence[str]) -> str | None:
    """What typer finds wrong with these arguments, in one sentence; None for what is no such error."""
    return _usage_sentence(error.format_message(), args) if _is_usage_error(error) else None  # type: ignore[attr-defined]


def _usage_sentence(message: str, args: Sequence[str]) -> str:
    """typer's sentence without the words of its parts, each option as the user spelled it."""
    sentence = re.sub(
        r"^Invalid value(?: for '([^']+)')?: (?:Value error, )?", lambda m: f"{m[1]}: " if m[1] else "", message
    )
    sentence = sentence.rstrip(".")
    for words, told in SAID.items():
        if re.fullmatch(words, sentence):
            sentence = re.sub(words, told, sentence.replace("'", ""))
            break
    for words, wanted in WANTED.items():
        option, colon, said = sentence.partition(": ")
        if colon and re.fullmatch(words, said):
            found = _value_of(option, [_dashed(arg) for arg in args])
            sentence = f"{option}{'' if found is None else f' {found}'}: {re.sub(words, wanted, said)}"
    return _as_spelled(sentence, args).rstrip(".")


def _as_spelled(sentence: str, args: Sequence[str]) -> str:
    """The sentence with each option as the user spelled it: with underscores or hyphens."""
    for arg in args:
        spelled = arg.partition("=")[0]
        if spelled.startswith("--"):
            either = re.sub("[-_]", "[-_]", spelled[2:])
            sentence = re.sub(rf"--{either}(?![-_\w])", spelled, sentence)
    return sentence


def _check_process() -> None:
    """Raise UsageError for what would end in a library's failure that nobody understands."""
    if sys.flags.optimize > 1:
        raise UsageError(
            "Python leaves docstrings out here (-OO, PYTHONOPTIMIZE=2), which transformers reads; unset it"
        )
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError("the folder that glmq was started in is gone; change to one that exists") from None


@contextmanager
def _logged(path: Path | None) -> Iterator[None]:
    """Write what glmq logs into a file too, and the traceback of what stops the command."""
    if path is None:
        yield
        return
    with logging_to(path, logging.DEBUG) as file:
        try:
            yield
        except BaseException as error:
            if not isinstance(error, typer.Exit):
                log.exception("stopped by %s", type(error).__name__)
            raise
    if file.failure is not None:
        say(f"warning: {path}: lines are missing in the log ({file.failure.strerror})")


def _is_usage_error(error: BaseException) -> bool:
    """Whether it is one of typer's own usage errors, whose base class has no public name."""
    return type(error).__module__.startswith("typer.") and not isinstance(error, typer.Exit | typer.Abort)


def _dashed(word: str) -> str:
    """`--model-path` of `--model_path`; what is no option as it is."""
    return word.replace("_", "-") if word.startswith("--") else word


def _value_of(option: str, args: Sequence[str]) -> str | None:
    """The value of an option that supplies the others' defaults, before they are parsed."""
    for index, arg in enumerate(args):
        if arg == option and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
    return None


def _refuse_empty(args: Sequence[str]) -> None:
    """Raise for an empty value: mostly a variable of the shell that is not set, and as a path the current folder."""
    for before, arg in zip(("", *args), args):
        option, equals, value = (before, "=", arg) if not arg and before.startswith("--") else arg.partition("=")
        if value or (arg and not (equals and option.startswith("--"))) or _dashed(option)[2:] in MAY_BE_EMPTY:
            continue
        what = option if option.startswith("--") else "an argument"
        raise typer.BadParameter(f"{what}: is empty; give a value (perhaps a variable of the shell is not set)")


def _spell_booleans(args: Sequence[str], params: Sequence[object]) -> list[str]:
    """Rewrite `--flag True`, `--flag=false` to `--flag` and `--no-flag` for options that are such flags."""
    flags: dict[str, tuple[str, str]] = {}
    takes_arguments = any(isinstance(param, TyperArgument) for param in params)
    for param in params:
        if isinstance(param, TyperOption) and param.is_flag and param.secondary_opts:
            for name in param.opts:
                flags[name] = (param.opts[0], param.secondary_opts[0])
    rewritten: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        name = name.replace("_", "-")
        if name not in flags or arg == "--":
            rewritten.append(arg)
            continue
        if not equals and rest and (rest[0].lower() in BOOLEAN_WORDS or (not takes_arguments and rest[0][:1] != "-")):
            value = rest.pop(0)
        word = value.lower() or "true"
        if word not in BOOLEAN_WORDS:
            raise typer.BadParameter(f"{name} {value}: True or False is needed")
        rewritten.append(flags[name][0 if word in TRUE_WORDS else 1])
    return rewritten


def _without_resume(args: Sequence[str]) -> list[str]:
    """The arguments but for `--resume`, however it is spelled."""
    kept: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, _ = arg.partition("=")
        if _dashed(name) not in ("--resume", "--no-resume"):
            kept.append(arg)
        elif not equals and rest and rest[0].lower() in BOOLEAN_WORDS:
            rest.pop(0)
    return kept


def _spell_dtypes(args: Sequence[str]) -> list[str]:
    """Rewrite `--torch_dtype float16` to `--torch_dtype fp16`."""
    rewritten: list[str] = []
    for arg in args:
        name, equals, value = arg.rpartition("=")
        before = name if equals else rewritten[-1] if rewritten else ""
        is_dtype = before.replace("_", "-") == "--torch-dtype"
        rewritten.append(f"{name}{equals}{DTYPE_WORDS.get(value, value)}" if is_dtype else arg)
    return rewritten


def _raise_terminated(_: int, __: FrameType | None) -> None:
    _ignore_signals()
    raise Terminated


def _ignore_signals() -> None:
    """From now on until the end of the process: it is ending, and a second signal would only keep it from saying how."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
