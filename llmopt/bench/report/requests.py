"""requests.parquet: a row a request with every stamp, a row group a level and round.

A level is a file of its own in `requests.parts/` as soon as it has ended, and `close` joins them: whenever the process
is killed, what has been measured lies there complete and can be read by anything that reads parquet.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from llmopt.bench.metrics.figures import Level
    from llmopt.bench.metrics.records import Record

REQUESTS = "requests.parquet"
PARTS = "requests.parts"


class Requests:
    """The writer. numpy and pyarrow come with the first level: no load waits for them before it starts."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._written = 0

    def append(self, level: Level) -> None:
        """The level is on disk when this returns."""
        self._put(_table(level))

    def append_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of one level and round that another tool measured; a column that it does not tell is null."""
        import pyarrow as pa

        self._put(pa.Table.from_pylist(list(rows), _schema()))

    def _put(self, table: Any) -> None:
        import pyarrow.parquet as pq

        folder = self._out / PARTS
        folder.mkdir(exist_ok=True)
        part = folder / f"{self._written:05}.parquet"
        aside = part.with_suffix(".tmp")
        pq.write_table(table, aside, compression="zstd")
        aside.replace(part)
        self._written += 1

    def close(self) -> None:
        """Join the levels into one file; without any there is none."""
        if not self._written:
            return
        import pyarrow.parquet as pq

        aside = self._out / f"{REQUESTS}.tmp"
        with pq.ParquetWriter(aside, _schema(), compression="zstd") as writer:
            for number in range(self._written):
                table = pq.read_table(self._out / PARTS / f"{number:05}.parquet")
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


def _schema() -> Any:
    import pyarrow as pa

    counts = ("prompt_tokens", "cached_tokens", "completion_tokens", "wanted_tokens")
    return pa.schema(
        [
            ("subject", pa.string()),
            ("level", pa.string()),
            ("round", pa.int32()),
            ("counted", pa.bool_()),  # answered, and sent inside the window: the latencies are of these
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
    import numpy as np
    import pyarrow as pa

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
        "counted": [_counted(level, record) for record in records],
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


def _counted(level: Level, record: Record) -> bool:
    if record.failure is not None or not len(record.stamps_ns):
        return False
    begin_ns, end_ns = level.window_ns or (-math.inf, math.inf)
    return begin_ns <= record.sent_ns - level.started_ns < end_ns
