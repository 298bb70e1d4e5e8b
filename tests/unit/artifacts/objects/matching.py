"""Requests that tests let go wrong, by what they are about."""

from __future__ import annotations

from servers import Exchange

from llmopt.artifacts import layout

MIB = 1 << 20


def a_part(request: Exchange) -> bool:
    return request.method == "PUT" and "partNumber" in request.query


def a_small_put(request: Exchange) -> bool:
    return request.method == "PUT" and f"/{layout.BLOBS}/" in request.path and not request.query


def a_range(request: Exchange) -> bool:
    return request.method == "GET" and f"/{layout.BLOBS}/" in request.path


def a_chunk(request: Exchange) -> bool:
    return a_range(request) and request.headers.get("range") == f"bytes=0-{16 * MIB - 1}"


def a_begin(request: Exchange) -> bool:
    return request.method == "POST" and "uploads" in request.query


def an_end(request: Exchange) -> bool:
    return request.method == "POST" and "uploadId" in request.query


def a_manifest(request: Exchange) -> bool:
    return f"/{layout.MANIFESTS}/" in request.path and request.method == "PUT"


def a_listing(request: Exchange) -> bool:
    return request.method == "GET" and "list-type" in request.query


def a_look(request: Exchange) -> bool:
    return request.method == "HEAD"


def anything(request: Exchange) -> bool:
    return True
