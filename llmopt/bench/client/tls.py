"""TLS on a socket that we read ourselves: `recvmsg` brings its stamp with the bytes, then they are decrypted."""

from __future__ import annotations

import ssl

_READ_BYTES = 256 * 1024


def context() -> ssl.SSLContext:
    """Trusts what the system trusts, and what `SSL_CERT_FILE` names."""
    made = ssl.create_default_context()
    made.set_alpn_protocols(["http/1.1"])
    return made


class Session:
    """One connection's TLS. All methods raise ssl.SSLError; after each, `outgoing` may have bytes to send."""

    def __init__(self, trust: ssl.SSLContext, hostname: str) -> None:
        self._received = ssl.MemoryBIO()
        self._to_send = ssl.MemoryBIO()
        self._tls = trust.wrap_bio(self._received, self._to_send, server_hostname=hostname)

    def handshake(self, data: bytes) -> bool:
        """Go on with what was received; True when the session stands."""
        self._received.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def seal(self, data: bytes) -> None:
        self._tls.write(data)

    def open(self, data: bytes = b"") -> tuple[bytes, bool]:
        """What the received bytes say, and whether the other side says that it has ended."""
        self._received.write(data)
        parts: list[bytes] = []
        try:
            while part := self._tls.read(_READ_BYTES):
                parts.append(part)
        except ssl.SSLWantReadError:
            return b"".join(parts), False
        except ssl.SSLZeroReturnError:
            pass
        return b"".join(parts), True

    def outgoing(self) -> bytes:
        return self._to_send.read()
