"""The job API's client against a stand-in for Ray's: what it asks, and what it says."""

import asyncio
import io
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import pytest
from rich.console import Console

from tunesmith.errors import ConfigError, Interrupted, RunError, UserError
from tunesmith.jobs import client as module
from tunesmith.jobs import command
from tunesmith.jobs.client import Cluster, Job, chosen_variables, outcome

pytest.importorskip("ray.job_submission")


class StandIn:
    """A cluster with one job ``j``; its log comes in ``pieces``, a connection ends after each of ``ends`` of them."""

    pieces: tuple[str, ...] = ("one\n", "two\n", "three\n")
    ends: ClassVar[list[int]] = []
    states: ClassVar[list[str]] = []
    sent: ClassVar[list[dict]] = []
    fault: BaseException | None = None
    takes: bool = False  # a job although its answer is ``fault``
    silences: ClassVar[list[Exception]] = []  # of the next questions after a job
    is_silent: bool = False  # a log's line that goes dead without a word

    def __init__(self, address):
        self.address = address

    def submit_job(self, **what):
        type(self).sent.append(what)
        if self.fault:
            raise self.fault

    def get_job_info(self, name):
        known = [what["submission_id"] for what in self.sent] if self.takes else []
        if name not in ("j", *known):
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        if self.silences and (silence := self.silences.pop(0)):
            raise silence
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return SimpleNamespace(
            submission_id=name, status=state, message="a\nb", start_time=1000, end_time=4000
        )

    def list_jobs(self):
        return [
            SimpleNamespace(submission_id=name, status="RUNNING", message=None, start_time=at, end_time=None)
            for name, at in (("early", 1000), (None, 1500), ("late", 2000))
        ]

    def stop_job(self, name):
        type(self).states = ["STOPPED"]

    def get_job_logs(self, name):
        return "".join(self.pieces)

    async def tail_job_logs(self, name):
        end = self.ends.pop(0) if self.ends else len(self.pieces)
        for piece in self.pieces[:end]:
            yield piece
        if self.is_silent:
            await asyncio.sleep(3600)
        if end < len(self.pieces):
            raise RuntimeError("WebSocket connection closed unexpectedly")


@pytest.fixture
def ray(monkeypatch):
    kind = type("Own", (StandIn,), {"ends": [], "states": ["SUCCEEDED"], "sent": [], "silences": []})
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", kind)
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return kind


@pytest.fixture
def cluster(ray):
    return Cluster("http://head:8265/")


def test_following_writes_the_log_once_whatever_breaks(cluster, ray):
    ray.ends, ray.states = [1, 1, 2, 0, 3], ["RUNNING"] * 5 + ["SUCCEEDED"]
    written = []
    job = cluster.follow("j", written.append)
    assert "".join(written) == "one\ntwo\nthree\n"
    assert job.status == "SUCCEEDED"


def test_the_last_lines_are_written_where_the_job_ended_first(cluster, ray):
    ray.ends = [1]
    written = []
    cluster.follow("j", written.append)
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_log_that_cannot_be_followed_is_given_up(cluster, ray):
    ray.ends, ray.states = [0] * 99, ["RUNNING"]
    with pytest.raises(
        ConfigError, match="cannot be followed; see: tunesmith jobs logs j --address http://head:8265"
    ):
        cluster.follow("j", print)


def test_a_cluster_that_does_not_answer_for_a_moment_does_not_end_the_following(cluster, ray):
    ray.ends, ray.states = [1, 2], ["RUNNING", "RUNNING", "SUCCEEDED"]
    ray.silences = [None, ConnectionError("no route"), ConnectionError("no route")]
    written = []
    assert cluster.follow("j", written.append).status == "SUCCEEDED"
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_line_that_is_dead_without_a_word_is_noticed(cluster, ray, monkeypatch):
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.01)
    ray.is_silent, ray.states = True, ["RUNNING", "RUNNING", "SUCCEEDED"]
    written = []
    started = time.monotonic()
    assert cluster.follow("j", written.append).status == "SUCCEEDED"
    assert "".join(written) == "one\ntwo\nthree\n"
    assert time.monotonic() - started < 10


def test_a_reader_who_leaves_ends_the_following(cluster, ray):
    ray.states = ["RUNNING"]

    def gone(_text):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cluster.follow("j", gone)


def test_what_is_sent(cluster, ray, tmp_path):
    name = cluster.submit(tmp_path, {"HF_TOKEN": "hush"}, ("--skip-bad-rows",))
    (sent,) = ray.sent
    assert sent["entrypoint"] == "python -m tunesmith finetune config.yaml --skip-bad-rows"
    assert sent["submission_id"] == name
    assert sent["runtime_env"] == {
        "working_dir": str(tmp_path), "env_vars": {"HF_TOKEN": "hush", "PYTHONUNBUFFERED": "1"}
    }  # fmt: skip


def test_a_job_that_is_not_taken_is_told_without_its_secrets(cluster, ray, tmp_path):
    ray.fault = RuntimeError("cannot set up\n{'HF_TOKEN': 'hush-hush'}")
    with pytest.raises(ConfigError) as caught:
        cluster.submit(tmp_path, {"HF_TOKEN": "hush-hush"})
    assert str(caught.value) == (
        "http://head:8265: did not take the job (cannot set up {'HF_TOKEN': '***'}); check --address"
    )


@pytest.mark.parametrize(
    "shown", ["-----BEGIN\nab c\n-----END", "-----BEGIN\\nab c\\n-----END", "x-----BEGIN\nab c\n-----ENDx"]
)
def test_secrets_of_several_lines_are_hidden_too(cluster, ray, tmp_path, shown):
    ray.fault = RuntimeError(f"cannot set up {shown}")
    with pytest.raises(ConfigError) as caught:
        cluster.submit(tmp_path, {"PEM": "-----BEGIN\nab c\n-----END", "PART": "ab c"})
    assert "BEGIN" not in str(caught.value)
    assert "***" in str(caught.value)


def test_a_job_whose_answer_was_lost_is_not_called_lost(cluster, ray, tmp_path):
    ray.fault, ray.takes = ConnectionError("reset"), True
    assert cluster.submit(tmp_path, {}) == ray.sent[0]["submission_id"]


def test_a_cluster_that_has_just_been_started_is_asked_again(cluster, ray, tmp_path, monkeypatch):
    early = RuntimeError(
        "Request failed with status code 500: No available agent to submit job, please try later"
    )
    answers = [early, early, None]

    def take(_self, **what):
        ray.sent.append(what)
        if answer := answers.pop(0):
            raise answer

    monkeypatch.setattr(ray, "submit_job", take)
    name = cluster.submit(tmp_path, {})
    assert [what["submission_id"] for what in ray.sent] == [name] * 3
    monkeypatch.setattr(module, "_READY_SECONDS", 0.0)
    answers = [early]
    with pytest.raises(
        ConfigError, match=r"did not take the job \(Request failed with status code 500: No available"
    ):
        cluster.submit(tmp_path, {})


def test_ctrl_c_while_sending_tells_the_name(cluster, ray, tmp_path):
    ray.fault = KeyboardInterrupt()
    with pytest.raises(Interrupted) as caught:
        cluster.submit(tmp_path, {})
    name = ray.sent[0]["submission_id"]
    assert str(caught.value) == (
        f"job {name}: may have been sent already; ask: tunesmith jobs status {name} --address http://head:8265"
    )


def test_stopping_waits_for_the_end(cluster, ray, monkeypatch):
    ray.states = ["RUNNING"]
    monkeypatch.setattr(ray, "stop_job", lambda *_: setattr(ray, "states", ["RUNNING", "RUNNING", "STOPPED"]))
    assert cluster.stop("j").status == "STOPPED"
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.0)
    ray.states = ["RUNNING"]
    monkeypatch.setattr(ray, "stop_job", lambda *_: None)
    assert cluster.stop("j").status == "RUNNING"


def test_status_list_and_stop(cluster, ray):
    ray.states = ["RUNNING"]
    assert cluster.job("j") == Job("j", "RUNNING", "a b", 1.0, 4.0)
    assert [job.id for job in cluster.jobs()] == ["late", "early"]
    assert cluster.stop("j").status == "STOPPED"


@pytest.mark.parametrize("name", ["none", "../x", "a b", ""])
def test_unknown_jobs(cluster, name):
    for call in (cluster.job, cluster.stop, cluster.logs, lambda name: cluster.follow(name, print)):
        with pytest.raises(UserError, match=r"no such job|is no job id"):
            call(name)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (None, "--address: is missing; give --address http://HOST:8265"),
        ("head:8265", "head:8265 is none of a dashboard"),
        ("ray://head:10001", "ray://head:10001 is none of a dashboard"),
        ("http://user:hush@head:8265", "http://head:8265: has credentials in it"),
        ("http://head:8265/x?token=hush", "has a key among its parameters"),
    ],
)
def test_refused_addresses(ray, address, says):
    with pytest.raises(ConfigError) as caught:
        Cluster(address)
    assert says in str(caught.value)
    assert "hush" not in str(caught.value)


def test_the_address_may_come_from_the_environment(ray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "https://other:1")
    assert Cluster(None).address == "https://other:1"


def test_what_is_no_dashboard_is_told_by_the_variable_that_says_it(ray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS: head:6379 is none of a dashboard"):
        Cluster(None)


class Version(BaseHTTPRequestHandler):
    """A cluster that answers who it is."""

    def do_GET(self):
        body = b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        time.sleep(0.7)  # a line so slow that what is sent does not go at once
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_):
        pass


def test_what_is_large_may_take_its_time(monkeypatch):
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.3)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Version)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client = Cluster(f"http://127.0.0.1:{server.server_port}")._client
        assert client._do_request("PUT", "/api/packages/gcs/x", data=bytes(20_000_000)).status_code == 200
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_address_that_is_given_wins_over_the_environment(monkeypatch, variable):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Version)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    other = f"http://127.0.0.1:{server.server_port}"
    try:
        assert Cluster(other).address == other
        monkeypatch.setenv(variable, other)
        with pytest.raises(ConfigError, match=r"^http://127\.0\.0\.1:9: no cluster answers"):
            Cluster("http://127.0.0.1:9")
        assert os.environ[variable] == other
    finally:
        server.shutdown()
        server.server_close()


def test_a_cluster_that_takes_a_question_and_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = []

        def ask():
            try:
                Cluster(address)
            except ConfigError as error:
                found.append(str(error))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(20)
        assert found
        assert found[0].startswith(f"{address}: no cluster answers (")


def test_no_cluster_at_the_address(monkeypatch):
    with pytest.raises(ConfigError, match=r"^http://127.0.0.1:9: no cluster answers \(.*; check --address$"):
        Cluster("http://127.0.0.1:9")


def test_only_named_variables_go_along_and_values_are_never_taken_or_told(monkeypatch):
    monkeypatch.setenv("ONE", "hush")
    monkeypatch.delenv("TWO", raising=False)
    assert chosen_variables(["ONE"]) == {"ONE": "hush"}
    assert chosen_variables([]) == {}
    with pytest.raises(ConfigError, match="--env TWO: is not set in this environment"):
        chosen_variables(["ONE", "TWO"])
    with pytest.raises(ConfigError) as caught:
        chosen_variables(["THREE=hush"])
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "says"),
    [("FAILED", "job j: ended as FAILED; its log: tunesmith jobs logs j"), ("STOPPED", "job j: was stopped")],
)
def test_other_ends_are_errors(cluster, status, says):
    with pytest.raises(RunError, match=says):
        outcome(cluster, Job("j", status, "", None, None))


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(cluster, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "follow", stopped)
    with pytest.raises(Interrupted) as caught:
        command.follow(cluster, "j")
    assert str(caught.value) == (
        "job j: goes on without you; follow: tunesmith jobs logs j --address http://head:8265; "
        "stop: tunesmith jobs stop j --address http://head:8265"
    )


def test_tables():
    console = Console(file=io.StringIO(), width=100)
    command.print_job(console, Job("j", "SUCCEEDED", "well", 1.0, 3662.0))
    command.print_jobs(console, [])
    command.print_jobs(console, [Job("j", "PENDING", "", None, None)])
    command.print_job(console, Job("j", "RUNNING", "", time.time() + 500, None))  # by the cluster's clock
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == ["j: SUCCEEDED, took 1:01:01; well", "The cluster knows no jobs"]
    assert lines[3].split() == ["j", "PENDING"]
    assert lines[4] == "j: RUNNING, for 0:00:00"
