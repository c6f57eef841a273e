"""A loading path at a URL: what is copied, when, and what a request finds meanwhile."""

import hashlib
import json
import threading
import time
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tunesmith.errors import ConfigError
from tunesmith.serving import bucket
from tunesmith.serving.bucket import Mirror, local_root, models_in
from tunesmith.serving.loading_path import LoadingPath, stamp_of
from tunesmith.storage import places, retries
from tunesmith.storage.places import Found, open_place

STORE = fsspec.filesystem("memory")
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "tunesmith.json"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(retries, "sleep", lambda _: None)


class Bucket:
    """A folder of the memory store, and a mirror of it with a clock of its own."""

    def __init__(self, folder):
        self.name, self.said, self.clock = uuid4().hex, [], 0.0
        self.url, self.folder = f"memory://{self.name}", folder
        self.mirror = self.open()

    def open(self):
        place = open_place(self.url, ConfigError)
        return Mirror(place, self.folder, self.said.append, 0.0, now=lambda: self.clock)

    def put(self, name, content):
        STORE.pipe_file(f"/{self.name}/{name}", content if isinstance(content, bytes) else content.encode())

    def remove(self, *names):
        for name in names:
            STORE.rm_file(f"/{self.name}/{name}")

    def ours(self, name, content, *, manifest=True):
        files = {CONFIG: f"config of {content}", WEIGHTS: f"weights of {content}"}
        for file, text in files.items():
            self.put(f"{name}/{file}", text)
        if manifest:
            stamps = {
                f: {"sha256": hashlib.sha256(t.encode()).hexdigest(), "bytes": len(t)}
                for f, t in files.items()
            }
            self.put(f"{name}/{MANIFEST}", json.dumps({"files": stamps}))

    def models(self):
        """By name: what its weights say. Settings and weights are always of one version."""
        found = {}
        for name, folder, _ in LoadingPath(self.folder).models():
            owner = (folder / WEIGHTS).read_text().removeprefix("weights of ")
            assert (folder / CONFIG).read_text() == f"config of {owner}"
            found[name] = owner
        return found


@pytest.fixture
def here(tmp_path):
    bucket = Bucket(tmp_path / "copy")
    bucket.folder.mkdir()
    yield bucket
    if STORE.exists(f"/{bucket.name}"):
        STORE.rm(f"/{bucket.name}", recursive=True)


def test_adapters_are_there_after_the_first_look(here):
    here.ours("tiny:me:abcde", "one")
    here.ours("org/tiny:me:abcde", "two")
    here.ours("plain", "three", manifest=False)
    here.put("notes.txt", "no model")
    here.put("runs/log.jsonl", "no model")
    here.mirror.begin()
    assert here.models() == {"tiny:me:abcde": "one", "org/tiny:me:abcde": "two", "plain": "three"}
    assert here.said[-1] == f"3 of the models at {here.url} are here"


def test_new_changed_and_gone_adapters_are_seen_at_the_next_look(here):
    here.mirror.begin()
    here.ours("a", "one")
    here.mirror.look()
    assert here.models() == {"a": "one"}
    before = stamp_of(here.folder / "a")
    here.mirror.look()
    assert stamp_of(here.folder / "a") == before
    here.ours("a", "two")
    here.mirror.look()
    assert here.models() == {"a": "two"}
    assert stamp_of(here.folder / "a") != before
    here.remove(f"a/{MANIFEST}", f"a/{CONFIG}", f"a/{WEIGHTS}")
    here.mirror.look()
    assert here.models() == {}
    assert here.said[1:] == ["model a has changed", "model a is gone"]


def test_nothing_is_fetched_twice_and_the_copy_outlives_the_server(here, monkeypatch):
    here.ours("a", "one")
    here.ours("b", "two", manifest=False)
    here.mirror.begin()
    monkeypatch.setattr("tunesmith.checkpoints.fetching.download", lambda *_: pytest.fail("fetched again"))
    here.mirror.look()
    again = here.open()
    again.begin()
    assert here.models() == {"a": "one", "b": "two"}


def test_what_went_while_no_server_ran_is_removed_with_its_versions(here):
    for name in ("a", "b"):
        here.ours(name, "one")
    here.mirror.begin()
    here.remove(f"a/{MANIFEST}", f"a/{CONFIG}", f"a/{WEIGHTS}")
    here.ours("b", "two")
    here.open().begin()
    assert here.models() == {"b": "two"}
    assert len(list((here.folder / ".versions").glob("*/*"))) == 1


def test_an_adapter_without_a_manifest_must_rest_for_one_look(here):
    here.mirror.begin()
    here.put(f"a/{CONFIG}", "config of one")
    here.put(f"a/{WEIGHTS}", "weights of one")
    here.mirror.look()
    assert here.models() == {}
    here.put(f"a/{CONFIG}", "config of two")
    here.put(f"a/{WEIGHTS}", "weights of two")
    here.mirror.look()
    assert here.models() == {}
    here.mirror.look()
    assert here.models() == {"a": "two"}


def test_while_a_checkpoint_is_replaced_the_old_one_is_served(here):
    here.ours("a", "one")
    here.mirror.begin()
    steps = [
        lambda: here.remove(f"a/{MANIFEST}"),
        lambda: here.remove(f"a/{WEIGHTS}"),
        lambda: here.put(f"a/{CONFIG}", "config of two"),
        lambda: here.put(f"a/{WEIGHTS}", "weights of two"),
    ]
    for step in steps:
        step()
        for _ in range(3):
            here.mirror.look()
        assert here.models() == {"a": "one"}
    here.ours("a", "two")
    here.mirror.look()
    assert here.models() == {"a": "two"}


def test_a_damaged_adapter_is_told_once_and_tried_again_later_or_when_mended(here):
    here.ours("a", "one")
    here.put(f"a/{WEIGHTS}", "weights of 0ne")
    here.mirror.begin()
    assert here.models() == {}
    (told,) = [text for text in here.said if "not taken" in text]
    assert told == (
        f"model a is not taken: {here.url}/a/{WEIGHTS}: its content is not what was saved; upload it again"
    )
    for _ in range(3):
        here.clock += 20
        here.mirror.look()
    assert len([text for text in here.said if "not taken" in text]) == 1
    here.ours("a", "one")
    here.mirror.look()
    assert here.models() == {"a": "one"}


def test_a_damaged_replacement_leaves_the_old_one(here):
    here.ours("a", "one")
    here.mirror.begin()
    here.ours("a", "two")
    here.put(f"a/{CONFIG}", "config of 2wo")
    here.mirror.look()
    assert here.models() == {"a": "one"}


def test_old_versions_stay_for_a_minute_and_then_go(here):
    here.ours("a", "one")
    here.mirror.begin()
    old = (here.folder / "a").resolve()
    here.ours("a", "two")
    here.mirror.look()
    assert (old / WEIGHTS).read_text() == "weights of one"
    here.clock += 61
    here.mirror.look()
    assert not old.exists()
    here.ours("a", "one")  # and back
    here.mirror.look()
    assert here.models() == {"a": "one"}


def test_a_version_that_comes_back_within_the_minute_stays(here):
    here.ours("a", "one")
    here.mirror.begin()
    for content in ("two", "one"):
        here.ours("a", content)
        here.mirror.look()
    here.clock += 61
    here.mirror.look()
    assert here.models() == {"a": "one"}


def test_a_model_may_give_way_to_a_folder_of_models_and_back(here):
    here.ours("a", "one")
    here.mirror.begin()
    here.remove(f"a/{MANIFEST}", f"a/{CONFIG}", f"a/{WEIGHTS}")
    here.ours("a/b", "two")
    here.mirror.look()
    here.mirror.look()
    assert here.models() == {"a/b": "two"}
    here.remove(*(f"a/b/{name}" for name in (MANIFEST, CONFIG, WEIGHTS)))
    here.ours("a", "three")
    here.mirror.look()
    assert here.models() == {"a": "three"}


def test_a_copy_that_somebody_took_away_is_fetched_again(here):
    here.ours("a", "one")
    here.mirror.begin()
    (here.folder / "a" / WEIGHTS).unlink()
    here.mirror.look()
    assert here.models() == {"a": "one"}


def test_a_store_that_does_not_answer_leaves_what_is_there_and_is_told_once(here, monkeypatch):
    here.ours("a", "one")
    here.mirror.begin()
    is_dead = threading.Event()
    is_dead.set()
    real = places._find

    def find(folder):
        if is_dead.is_set():
            raise ConnectionError("dead")
        return real(folder)

    monkeypatch.setattr(places, "_find", find)
    monkeypatch.setattr(bucket, "_MOST_SECONDS", 0.01)
    here.mirror.start()
    until = time.monotonic() + 5
    while not any("served as it was" in text for text in here.said) and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(0.05)
    assert here.models() == {"a": "one"}
    is_dead.clear()
    while here.said[-1] != f"{here.url} answers again" and time.monotonic() < until:
        time.sleep(0.005)
    here.mirror.stop()
    here.mirror.join(5)
    assert len([text for text in here.said if "served as it was" in text]) == 1
    assert here.said[-1] == f"{here.url} answers again"


def test_a_reader_never_finds_half_a_model(here):
    """Versions come and go as fast as they can while another thread reads."""
    here.ours("a", "0")
    here.mirror.begin()
    ended, seen, faults = threading.Event(), set(), []

    def read():
        while not ended.is_set():
            try:
                version = (here.folder / "a").resolve(strict=True)
                owner = (version / WEIGHTS).read_text().removeprefix("weights of ")
                assert (version / CONFIG).read_text() == f"config of {owner}"
                seen.add(owner)
            except (OSError, AssertionError) as error:
                faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 30):
        here.ours("a", str(number))
        here.mirror.look()
    ended.set()
    reader.join()
    assert faults == []
    assert len(seen) > 1


# --- Names


FILES = [CONFIG, WEIGHTS, MANIFEST, "config.json", "model.safetensors", "x.txt"]
NAMES = st.lists(st.sampled_from(["a", "b:c", "..", ".hidden", "-x", "é", "org"]), min_size=1, max_size=5)


@given(st.lists(st.tuples(NAMES, st.sampled_from(FILES)), max_size=12))
@example([(["b:c"], WEIGHTS), (["b:c"], MANIFEST), (["b:c"], "config.json")])  # half an adapter is no base
def test_only_names_that_can_be_asked_for_become_models(keys):
    files = {"/".join([*folders, name]): Found(1, "t") for folders, name in keys}
    models = models_in(files)
    for name, own in models.items():
        assert LoadingPath(Path("/root")).at(name) == Path("/root") / name
        assert len(name.split("/")) <= 3
        assert {CONFIG, WEIGHTS} <= own.keys() or {"config.json", MANIFEST, "model.safetensors"} <= own.keys()
        assert not any(other != name and name.startswith(f"{other}/") for other in models)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "plain", "cut", "gone", "look"])),
        max_size=25,
    )
)
def test_after_any_changes_two_looks_give_what_is_there(tmp_path, steps):
    here = Bucket(tmp_path / uuid4().hex)
    here.folder.mkdir()
    for number, (name, what) in enumerate(steps):
        there = [file for file in (MANIFEST, CONFIG, WEIGHTS) if STORE.exists(f"/{here.name}/{name}/{file}")]
        if what == "look":
            here.mirror.look()
            here.models()
        elif what == "put":
            here.ours(name, str(number))
        elif what == "plain" and MANIFEST not in there:
            here.ours(name, str(number), manifest=False)
        elif what == "cut" and MANIFEST in there:  # a replacement that stopped after its first step
            here.remove(f"{name}/{MANIFEST}", f"{name}/{WEIGHTS}")
        elif what == "gone" and there:
            here.remove(*(f"{name}/{file}" for file in there))
            here.mirror.look()
    for name in "abc":
        here.ours(name, f"last {name}")
    here.mirror.look()
    assert here.models() == {name: f"last {name}" for name in "abc"}


# --- The folder


def test_a_local_loading_path_is_taken_as_it_is(tmp_path):
    for place, expected in ((None, None), (str(tmp_path), tmp_path), ("some/where", "some/where")):
        with local_root(place, print) as root:
            assert root == expected or str(root) == expected


def test_each_server_has_a_folder_of_its_own(here, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    here.ours("a", "one")
    said = []
    with local_root(here.url, said.append) as first, local_root(here.url, said.append) as second:
        assert first != second
        for root in (first, second):
            assert [name for name, _, _ in LoadingPath(root).models()] == ["a"]
    with local_root(here.url, said.append) as third:
        assert third == first


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://key:hush@bucket/x", "s3://bucket/x: has credentials in it"),
        ("nosuch://bucket/x", "nosuch://bucket/x: no store is known by nosuch://"),
    ],
)
def test_what_cannot_be_a_loading_path_ends_the_command(url, says, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught, local_root(url, print):
        pass
    assert str(caught.value).startswith(says)
    assert "hush" not in str(caught.value)
