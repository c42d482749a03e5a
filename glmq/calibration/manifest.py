"""statistics.json: what it says of each input, written and read back into records.

    schema          "glmq.statistics/2"; "glmq.statistics/1", which had no checksums, is read too
    glmq            version that wrote it
    model           fingerprint of the float checkpoint: its headers and config.json
    weights         xxh3-128 of each of its tensors
    samples         of each its name, sha256, tokens, whether calibration saw an answer, and one by the model itself
    samples_sha256  of them all
    inputs          by site: file, width, tokens, whether it has a second moment, rows of its
                    sensitivity (0: none), how far it has settled, `xxh3` of each field
    text_inputs     xxh3-128 by file of what enters the text layers; only where it was kept
    digest          xxh3-128 of this document without it, keys sorted, no spaces

and the settings that the statistics depend on, see `glmq.calibration.stats.Settings`. Checksums are of the stored bytes,
in hexadecimal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeGuard

from glmq.calibration.convergence import Convergence
from glmq.checkpoint.checksums import document_digest
from glmq.checkpoint.json_file import JsonObject, JsonValue, read_json_object
from glmq.checkpoint.layout import TensorSpec
from glmq.checkpoint.names import natural_key
from glmq.errors import StatisticsError
from glmq.numerics.moments import BINS

SCHEMA: Final = "glmq.statistics/2"
SCHEMAS: Final = ("glmq.statistics/1", SCHEMA)
"""Those that are read: the first had no checksums."""
MANIFEST: Final = "statistics.json"
MOST: Final = 2**48
"""Widths and tokens are below this."""


@dataclass(frozen=True, slots=True)
class SampleTokens:
    """One sample of a finished calibration."""

    name: str
    tokens: int
    """Image placeholders, prompt and answer together."""
    has_answer: bool


@dataclass(frozen=True, slots=True)
class SiteShape:
    """What decides the shapes of the tensors that are stored for one input."""

    width: int
    has_moment: bool
    rows: int = 0
    """Of all linears that read it, whose sensitivity is stored; 0: it is not."""


@dataclass(frozen=True, slots=True)
class Site:
    """What the manifest says of one input."""

    file: str
    """Where its tensors are."""
    tokens: int
    shape: SiteShape
    settled: Convergence | None
    """How much the second half of the samples changed; None where one half alone reached the input."""
    checksums: Mapping[str, str]
    """xxh3-128 of each field's stored bytes; empty in a folder of an older glmq."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A statistics.json that was found whole."""

    document: JsonObject
    model_fingerprint: str
    samples_digest: str
    samples: tuple[SampleTokens, ...]
    sites: Mapping[str, Site]
    weights: Mapping[str, str]
    """Empty in a folder of an older glmq."""
    has_checksums: bool
    text_inputs: Mapping[str, str]
    """xxh3-128 of the files of what enters the text layers, by name; empty where it was not kept."""

    @property
    def digest(self) -> str:
        """Of everything in the folder that has a checksum."""
        return digest_of(self.document)

    def files(self) -> list[str]:
        """Every file that must lie beside it, in natural order."""
        return sorted({site.file for site in self.sites.values()} | set(self.text_inputs), key=natural_key)


def read_manifest(path: Path) -> Manifest:
    """Read statistics.json.

    Raises:
        StatisticsError: of another version of glmq, or damaged.
        CheckpointError: not a JSON object.
    """
    document = read_json_object(path)
    schema, model, samples_digest = (document.get(key) for key in ("schema", "model", "samples_sha256"))
    if schema not in SCHEMAS:
        raise StatisticsError(
            f"{path}: schema is {schema!r:.60}, this glmq reads {SCHEMA!r}; run `glmq calibrate` again"
        )
    has_checksums = schema == SCHEMA

    def refuse(key: str) -> StatisticsError:
        return StatisticsError(f"{path}: {key!r} is missing or damaged; run `glmq calibrate` again")

    if not isinstance(model, str):
        raise refuse("model")
    if not isinstance(samples_digest, str):
        raise refuse("samples_sha256")
    samples = _parse_samples(document.get("samples"))
    if samples is None:
        raise refuse("samples")
    sites = _parse_sites(document.get("inputs"), has_checksums=has_checksums)
    if sites is None:
        raise refuse("inputs")
    weights = parse_digests(document.get("weights")) if has_checksums else {}
    if weights is None:
        raise refuse("weights")
    text_inputs = parse_digests(document.get("text_inputs", {}))
    if text_inputs is None:
        raise refuse("text_inputs")
    if has_checksums and document.get("digest") != digest_of(document):
        raise StatisticsError(
            f"{path}: its digest does not fit its contents, so it was altered; copy it again or run `glmq calibrate` again"
        )
    return Manifest(document, model, samples_digest, samples, sites, weights, has_checksums, text_inputs)


def field_specs(site: str, shape: SiteShape, kept: int) -> list[TensorSpec]:
    """The tensors that are stored for one input, of which `kept` tokens are kept."""
    width = shape.width
    specs = [TensorSpec(f"{site}.{field}", "F32", (width,)) for field in ("minimum", "maximum", "mean", "square_mean")]
    specs.append(TensorSpec(f"{site}.exponent", "I16", (width,)))
    specs.append(TensorSpec(f"{site}.histogram", "I32", (width, BINS)))
    specs.append(TensorSpec(f"{site}.sample", "F32", (kept, width)))
    if shape.has_moment:
        specs.append(TensorSpec(f"{site}.second_moment", "F32", (width * (width + 1) // 2,)))
    if shape.rows:
        specs.append(TensorSpec(f"{site}.sensitivity", "F32", (shape.rows,)))
    return specs


def site_entry(
    block: str, shape: SiteShape, tokens: int, settled: Convergence | None, checksums: Mapping[str, str]
) -> JsonObject:
    """What the manifest says of an input."""
    return {
        "file": f"{block}.safetensors",
        "width": shape.width,
        "tokens": tokens,
        "second_moment": shape.has_moment,
        "sensitivity_rows": shape.rows,
        "settled": convergence_json(settled),
        "xxh3": dict(checksums),
    }


def digest_of(manifest: JsonObject) -> str:
    """What the entry `digest` of a manifest must be."""
    return document_digest({key: value for key, value in manifest.items() if key != "digest"})


def convergence_json(settled: Convergence | None) -> JsonObject | None:
    """For the manifest: texts like `5.10e-02`, whose length a plan knows before the values."""
    if settled is None:
        return None
    values = {"range": settled.range_gap, "diagonal": settled.diagonal, "correlation": settled.correlation}
    return {key: None if value is None else f"{value:.2e}" for key, value in values.items()}


def _parse_sites(found: JsonValue, *, has_checksums: bool) -> dict[str, Site] | None:
    """The inputs of a manifest; None if one is not as it must be."""
    if not isinstance(found, Mapping):
        return None
    sites = {name: _parse_site(entry, has_checksums=has_checksums) for name, entry in found.items()}
    whole = {name: site for name, site in sites.items() if site is not None}
    return whole if len(whole) == len(sites) else None


def _parse_site(entry: JsonValue, *, has_checksums: bool) -> Site | None:
    if not isinstance(entry, Mapping):
        return None
    file, width, tokens, moment = (entry.get(key) for key in ("file", "width", "tokens", "second_moment"))
    rows = entry.get("sensitivity_rows", 0)  # folders of an older glmq have none
    checksums = parse_digests(entry.get("xxh3")) if has_checksums else {}
    settled = _parse_convergence(entry.get("settled"))
    if (
        not isinstance(file, str)
        or not _is_count(width)
        or not _is_count(tokens)
        or not isinstance(moment, bool)
        or not _is_row_count(rows)
        or checksums is None
        or settled is False
    ):
        return None
    shape = SiteShape(width, moment, rows)
    if has_checksums and set(checksums) != {spec.name[1:] for spec in field_specs("", shape, 1)}:
        return None
    return Site(file, tokens, shape, settled, checksums)


def _parse_convergence(found: JsonValue) -> Convergence | Literal[False] | None:
    """What `convergence_json` wrote; False if it is not that."""
    if found is None:
        return None
    if not isinstance(found, Mapping):
        return False
    numbers: list[float | None] = []
    for key in ("range", "diagonal", "correlation"):
        text = found.get(key)
        if isinstance(text, str) and re.fullmatch(r"-?[0-9.]{1,8}e[+-][0-9]{2,3}|inf|nan", text):
            numbers.append(float(text))
        elif text is None and key == "correlation":
            numbers.append(None)
        else:
            return False
    range_gap, diagonal, correlation = numbers
    assert range_gap is not None
    assert diagonal is not None
    return Convergence(range_gap, diagonal, correlation)


def parse_digests(found: JsonValue) -> dict[str, str] | None:
    """Checksums by name; None if it is not that."""
    if not isinstance(found, Mapping):
        return None
    digests = {name: value for name, value in found.items() if isinstance(value, str)}
    return digests if len(digests) == len(found) else None


def _parse_samples(found: JsonValue) -> tuple[SampleTokens, ...] | None:
    samples: list[SampleTokens] = []
    for entry in found if isinstance(found, list) else [None]:
        if not isinstance(entry, Mapping):
            return None
        name, tokens, answer = entry.get("name"), entry.get("tokens"), entry.get("answer")
        if not isinstance(name, str) or not _is_count(tokens) or not isinstance(answer, bool):
            return None
        samples.append(SampleTokens(name, tokens, answer))
    return tuple(samples)


def _is_row_count(value: JsonValue) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MOST


def _is_count(value: JsonValue) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= MOST
