"""Ray where it is not installed, and where nobody answers."""

import os
import socket
import sys
import time
from types import SimpleNamespace

import pytest

from tunesmith.cluster.ray_setup import connected, import_ray
from tunesmith.config.load import load_config
from tunesmith.errors import ConfigError, RunError
from tunesmith.run import finetune


def test_without_the_extra_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # Ray's settings go there
    monkeypatch.setitem(sys.modules, "ray", None)
    wanted = "setting num_devices: above 1 needs Ray Train; run: pip install 'tunesmith\\[ray\\]'"
    with pytest.raises(ConfigError, match=wanted):
        import_ray("setting num_devices")
    loaded = load_config(None, ["model_id=m", "train_path=rows.jsonl", "num_devices=2"])
    with pytest.raises(ConfigError, match="--set: num_devices: above 1 needs Ray Train"):
        finetune(loaded, None)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_ray_of_our_own_asks_for_a_token(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError):
        import_ray("setting num_devices")
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize(("given", "mode"), [({}, None), ({"RAY_AUTH_TOKEN_PATH": "/t"}, "token")])
def test_a_cluster_that_is_there_is_asked_as_the_environment_says(monkeypatch, given, mode):
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "10.0.0.1:6379", **given})
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError):
        import_ray("setting num_devices")
    assert os.environ.get("RAY_AUTH_MODE") == mode
    assert "RAY_AUTH_TOKEN" not in os.environ


class NoRay:
    """What ``connected`` uses of Ray, which never comes up; ``asked``: how it was asked to."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self) -> None:
        self.asked: list[str] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str, **_: object) -> None:
        self.asked.append(address)
        raise Exception("The current node timed out\n during startup.")

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "127.0.0.1:1",
            "RAY_ADDRESS: no cluster at 127.0.0.1:1 (Connection refused); start it, or unset RAY_ADDRESS",
        ),
        ("nobody.invalid:6379", "RAY_ADDRESS: no cluster at nobody.invalid:6379 ("),
        (
            "http://127.0.0.1:8265",
            "RAY_ADDRESS: http://127.0.0.1:8265 is not where a cluster takes workers; give HOST:",
        ),
        ("ray://127.0.0.1:10001", "runs go by: tunesmith submit"),
        ("nonsense", "RAY_ADDRESS: nonsense is no address; give HOST:6379 of the cluster's head"),
        ("host:70000", "is no address"),
    ],
)
def test_an_address_where_nobody_is_is_refused_within_seconds(monkeypatch, address, said):
    """Ray itself asked there for seven minutes, and no signal ended it."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    ray, begun = NoRay(), time.monotonic()
    with pytest.raises(ConfigError) as error, connected(ray, 2):
        pass
    assert said in str(error.value)
    assert (ray.asked, time.monotonic() - begun < 15) == ([], True)


def test_an_address_where_somebody_listens_is_left_to_ray(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        ray = NoRay()
        with pytest.raises(Exception, match="timed out"), connected(ray, 2):
            pass
    assert ray.asked == [os.environ["RAY_ADDRESS"]]


def test_a_cluster_of_this_machine_that_has_ended_is_refused_within_seconds(monkeypatch):
    """Of a killed cluster its note stays, which "auto" follows: Ray asked there for minutes."""
    services = pytest.importorskip("ray._private.services")
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: [])
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: "127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    ray = NoRay()
    with (
        pytest.raises(ConfigError, match=r"no cluster at 127\.0\.0\.1:1 \(Connection refused\); start"),
        connected(ray, 2),
    ):
        pass
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with (
        pytest.raises(ConfigError, match="RAY_ADDRESS: auto finds no cluster on this machine; start one"),
        connected(ray, 2),
    ):
        pass
    assert ray.asked == []


class Deaf(NoRay):
    """A Ray that finds somebody at an address, and no cluster."""

    def init(self, address: str, **_: object) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}")


def test_a_cluster_that_does_not_take_us_may_want_a_token(monkeypatch):
    """Whether it is missing or wrong, Ray itself says only that it cannot connect."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConfigError) as error, connected(Deaf(), 2):
            pass
    wish = "; where it asks for a token, check RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
    assert str(error.value).endswith(f"start it, or unset RAY_ADDRESS{wish}")


@pytest.mark.parametrize("address", ["", " ", "local"])
def test_a_ray_that_does_not_start_is_tried_again_and_told_in_one_line(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    ray = NoRay()
    with pytest.raises(RunError) as error, connected(ray, 2):
        pass
    assert ray.asked == ["local", "local"]
    text = str(error.value)
    assert text.startswith("Ray: does not start on this machine (The current node timed out during startup.)")
    assert "\n" not in text
