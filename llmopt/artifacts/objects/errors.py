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
_BY_STATUS = {301: "PermanentRedirect", 401: "SignatureDoesNotMatch", 403: "AccessDenied"}


def tell(text: str, *, bucket: str, endpoint: str, what: str) -> LlmoptError:
    """The error for a server's last answer, or for none. `what` was tried: `reading`, `listing`."""
    code, status = _first(_CODE, text), _first(_STATUS, text)
    known = _KNOWN.get(code or "") or _KNOWN.get(_BY_STATUS.get(int(status or 0), ""))
    if known is not None:
        message, hint = known
        return LlmoptError(message.format(bucket=bucket, endpoint=endpoint, what=what), hint=hint)
    said = " ".join(part for part in (status, code, _first(_MESSAGE, text)) if part)
    if said:
        return LlmoptError(
            f"{what} in the bucket `{bucket}` failed: `{endpoint}` kept answering {said}",
            hint="run the command again: it goes on where it stopped",
        )
    return LlmoptError(
        f"`{endpoint}` does not answer: {_reason(text)}", hint="check `AWS_ENDPOINT_URL` and that the server is up"
    )


def code_of(text: str) -> str | None:
    return _first(_CODE, text)


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return None if found is None else found[1]


def _reason(text: str) -> str:
    """The end of a chain of causes, which says the most."""
    line = text.partition("\n")[0]
    return line.rpartition(": ")[2] or line
