"""glmq_compress_report.json and .csv: what compressing did, per linear, per rank, and by area of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from glmq.checkpoint.json_file import JsonObject, JsonValue, write_json, write_whole
from glmq.compression.layouts import Layout
from glmq.compression.manifest import CodecKind, RankFile
from glmq.compression.source import Source
from glmq.compression.stream import CompressedLinear, RankFileWritten
from glmq.model.family import Area
from glmq.quoting import csv_text
from glmq.records import COMPRESS_REPORT
from glmq.version import __version__

SCHEMA: Final = "glmq.compress-report/1"
_COLUMNS: Final = (
    "rank", "name", "rows", "cols", "stored_bytes", "bits_per_weight", "ratio", "entropy_bits", "class_gain_bits"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AreaSizes:
    """Bytes of one area of the model in its three forms."""

    area: Area
    float16: int
    """As float16 weights, un-sharded."""
    w8a8s: int
    """As quantized, un-sharded."""
    compressed: int
    """As compressed, all ranks together."""


@dataclass(frozen=True, slots=True)
class RankTotals:
    """One rank's weight file."""

    rank: int
    file: str
    file_bytes: int
    linears: int
    weights: int
    """Of the compressed linears."""
    stored_bytes: int
    """Of the compressed linears."""


def rank_totals(linears: Sequence[CompressedLinear], parts: Sequence[RankFileWritten]) -> list[RankTotals]:
    """What each rank's file holds."""
    totals = []
    for part in parts:
        own = [linear for linear in linears if linear.rank == part.record.rank]
        weights, stored = sum(linear.weights for linear in own), sum(linear.stored_bytes for linear in own)
        totals.append(RankTotals(part.record.rank, part.record.file, part.record.nbytes, len(own), weights, stored))
    return totals


def area_sizes(source: Source, parts: Sequence[RankFileWritten]) -> list[AreaSizes]:
    """Bytes by area of the model: float16, W8A8S, and compressed."""
    family = source.config.family
    float16, w8a8s = dict.fromkeys(Area, 0), dict.fromkeys(Area, 0)
    for name, shape in family.shapes(source.config).items():
        count = 2
        for size in shape:
            count *= size
        float16[family.area(name)] += count
    for name in source.checkpoint:
        w8a8s[family.area(name)] += source.checkpoint.nbytes(name)
    return [AreaSizes(area, float16[area], w8a8s[area], sum(p.after[area] for p in parts)) for area in Area]


def report_document(
    source: Source,
    codec: CodecKind,
    layout: Layout,
    linears: Sequence[CompressedLinear],
    parts: Sequence[RankFileWritten],
) -> JsonObject:
    """The report as one JSON object; without times, so that equal runs write equal bytes."""
    return {
        "schema": SCHEMA,
        "glmq": __version__,
        "codec": codec.value,
        "layout": layout.value,
        "world_size": len(parts),
        "bytes": [
            {"part": s.area.value, "float16": s.float16, "w8a8s": s.w8a8s, "compressed": s.compressed}
            for s in area_sizes(source, parts)
        ],
        "ranks": [
            {
                "rank": t.rank,
                "file": t.file,
                "file_bytes": t.file_bytes,
                "linears": t.linears,
                "weights": t.weights,
                "stored_bytes": t.stored_bytes,
            }
            for t in rank_totals(linears, parts)
        ],
        "linears": [linear_row(linear) for linear in linears],
    }


def linear_row(linear: CompressedLinear) -> dict[str, JsonValue]:
    """The columns of the CSV and the entries of the JSON."""
    return {
        "rank": linear.rank,
        "name": linear.name,
        "rows": linear.rows,
        "cols": linear.cols,
        "stored_bytes": linear.stored_bytes,
        "bits_per_weight": linear.bits_per_weight,
        "ratio": linear.ratio,
        "entropy_bits": linear.entropy_bits,
        "class_gain_bits": linear.class_gain_bits,
    }


def write_report(folder: Path, document: Mapping[str, JsonValue], linears: Sequence[CompressedLinear]) -> None:
    """Write both files into `folder`. Raises SpaceError if the disk is full."""
    write_json(folder / f"{COMPRESS_REPORT}.json", document, indent=1)
    write_whole(folder / f"{COMPRESS_REPORT}.csv", csv_text(_COLUMNS, map(linear_row, linears)).encode())


def pack_results(linears: Sequence[CompressedLinear], parts: Sequence[RankFileWritten]) -> str:
    """What a rank did, as text for the other ranks."""
    written = [
        {
            "record": asdict(part.record),
            "before": [part.before[key] for key in Area],
            "after": [part.after[key] for key in Area],
        }
        for part in parts
    ]
    return json.dumps({"linears": [asdict(linear) for linear in linears], "parts": written})


def unpack_results(text: str) -> tuple[list[CompressedLinear], list[RankFileWritten]]:
    """The inverse of pack_results."""
    document = json.loads(text)
    parts = []
    for part in document["parts"]:
        record = part["record"] | {
            "matrices": {name: tuple(shape) for name, shape in part["record"]["matrices"].items()}
        }
        parts.append(
            RankFileWritten(RankFile(**record), dict(zip(Area, part["before"])), dict(zip(Area, part["after"])))
        )
    return [CompressedLinear(**linear) for linear in document["linears"]], parts
