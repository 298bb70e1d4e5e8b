"""S3 servers to test against, each a real one, and a proxy that breaks what passes between it and a client.

The fixtures are in `fixtures.py`: `rclone`, `ceph` and `swift` give a `Server`; `s3_server` gives each of them in turn.
"""

from servers.proxy import SLOW_DOWN, Answer, Cut, Exchange, Flip, Hang, LoseReply, Proxy, Rule, Slow, Truncate
from servers.server import Reply, Server

__all__ = [
    "SLOW_DOWN",
    "Answer",
    "Cut",
    "Exchange",
    "Flip",
    "Hang",
    "LoseReply",
    "Proxy",
    "Reply",
    "Rule",
    "Server",
    "Slow",
    "Truncate",
]
