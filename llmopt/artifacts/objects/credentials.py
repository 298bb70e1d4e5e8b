"""Whom to ask on S3 and as whom: what every AWS tool reads, the environment and `~/.aws`, by botocore's own rules."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from llmopt import backends
from llmopt.errors import LlmoptError, SettingsError

if TYPE_CHECKING:
    from botocore.credentials import Credentials

_DEFAULT_REGION = "us-east-1"
#: Of AWS's partitions, by what their regions begin with.
_DOMAINS = (("cn-", "amazonaws.com.cn"), ("us-isob-", "sc2s.sgov.gov"), ("us-iso-", "c2s.ic.gov"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """`endpoint` has no slash at its end. `credentials` renew themselves where they are of the kind that expires."""

    endpoint: str
    region: str
    credentials: Credentials

    @classmethod
    def find(cls) -> Access:
        """LlmoptError when no credentials are to be found; they are not tried yet."""
        session_module: Any = backends.load("botocore.session", extra="s3")
        exceptions: Any = backends.load("botocore.exceptions", extra="s3")
        session = session_module.get_session()
        try:
            # Those in the environment count without a look for others, which may take seconds.
            credentials = session.get_credentials()
            region = session.get_config_variable("region") or os.environ.get("AWS_REGION") or _DEFAULT_REGION
            endpoint = _configured_endpoint(session) or _aws_endpoint(region)
        except exceptions.ProfileNotFound as error:
            raise SettingsError(
                f"{error}".rstrip("."), hint="check `AWS_PROFILE`; `~/.aws/config` has the profiles"
            ) from error
        except exceptions.BotoCoreError as error:
            raise LlmoptError(
                f"the AWS configuration cannot be used: {error}", hint="check `~/.aws` and the `AWS_*` variables"
            ) from error
        if credentials is None:
            raise LlmoptError(
                "no AWS credentials are to be found",
                hint="set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or `AWS_PROFILE` for a profile of `~/.aws`",
            )
        if not endpoint.startswith(("http://", "https://")):
            raise SettingsError(
                f"the S3 endpoint `{endpoint}` has no scheme", hint="write `http://HOST:PORT` or `https://HOST`"
            )
        return cls(endpoint=endpoint.rstrip("/"), region=region, credentials=credentials)

    def frozen(self) -> Any:
        """As they are now, renewed if they had to be."""
        try:
            return self.credentials.get_frozen_credentials()
        except Exception as error:  # botocore raises what its provider raises
            raise LlmoptError(f"the AWS credentials cannot be renewed: {error}", hint="log in again") from error

    def for_obstore(self) -> dict[str, Any]:
        """As obstore asks for them, again and again."""
        frozen = self.frozen()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        }


def _configured_endpoint(session: Any) -> str | None:
    """`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, or those of the profile, as all AWS SDKs take them."""
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if found := os.environ.get(variable):
            return found
    profile = session.get_scoped_config()
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    found = services.get("s3", {}).get("endpoint_url") if isinstance(services.get("s3"), dict) else None
    named: str | None = found or profile.get("endpoint_url")
    return named


def _aws_endpoint(region: str) -> str:
    domain = next((domain for prefix, domain in _DOMAINS if region.startswith(prefix)), "amazonaws.com")
    return f"https://s3.{region}.{domain}"
