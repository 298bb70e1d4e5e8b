"""requests.parquet: a row a request with every stamp, a row group a level and round; written, and read for the charts.

A level is a file of its own in `requests.parts/` as soon as it has ended, and `close` joins them: whenever the process
is killed, what has been measured lies there complete and can be read by anything that reads parquet.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmopt.backends import load
from llmopt.bench.metrics.figures import Level

if TYPE_CHECKING:
    from types import ModuleType, TracebackType

REQUESTS = "requests.parquet"
PARTS = "requests.parts"

Floats = NDArray[np.float64]


class Requests:
    """The writer. pyarrow comes with the first level, so that no load waits for its import before it starts."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._written = 0

    def append(self, level: Level) -> None:
        """The level is on disk when this returns."""
        folder = self._out / PARTS
        folder.mkdir(exist_ok=True)
        part = folder / f"{self._written:05}.parquet"
        aside = part.with_suffix(".tmp")
        _parquet().write_table(_table(level), aside, compression="zstd")
        aside.replace(part)
        self._written += 1

    def close(self) -> None:
        """Join the levels into one file; without any there is none."""
        if not self._written:
            return
        aside = self._out / f"{REQUESTS}.tmp"
        with _parquet().ParquetWriter(aside, _schema(), compression="zstd") as writer:
            for number in range(self._written):
                table = _parquet().read_table(self._out / PARTS / f"{number:05}.parquet")
                writer.write_table(table, row_group_size=max(1, table.num_rows))
        aside.replace(self._out / REQUESTS)
        shutil.rmtree(self._out / PARTS)
        self._written = 0

    def __enter__(self) -> Requests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parquet() -> ModuleType:
    return load("pyarrow.parquet", extra="data")


def _schema() -> Any:
    pa = load("pyarrow", extra="data")
    counts = ("prompt_tokens", "cached_tokens", "completion_tokens", "wanted_tokens")
    return pa.schema(
        [
            ("subject", pa.string()),
            ("level", pa.string()),
            ("round", pa.int32()),
            ("prompt", pa.int64()),
            ("turn", pa.int32()),
            ("target", pa.int32()),
            ("status", pa.int32()),  # of HTTP; 0 where none came
            ("due_us", pa.int64()),  # since its sending: 0, or less the later it was sent; null in a closed loop
            ("sent_us", pa.int64()),  # since the start of the level
            ("end_us", pa.int64()),  # since its sending, as are all stamps below
            ("first_us", pa.int64()),
            ("answer_us", pa.int64()),  # the first chunk that is not reasoning
            ("chunks_us", pa.list_(pa.int64())),
            *((name, pa.int64()) for name in counts),
            ("finish", pa.string()),
            ("error", pa.string()),
            ("detail", pa.string()),
        ]
    )


def _table(level: Level) -> Any:
    pa = load("pyarrow", extra="data")
    schema, records = _schema(), level.records
    size = len(records)

    def since_sent(stamps_ns: Iterable[int | None]) -> list[int | None]:
        pairs = zip(stamps_ns, records, strict=True)
        return [None if stamp is None else (stamp - record.sent_ns) // 1000 for stamp, record in pairs]

    chunks = [(np.asarray(record.stamps_ns, np.int64) - record.sent_ns) // 1000 for record in records]
    ends = np.cumsum([0, *map(len, chunks)], dtype=np.int32)
    columns: dict[str, Any] = {
        "subject": [level.subject] * size,
        "level": [level.load.label] * size,
        "round": [level.round] * size,
        **{
            name: [getattr(record, name) for record in records]
            for name in schema.names
            if name in ("prompt", "turn", "target", "status", "finish") or name.endswith("_tokens")
        },
        "due_us": since_sent(record.due_ns for record in records),
        "sent_us": [(record.sent_ns - level.started_ns) // 1000 for record in records],
        "end_us": since_sent(record.end_ns for record in records),
        "first_us": since_sent(record.stamps_ns[0] if len(record.stamps_ns) else None for record in records),
        "answer_us": since_sent(record.answer_ns for record in records),
        "chunks_us": pa.ListArray.from_arrays(
            pa.array(ends), pa.array(np.concatenate(chunks) if chunks else np.empty(0, np.int64))
        ),
        "error": [None if record.failure is None else record.failure.kind for record in records],
        "detail": [None if record.failure is None else record.failure.detail for record in records],
    }
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The requests of one subject at one level in one round, by their sending. NaN where a request has no such time."""

    subject: str
    level: str
    round: int
    sent_s: Floats  # since the level's start
    due_s: Floats  # before its sending, 0 or less
    end_s: Floats  # from its sending
    ttft_ms: Floats
    failed: NDArray[np.bool_]
    tokens: Floats
    ends: NDArray[np.int64]  # of each request's chunks among `chunks_s`
    chunks_s: Floats  # from its sending, all requests behind one another

    def gaps_ms(self) -> Floats:
        """Between successive chunks of the answered requests."""
        gaps = np.diff(self.chunks_s) * 1e3
        inner = np.ones(len(gaps), bool)
        inner[self.ends[(self.ends > 0) & (self.ends < len(self.chunks_s))] - 1] = False
        owner = np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))
        return gaps[inner & ~self.failed[owner[:-1]]] if len(gaps) else gaps

    def answered_ttft_ms(self) -> Floats:
        return self.ttft_ms[~self.failed & ~np.isnan(self.ttft_ms)]


def read(out: Path) -> list[Sample]:
    """The samples in the order of their measurement; none where there is no file."""
    if not (out / REQUESTS).exists():
        return []
    file = _parquet().ParquetFile(out / REQUESTS)
    tables = (file.read_row_group(number) for number in range(file.num_row_groups))
    return [_sample(table) for table in tables if table.num_rows]


def _sample(table: Any) -> Sample:
    table = table.sort_by("sent_us")
    lists = table["chunks_us"].combine_chunks()
    counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    completion = _floats(table, "completion_tokens")
    return Sample(
        subject=table["subject"][0].as_py(),
        level=table["level"][0].as_py(),
        round=table["round"][0].as_py(),
        sent_s=_floats(table, "sent_us") / 1e6,
        due_s=_floats(table, "due_us") / 1e6,
        end_s=_floats(table, "end_us") / 1e6,
        ttft_ms=_floats(table, "first_us") / 1e3,
        failed=table["error"].is_valid().to_numpy(),
        tokens=np.where(np.isnan(completion), counts, completion),
        ends=np.cumsum(counts, dtype=np.int64),
        chunks_s=lists.flatten().to_numpy(zero_copy_only=False) / 1e6,
    )


def _floats(table: Any, name: str) -> Floats:
    values: Floats = table[name].to_numpy().astype(np.float64)
    return values


def grouped(samples: Iterable[Sample]) -> Iterator[tuple[tuple[str, str], list[Sample]]]:
    """The rounds of each subject and level, in the order of the first."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.subject, sample.level), []).append(sample)
    yield from groups.items()
