"""What a sweep is to do: its recipes by name, what they share, and the command that makes each checkpoint alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Final

from glmq.checkpoint.journal import number_text
from glmq.errors import UsageError
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.jobs.verify import CaseOptions
from glmq.quantization.bits import needs_curves
from glmq.quantization.flags import recipe_flags
from glmq.quantization.recipe import Recipe
from glmq.values import check_least, take_paths

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")
"""Names that are folders too, which the engines open."""
KL_LIMIT: Final = 8
"""Pictures or lines that KL is measured on unless somebody says how many."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One recipe of a sweep, under the name that its row has."""

    name: str
    """Letters, digits, `_ . -`, at most 60: it is the name of a folder too."""
    recipe: Recipe
    fallback_topk: int = 0
    """Keep this many of the worst groups float."""
    max_error: float | None = None
    """Keep groups with a larger relative output error float."""

    def __post_init__(self) -> None:
        check_least("--fallback-topk", self.fallback_topk, 0)
        check_least("--max-error", self.max_error, 0.0)

    @property
    def measures(self) -> bool:
        """Every group is quantized once before, to see which stay float."""
        return bool(self.fallback_topk) or self.max_error is not None

    @property
    def flags(self) -> list[str]:
        """The words that `glmq quantize` needs for it, beside those that say from what and where to."""
        words = recipe_flags(self.recipe)
        words += ["--fallback-topk", str(self.fallback_topk)] if self.fallback_topk else []
        return words if self.max_error is None else [*words, "--max-error", number_text(self.max_error)]

    @property
    def key(self) -> str:
        """Tells it from every other: a digest of what its bytes depend on."""
        return _digest([*sorted(self.recipe.settings().items()), self.fallback_topk, self.max_error])

    @property
    def curves_key(self) -> str | None:
        """The same of what its sparse linears lose at how many bits, which target bits do not change; None: nothing asks."""
        settings = {option: value for option, value in self.recipe.settings().items() if option != "--target-bits"}
        return _digest(sorted(settings.items())) if needs_curves(self.recipe) else None


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What of a sweep is not its recipes."""

    keep: Path | None = None
    """Folder in which each recipe's weights stay, in a folder of its name; None: they are removed once they are measured."""
    kl: bool = True
    """Run the float model and every checkpoint over samples, to see how far their predicted tokens are apart."""
    cases: CaseOptions = CaseOptions(limit=KL_LIMIT)
    """The samples; by default those of the statistics that came with glmq, of the pictures the first 8."""
    dequantize: bool = False
    """Take FP8 weights with scales as the float numbers that they stand for."""
    chat_template: Path | None = None
    """File of the chat template to use; None: the model folder's own."""
    work_dir: Path | None = None
    """Where the reports and the weights grow; None: beside the output folder, on the same disk."""

    def __post_init__(self) -> None:
        take_paths(self, "keep", "chat_template", "work_dir")

    def chosen(self) -> dict[str, str]:
        """Where the samples come from, by option; empty text for what is not given."""
        cases = self.cases
        return {
            "--calib_images": "" if cases.images is None else str(cases.images),
            "--recursive": str(cases.recursive),
            "--cases": "" if cases.cases is None else str(cases.cases),
            "--prompt": cases.prompt,
            "--limit": "" if cases.limit is None else str(cases.limit),
        }

    def settings(self) -> dict[str, str]:
        """What else the rows depend on."""
        return {
            "--keep": "" if self.keep is None else str(self.keep),
            "--kl": str(self.kl),
            "--dequantize": str(self.dequantize),
            "--chat-template": "" if self.chat_template is None else str(self.chat_template),
        }


@dataclass(frozen=True, slots=True)
class SweepJob:
    """What to sweep over, and where to."""

    model_path: Path
    stats_path: Path
    out_path: Path
    variants: tuple[Variant, ...]
    options: SweepOptions
    command: str = ""
    """That resumes it, for whom finds it interrupted."""

    def place_of(self, variant: Variant) -> Path | None:
        """Where the weights of a recipe stay; None: nowhere."""
        return None if self.options.keep is None else self.options.keep / variant.name

    def command_of(self, variant: Variant) -> str:
        """The command that makes the checkpoint of a recipe alone, where it stays or beside the reports; quoted for a shell."""
        place = self.place_of(variant) or self.out_path.with_name(f"{self.out_path.name}-{variant.name}")
        template = self.options.chat_template
        words = ["--model_path", str(self.model_path), "--stats", str(self.stats_path), "--save_directory", str(place)]
        words += [*variant.flags, *(["--dequantize"] if self.options.dequantize else [])]
        return join(["glmq", "quantize", *words, *([] if template is None else ["--chat-template", str(template)])])

    @property
    def calibration(self) -> CalibrationOptions:
        """How the float model is opened."""
        return CalibrationOptions(dequantize=self.options.dequantize, chat_template=self.options.chat_template)


def _digest(settings: object) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def check_variants(variants: Sequence[Variant]) -> None:
    """Raise UsageError for no recipe at all, a name that cannot be a folder's, and two of one name or that are the same."""
    if not variants:
        raise UsageError("no recipe to sweep over; give a TOML file of [[recipe]] tables, --target-bits, or both")
    names: dict[str, int] = {}
    keys: dict[str, int] = {}
    for number, variant in enumerate(variants, 1):
        if not NAME.fullmatch(variant.name):
            raise UsageError(
                f"recipe {number}: the name {variant.name!r:.80} cannot be a folder's; take letters, digits, _ . and -, at "
                "most 60"
            )
        first = keys.setdefault(variant.key, number)
        if first != number:
            raise UsageError(
                f"recipes {first} ({variants[first - 1].name}) and {number} ({variant.name}) are the same; drop one of them"
            )
        first = names.setdefault(variant.name, number)
        if first != number:
            raise UsageError(f"recipes {first} and {number} are both named {variant.name}; give one another name")
