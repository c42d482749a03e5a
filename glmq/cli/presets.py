"""`--preset` of `glmq quantize`: named sets of the vendor's flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

PresetName: TypeAlias = Literal["300i-duo", "800i-a2", "800i-a2-dynamic", "800i-a2-w8a16"]


@dataclass(frozen=True, slots=True)
class Preset:
    """What is served on one chip, and the flags of the vendor's `quant_glm41v.py` that make it."""

    what: str
    flags: Mapping[str, object]
    """Name of the parameter -> value. What else the command line or the file of `--config` says counts more."""


PRESETS: Final[Mapping[PresetName, Preset]] = {
    "300i-duo": Preset(
        "W8A8S for MindIE on the Atlas 300I Duo; `glmq compress` makes W8A8SC of it",
        {
            "w_bit": 4,
            "a_bit": 8,
            "anti_method": "m2",
            "is_lowbit": True,
            "fraction": 0.01,
            "use_sigma": True,
            "torch_dtype": "fp16",
        },
    ),
    "800i-a2": Preset(
        "W8A8 for MindIE and vLLM-Ascend on the Atlas 800I A2",
        {"w_bit": 8, "a_bit": 8, "anti_method": "m2", "act_method": 2, "torch_dtype": "bf16"},
    ),
    "800i-a2-dynamic": Preset(
        "W8A8_DYNAMIC for MindIE, vLLM-Ascend and SGLang on the Atlas 800I A2",
        {"w_bit": 8, "a_bit": 8, "is_dynamic": True, "anti_method": "m2", "torch_dtype": "bf16"},
    ),
    "800i-a2-w8a16": Preset(
        "W8A16 for vLLM-Ascend on the Atlas 800I A2",
        {"w_bit": 8, "a_bit": 16, "torch_dtype": "fp16"},
    ),
}


def flags_of(name: PresetName) -> str:
    """The flags of a preset as they are typed: `--w_bit 4 --is_lowbit True`."""
    return " ".join(f"--{flag} {value}" for flag, value in PRESETS[name].flags.items())


def overridden(name: PresetName, options: Mapping[str, object]) -> str:
    """What other options have made of a preset's flags: `; but --w_bit 8`, or nothing."""
    others = [f"--{flag} {options[flag]}" for flag, value in PRESETS[name].flags.items() if options[flag] != value]
    return f"; but {' '.join(others)}" if others else ""


def defaults_of(name: object) -> dict[str, object]:
    """The values of a preset by parameter; none for a name that is none, which typer refuses by itself."""
    return {key: value for known, preset in PRESETS.items() if known == name for key, value in preset.flags.items()}
