from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.client import wire
from llmopt.bench.client.wire import MalformedError, Piece, Response, events

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
BODY = b'data: {"text": "a"}\n\ndata: {"text": "0\\r\\n\\r\\n"}\n\ndata: [DONE]\n\n'


def chunked(parts: list[bytes], *, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    sizes = b"".join(b"%X%b\r\n%b\r\n" % (len(part), extension, part) for part in parts if part)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + sizes + b"0\r\n" + trailers + b"\r\n"


def with_length(body: bytes) -> bytes:
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(marks)]


def body_of(pieces: list[Piece]) -> Response:
    """A response whose body came in these pieces."""
    response = Response()
    response.feed(0, b"HTTP/1.1 200 OK\r\n\r\n")
    for stamp_ns, data in pieces:
        response.feed(stamp_ns, data)
    return response


def feed_all(segments: list[bytes]) -> Response:
    """Fed until complete; the stamp of a segment is its index."""
    response = Response()
    for index, segment in enumerate(segments):
        assert not response.complete
        assert response.feed(index, segment) == response.complete
    return response


places = st.lists(st.integers(0, 10_000), max_size=30)


@given(parts=st.lists(st.binary(max_size=40), max_size=8), places=places)
def test_a_chunked_body_is_the_same_wherever_receives_split_it(parts: list[bytes], places: list[int]) -> None:
    response = feed_all(cut(chunked(parts), places))
    assert response.complete
    assert response.keep_alive
    assert response.body() == b"".join(parts)


@given(body=st.binary(min_size=1, max_size=200), places=places)
def test_a_body_of_known_length_is_the_same_wherever_receives_split_it(body: bytes, places: list[int]) -> None:
    response = feed_all(cut(with_length(body), places))
    assert response.complete
    assert response.body() == body


@given(places=places)
def test_a_body_that_holds_the_last_chunk_s_bytes_does_not_end_early(places: list[int]) -> None:
    body = b"data: 0\r\n\r\n" * 3
    assert feed_all(cut(chunked([body, body]), places)).body() == body * 2


@given(places=places)
def test_extensions_trailers_and_interim_heads_are_no_body(places: list[int]) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + chunked([b"abc"], extension=b";x=y", trailers=b"Digest: none\r\n")
    response = feed_all(cut(data, places))
    assert (response.status, response.complete, response.body()) == (200, True, b"abc")


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    response = Response()
    assert not response.feed(0, HEAD + b"\r\nabc")
    assert not response.feed(1, b"def")
    assert response.closed()
    assert response.body() == b"abcdef"
    assert not response.keep_alive


@pytest.mark.parametrize("data", [chunked([BODY]), with_length(BODY)], ids=["chunked", "length"])
def test_a_connection_that_ends_early_leaves_the_response_incomplete(data: bytes) -> None:
    for size in range(len(data)):
        response = Response()
        assert not response.feed(0, data[:size])
        assert not response.closed()


@pytest.mark.parametrize(
    ("data", "keeps"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close\r\ncontent-length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 0\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (with_length(b"abc") + b"more", False),
        (chunked([b"abc"]) + b"more", False),
    ],
)
def test_the_connection_is_kept_when_the_server_will_keep_it(data: bytes, keeps: bool) -> None:
    response = feed_all([data])
    assert response.complete
    assert response.keep_alive is keeps


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabcdef\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1" * 5000,
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000,
    ],
)
def test_bytes_that_are_not_the_protocol_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        Response().feed(0, data)


@given(data=st.binary(max_size=300), places=places)
def test_any_bytes_are_read_or_refused_and_nothing_else(data: bytes, places: list[int]) -> None:
    response = Response()
    try:
        for segment in cut(data, places):
            response.feed(0, segment)
    except MalformedError:
        pass


@given(data=st.lists(st.sampled_from([b"data: x", b"\n", b"\r\n", b"\r", b":", b"event: y"])), places=places)
def test_any_body_can_be_cut_into_events(data: list[bytes], places: list[int]) -> None:
    pieces = [(i, piece) for i, piece in enumerate(cut(b"".join(data), places)) if piece]
    whole = [(0, b"".join(data))] if pieces else []
    assert [event for _, event in events(body_of(pieces))] == [event for _, event in events(body_of(whole))]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@given(texts=st.lists(st.text("ab \u03b6:", max_size=5), max_size=10), places=places)
def test_an_event_is_stamped_by_the_receive_that_completes_it(end: bytes, texts: list[str], places: list[int]) -> None:
    whole = [b": ping" + end + b"data: " + text.encode() + end * 2 for text in texts]
    body = b"".join(whole)
    pieces: list[Piece] = [(i, piece) for i, piece in enumerate(cut(body, places)) if piece]
    found = events(body_of(pieces))
    assert [data.decode() for _, data in found] == texts
    reached, ends = 0, []
    for stamp, piece in pieces:
        reached += len(piece)
        ends.append((reached, stamp))
    for i, (stamp, _) in enumerate(found):
        last_byte = sum(map(len, whole[: i + 1]))
        assert stamp == next(s for e, s in ends if e >= last_byte)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_lines_of_data_are_joined_and_other_fields_dropped(end: bytes) -> None:
    lines = [b"event: token", b"id: 3", b"data: a", b"data:b", b"retry: 10", b"", b": comment", b"", b""]
    assert events(body_of([(5, end.join(lines))])) == [(5, b"a\nb")]


def test_the_last_event_needs_no_blank_line() -> None:
    assert events(body_of([(1, b"data: a\n\n"), (2, b"data: [DONE]\n")])) == [(1, b"a"), (2, b"[DONE]")]


@given(texts=st.lists(st.text("ab:", max_size=5), min_size=1, max_size=6), odd=st.integers(0, 5))
def test_events_are_the_same_whether_each_came_in_a_piece_of_its_own_or_not(texts: list[str], odd: int) -> None:
    whole = [b"data: " + text.encode() + b"\n\n" for text in texts]
    at = odd % len(whole)
    parted = [*whole[:at], whole[at][:3], whole[at][3:], *whole[at + 1 :]]
    expected = [text.encode() for text in texts]
    assert [data for _, data in events(body_of(list(enumerate(whole))))] == expected
    assert [data for _, data in events(body_of(list(enumerate(parted))))] == expected


EVENT = st.sampled_from([b'data: {"a": 1}', b"data: x", b": ping", b"event: e", b"data:y", b"data: ", b"data", b""])
NEWLINE = st.sampled_from([b"\n", b"\n\n", b"\n\n", b"\r\n\r\n", b"\r"])


@given(parts=st.lists(st.tuples(EVENT, NEWLINE), max_size=8), size=st.integers(1, 30))
def test_the_quick_cut_of_events_is_the_general_one(parts: list[tuple[bytes, bytes]], size: int) -> None:
    whole = b"".join(b"".join(part) for part in parts)
    for pieces in (
        [(number, b"".join(part)) for number, part in enumerate(parts)],
        [(at, whole[at : at + size]) for at in range(0, len(whole), size)],
    ):
        response = body_of([piece for piece in pieces if piece[1]])
        assert events(response) == wire._cut(response, whole)
