"""A checkpoint larger than the memory it may use: quantized, and quantized again through twenty kill -9.

LLMOPT_BENCH_GB (8) sizes the checkpoint and LLMOPT_BENCH_LIMIT_GB (4) the limit; the scratch folder needs about twice
the checkpoint's size.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from generate import Shape, generate
from limits import Limit, Ran, memory_limit, run

pytestmark = [pytest.mark.bench, pytest.mark.timeout(6 * 3600)]

SIZE_BYTES = int(float(os.environ.get("LLMOPT_BENCH_GB", "8")) * 1e9)
LIMIT_BYTES = int(float(os.environ.get("LLMOPT_BENCH_LIMIT_GB", "4")) * 1e9)
KILLS = 20
ARGUMENTS = (
    *("--method", "gptq", "--no-compensate", "--sweeps", "0"),
    *("--samples", "4", "--seq-len", "512", "--memory-budget", "2GiB"),
)


def shape(size_bytes: int) -> Shape:
    """A Llama of at least that many bytes whose linears are square: the cheapest GPTQ for its size."""
    small = size_bytes < 2_000_000_000
    hidden = 1024 if small else 2048
    sizes = {"hidden": hidden, "mlp": hidden, "heads": hidden // 128, "kv_heads": hidden // 512, "vocab": 32000}
    one, two = (_bytes(Shape(layers=layers, **sizes)) for layers in (1, 2))
    return Shape(layers=-(-(size_bytes - one) // (two - one)) + 1, **sizes)


def _bytes(shape: Shape) -> int:
    block = sum(sizes[0] * (sizes[1] if len(sizes) == 2 else 1) for sizes in shape.block.values())
    return 2 * (shape.layers * block + 2 * shape.vocab * shape.hidden + shape.hidden)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "model"
    total = generate(folder, shape(SIZE_BYTES))
    assert total >= SIZE_BYTES
    print(f"\n{total / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards")
    return folder


@pytest.fixture(scope="module")
def limit() -> Iterator[Limit]:
    with memory_limit(LIMIT_BYTES) as found:
        yield found


def quantize(
    checkpoint: Path, store: Path, limit: Limit, *, kill_after_s: float | None = None, counting_from: str = ""
) -> Ran:
    command = (sys.executable, "-m", "llmopt", "quantize", checkpoint, *ARGUMENTS, "--store", store, "--json")
    return run(command, limit, log=store.with_suffix(".log"), kill_after_s=kill_after_s, counting_from=counting_from)


def artifact(ran: Ran) -> str:
    assert ran.code == 0, f"exit code {ran.code}: {ran.err[-3000:]}"
    return str(json.loads(ran.out)["artifact"])


def blocks_done(ran: Ran) -> int:
    """The last block that the progress on stderr names."""
    return max((int(number) for number in re.findall(r"block (\d+)/\d+", ran.err)), default=0)


@pytest.fixture(scope="module")
def uninterrupted(checkpoint: Path, limit: Limit, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    ran = quantize(checkpoint, tmp_path_factory.mktemp("whole") / "store", limit)
    held = limit.peak_bytes()
    print(
        f"\n{limit.name} of {LIMIT_BYTES / 1e9:.1f} GB: {ran.wall_s:.0f} s of wall time, "
        f"peak {ran.peak_rss_bytes / 1e9:.2f} GB resident, {ran.peak_anonymous_bytes / 1e9:.2f} GB of it anonymous"
        + ("" if held is None else f", {held / 1e9:.2f} GB with the page cache")
    )
    return ran


def test_more_than_the_limit_quantizes_below_it(uninterrupted: Ran) -> None:
    assert artifact(uninterrupted).startswith("sha256:")
    assert uninterrupted.peak_anonymous_bytes < LIMIT_BYTES


def test_the_limit_is_real(limit: Limit, tmp_path: Path) -> None:
    code = f"b = bytearray({LIMIT_BYTES + (64 << 20)}); b[::4096] = b'x' * len(b[::4096]); print('alive')"
    ran = run((sys.executable, "-c", code), limit, log=tmp_path / "log")
    assert ran.code != 0
    assert "alive" not in ran.out


def test_twenty_kills_end_in_the_same_artifact(
    uninterrupted: Ran, checkpoint: Path, limit: Limit, tmp_path: Path
) -> None:
    """Every other kill counts from the start, reading and checking included; the rest from the first block named."""
    expected = artifact(uninterrupted)
    reached = []
    for kill, moment in enumerate(random.Random(20).choices(range(1000), k=KILLS)):
        ran = quantize(
            checkpoint,
            tmp_path / "store",
            limit,
            kill_after_s=uninterrupted.wall_s * 2 / (KILLS + 1) * moment / 1000,
            counting_from="block " if kill % 2 else "",
        )
        assert ran.killed, f"it ended by itself: {ran.err[-3000:]}"
        reached.append(blocks_done(ran))
    last = quantize(checkpoint, tmp_path / "store", limit)
    print(f"\nkilled at blocks {reached}; the last run took {last.wall_s:.0f} s")
    assert artifact(last) == expected
    assert max(reached) > 1, "no kill came late enough to leave a finished block"
    assert last.wall_s < uninterrupted.wall_s, "the last run began from the start"
