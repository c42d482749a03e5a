"""Answers that the float model writes itself, streamed block by block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import calibrate, full_model_kwargs, load_full, quantize, refused, tree

from glmq.calibration.generate import GenerationPlan, generate_answers, plan_generation, with_answers
from glmq.calibration.resume import CalibrationJournal
from glmq.calibration.samples import Sample, list_images, open_image, read_samples
from glmq.calibration.stats import Statistics
from glmq.checkpoint.reader import Checkpoint
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.model.config import read_config
from glmq.model.inputs import DEFAULT_PROMPT, Preprocessor
from glmq.model.streamed import StreamedModel
from glmq.progress import Event, Note
from glmq.ranks import Place, Ranks

TOKENS = 40
ALONE = Ranks(Place(0, 1))


@pytest.fixture(scope="module")
def samples(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    """Two pictures whose answers end after 19 and 28 tokens, a picture with an answer, and a question without a picture."""
    lines = [
        {"image": str(pictures / "00.png"), "prompt": DEFAULT_PROMPT},
        {"image": str(pictures / "02.png"), "prompt": DEFAULT_PROMPT, "text": "Two objects."},
        {"prompt": "What is a licence?"},
        {"image": str(pictures / "01.png"), "prompt": DEFAULT_PROMPT},
    ]
    path = tmp_path_factory.mktemp("asked") / "s.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return read_samples(path, limit=None).samples


def generate(
    model: Path, samples: tuple[Sample, ...], folder: Path, tokens: int, *, kept: bool = True
) -> tuple[GenerationPlan, tuple[Sample, ...]]:
    folder.mkdir(exist_ok=True)
    with Checkpoint.open(model) as source:
        config = read_config(model)
        streamed = StreamedModel(source, config, device=torch.device("cpu"), dtype=torch.float32)
        preprocessor = Preprocessor(model, config, max_pixels=None, trust_remote_code=False)
        plan = plan_generation(streamed, samples, preprocessor, tokens)
        assert bool(plan.kept) == kept
        journal = CalibrationJournal(folder, folder, {}, source, streamed.config.family, ALONE)
        for done in generate_answers(streamed, samples, preprocessor, plan, journal, ALONE):
            assert 0 <= done.index < done.total == tokens * len(plan.rounds)
        assert all(parameter.device.type == "meta" for parameter in streamed.model.parameters())
        return plan, with_answers(samples, plan, journal)


def ids(samples: tuple[Sample, ...]) -> list[tuple[int, ...] | None]:
    return [None if sample.generated is None else sample.generated.ids for sample in samples]


@pytest.fixture(scope="module")
def answered(tiny: Path, samples: tuple[Sample, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    return generate(tiny, samples, tmp_path_factory.mktemp("answered"), TOKENS)[1]


@pytest.mark.slow
def test_answers_are_those_of_transformers_own_generation(
    tiny: Path, samples: tuple[Sample, ...], answered: tuple[Sample, ...]
) -> None:
    model, config = load_full(tiny, torch.float32), read_config(tiny)
    preprocessor = Preprocessor(tiny, config, max_pixels=None, trust_remote_code=False)
    for sample, found in zip(samples, ids(answered), strict=True):
        if sample.answer:
            assert found is None
            continue
        inputs = preprocessor.encode(open_image(sample), sample.prompt, None)
        output = model.generate(
            **(full_model_kwargs(inputs, model) | {"use_cache": True}),
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=list(config.eos_token_ids),
            pad_token_id=config.eos_token_ids[0],
        )
        wanted = output[0, inputs.tokens :].tolist()
        ended = wanted[-1] in config.eos_token_ids
        assert found == tuple(wanted[:-1] if ended else wanted)
    assert [None if i is None else len(i) for i in ids(answered)][::3] == [19, 28]  # both stopped at the end token
    assert answered[0].generated is not None
    assert answered[0].generated.text == (
        "The background is sky. There is one object: a large purple triangle at the bottom left."
    )


@pytest.mark.slow
def test_weights_that_do_not_fit_are_read_for_each_token_and_change_nothing(
    tiny: Path,
    samples: tuple[Sample, ...],
    answered: tuple[Sample, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("glmq.calibration.generate.KEPT_SHARE", 0.0)
    monkeypatch.setattr("glmq.calibration.generate.HEAD_ROWS", 500)
    monkeypatch.setattr("glmq.calibration.generate.RECORD_SECONDS", 0.0)
    plan, found = generate(
        tiny, samples, tmp_path, 8, kept=False
    )  # all answers reach the limit, each token is recorded
    assert plan.kept_bytes == 0
    assert plan.read_seconds > 0
    assert ids(found) == [None if answer is None else answer[:8] for answer in ids(answered)]


@pytest.mark.slow
def test_a_round_takes_samples_while_their_keys_and_values_fit(
    small: Path, samples: tuple[Sample, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(small)
    place = 2 * config.layers * config.kv_heads * config.head_dim * 4
    # The pictures take 38 tokens, the question alone fewer; each may answer in 2.
    for places, rounds in ((3 * 40, ((0, 2, 3),)), (3 * 40 - 1, ((0, 2), (3,))), (1, ((0,), (2,), (3,)))):
        monkeypatch.setattr("glmq.calibration.generate.CACHE_BYTES", places * place)
        assert generate(small, samples, tmp_path / str(places), 2)[0].rounds == rounds


def test_a_model_that_keeps_talking_stops_at_the_limit_and_never_says_the_image_placeholder(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = list_images(pictures, DEFAULT_PROMPT, skip_bad=False, limit=1).samples
    first = ids(generate(small, samples, tmp_path / "one", 3)[1])[0]
    assert first is not None
    assert len(first) == 3
    # The same, were its favourite the placeholder: the next best is taken.
    config = read_config(small)
    changed = type(config)(
        **{name: getattr(config, name) for name in config.__dataclass_fields__} | {"image_token_id": first[0]}
    )
    monkeypatch.setattr("glmq.calibration.encode.open_image", lambda _: None)  # no placeholder in the prompt then
    monkeypatch.setattr(f"{__name__}.read_config", lambda _: changed)
    render = Preprocessor._render_once

    def place_favourite(self: Preprocessor, has_image: bool, prompt: str) -> str:
        """A template whose pictures have that placeholder."""
        return self._tokenizer.convert_ids_to_tokens(first[0]) if has_image else render(self, has_image, prompt)

    monkeypatch.setattr(Preprocessor, "_render_once", place_favourite)
    textual = tuple(Sample("q", None, "Why?", None, "") for _ in range(1))
    found = ids(generate(small, textual, tmp_path / "two", 3)[1])[0]
    assert found is not None
    assert first[0] not in found


def test_statistics_with_generated_answers_say_so_and_cover_them(small: Path, pictures: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    calibrate(small, tmp_path / "stats", pictures, limit=2, texts=False, generate=3, watch=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert "generate: 2 samples are answered in up to 3 tokens; reading the weights once takes up to about 1 s" in notes
    assert not any("have no answer" in note for note in notes)
    statistics = Statistics.open(tmp_path / "stats")
    for sample, entry in zip(statistics.samples(), statistics.manifest["samples"], strict=True):
        assert (sample.tokens, sample.has_answer) == (38 + 3, True)
        assert len(entry["generated"]["ids"]) == 3
        assert isinstance(entry["generated"]["text"], str)
    assert statistics.manifest["generate"] == 3
    assert statistics.input("lm_head").tokens == 2 * (38 + 3)


def test_quantize_takes_such_statistics_for_the_same_answers_only(small: Path, pictures: Path, tmp_path: Path) -> None:
    def quantized(name: str, generate: int | None) -> Path:
        calibration = CalibrationOptions(images=pictures, limit=1, texts=False, generate=generate)
        return quantize(small, tmp_path / "stats", tmp_path / name, calibration=calibration)

    assert tree(quantized("one", 3)) == tree(quantized("two", 3))
    code, sentence = refused(lambda: quantized("three", None))
    assert code == 4
    assert "other samples, prompt, limit or --generate than the command names" in sentence


@pytest.mark.slow
def test_a_run_that_was_stopped_between_answers_continues_to_the_same_bytes(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmq.calibration.generate.CACHE_BYTES", 1)  # a round for each sample
    options = {"limit": 3, "texts": False, "generate": 2}
    whole = calibrate(small, tmp_path / "whole", pictures, **options)
    rounds: list[int] = []

    real = StreamedModel.vision_call

    def stop(self: StreamedModel, inputs: object) -> object:
        rounds.append(1)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return real(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "vision_call", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate(small, tmp_path / "stats", pictures, **options)
    assert tree(calibrate(small, tmp_path / "stats", pictures, resume=True, **options)) == tree(whole)
