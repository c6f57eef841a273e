"""URLs: what is a secret in them, and which names stay in a folder."""

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import ConfigError, DataError
from tunesmith.storage.urls import below, is_safe_name, is_url, protocol_of, refuse_secrets, shown

SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/rows.jsonl",
        f"s3://{SECRET}@bucket/rows.jsonl",
        f"https://user:{SECRET}@host/rows.jsonl",
        f"https://host/rows.jsonl?X-Amz-Signature={SECRET}&X-Amz-Date=20260101",
        f"https://host/rows.jsonl?x-amz-security-token={SECRET}",
        f"https://host/rows.jsonl?sig={SECRET}",
        f"https://host/rows.jsonl?access_token={SECRET}",
        f"https://host/rows.jsonl?key={SECRET}",
        f"https://host/rows.jsonl?AWSAccessKeyId={SECRET}",
        f"s3://AKIAEXAMPLE:a/{SECRET}/b@bucket/rows.jsonl",
        f"s3://AKIAEXAMPLE:a?{SECRET}@bucket/rows.jsonl",
        f"https://host/rows.jsonl?key={SECRET}&api_key=1",
        f"zip://rows.jsonl::s3://k:{SECRET}@bucket/rows.zip",
        f"simplecache::https://host/rows.zip?token={SECRET}",
        f"sftp://user:{SECRET}@host/rows.jsonl",
        f"abfs://container:{SECRET}@account/rows.jsonl",
        f"s3://user:{SECRET}@[bad/rows.jsonl",
    ],
)
def test_urls_with_secrets_are_refused_and_never_repeated(url):
    with pytest.raises(DataError) as caught:
        refuse_secrets(url, DataError)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "environment" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b/rows.jsonl",
        "hf://datasets/org/name@main/rows.jsonl",
        "s3://bucket/rows.jsonl?versionId=abc",
        "sftp://user@host/rows.jsonl",
        "abfs://container@account.dfs.core.windows.net/rows.jsonl",
        "abfss://container@account.dfs.core.windows.net/rows.jsonl",
        "http://host:8080/a@b/rows.jsonl",
        "http://[::1]:8080/a@b/rows.jsonl",
        "s3://bucket/lora_fine_tuning/tiny:me:abcde@2/x",
        "https://host/rows.jsonl?download=true&design=blue",
        "memory://folder/rows.jsonl",
        "zip://rows.jsonl::file:///tmp/x.zip",
    ],
)
def test_urls_without_secrets_pass_and_are_shown_as_they_are(url):
    refuse_secrets(url, ConfigError)
    assert shown(url) == url


@given(
    st.text(min_size=1).filter(lambda text: "::" not in text),
    st.text(max_size=20).filter(lambda text: "@" not in text),
)
def test_no_password_is_shown_whatever_it_is(password, rest):
    url = f"s3://key:<{password}>@bucket/{rest}"
    assert f"<{password}>" not in shown(url).replace(rest, "")
    with pytest.raises(ConfigError):
        refuse_secrets(url, ConfigError)


@given(st.text(max_size=40))
def test_what_is_shown_is_one_printable_line(text):
    assert shown(f"s3://bucket/{text}").isprintable()


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b.json", "\\", "a\0", "...", "..a"]), max_size=4))
def test_safe_names_stay_in_their_folder(parts):
    name = "/".join(parts)
    stays = (
        bool(parts) and all(part not in ("", ".", "..") for part in parts) and not set(name) & {"\\", "\0"}
    )
    assert is_safe_name(name) == stays
    if stays:
        assert not PurePosixPath(name).is_absolute()


def test_parts_of_urls():
    assert (is_url("s3://b/x"), is_url("/b/x"), is_url("C:/x")) == (True, False, False)
    assert protocol_of("S3://b/x") == protocol_of("zip://a::s3://b/x") == "s3"
    assert below("s3://b/x/", "y/z") == below("s3://b/x", "y/z") == "s3://b/x/y/z"
