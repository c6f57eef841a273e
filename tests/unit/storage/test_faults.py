"""Errors of drivers as one line: what passes, what lasts, and that no secret is in it."""

import errno
import http.client

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import DataError, ModelError, OutputError
from tunesmith.storage.faults import TornTransfer, explained, is_passing, told


class WithStatus(Exception):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


class WithResponse(Exception):
    """As botocore's ClientError."""

    def __init__(self, status, text="An error occurred"):
        super().__init__(text)
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class NoCredentialsError(Exception):
    """As botocore's."""


class DefaultCredentialsError(Exception):
    """As google.auth's."""


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (TornTransfer("3 of 5"), True),
        (ConnectionResetError(104, "reset"), True),
        (TimeoutError(), True),
        (http.client.IncompleteRead(b""), True),
        (OSError(errno.EIO, "store"), True),
        (WithStatus(503), True),
        (WithStatus(429), True),
        (WithStatus(408), True),
        (WithResponse(500), True),
        (WithStatus(400), False),
        (WithStatus(412), False),
        (WithResponse(403), False),
        (FileNotFoundError("x"), False),
        (PermissionError("x"), False),
        (OSError(errno.EINVAL, "bad request"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (NoCredentialsError("x"), False),
        (DataError("x", "y"), False),
        (TypeError("x"), False),
        (KeyError("x"), False),
    ],
)
def test_what_may_pass(error, passes):
    assert is_passing(error) == passes


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("s3://b/x", FileNotFoundError("b/x"), "s3://b/x: not found; check the address"),
        ("s3://b/x", FileNotFoundError("The specified bucket does not exist"), "there is no such bucket"),
        ("s3://b/x", ImportError("Install s3fs"), "not installed; run: pip install 'tunesmith[s3]'"),
        ("gs://b/x", ImportError("gcsfs"), "not installed; run: pip install 'tunesmith[gs]'"),
        ("hf://b/x", ImportError("hub"), "run: pip install huggingface_hub"),
        ("az://b/x", ImportError("adlfs"), "run: pip install adlfs"),
        ("sftp://b/x", ImportError("paramiko"), "run: pip install paramiko"),
        ("wandb://b/x", ImportError("wandbfs"), "run: pip install wandbfs"),
        (
            "s3://b/x",
            NoCredentialsError("x"),
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
        ),
        ("gs://b/x", DefaultCredentialsError("x"), "set GOOGLE_APPLICATION_CREDENTIALS in the environment"),
        (
            "s3://b/x",
            PermissionError("Forbidden"),
            "permission denied (PermissionError: Forbidden); check AWS_ACCESS",
        ),
        ("hf://b/x", WithStatus(401), "check HF_TOKEN"),
        ("ftp://b/x", WithStatus(403), "the variables that its driver reads"),
        ("hf://b/x", WithStatus(404), "not found"),
        ("s3://b/x", OSError(errno.ENOSPC, "full"), "no space left on this machine"),
        ("nosuch://b/x", ValueError("Protocol not known: nosuch"), "no store is known by nosuch://"),
        (
            "s3://b/x",
            ConnectionError(""),
            "cannot be reached (ConnectionError); check the address and the network",
        ),
        ("s3://b/x", ConnectionError("a\nb\x1b[31m"), "cannot be reached (ConnectionError: a b [31m)"),
    ],
)
def test_one_line_for_each(url, error, says):
    with pytest.raises(ModelError) as caught, told(url, ModelError):
        raise error
    text = str(caught.value)
    assert says in text
    assert text.startswith(f"{url}: ")
    assert text.isprintable()


def test_errors_of_ours_pass_unchanged():
    with pytest.raises(OutputError, match=r"^place: fault$"), told("s3://b", DataError):
        raise OutputError("place", "fault")


def test_values_of_secrets_in_the_environment_are_never_told(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    fault, _ = explained(ConnectionError("key hush-hush-hush or hf_abcdefgh is wrong"), "s3://b")
    assert fault == "cannot be reached (ConnectionError: key *** or *** is wrong)"


def test_a_secret_within_another_and_one_of_several_lines_are_hidden_whole(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hush-hush")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-and-more")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountKey=\nquiet")
    fault, _ = explained(ConnectionError("hush-hush-and-more, AccountKey=\nquiet"), "s3://b")
    assert fault == "cannot be reached (ConnectionError: ***, ***)"


def test_signed_addresses_in_answers_lose_their_parameters():
    signed = "https://cdn.host/x?X-Amz-Signature=0123456789&X-Amz-Date=1"
    fault, _ = explained(ConnectionError(f"404, url='{signed}' at {signed}"), "hf://b")
    assert fault == "cannot be reached (ConnectionError: 404, url='https://cdn.host/x' at https://cdn.host/x)"


@given(st.text(), st.sampled_from([OSError, ConnectionError, PermissionError, RuntimeError]))
def test_any_text_becomes_one_bounded_line(text, kind):
    fault, remedy = explained(kind(text), "s3://b/x")
    assert f"{fault}; {remedy}".isprintable()
    assert len(fault) < 300
