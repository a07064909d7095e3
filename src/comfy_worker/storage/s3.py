"""Outputs in an S3 bucket, handed over as presigned URLs."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from comfy_worker.errors import DeliveryFailed
from comfy_worker.jobs import Delivered
from comfy_worker.settings import Settings
from comfy_worker.storage.endpoint import Bucket, parse_endpoint

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from comfy_worker.storage import Parcel


class S3Storage:
    """Puts files into one bucket; the client and its connections are kept for all jobs."""

    def __init__(self, client: S3Client, bucket: Bucket, *, prefix: str | None, expires_s: int) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._expires_s = expires_s

    def for_job(self, *, prefix: str | None, expires_s: int | None) -> S3Storage:
        """Return the same bucket with what one job wants different."""
        return S3Storage(self._client, self._bucket, prefix=prefix, expires_s=expires_s or self._expires_s)

    @classmethod
    def connect(cls, settings: Settings) -> S3Storage:
        """Return the storage that the settings describe; nothing is sent yet.

        Raises:
            InvalidInput: the endpoint names no bucket.
        """
        assert settings.bucket_endpoint_url, "chosen only when a bucket is configured"  # noqa: S101
        assert settings.bucket_access_key_id, "checked when the settings are loaded"  # noqa: S101
        assert settings.bucket_secret_access_key, "checked when the settings are loaded"  # noqa: S101
        bucket = parse_endpoint(settings.bucket_endpoint_url, settings.bucket_name, settings.bucket_region)
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=bucket.endpoint_url,
            region_name=bucket.region,
            aws_access_key_id=settings.bucket_access_key_id.get_secret_value(),
            aws_secret_access_key=settings.bucket_secret_access_key.get_secret_value(),
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "virtual" if bucket.virtual_hosted else "path"},
                # Checksums that were not asked for are refused by R2, GCS and older MinIOs.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"mode": "standard", "max_attempts": 4},
                connect_timeout=10,
                read_timeout=60,
                max_pool_connections=settings.transfer_threads + 2,
            ),
        )
        return cls(client, bucket, prefix=None, expires_s=settings.bucket_url_expires_s)

    def deliver(self, parcel: Parcel) -> Delivered:
        """Upload the file and return a presigned URL for it.

        Raises:
            DeliveryFailed: S3 did not take it.
        """
        key = f"{self._prefix or parcel.job_id}/{parcel.path}"
        filename = parcel.path.rpartition("/")[2]
        try:
            self._client.put_object(
                Bucket=self._bucket.name,
                Key=key,
                Body=parcel.content,
                ContentType=parcel.mime_type,
                ContentDisposition=f"inline; filename*=UTF-8''{quote(filename)}",
            )
            url = self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self._bucket.name, "Key": key}, ExpiresIn=self._expires_s
            )
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "an error")
            raise DeliveryFailed(f"S3 refused {parcel.path} for bucket {self._bucket.name!r}: {code}") from error
        except BotoCoreError as error:
            raise DeliveryFailed(f"S3 could not be reached to store {parcel.path}: {type(error).__name__}") from error
        return Delivered("s3_url", url)
