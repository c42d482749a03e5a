"""What --overwrite may replace: all that glmq writes, and nothing else."""

from pathlib import Path

import pytest

from glmq.checkpoint.own_files import check_contents, foreign_names
from glmq.errors import OutputError

QUANTIZED = ["config.json", "glmq_checksums.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        ([], []),
        (
            [*QUANTIZED, "README.md", "LICENSE", "processing_glm.py", "glmq.log", "quant_model_description_w8a8s.json"],
            [],
        ),
        (["statistics.json", "lm_head.safetensors"], []),
        (["sweep.csv", "sweep.html", "sweep.json"], []),
        (["config.json", "glmq_manifest.json", "glmq_source", "part0-of-1"], []),
        (["config.json", "part0-of-2", "part1-of-2"], []),
        ([*QUANTIZED, "notes.md", "photos"], ["notes.md", "photos"]),
        (["config.json", "model.safetensors"], ["config.json", "model.safetensors"]),  # a float checkpoint
        (["quant_model_description.json"], ["quant_model_description.json"]),  # of another tool
    ],
)
def test_an_output_is_known_by_its_names(names: list[str], foreign: list[str]) -> None:
    assert foreign_names(names) == foreign


def test_what_somebody_else_wrote_is_never_given_up() -> None:
    folder = Path("out")
    check_contents(folder, [], overwrite=False)
    check_contents(folder, QUANTIZED, overwrite=True)
    with pytest.raises(OutputError) as caught:
        check_contents(folder, QUANTIZED, overwrite=False)
    assert str(caught.value) == "out: is not empty; choose another folder, or pass --overwrite to replace its contents"
    for overwrite in (False, True):
        with pytest.raises(OutputError) as caught:
            check_contents(folder, [*QUANTIZED, "photos", "thesis.txt"], overwrite=overwrite)
        assert str(caught.value) == (
            "out: is not empty, and glmq did not write photos and 1 other entry in it, so that even --overwrite replaces "
            "nothing there; choose another folder, or empty this one yourself"
        )
