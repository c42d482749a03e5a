"""`quantization_config` of the compressed-tensors form: which linears of a checkpoint are quantized, and how. Read and written.

Field names and values are those of the `compressed-tensors` library (0.20: QuantizationConfig, QuantizationScheme,
QuantizationArgs). A linear is named as the checkpoint names it: transformers calls its modules so, and vLLM renames targets
as it renames tensors. torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from glmq.checkpoint.json_file import JsonObject, JsonValue
from glmq.errors import CheckpointError
from glmq.spec import TYPES, Activation, Form, QuantType, assert_never

METHOD: Final = "compressed-tensors"
KEY: Final = "quantization_config"
"""Of config.json."""

KNOWN: Final = tuple(t for t, spec in TYPES.items() if Form.COMPRESSED_TENSORS in spec.forms)
"""The types that this form has."""

_INT: Final = "int-quantized"
_PACKED: Final = "pack-quantized"
_MIXED: Final = "mixed-precision"
"""Of the whole where its groups have different formats; each group then says its own."""


@dataclass(frozen=True, slots=True)
class CompressedGroup:
    """Linears that are quantized alike."""

    quant_type: QuantType
    group_size: int
    """Input columns per step; 0: one step per row."""
    targets: tuple[str, ...]
    """Names of linears, those by which vLLM calls fused ones among them."""


@dataclass(frozen=True, slots=True)
class CompressedConfig:
    """A `quantization_config`."""

    groups: tuple[CompressedGroup, ...]
    """Those of the model's own type first."""
    ignore: tuple[str, ...]
    """Names of linears that stay float."""

    @property
    def quant_type(self) -> QuantType:
        """Of the model: that of its first group."""
        return self.groups[0].quant_type

    def group_of(self, linear: str) -> CompressedGroup | None:
        """The group that names a linear; None if it stays float."""
        return next((group for group in self.groups if linear in group.targets), None)

    def tensor_types(self, names: Iterable[str]) -> dict[str, str]:
        """The type of every tensor, as a description file would say it: FLOAT beside the types of quantized linears."""
        types = {target: group.quant_type.value for group in self.groups for target in group.targets}
        bases = ((name, *name.rpartition(".")[::2]) for name in names)
        return {
            name: types[base] if base in types and suffix != "bias" else QuantType.FLOAT.value
            for name, base, suffix in bases
        }

    def document(self) -> JsonObject:
        """As config.json holds it."""
        formats = {group.quant_type: _format_of(group.quant_type) for group in self.groups}
        mixed = len(set(formats.values())) > 1
        groups: JsonObject = {}
        for index, group in enumerate(self.groups):
            scheme: JsonObject = {
                "targets": list(group.targets),
                "weights": _weights(group.quant_type, group.group_size),
                "input_activations": _inputs(group.quant_type),
                "output_activations": None,
            }
            groups[f"group_{index}"] = scheme | ({"format": formats[group.quant_type]} if mixed else {})
        return {
            "quant_method": METHOD,
            "format": _MIXED if mixed else next(iter(formats.values())),
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(self.ignore),
            "config_groups": groups,
        }


def make_config(
    linears: Mapping[str, QuantType], others: Sequence[str], model_type: QuantType, group_size: int
) -> CompressedConfig:
    """The configuration of a checkpoint.

    Args:
        linears: the quantized ones and their types.
        others: the linears that stay float.
        model_type: its group comes first.
        group_size: input columns per step of types with groups.
    """
    types = sorted(dict.fromkeys(linears.values()), key=lambda quant_type: quant_type is not model_type)
    groups = [
        CompressedGroup(
            quant_type,
            group_size if quant_type.has_groups(Form.COMPRESSED_TENSORS) else 0,
            tuple(name for name, own in linears.items() if own is quant_type),
        )
        for quant_type in types
    ]
    return CompressedConfig(tuple(groups), tuple(others))


def is_packed(quant_type: QuantType) -> bool:
    """Whether several integers of its weights share an int32."""
    return quant_type.spec.activation is Activation.NONE


def _format_of(quant_type: QuantType) -> str:
    return _PACKED if is_packed(quant_type) else _INT


def _weights(quant_type: QuantType, group_size: int) -> JsonObject:
    return {
        "num_bits": quant_type.spec.weight_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size or None,
        "dynamic": False,
    }


def _inputs(quant_type: QuantType) -> JsonObject | None:
    match quant_type.spec.activation:
        case Activation.STATIC:
            strategy, is_dynamic = "tensor", False
        case Activation.PER_TOKEN:
            strategy, is_dynamic = "token", True
        case Activation.NONE:
            return None
        case other:
            assert_never(other)
    # Zero points move asymmetric ranges onto the int8 grid; a token's scale alone is found at run time.
    return {"num_bits": 8, "type": "int", "symmetric": is_dynamic, "strategy": strategy, "dynamic": is_dynamic}


def is_compressed_tensors(config: Mapping[str, JsonValue]) -> bool:
    """Whether a config.json says that the checkpoint has this form."""
    document = config.get(KEY)
    return isinstance(document, Mapping) and document.get("quant_method") == METHOD


def read_compressed_config(config: Mapping[str, JsonValue], where: str) -> CompressedConfig:
    """The quantization_config of a config.json in which `is_compressed_tensors` found one.

    Args:
        config: contents of config.json.
        where: its path, for messages.

    Raises:
        CheckpointError: a scheme, a pattern or a feature that glmq does not write, or a malformed document.
    """
    document = config.get(KEY)
    assert isinstance(document, Mapping)
    groups, ignore = document.get("config_groups"), document.get("ignore", [])
    if not isinstance(groups, Mapping) or not groups:
        raise _refusal(where, f"config_groups is {_short(groups)}, wanted one group at least")
    if document.get("kv_cache_scheme") is not None:
        raise _refusal(where, "kv_cache_scheme is set, glmq knows weights and their inputs only")
    for key in ("sparsity_config", "transform_config"):
        if document.get(key):
            raise _refusal(where, f"{key} is set, which glmq does not know")
    found = [
        _parse_group(f"config_groups.{name}", group, document.get("format"), where) for name, group in groups.items()
    ]
    return CompressedConfig(tuple(found), _names(ignore, "ignore", where))


def _parse_group(name: str, group: JsonValue, whole: JsonValue, where: str) -> CompressedGroup:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise _refusal(where, f"{name} is {_short(group)}, wanted an object with targets and weights")
    weights = group["weights"]
    assert isinstance(weights, Mapping)
    found, inputs, stored = weights.get("group_size"), group.get("input_activations"), group.get("format") or whole
    size = found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0
    for quant_type in KNOWN:
        if (
            quant_type.has_groups(Form.COMPRESSED_TENSORS) == (size > 0)
            and _agrees(weights, _weights(quant_type, size))
            and _agrees(inputs, _inputs(quant_type))
            and group.get("output_activations") is None
            and stored == _format_of(quant_type)
        ):
            return CompressedGroup(quant_type, size, _names(group.get("targets"), f"{name}.targets", where))
    raise _refusal(
        where,
        f"{name} has weights {_short(weights)} and inputs {_short(inputs)} in the format {_short(stored)}, "
        f"which is none of {', '.join(known.value for known in KNOWN)}",
    )


def _agrees(found: JsonValue, wanted: JsonObject | None) -> bool:
    """Whether quantization arguments say what those of a type say; others of their fields do not matter."""
    if wanted is None or not isinstance(found, Mapping):
        return found is None and wanted is None
    return all(found.get(key) == value for key, value in wanted.items())


def _names(value: JsonValue, name: str, where: str) -> tuple[str, ...]:
    """A list of names of linears. Patterns and names of classes are not resolved here, so they are refused."""
    names = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(names) != len(value):
        raise _refusal(where, f"{name} is {_short(value)}, wanted a list of names")
    for item in names:
        if item.startswith("re:") or item == "Linear":
            raise _refusal(where, f"{name} has {item!r}, glmq reads the exact names of linears")
    return tuple(names)


def _refusal(where: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: in quantization_config {problem}; quantize again, or look at it with another tool"
    )


def _short(value: JsonValue) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
