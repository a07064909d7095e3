"""In how many ways people write an S3 endpoint, and what each means."""

from __future__ import annotations

import pytest
from botocore.handlers import validate_bucket_name
from botocore.utils import is_valid_endpoint_url, is_valid_ipv6_endpoint_url
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.errors import InvalidInput
from comfy_worker.storage.endpoint import Bucket, known_service, parse_endpoint

ACCOUNT = "0123456789abcdef0123456789abcdef"
AWS_EU = "https://s3.eu-central-1.amazonaws.com"


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
        ("https://s3.example.com/my%2Eshop", Bucket("https://s3.example.com", "my.shop", "us-east-1", False)),
        ("https://s3.example.com./shop", Bucket("https://s3.example.com", "shop", "us-east-1", False)),
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
        ("https://shop.s3.eu-central-1.amazonaws.com/shop", Bucket(AWS_EU, "shop", "eu-central-1", True)),
        # A path beside a name belongs to the endpoint.
        (
            "https://abc.supabase.co/storage/v1/s3",
            Bucket("https://abc.supabase.co/storage/v1/s3", "shop", "us-east-1", False),
        ),
        ("http://minio:9000/s3/shop", Bucket("http://minio:9000/s3", "shop", "us-east-1", False)),
        ("http://minio:9000/my%2Ds3", Bucket("http://minio:9000/my-s3", "shop", "us-east-1", False)),
    ],
)
def test_a_bucket_by_its_own_name(url: str, bucket: Bucket) -> None:
    assert parse_endpoint(url, "shop") == bucket


def test_an_explicit_region_wins() -> None:
    assert parse_endpoint("https://shop.s3.eu-central-1.amazonaws.com", region="eu-west-3").region == "eu-west-3"
    assert parse_endpoint("http://minio:9000/shop", region="home").region == "home"


def test_a_region_replaces_the_global_aws_host() -> None:
    bucket = parse_endpoint("https://s3.amazonaws.com", "shop", "eu-west-1")
    assert bucket == Bucket("https://s3.eu-west-1.amazonaws.com", "shop", "eu-west-1", True)
    assert parse_endpoint("https://s3.amazonaws.com", "shop", "us-east-1").endpoint_url == "https://s3.amazonaws.com"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://minio:9000/shop", "minio"),
        ("https://s3.eu-central-1.amazonaws.com/shop", "shop.s3.eu-central-1.amazonaws.com"),
        ("https://my.shop.s3.eu-central-1.amazonaws.com", "s3.eu-central-1.amazonaws.com"),
    ],
)
def test_virtual_hosted_style_where_required_and_covered_by_tls(url: str, host: str) -> None:
    assert parse_endpoint(url).host == host


@pytest.mark.parametrize(
    ("url", "port"),
    [("http://minio:9000/shop", 9000), ("http://minio/shop", 80), ("https://minio/shop", 443)],
)
def test_request_ports(url: str, port: int) -> None:
    assert parse_endpoint(url).port == port


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://s3.example.com/shop/folder", None),
        ("https://shop.s3.eu-central-1.amazonaws.com/folder", None),
        ("https://s3.eu-central-1.amazonaws.com/shop/folder", None),
        ("https://s3.eu-central-1.amazonaws.com/folder", "shop"),
        (f"https://{ACCOUNT}.r2.cloudflarestorage.com/shop/folder", "shop"),
    ],
)
def test_a_path_after_the_bucket_is_rejected(url: str, name: str | None) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_endpoint(url, name)
    assert refused.value.message == (
        "BUCKET_ENDPOINT_URL has more in its path than a bucket: folders belong into the outputs' keys, "
        "and a path of the endpoint itself needs BUCKET_NAME"
    )


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
def test_invalid_endpoints(url: str) -> None:
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
    bucket = parse_endpoint(url, default_name="11-26")
    assert (bucket.name, bucket.endpoint_url) == ("11-26", url.rstrip("/"))


@pytest.mark.parametrize(
    ("host", "service"),
    [
        ("shop.s3.eu-central-1.amazonaws.com", "s3.eu-central-1.amazonaws.com"),
        ("S3.EU-CENTRAL-1.AMAZONAWS.COM", "s3.eu-central-1.amazonaws.com"),
        (f"shop.{ACCOUNT}.r2.cloudflarestorage.com", f"{ACCOUNT}.r2.cloudflarestorage.com"),
        ("storage.googleapis.com", "storage.googleapis.com"),
        ("shop.minio.example.com", None),
        ("s3.amazonaws.com.example.com", None),
        ("", None),
    ],
)
def test_the_large_services_are_known(host: str, service: str | None) -> None:
    assert known_service(host) == service


BUCKET_NAMES = st.from_regex(r"\A[a-z0-9][a-z0-9-]{1,20}[a-z0-9]\Z")


@given(BUCKET_NAMES, st.sampled_from(["eu-central-1", "us-east-1", "ap-southeast-2"]))
def test_host_path_and_name_mean_the_same(name: str, region: str) -> None:
    service = f"s3.{region}.amazonaws.com"
    meant = Bucket(f"https://{service}", name, region, True)
    assert parse_endpoint(f"https://{name}.{service}") == meant
    assert parse_endpoint(f"https://{service}/{name}") == meant
    assert parse_endpoint(f"https://{service}", name) == meant


@given(st.text(max_size=30), st.none() | BUCKET_NAMES)
def test_any_text_is_a_bucket_or_an_error(text: str, name: str | None) -> None:
    for url in (text, f"https://{text}"):
        try:
            bucket = parse_endpoint(url, name)
        except InvalidInput:
            continue
        assert bucket.name
        assert is_valid_endpoint_url(bucket.endpoint_url) or is_valid_ipv6_endpoint_url(bucket.endpoint_url)
        assert bucket.endpoint_url.startswith(("http://", "https://"))


@given(
    st.sampled_from(["http://", "https://"]),
    st.text("abz019.-_:[]%@/?# \\ä", max_size=30),
    st.none() | BUCKET_NAMES,
)
def test_botocore_accepts_every_accepted_endpoint(scheme: str, rest: str, name: str | None) -> None:
    try:
        bucket = parse_endpoint(scheme + rest, name)
    except InvalidInput:
        return
    url = bucket.endpoint_url
    assert is_valid_endpoint_url(url) or is_valid_ipv6_endpoint_url(url)
    validate_bucket_name({"Bucket": bucket.name})
