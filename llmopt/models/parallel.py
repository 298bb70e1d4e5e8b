"""All cores, one BLAS thread each, results in order: figures that do not depend on how many cores there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import torch

_T = TypeVar("_T")
_U = TypeVar("_U")
_products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time


class Workers:
    """Threads of this process for the time of a `with`; torch runs single-threaded inside it, as before outside.

    `bfloat16`: matrix products of float32 take BF16 factors and sum in float32, twice as fast where the machine has
    BF16. `float32_products` keeps out of it what would not bear that.
    """

    def __init__(self, *, bfloat16: bool = False) -> None:
        self._products = "bf16" if bfloat16 else "ieee"

    def __enter__(self) -> Workers:
        self._products_before, _products.fp32_precision = _products.fp32_precision, self._products
        self._count = len(os.sched_getaffinity(0))
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads_before)
        _products.fp32_precision = self._products_before

    def map(self, function: Callable[[_T], _U], items: Iterable[_T], *, grad: bool = False) -> Iterator[_U]:
        """Results in the order of `items`, at most one more than cores ahead: they may be large.

        `grad`: whether `function` runs with gradients enabled, which is a thread's own setting.
        """
        guarded = (torch.enable_grad() if grad else torch.no_grad())(function)
        todo, ahead = list(items), self._count + 1
        waiting = [self._pool.submit(guarded, item) for item in todo[:ahead]]
        for position in range(len(todo)):
            yield waiting.pop(0).result()
            if position + ahead < len(todo):
                waiting.append(self._pool.submit(guarded, todo[position + ahead]))


@contextmanager
def float32_products() -> Iterator[None]:
    """Products of float32 as they are written. The switch is the process's own: only while no `map` is under way."""
    before, _products.fp32_precision = _products.fp32_precision, "ieee"
    try:
        yield
    finally:
        _products.fp32_precision = before
