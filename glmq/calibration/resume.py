"""What an interrupted calibration leaves, and what of it the resumed one may go on from.

    journal.jsonl           one line per finished block, see `glmq.checkpoint.journal`; with answers, one line per round of them
    .states-NNN-R           rank R's hidden states after block NNN, the last finished one
    {block}.safetensors     the statistics of finished blocks, in the folder that becomes the output

A line holds the checksums of everything that a resume reads: the files above, and the tensors of the checkpoint that were read
since the line before. If one is missing or altered, all blocks are done again: hidden states follow from those of the block
before alone, and only the last ones are kept, as they have gigabytes. A checkpoint that is another one now is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from safetensors import safe_open

from glmq.calibration import text_inputs
from glmq.calibration.manifest import parse_digests
from glmq.calibration.samples import GeneratedAnswer
from glmq.calibration.stats_writer import StoredBlock
from glmq.checkpoint.checksums import is_as_written
from glmq.checkpoint.contents import ContentDigests
from glmq.checkpoint.journal import NAME, NO_OPTIONS, Journal
from glmq.checkpoint.json_file import JsonObject, JsonValue
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.writer import write_tensors
from glmq.model.family import Family
from glmq.model.streamed import BlockCall
from glmq.ranks import Ranks
from glmq.wording import counted

Calls: TypeAlias = dict[int, BlockCall]
"""The calls in flight, by index of the sample."""

STATES: Final = ".states-"


@dataclass(frozen=True, slots=True)
class FinishedBlock:
    """A block whose statistics are stored."""

    name: str
    stored: StoredBlock
    states: Mapping[str, str]
    """xxh3-128 of the files of hidden states that it left, by name."""


class CalibrationJournal:
    """The journal of a calibration with the hidden states to resume from; all ranks call its methods together.

    Opening it looks at what an interrupted run has left, and reads all weights that that run has read once more.

    Args:
        work: where the journal and hidden states lie.
        out: where the statistics grow.
        settings: everything that their bytes depend on, beside the weights' values.
        source: the float checkpoint; its `contents` are set.
        family: that it belongs to.
        ranks: the processes that share the samples.
        options: what the user chose, by option.

    Raises:
        UsageError: the interrupted run had other settings.
        StatisticsError: its checkpoint had other weights.
    """

    def __init__(
        self,
        work: Path,
        out: Path,
        settings: Mapping[str, str],
        source: Checkpoint,
        family: Family,
        ranks: Ranks,
        options: Mapping[str, str] = NO_OPTIONS,
    ) -> None:
        self._work, self._out, self._source, self._ranks = work, out, source, ranks
        self._journal = Journal(work, settings, writes=ranks.place.is_first, options=options)
        self.is_resumed: Final = bool(self._journal.finished)
        self.note = ""
        """What of the interrupted run is lost, as a sentence for the user; empty if nothing is."""
        self.finished: list[FinishedBlock] = []
        self._rewind()
        self._contents = ContentDigests(
            {
                name: value
                for line in self._journal.finished.values()
                for name, value in _digests(line, "weights").items()
            },
            f"the one that the unfinished run in {work} has read; give its weights, or start again with --overwrite",
        )
        source.contents = self._contents
        # These are read whole, block by block; of the others, rows at most.
        placed = (f"{family.vision}.", f"{family.text}.layers.", f"{family.text}.norm.")
        self._scan(name for name in source if name in self._contents.known or not name.startswith(placed))
        ranks.barrier()  # nobody writes before rank 0 has cleared the folder

    def load_states(self, calls: Calls) -> None:
        """Put the states that the last finished block left into the calls, whatever ranks wrote them."""
        for name in self.finished[-1].states:
            with safe_open(self._work / name, "pt") as stored:
                for sample in {int(key) for key in stored.keys()} & calls.keys():  # noqa: SIM118 - it is no mapping
                    calls[sample].hidden = stored.get_tensor(str(sample)).to(calls[sample].hidden.device)

    def record_block(self, name: str, stored: StoredBlock, calls: Calls) -> None:
        """A block is finished: keep its states whole or not at all, journal it, then drop the states of the one before."""
        states = {str(sample): call.hidden.contiguous() for sample, call in calls.items()}
        path = self._work / f"{STATES}{len(self.finished):03d}-{self._ranks.place.rank}"
        own = json.dumps({path.name: write_tensors(path, states)})
        every = {key: value for text in self._ranks.all_gather(own) for key, value in json.loads(text).items()}
        line = {"inputs": stored.inputs, "files": stored.files, "states": every, "weights": self._share_weights()}
        self._journal.record(name, line)
        self.finished.append(FinishedBlock(name, stored, every))
        self._clear(self._work, f"{STATES}*", keep=every)

    def record_answers(self, number: int, answers: JsonValue) -> None:
        """A round of answers is finished."""
        self._journal.record(_round_name(number), {"answers": answers, "weights": self._share_weights()})

    def answers(self, number: int) -> dict[int, GeneratedAnswer] | None:
        """The answers of a round by index of the sample, empty ones included; None if it is not finished."""
        return _parse_answers(self._journal.finished.get(_round_name(number), {}).get("answers"))

    def all_weights(self) -> dict[str, str]:
        """xxh3-128 of every tensor of the checkpoint; those that were not read yet are."""
        self._scan(name for name in self._source if name not in self._contents.known)
        self._share_weights()
        return {name: self._contents.known[name] for name in self._source}

    def finish(self, files: list[str]) -> None:
        """The statistics are whole: of all that glmq has written beside them only the journal stays."""
        self._clear(self._work, f"{STATES}*", keep=())
        self._clear(self._out, "*.safetensors", keep=files)

    def _rewind(self) -> None:
        """Keep the finished blocks up to the first that is damaged, if the states to go on from are there too; or none."""
        lines = {name: line for name, line in self._journal.finished.items() if "inputs" in line}
        found = [_parse_block(name, line) for name, line in lines.items()]
        (told, *_) = self._ranks.all_gather(self._find_damage(found) if self._ranks.place.is_first else "")
        if told:
            self.note = told
            self._journal.drop(lines.keys())
        else:
            self.finished = [block for block in found if block is not None]
        states = self.finished[-1].states if self.finished else {}
        self._clear(self._work, f"{STATES}*", keep=states)

    def _find_damage(self, found: list[FinishedBlock | None]) -> str:
        """What of the files of the finished blocks is missing or altered, as a sentence; empty if nothing is."""
        damaged = next((name for name in self._damaged(found)), None)
        if damaged is None:
            return ""
        blocks = len(found) or self._stored_blocks()
        again = counted(blocks, "finished block is", "finished blocks are")
        return f"{damaged} of the unfinished run is missing or altered, so its {again} done again"

    def _stored_blocks(self) -> int:
        files = {path.name: "" for path in self._out.glob("*.safetensors")}
        return len(files) - len(text_inputs.among(files))

    def _damaged(self, found: list[FinishedBlock | None]) -> Iterator[str]:
        if not found and self._stored_blocks() > 1:
            yield NAME
        for number, block in enumerate(found, 1):
            if block is None:
                yield NAME
                return
            wanted = {self._out / name: digest for name, digest in block.stored.files.items()}
            if number == len(found):
                wanted |= {self._work / name: digest for name, digest in block.states.items()}
            for path, digest in wanted.items():
                if not is_as_written(path, digest):
                    yield path.name

    def _scan(self, names: Iterator[str]) -> None:
        """Hash these tensors, divided among the ranks."""
        place = self._ranks.place
        for name in list(names)[place.rank :: place.world]:
            self._source.scan(name)

    def _share_weights(self) -> dict[str, str]:
        """What any rank has read since this was last asked, known to all of them."""
        every: dict[str, str] = {}
        for text in self._ranks.all_gather(json.dumps(self._contents.take_fresh())):
            every |= json.loads(text)
            self._contents.learn(self._source.directory, json.loads(text))
        self._contents.take_fresh()
        return every

    def _clear(self, folder: Path, pattern: str, *, keep: Mapping[str, str] | list[str] | tuple[()]) -> None:
        """Remove the files of that pattern and those that a kill left half written, on rank 0."""
        if self._ranks.place.is_first:
            for path in [*folder.glob(pattern), *folder.glob(".*.partial")]:
                if path.name not in keep:
                    path.unlink(missing_ok=True)


def _round_name(number: int) -> str:
    """Of a round of answers in the journal."""
    return f"answers {number}"


def _digests(line: JsonObject, key: str) -> dict[str, str]:
    return parse_digests(line.get(key)) or {}


def _parse_block(name: str, line: JsonObject) -> FinishedBlock | None:
    inputs, files, states = line.get("inputs"), parse_digests(line.get("files")), parse_digests(line.get("states"))
    if not isinstance(inputs, dict) or files is None or states is None:
        return None
    return FinishedBlock(name, StoredBlock(inputs, files), states)


def _parse_answers(found: JsonValue) -> dict[int, GeneratedAnswer] | None:
    if not isinstance(found, dict):
        return None
    answers: dict[int, GeneratedAnswer] = {}
    for index, answer in found.items():
        ids, text = (answer.get("ids"), answer.get("text")) if isinstance(answer, dict) else (None, None)
        if not index.isdecimal() or not isinstance(text, str) or not isinstance(ids, list):
            return None
        tokens = tuple(token for token in ids if isinstance(token, int))
        if len(tokens) != len(ids):
            return None
        answers[int(index)] = GeneratedAnswer(tokens, text)
    return answers
