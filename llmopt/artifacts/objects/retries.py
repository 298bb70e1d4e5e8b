"""Trying again while a server is busy or the connection to it breaks: one policy for all requests."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: In all about 30 s, if each answer comes at once; of a server that has never answered, 2 s.
TRIES, FIRST_TRIES = 9, 4
PAUSE_S, MOST_PAUSE_S = 0.25, 10.0
#: So long after the first try there is no other: those before may have taken long.
GIVE_UP_S = 150.0


def again(work: Callable[[], T], *, passing: Callable[[Exception], bool], met: Callable[[], bool]) -> T:
    """`passing` tells an error that another try may not meet; `met`, whether the server has answered before."""
    begin, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return work()
        except Exception as error:
            most = TRIES if met() else FIRST_TRIES
            if tries >= most or time.monotonic() - begin > GIVE_UP_S or not passing(error):
                raise
        time.sleep(min(MOST_PAUSE_S, PAUSE_S * 2 ** (tries - 1)) * (0.5 + random.random() / 2))
