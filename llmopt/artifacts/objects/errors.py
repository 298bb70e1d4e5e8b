"""What S3 servers say when they refuse, in words that a user can act on."""

from __future__ import annotations

import re

from llmopt.errors import LlmoptError

_CODE, _MESSAGE = re.compile(r"<Code>(\w+)</Code>"), re.compile(r"<Message>([^<]+)</Message>")
_STATUS = re.compile(r"status(?: code)?:? (\d{3})")
_CREDENTIALS = "check `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_PROFILE`, are they of this endpoint?"
_LOGIN = "get new ones (`aws sso login`, or whoever issued them) and run the command again: it goes on where it stopped"
_REGION = "set `AWS_REGION` to the bucket's region"
_CLOCK = "set this machine's clock: S3 refuses requests that are 15 minutes off"
_MAY_NOT = "ask for s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject and s3:DeleteObject on what is in it"
#: By the code in the body: what it means, and what to do. `{bucket}` and `{endpoint}` are filled in.
_KNOWN = {
    "NoSuchBucket": ("there is no bucket `{bucket}` at `{endpoint}`", "create it, or check the name and the endpoint"),
    "InvalidBucketName": ("`{bucket}` cannot be the name of a bucket", "3 to 63 lower-case letters, digits and `-`"),
    "InvalidAccessKeyId": ("`{endpoint}` does not know the access key", _CREDENTIALS),
    "SignatureDoesNotMatch": ("`{endpoint}` refused the signature: the secret key is wrong", _CREDENTIALS),
    "ExpiredToken": ("the credentials have expired", _LOGIN),
    "TokenRefreshRequired": ("the credentials have expired", _LOGIN),
    "InvalidToken": ("`{endpoint}` does not know the session token", _CREDENTIALS),
    "RequestTimeTooSkewed": ("the clock of this machine and that of `{endpoint}` differ too much", _CLOCK),
    "RequestExpired": ("the clock of this machine and that of `{endpoint}` differ too much", _CLOCK),
    "AccessDenied": ("`{endpoint}` does not allow {what} in the bucket `{bucket}`", _MAY_NOT),
    "AllAccessDisabled": ("`{endpoint}` does not allow {what} in the bucket `{bucket}`", _MAY_NOT),
    "PermanentRedirect": ("the bucket `{bucket}` is in another region", _REGION),
    "AuthorizationHeaderMalformed": ("the bucket `{bucket}` is in another region", _REGION),
    "IllegalLocationConstraintException": ("the bucket `{bucket}` is in another region", _REGION),
    "QuotaExceeded": ("the bucket `{bucket}` is full", "free some space: `llmopt store gc`"),
}
_BUSY = (408, 429, 500, 502, 503, 504)
_PASSING = ("RequestTimeout", "SlowDown", "OperationAborted", "BadDigest", "XAmzContentSHA256Mismatch")
#: obstore's words for a connection that broke, in whatever state.
_TRANSPORT = re.compile(r"HttpError|HTTP error|error decoding response body|reqwest::Error|unexpected EOF")
#: By what obstore and urllib3 say of a request that got no answer: what it means.
_SILENCES = [
    (re.compile(pattern), words)
    for pattern, words in (
        (r"[Cc]ertificate|CERTIFICATE", "the certificate of `{endpoint}` is not trusted here"),
        (r"Connection refused", "`{endpoint}` does not answer: connection refused"),
        (r"dns error|Failed to resolve", "`{endpoint}` does not answer: its name is not known"),
        (r"[Tt]imed ?[Oo]ut|Timeout", "`{endpoint}` does not answer: it has been silent for too long"),
        (
            r"Reset|reset|Interrupted|EOF|Eof|Incomplete|Broken|Disconnected|closed",
            "the connection to `{endpoint}` keeps breaking",
        ),
    )
]
_BY_STATUS = {301: "PermanentRedirect", 401: "SignatureDoesNotMatch", 403: "AccessDenied"}


class RefusedError(LlmoptError):
    """A server's last answer, with the code of S3's that it gave, if any."""

    s3_code: str | None = None
    status: int | None = None


def tell(text: str, *, bucket: str, endpoint: str, what: str) -> LlmoptError:
    """The error for a server's last answer, or for none. `what` was tried: `reading`, `listing`."""
    code, status = code_of(text), status_of(text)
    if status is None and "configured region" in text:  # obstore's words for a redirect
        status = 301
    if code is None and status is None:
        said = next((words for pattern, words in _SILENCES if pattern.search(text)), None)
        said = said or "`{endpoint}` does not answer: " + text.partition("\n")[0].replace("{", "").replace("}", "")
        hint = "check `AWS_ENDPOINT_URL` and that the server is up; the same command goes on where it stopped"
        return LlmoptError(said.format(endpoint=endpoint), hint=hint)
    known = _KNOWN.get(code or "") or _KNOWN.get(_BY_STATUS.get(status or 0, ""))
    if known is not None:
        message, hint = known
        message = message.format(bucket=bucket, endpoint=endpoint, what=what)
        if code is not None and code not in _KNOWN:
            message += f" ({code})"
    else:
        said = " ".join(str(part) for part in (status, code, _first(_MESSAGE, text)) if part)
        kept = "kept answering" if is_passing(text) else "answered"
        message = f"{what} in the bucket `{bucket}` failed: `{endpoint}` {kept} {said.rstrip('.')}"
        hint = "run the command again: it goes on where it stopped"
    error = RefusedError(message, hint=hint)
    error.s3_code, error.status = code, status
    return error


def is_passing(text: str) -> bool:
    """Whether another try may get another answer: the server is busy, or none came, or not all of it."""
    status, code = status_of(text), code_of(text)
    if code in _PASSING:
        return True
    if status is not None:
        return status in _BUSY
    # Of many writers of one object at once, Swift gives some an answer without the ETag that obstore asks for.
    return _TRANSPORT.search(text) is not None or "Header missing from response" in text


def code_of(text: str) -> str | None:
    return _first(_CODE, text)


def status_of(text: str) -> int | None:
    found = _first(_STATUS, text)
    return None if found is None else int(found)


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return None if found is None else found[1]
