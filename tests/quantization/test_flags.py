"""The flags of a recipe: read as `glmq quantize` reads them, they make the same recipe again."""

import argparse

import pytest

from glmq.quantization.flags import recipe_flags
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe

SPARSE = {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16"}
CHOSEN: list[dict[str, object]] = [
    {},
    {"torch_dtype": "fp16", "act_method": 3, "method": "plain", "bias_correction": True},
    {"is_dynamic": True, "anti_method": "none"},
    {"do_smooth": True, "mindie_format": True, "channel_shift": True},
    {"a_bit": 16, "group_size": 128, "format": "compressed-tensors"},
    {"a_bit": 16, "w_bit": 4, "format": "compressed-tensors"},
    {"w_bit": 4, "is_lowbit": True, "is_dynamic": True, "group_size": 256},
    {"target_ratio": 0.7},
    {**SPARSE, "use_sigma": True, "sigma_factor": 2.5, "target": "mindie-300i-duo"},
    {**SPARSE, "open_outlier": False},
    {**SPARSE, "target_bits": 2.9000000000000004, "allocate": "error"},
    {"co_sparse": True, "torch_dtype": "fp16", "method": "reference"},
    {"layer": ("*.layers.0.*=FLOAT", "a b=W8A8_DYNAMIC"), "keep_float": ("it's *", "*.o_proj")},
]


def read(words: list[str]) -> Options:
    """Options from such words."""
    parser = argparse.ArgumentParser()
    for name in ("--is_lowbit", "--co_sparse", "--is_dynamic", "--use_sigma", "--open_outlier", "--do_smooth"):
        parser.add_argument(name, type={"True": True, "False": False}.__getitem__)
    for name, kind in (("w_bit", int), ("a_bit", int), ("act_method", int), ("group_size", int)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("fraction", "sigma_factor", "target-bits"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("anti_method", "torch_dtype", "format", "method", "allocate", "target"):
        parser.add_argument(f"--{name}")
    for name in ("bias-correction", "channel-shift"):
        parser.add_argument(f"--{name}", action="store_true", default=None)
    for name in ("layer", "keep-float"):
        parser.add_argument(f"--{name}", action="append")
    found = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    return Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


@pytest.mark.parametrize("chosen", CHOSEN)
def test_the_flags_of_a_recipe_make_it_again(chosen: dict[str, object]) -> None:
    recipe = make_recipe(Options(**chosen))
    again = make_recipe(read(recipe_flags(recipe)))
    assert again == recipe
    assert again.settings() == recipe.settings()


def test_there_are_no_more_of_them_than_are_needed() -> None:
    assert recipe_flags(make_recipe(Options())) == []
    sparse = make_recipe(Options(w_bit=4, is_lowbit=True, use_sigma=True, torch_dtype="fp16", target_bits=3))
    assert recipe_flags(sparse) == (
        ["--w_bit", "4", "--is_lowbit", "True", "--use_sigma", "True", "--torch_dtype", "fp16", "--target-bits", "3"]
    )
