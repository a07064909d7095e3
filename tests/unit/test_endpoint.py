"""In how many ways people write an S3 endpoint, and what each means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.errors import InvalidInput
from comfy_worker.storage.endpoint import Bucket, parse_endpoint

ACCOUNT = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("url", "bucket"),
    [
        # AWS
        (
            "https://shop.s3.eu-central-1.amazonaws.com",
            Bucket("https://s3.eu-central-1.amazonaws.com", "shop", "eu-central-1", True),
        ),
        (
            "https://s3.eu-central-1.amazonaws.com/shop",
            Bucket("https://s3.eu-central-1.amazonaws.com", "shop", "eu-central-1", True),
        ),
        (
            "https://SHOP.S3.EU-CENTRAL-1.AMAZONAWS.COM/",
            Bucket("https://s3.eu-central-1.amazonaws.com", "shop", "eu-central-1", True),
        ),
        ("https://shop.s3.amazonaws.com", Bucket("https://s3.amazonaws.com", "shop", "us-east-1", True)),
        (
            "https://shop.s3-eu-west-1.amazonaws.com",
            Bucket("https://s3-eu-west-1.amazonaws.com", "shop", "eu-west-1", True),
        ),
        (
            "https://shop.s3.dualstack.ap-southeast-2.amazonaws.com",
            Bucket("https://s3.dualstack.ap-southeast-2.amazonaws.com", "shop", "ap-southeast-2", True),
        ),
        (
            "https://shop.s3.us-gov-west-1.amazonaws.com",
            Bucket("https://s3.us-gov-west-1.amazonaws.com", "shop", "us-gov-west-1", True),
        ),
        (
            "https://shop.s3.cn-north-1.amazonaws.com.cn",
            Bucket("https://s3.cn-north-1.amazonaws.com.cn", "shop", "cn-north-1", True),
        ),
        # A dot in the name does not fit the certificate, unless there is none.
        (
            "https://my.shop.s3.eu-central-1.amazonaws.com",
            Bucket("https://s3.eu-central-1.amazonaws.com", "my.shop", "eu-central-1", False),
        ),
        (
            "http://my.shop.s3.eu-central-1.amazonaws.com",
            Bucket("http://s3.eu-central-1.amazonaws.com", "my.shop", "eu-central-1", True),
        ),
        # Cloudflare R2
        (
            f"https://{ACCOUNT}.r2.cloudflarestorage.com/shop",
            Bucket(f"https://{ACCOUNT}.r2.cloudflarestorage.com", "shop", "auto", False),
        ),
        (
            f"https://shop.{ACCOUNT}.r2.cloudflarestorage.com",
            Bucket(f"https://{ACCOUNT}.r2.cloudflarestorage.com", "shop", "auto", False),
        ),
        (
            f"https://{ACCOUNT}.eu.r2.cloudflarestorage.com/shop",
            Bucket(f"https://{ACCOUNT}.eu.r2.cloudflarestorage.com", "shop", "auto", False),
        ),
        # Alibaba OSS
        (
            "https://shop.oss-cn-hangzhou.aliyuncs.com",
            Bucket("https://oss-cn-hangzhou.aliyuncs.com", "shop", "cn-hangzhou", True),
        ),
        (
            "https://shop.oss-cn-hangzhou-internal.aliyuncs.com",
            Bucket("https://oss-cn-hangzhou-internal.aliyuncs.com", "shop", "cn-hangzhou", True),
        ),
        (
            "https://shop.s3.oss-us-west-1.aliyuncs.com",
            Bucket("https://s3.oss-us-west-1.aliyuncs.com", "shop", "us-west-1", True),
        ),
        (
            "https://s3.oss-cn-hangzhou.aliyuncs.com/shop",
            Bucket("https://s3.oss-cn-hangzhou.aliyuncs.com", "shop", "cn-hangzhou", True),
        ),
        # Google
        ("https://storage.googleapis.com/shop", Bucket("https://storage.googleapis.com", "shop", "auto", False)),
        ("https://shop.storage.googleapis.com", Bucket("https://storage.googleapis.com", "shop", "auto", False)),
        # Backblaze B2
        (
            "https://s3.us-west-004.backblazeb2.com/shop",
            Bucket("https://s3.us-west-004.backblazeb2.com", "shop", "us-west-004", False),
        ),
        (
            "https://shop.s3.us-west-004.backblazeb2.com",
            Bucket("https://s3.us-west-004.backblazeb2.com", "shop", "us-west-004", False),
        ),
        # DigitalOcean Spaces
        (
            "https://shop.nyc3.digitaloceanspaces.com",
            Bucket("https://nyc3.digitaloceanspaces.com", "shop", "nyc3", True),
        ),
        (
            "https://nyc3.digitaloceanspaces.com/shop",
            Bucket("https://nyc3.digitaloceanspaces.com", "shop", "nyc3", True),
        ),
        # Wasabi
        (
            "https://s3.eu-central-1.wasabisys.com/shop",
            Bucket("https://s3.eu-central-1.wasabisys.com", "shop", "eu-central-1", False),
        ),
        ("https://shop.s3.wasabisys.com", Bucket("https://s3.wasabisys.com", "shop", "us-east-1", False)),
        # Scaleway
        ("https://shop.s3.fr-par.scw.cloud", Bucket("https://s3.fr-par.scw.cloud", "shop", "fr-par", False)),
        # MinIO and everything else
        ("http://127.0.0.1:9000/shop", Bucket("http://127.0.0.1:9000", "shop", "us-east-1", False)),
        ("http://[::1]:9000/shop", Bucket("http://[::1]:9000", "shop", "us-east-1", False)),
        ("http://minio:9000/shop/", Bucket("http://minio:9000", "shop", "us-east-1", False)),
        ("https://s3.example.com/my%20shop", Bucket("https://s3.example.com", "my shop", "us-east-1", False)),
        (" https://s3.example.com/shop\n", Bucket("https://s3.example.com", "shop", "us-east-1", False)),
    ],
)
def test_a_bucket_in_host_or_path(url: str, bucket: Bucket) -> None:
    assert parse_endpoint(url) == bucket


@pytest.mark.parametrize(
    ("url", "bucket"),
    [
        ("http://minio:9000", Bucket("http://minio:9000", "shop", "us-east-1", False)),
        ("http://shop.minio.local:9000", Bucket("http://minio.local:9000", "shop", "us-east-1", True)),
        (
            f"https://{ACCOUNT}.r2.cloudflarestorage.com",
            Bucket(f"https://{ACCOUNT}.r2.cloudflarestorage.com", "shop", "auto", False),
        ),
        (
            "https://s3.eu-central-1.amazonaws.com",
            Bucket("https://s3.eu-central-1.amazonaws.com", "shop", "eu-central-1", True),
        ),
        # What is said by name wins, and is not put twice.
        (
            "https://shop.s3.eu-central-1.amazonaws.com",
            Bucket("https://s3.eu-central-1.amazonaws.com", "shop", "eu-central-1", True),
        ),
        (
            "https://other.s3.eu-central-1.amazonaws.com",
            Bucket("https://s3.eu-central-1.amazonaws.com", "shop", "eu-central-1", True),
        ),
        ("http://minio:9000/shop", Bucket("http://minio:9000", "shop", "us-east-1", False)),
    ],
)
def test_a_bucket_by_its_own_name(url: str, bucket: Bucket) -> None:
    assert parse_endpoint(url, "shop") == bucket


def test_a_region_that_is_said_wins() -> None:
    assert parse_endpoint("https://shop.s3.eu-central-1.amazonaws.com", region="eu-west-3").region == "eu-west-3"
    assert parse_endpoint("http://minio:9000/shop", region="home").region == "home"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "shop",
        "minio:9000/shop",
        "s3://shop",
        "ftp://host/shop",
        "https://",
        "https:///shop",
        "http://host:port/shop",
        "http://host:99999/shop",
        "http://[::1/shop",
    ],
)
def test_what_is_no_endpoint(url: str) -> None:
    with pytest.raises(InvalidInput, match="BUCKET_ENDPOINT_URL must be a URL such as "):
        parse_endpoint(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://minio:9000",
        "http://minio:9000/",
        "https://s3.eu-central-1.amazonaws.com",
        f"https://{ACCOUNT}.r2.cloudflarestorage.com",
        "https://storage.googleapis.com",
    ],
)
def test_an_endpoint_without_a_bucket(url: str) -> None:
    with pytest.raises(InvalidInput, match="No bucket is named: set BUCKET_NAME"):
        parse_endpoint(url)


BUCKET_NAMES = st.from_regex(r"\A[a-z0-9][a-z0-9-]{1,20}[a-z0-9]\Z")


@given(BUCKET_NAMES, st.sampled_from(["eu-central-1", "us-east-1", "ap-southeast-2"]))
def test_host_path_and_name_mean_the_same(name: str, region: str) -> None:
    service = f"s3.{region}.amazonaws.com"
    meant = Bucket(f"https://{service}", name, region, True)
    assert parse_endpoint(f"https://{name}.{service}") == meant
    assert parse_endpoint(f"https://{service}/{name}") == meant
    assert parse_endpoint(f"https://{service}", name) == meant


@given(st.text(max_size=30), st.none() | BUCKET_NAMES)
def test_any_text_is_a_bucket_or_a_sentence(text: str, name: str | None) -> None:
    for url in (text, f"https://{text}"):
        try:
            bucket = parse_endpoint(url, name)
        except InvalidInput:
            continue
        assert bucket.name
        assert bucket.endpoint_url.startswith(("http://", "https://"))
