"""How to talk to an S3 server: what a job file may say besides `s3://bucket/prefix`.

Credentials are not among it. They come through boto3's own chain (environment, profile, metadata
service), and never from a file of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class S3Options:
    """What differs between AWS and the many servers that speak its protocol.

    `role` is the ARN of a role to assume through STS. `ca_bundle` is the path of a file with the
    certificates to trust. `conditional_writes=False` is for servers that know no `If-None-Match`:
    two writers of one key are then told apart by a look before the write, which is no proof.
    """

    endpoint: str | None = None
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    sse: Literal["AES256", "aws:kms"] | None = None
    kms_key: str | None = None
    storage_class: str | None = None
    role: str | None = None
    ca_bundle: str | None = None
    conditional_writes: bool = True
