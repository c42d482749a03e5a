from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_w8a8s import write_w8a8s

from glmq.checkpoint import reader
from glmq.checkpoint.layout import TensorSpec
from glmq.checkpoint.reader import Checkpoint
from glmq.compression import shard
from glmq.compression.shard import RankTensor, Slice, check_world, read_matrix, read_pieces, zeros
from glmq.engines import Engine
from glmq.errors import ModelError, UsageError
from glmq.model.config import ModelConfig, read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_w8a8s(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return read_config(folder)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_world_sizes_that_divide_are_accepted(config: ModelConfig, world: int) -> None:
    check_world(config, world, Engine.MINDIE)


@pytest.mark.parametrize(
    ("changes", "world", "problem", "allowed"),
    [
        ({}, 3, "3 is not a world size that the serving engine is known to load", "1, 2, 4"),
        ({}, 8, "8 is not a world size that the serving engine is known to load", "1, 2, 4"),
        ({"heads": 6}, 4, "6 attention heads do not divide by 4", "1, 2"),
        ({"vocab_size": 1537}, 2, "1537 rows of the vocabulary do not divide by 2", "1"),
        ({"intermediate_size": 90}, 4, "90 rows of gate and up do not divide by 4", "1, 2"),
        ({"vision_out": 130}, 4, "130 rows of the vision tower's gate and up do not divide by 4", "1, 2"),
        ({"vision_intermediate": 42}, 4, "42 rows of the merger's gate and up do not divide by 4", "1, 2"),
        (
            {"heads": 12, "kv_heads": 3},
            2,
            "3 key-value heads can neither be dealt out nor be repeated over 2 ranks",
            "1",
        ),
    ],
)
def test_a_world_size_that_does_not_divide_names_the_numbers_and_what_works(
    config: ModelConfig, changes: dict[str, int], world: int, problem: str, allowed: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_world(replace(config, **changes), world, Engine.MINDIE)
    assert str(caught.value) == f"--tp {world}: {problem}; world sizes that work for this model: {allowed}"


def test_vision_heads_must_divide_too(config: ModelConfig) -> None:
    vision = dict(config.nested["vision_config"]) | {"num_heads": 3}
    with pytest.raises(
        UsageError, match=r"3 vision heads do not divide by 2; world sizes that work for this model: 1$"
    ):
        check_world(replace(config, nested=config.nested | {"vision_config": vision}), 2, Engine.MINDIE)


def test_a_config_without_vision_heads_is_refused(config: ModelConfig) -> None:
    vision = {key: value for key, value in config.nested["vision_config"].items() if key != "num_heads"}
    with pytest.raises(ModelError) as caught:
        check_world(replace(config, nested=config.nested | {"vision_config": vision}), 1, Engine.MINDIE)
    assert str(caught.value) == (
        "config.json: vision_config.num_heads is None, a positive integer is needed; restore the file"
    )


@pytest.mark.parametrize("piece_bytes", [1, 300, 2**20])
def test_pieces_of_any_size_make_the_same_tensor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(shard, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(reader, "PIECE_BYTES", piece_bytes)
    name = "model.language_model.layers.0.mlp.gate_up_proj.weight"
    slices = (Slice(name, 3, 10, 5, 25), zeros(4, 20), Slice(name, 20, 21, 0, 20))
    tensor = RankTensor(TensorSpec("a.weight", "I8", (12, 20)), slices)
    with Checkpoint.open(folder) as source:
        whole = source.read(name)
        expected = torch.cat([whole[3:10, 5:25], torch.zeros(4, 20, dtype=torch.int8), whole[20:21, :20]])
        pieces = list(read_pieces(source, tensor))
        assert torch.equal(torch.cat(pieces), expected)
        assert torch.equal(torch.from_numpy(read_matrix(source, tensor)), expected)
    assert max(piece.shape[0] for piece in pieces) == {1: 1, 300: 4, 2**20: 7}[piece_bytes]
