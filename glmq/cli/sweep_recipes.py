"""The recipes of `glmq sweep`: a TOML file of [[recipe]] tables in the options of `glmq quantize`, or a list of target bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Final

import typer

from glmq.checkpoint.journal import number_text
from glmq.cli.command import CONTEXT, usage_sentence
from glmq.cli.config_file import known_values, read_toml
from glmq.cli.presets import PresetName, defaults_of
from glmq.cli.quantize import quantize
from glmq.errors import UsageError
from glmq.jobs.sweep_recipes import Variant
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe

OPTIONS: Final = {field.name: "form" if field.name == "format" else field.name for field in fields(Options)}
"""Field of Options -> parameter of `glmq quantize`."""
KEYS: Final = {*OPTIONS, "name", "preset", "fallback_topk", "max_error"}
"""What a [[recipe]] may say."""


class RecipeReader:
    """Reads recipes as `glmq quantize` reads its options."""

    def __init__(self) -> None:
        app = typer.Typer()
        app.command(context_settings=CONTEXT)(quantize)
        self._command = typer.main.get_command(app)

    def read_file(self, path: Path) -> list[Variant]:
        """The recipes of a TOML file, each a table [[recipe]] with options of `glmq quantize` and perhaps a name.

        Raises:
            UsageError: not such a file, an unknown key, or options that contradict each other.
        """
        document = read_toml(str(path))
        tables = document.pop("recipe", None)
        if document:
            raise UsageError(f"{path}: unknown key {next(iter(document))!r}; recipes stand below lines [[recipe]]")
        if not isinstance(tables, list) or not tables or not all(isinstance(one, dict) for one in tables):
            raise UsageError(f"{path}: holds no recipe; each begins with a line [[recipe]], options of quantize follow")
        return [self._variant(f"{path}, recipe {number}: ", number, table) for number, table in enumerate(tables, 1)]

    def read_bits(self, text: str, preset: PresetName) -> list[Variant]:
        """A recipe for each of the target bits `2.5,3`: the preset's with these bits.

        Raises:
            UsageError: not such a list, or bits out of range.
        """
        found = []
        for word in text.split(","):
            try:
                bits = float(word)
            except ValueError:
                raise UsageError(
                    f"--target-bits {text}: numbers with commas between them are needed, like 2.5,3,3.5"
                ) from None
            values = {"name": f"{number_text(bits)}-bits", "preset": preset, "target-bits": bits}
            found.append(self._variant("", 0, values))
        return found

    def _variant(self, where: str, number: int, table: Mapping[str, object]) -> Variant:
        values = known_values(table, KEYS, where.removesuffix(": "))
        name = values.pop("name", None)
        if name is not None and not isinstance(name, str):
            raise UsageError(f"{where}name {name!r:.60}: a text is needed")
        chosen = {OPTIONS.get(key, key): value for key, value in values.items()}
        try:
            context = self._command.make_context(
                "quantize",
                ["--model-path", ".", "--save-directory", "."],
                default_map={**defaults_of(chosen.get("preset")), **chosen},
            )
        except Exception as error:
            sentence = usage_sentence(
                error, [word for key, value in table.items() for word in (f"--{key}", str(value))]
            )
            if sentence is None:
                raise
            raise UsageError(f"{where}{sentence}") from error
        params = context.params
        options = {field: params[name] for field, name in OPTIONS.items()}
        options |= {"keep_float": tuple(params["keep_float"] or ()), "layer": tuple(params["layer"] or ())}
        try:
            recipe = make_recipe(Options(**{**options, "target": params["target"].value}))
        except UsageError as error:
            raise type(error)(f"{where}{error}") from error
        default = f"{number}-{recipe.quant_type.value.lower()}"
        return Variant(default if name is None else name, recipe, params["fallback_topk"], params["max_error"])
