"""Keeps a boto3 client off addresses that are not public.

A name that was looked up and found to be public may mean something else a moment later (DNS rebinding), so the address
is checked again on each connection, before anything is sent over it.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from urllib3.exceptions import NewConnectionError

from comfy_worker.net.public_addresses import is_public

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def connect_only_to_public_addresses(client: S3Client) -> None:
    """Let every further connection of the client to any other address fail."""
    endpoint: Any = getattr(client, "_endpoint")  # noqa: B009 - botocore has no public way to it
    pools = endpoint.http_session._manager.pool_classes_by_scheme
    pools.update(http=_PublicHTTPPool, https=_PublicHTTPSPool)


def _checked(connection: Any, connected: socket.socket) -> socket.socket:
    if is_public(str(connected.getpeername()[0])):
        return connected
    connected.close()
    raise NewConnectionError(connection, "the host has no public address")


class _PublicHTTPConnection(AWSHTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _checked(self, super()._new_conn())


class _PublicHTTPSConnection(AWSHTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _checked(self, super()._new_conn())


class _PublicHTTPPool(AWSHTTPConnectionPool):
    ConnectionCls = _PublicHTTPConnection


class _PublicHTTPSPool(AWSHTTPSConnectionPool):
    ConnectionCls = _PublicHTTPSConnection
