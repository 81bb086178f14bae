"""Which credentials boto3 finds on this machine: where they come from, never what they are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from runner.errors import StoreError

_PROVIDERS = {  # botocore's names of its providers
    "env": "the environment (AWS_ACCESS_KEY_ID)",
    "shared-credentials-file": "the shared credentials file",
    "config-file": "the AWS config file",
    "assume-role": "a role that the profile assumes",
    "assume-role-with-web-identity": "a web identity token (AWS_WEB_IDENTITY_TOKEN_FILE)",
    "sso": "AWS single sign-on",
    "custom-process": "a program named in the AWS config file",
    "container-role": "the container's role",
    "iam-role": "the instance's role, from the metadata service",
}


@dataclass(frozen=True)
class CredentialSource:
    """Where the credentials come from, and when they end, if they do and that is known."""

    provider: str
    expires_at: datetime | None = None


def credential_source() -> CredentialSource | None:
    """What boto3's own chain finds; None if it finds nothing.

    Asks no server but those that hand out credentials. StoreError if a provider is there and fails.
    """
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        found = boto3.session.Session().get_credentials()
        if found is None or not found.get_frozen_credentials().access_key:
            return None
    except BotoCoreError as error:
        raise StoreError(f"no credentials can be had: {error}") from error
    # Not public, and the only place where botocore says it; without it nothing is claimed.
    expiry = getattr(found, "_expiry_time", None)
    if not isinstance(expiry, datetime) or expiry.tzinfo is None:
        expiry = None
    return CredentialSource(_PROVIDERS.get(found.method, str(found.method)), expiry)
