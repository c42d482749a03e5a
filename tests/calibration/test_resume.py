"""What a resumed calibration trusts: nothing that was altered or taken away since the kill."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import calibrate, edit_tensors, refused, run_ranks, tree
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmq.calibration.resume import CalibrationJournal
from glmq.calibration.stats_writer import StoredBlock
from glmq.checkpoint.contents import ContentDigests
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import StatisticsError, UsageError
from glmq.model.config import read_config
from glmq.progress import Event, Note
from glmq.ranks import Place, Ranks

BLOCKS = 5
"""Of the small model: a vision block, the merger, two text layers, lm_head."""
LAYER = "model.language_model.layers"
TEXT_INPUTS = "text_inputs-0001.safetensors"


def run(model: Path, pictures: Path, stats: Path, **options: object) -> list[str]:
    """Calibrate on two pictures; returns what was noted."""
    events: list[Event] = []
    calibrate(model, stats, pictures, limit=2, texts=False, text_inputs=True, watch=events.append, **options)
    return [event.text for event in events if isinstance(event, Note)]


def killed(work: Callable[[], object], owner: type, method: str, call: int, *, after: bool) -> None:
    """Run in a forked child that kills itself (kill -9) before or after the call of that number of a method."""
    child = os.fork()
    if child == 0:
        count, original = 0, getattr(owner, method)

        def dying(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = original(*args, **kwargs)
            if count == call and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, method, dying)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it came to its end"


@pytest.fixture(scope="module")
def unbroken(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("unbroken") / "stats"
    run(small, pictures, out)
    assert sorted(tree(out)) == [
        "lm_head.safetensors", f"{LAYER}.0.safetensors", f"{LAYER}.1.safetensors", "model.visual.blocks.0.safetensors",
        "model.visual.merger.safetensors", "statistics.json", "text_inputs-0000.safetensors", "text_inputs-0001.safetensors",
    ]  # fmt: skip
    return tree(out)


@pytest.fixture(scope="module")
def cut_short(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that is killed after it has journaled its third block, beside nothing else. Do not write into it."""
    folder = tmp_path_factory.mktemp("cut")
    killed(lambda: run(small, pictures, folder / "stats"), Journal, "record", 3, after=True)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "states removed": (lambda f: (f / ".states-002-0").unlink(), ".states-002-0"),
    "states altered": (lambda f: flip(f / ".states-002-0"), ".states-002-0"),
    "states emptied": (lambda f: (f / ".states-002-0").write_bytes(b""), ".states-002-0"),
    "first block removed": (
        lambda f: (f / "result" / "model.visual.blocks.0.safetensors").unlink(), "model.visual.blocks.0.safetensors",
    ),
    "last block altered": (lambda f: flip(f / "result" / f"{LAYER}.0.safetensors"), f"{LAYER}.0.safetensors"),
    "text inputs removed": (lambda f: (f / "result" / TEXT_INPUTS).unlink(), TEXT_INPUTS),
    "text inputs altered": (lambda f: flip(f / "result" / TEXT_INPUTS), TEXT_INPUTS),
    "journal removed": (lambda f: (f / "journal.jsonl").unlink(), "journal.jsonl"),
    "journal's settings altered": (
        lambda f: (f / "journal.jsonl").write_text((f / "journal.jsonl").read_text().replace('"', '"x', 1)), "journal.jsonl",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_what_was_damaged_between_kill_and_resume_is_done_again_and_said(
    what: str, small: Path, pictures: Path, unbroken: dict[str, str], cut_short: Path, tmp_path: Path
) -> None:
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    damage, named = DAMAGE[what]
    damage(tmp_path / ".stats.partial")
    assert f"note: {named} of the unfinished run is missing or altered, so its 3 finished blocks are done again" in (
        run(small, pictures, tmp_path / "stats", resume=True)
    )
    assert tree(tmp_path / "stats") == unbroken
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


@pytest.mark.slow
def test_a_damaged_line_of_the_journal_and_its_block_are_done_again(
    small: Path, pictures: Path, unbroken: dict[str, str], cut_short: Path, tmp_path: Path
) -> None:
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    path = tmp_path / ".stats.partial" / "journal.jsonl"
    first, second, third, fourth = path.read_text().splitlines()
    path.write_text("\n".join([first, second, third.replace('"tokens": ', '"tokens": 1', 1), fourth]) + "\n")
    assert "note: .states-000-0 of the unfinished run is missing or altered, so its 1 finished block is done again" in (
        run(small, pictures, tmp_path / "stats", resume=True)
    )
    assert tree(tmp_path / "stats") == unbroken


@pytest.mark.slow
def test_a_run_that_was_only_killed_has_nothing_to_say(
    small: Path, pictures: Path, unbroken: dict[str, str], cut_short: Path, tmp_path: Path
) -> None:
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    assert not any("unfinished" in note for note in run(small, pictures, tmp_path / "stats", resume=True))
    assert tree(tmp_path / "stats") == unbroken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [("unlink", "before"), ("unlink", "after"), ("replace", "before"), ("replace", "after")],
)
@pytest.mark.parametrize("call", [1, 4, 7])
def test_a_kill_at_any_rename_or_removal_leaves_no_file_but_the_documented(
    name: str, method: str, call: int, small: Path, pictures: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    owner: type = Path if name == "unlink" else os  # type: ignore[assignment]
    killed(lambda: run(small, pictures, tmp_path / "stats"), owner, name, call, after=method == "after")
    with suppress(UsageError):  # of a run that was killed after its last block it says that it is whole
        run(small, pictures, tmp_path / "stats", resume=True)
    assert tree(tmp_path / "stats") == unbroken
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


@pytest.mark.slow
def test_files_that_no_site_is_in_do_not_reach_the_finished_folder(
    small: Path, pictures: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    killed(lambda: run(small, pictures, tmp_path / "stats"), Journal, "record", 2, after=True)
    for name in (".states-000-0", ".states-000-7", "result/.lm_head.safetensors.partial", "result/old.safetensors"):
        (tmp_path / ".stats.partial" / name).write_bytes(b"left over")
    run(small, pictures, tmp_path / "stats", resume=True)
    assert tree(tmp_path / "stats") == unbroken


def replaced(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[0] += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "model.visual.blocks.0.attn.qkv.weight", f"{LAYER}.0.self_attn.q_proj.bias", "lm_head.weight",
        "model.language_model.embed_tokens.weight", "model.visual.merger.post_projection_norm.bias",
    ],
)  # fmt: skip
def test_weights_that_were_exchanged_between_kill_and_resume_are_refused_by_name(
    name: str, small_copy: Path, pictures: Path, cut_short: Path, tmp_path: Path
) -> None:
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    edit_tensors(small_copy, lambda tensors: replaced(tensors, name))
    assert refused(lambda: run(small_copy, pictures, tmp_path / "stats", resume=True)) == (
        4,
        f"{small_copy / 'model-00001-of-00001.safetensors'}: tensor {name!r} is not the one that the unfinished run in "
        f"{tmp_path / '.stats.partial'} has read; give its weights, or start again with --overwrite",
    )
    assert not (tmp_path / "stats").exists()


@pytest.mark.slow
def test_weights_that_were_exchanged_before_they_were_read_are_those_of_the_whole_run(
    small_copy: Path, pictures: Path, cut_short: Path, tmp_path: Path
) -> None:
    """The statistics of a layer depend on the layers before it alone: nothing is mixed."""
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    edit_tensors(small_copy, lambda tensors: replaced(tensors, f"{LAYER}.1.self_attn.q_proj.bias"))
    run(small_copy, pictures, tmp_path / "stats", resume=True)
    run(small_copy, pictures, tmp_path / "again")
    assert tree(tmp_path / "stats") == tree(tmp_path / "again")


@pytest.mark.slow
def test_weights_that_were_exchanged_after_the_models_answers_are_refused(
    small_copy: Path, pictures: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    killed(lambda: run(small_copy, pictures, stats, generate=2), Journal, "record", 1, after=True)
    name = f"{LAYER}.1.mlp.down_proj.weight"
    edit_tensors(small_copy, lambda tensors: replaced(tensors, name))
    code, sentence = refused(lambda: run(small_copy, pictures, stats, generate=2, resume=True))
    assert code == 4
    assert f"tensor {name!r} is not the one that the unfinished run in" in sentence


def test_the_manifest_has_the_digest_of_every_tensor_whatever_was_read(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    run(small, pictures, tmp_path / "pictures")
    (tmp_path / "s.jsonl").write_text('{"text": "Permission is hereby granted."}')
    calibrate(small, tmp_path / "text", None, samples_file=tmp_path / "s.jsonl", texts=False)
    found = [json.loads((tmp_path / name / "statistics.json").read_text())["weights"] for name in ("pictures", "text")]
    assert found[0] == found[1]
    assert set(found[0]) == set(load_file(small / "model-00001-of-00001.safetensors"))


def test_calibration_reads_each_tensor_once(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = ContentDigests.learn

    def learn(self: ContentDigests, path: Path, digests: dict[str, str]) -> None:
        if path.suffix == ".safetensors":
            seen.extend(digests)
        original(self, path, digests)

    monkeypatch.setattr(ContentDigests, "learn", learn)
    run(small, pictures, tmp_path / "stats")
    # What comes before the first block of the vision tower stays in memory for no second use: the stem is read for
    # pictures, and everything else once.
    tensors = list(load_file(small / "model-00001-of-00001.safetensors"))
    assert sorted(seen) == sorted(tensors)


def opened(folder: Path, model: Path, ranks: Ranks) -> CalibrationJournal:
    return CalibrationJournal(folder, folder, {}, Checkpoint.open(model), read_config(model).family, ranks)


def test_ranks_that_read_different_weights_all_stop(small_copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_copy, other)
    name = f"{LAYER}.0.self_attn.q_proj.weight"
    edit_tensors(other, lambda tensors: replaced(tensors, name))
    folder = tmp_path / "stats"
    folder.mkdir()

    def work(ranks: Ranks) -> None:
        source = Checkpoint.open(other if ranks.place.rank else small_copy)
        journal = CalibrationJournal(folder, folder, {}, source, read_config(small_copy).family, ranks)
        source.read(name)
        journal.record_block("a", StoredBlock({}, {}), {})

    raised = run_ranks(2, work)
    assert [text.partition(":")[0] for text in raised] == ["OtherStatisticsError", "OtherStatisticsError"]
    assert all(f"tensor {name!r} is not the one" in text for text in raised)


def test_a_log_of_foreign_shapes_is_no_reason_to_fail(small: Path, tmp_path: Path) -> None:
    for payload in (
        {"inputs": []},
        {"inputs": {}, "files": 3, "states": {}},
        {"inputs": {}, "files": {}, "states": {"a": 1}},
    ):
        shutil.rmtree(tmp_path / "stats", ignore_errors=True)
        (tmp_path / "stats").mkdir()
        Journal(tmp_path / "stats", {}).record("a", payload)
        journal = opened(tmp_path / "stats", small, Ranks(Place(0, 1)))
        assert journal.finished == []
        assert journal.note == (
            "journal.jsonl of the unfinished run is missing or altered, so its 1 finished block is done again"
        )


def test_answers_of_foreign_shapes_are_made_again(small: Path, tmp_path: Path) -> None:
    for answers in (None, [], {"x": {}}, {"0": {"ids": "1", "text": ""}}, {"0": {"ids": [None], "text": ""}}):
        Journal(tmp_path, {}).record("answers 0", {"answers": answers})
        assert opened(tmp_path, small, Ranks(Place(0, 1))).answers(0) is None


def test_a_tensor_counts_when_its_bytes_were_read_in_order(tmp_path: Path) -> None:
    save_file({"a": torch.arange(12.0).reshape(4, 3), "empty": torch.zeros(0, 3)}, tmp_path / "m.safetensors")
    digests = []
    for rows in ([(0, 4)], [(0, 1), (1, 4)], [(2, 3), (0, 2), (2, 4)], [(0, 2), (0, 4)]):
        source = Checkpoint.open(tmp_path)
        source.contents = ContentDigests({}, "it")
        for start, stop in rows:
            source.read_rows("a", start, stop)
        digests.append(source.contents.known["a"])
    assert len(set(digests)) == 1
    for rows in ([(1, 4)], [(0, 1), (2, 4)], [(0, 3)], [(0, 2), (1, 4)]):
        source = Checkpoint.open(tmp_path)
        source.contents = ContentDigests({"a": "another"}, "it")
        for start, stop in rows:
            source.read_rows("a", start, stop)
        with pytest.raises(StatisticsError, match=r"m\.safetensors: tensor 'a' is not it$"):
            source.scan("a")
        source.scan("empty")
        assert "empty" in source.contents.known
