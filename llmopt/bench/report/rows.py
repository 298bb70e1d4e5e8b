"""requests.parquet read back for the charts, as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmopt.bench.report.requests import REQUESTS

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The requests of one subject under one load in one round, by their sending. NaN where one has no such time."""

    subject: str
    level: str
    round: int
    sent_s: Floats  # since the level's start
    due_s: Floats  # since its sending: 0 or less
    end_s: Floats  # since its sending
    first_s: Floats  # since its sending
    failed: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    tokens: Floats
    ends: NDArray[np.int64]  # of each request's chunks among `chunks_s`
    chunks_s: Floats  # since its sending, all requests behind one another

    def __len__(self) -> int:
        return len(self.sent_s)

    @property
    def scheduled(self) -> bool:
        return len(self) > 0 and not np.isnan(self.due_s).any()

    def times_ms(self) -> dict[str, Floats]:
        """Of the counted requests, by the names that a summary has for them."""
        first_s = self.first_s[self.counted & ~np.isnan(self.first_s)]
        some = self.counted & (np.diff(self.ends, prepend=0) > 0)
        last_s = self.chunks_s[self.ends[some] - 1]
        spoken = self.tokens[some] > 1
        decode_s = (last_s - self.first_s[some])[spoken]
        found = {
            "ttft_ms": first_s * 1e3,
            "tpot_ms": decode_s * 1e3 / (self.tokens[some][spoken] - 1),
            "e2e_ms": last_s * 1e3,
            "itl_ms": self._gaps_ms(),
        }
        return found | ({"ttft_scheduled_ms": (self.first_s - self.due_s)[some] * 1e3} if self.scheduled else {})

    def _gaps_ms(self) -> Floats:
        owner = self.owners()
        gaps_ms = np.diff(self.chunks_s) * 1e3
        inner = (owner[1:] == owner[:-1]) & self.counted[owner[1:]]
        return np.asarray(gaps_ms[inner])

    def owners(self) -> NDArray[np.int64]:
        """The request of each chunk."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends, prepend=0))


def read(out: Path) -> list[Rows]:
    """The measured in the order of their measurement; none where there is no file."""
    if not (out / REQUESTS).exists():
        return []
    import pyarrow.parquet as pq

    file = pq.ParquetFile(out / REQUESTS)
    tables = (file.read_row_group(number) for number in range(file.num_row_groups))
    return [_rows(table) for table in tables if table.num_rows]


def _rows(table: Any) -> Rows:
    table = table.sort_by("sent_us")
    lists = table["chunks_us"].combine_chunks()
    counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    completion = _floats(table, "completion_tokens")
    return Rows(
        subject=table["subject"][0].as_py(),
        level=table["level"][0].as_py(),
        round=table["round"][0].as_py(),
        sent_s=_floats(table, "sent_us") / 1e6,
        due_s=_floats(table, "due_us") / 1e6,
        end_s=_floats(table, "end_us") / 1e6,
        first_s=_floats(table, "first_us") / 1e6,
        failed=table["error"].is_valid().to_numpy(),
        counted=table["counted"].combine_chunks().fill_null(table["error"].combine_chunks().is_null()).to_numpy(False),
        tokens=np.where(np.isnan(completion), counts, completion),
        ends=np.cumsum(counts, dtype=np.int64),
        chunks_s=lists.flatten().to_numpy(zero_copy_only=False) / 1e6,
    )


def _floats(table: Any, name: str) -> Floats:
    values: Floats = table[name].to_numpy().astype(np.float64)
    return values


def grouped(measured: Iterable[Rows]) -> Iterator[tuple[tuple[str, str], list[Rows]]]:
    """The rounds of each subject and level, in the order of the first."""
    groups: dict[tuple[str, str], list[Rows]] = {}
    for rows in measured:
        groups.setdefault((rows.subject, rows.level), []).append(rows)
    yield from groups.items()
