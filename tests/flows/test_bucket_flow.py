"""A run whose rows, model, earlier adapter and result all lie in a bucket of a real S3 server, and a server of it."""

import os
import time

import pytest

from flow_parts import LORA, finetune, refused_run
from serving_parts import save_adapter, save_base, served
from store_parts import environment, fresh_clients, line_to, put, s3_server
from tunesmith.checkpoints.manifest import read_manifest, verify
from tunesmith.errors import OutputError
from tunesmith.serving.bucket import local_root
from tunesmith.storage.places import list_files, open_place

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = pytest.mark.flow


@pytest.fixture(scope="module")
def line():
    with (
        s3_server() as address,
        line_to(*address) as line,
        pytest.MonkeyPatch.context() as patch,
        fresh_clients(),
    ):
        for name, value in environment(line.url).items():
            patch.setenv(name, value)
        yield line


@pytest.fixture
def bucket(line):
    name = f"b{os.urandom(6).hex()}"
    open_place(f"s3://{name}", OutputError).fs.mkdir(name)
    yield f"s3://{name}"
    line.heal()


def test_everything_of_a_run_in_a_bucket(bucket, line, tiny, rows, tmp_path):
    put(tiny, f"{bucket}/models/tiny")
    put(rows, f"{bucket}/rows")
    line.cut(times=2, after=20_000)  # not the way to stop a run
    places = {
        "model_id": f"{bucket}/models/tiny",
        "train_path": f"{bucket}/rows/train.jsonl",
        "valid_path": f"{bucket}/rows/valid*.jsonl",
        "forward_checkpoint_config": {"remote_uri": f"{bucket}/out"},
        "lora_config": LORA,
    }
    first = finetune(tmp_path, tiny, rows, custom_model_tag="me/first", **places)
    assert first.name.startswith("tiny-lora-")
    manifest = verify(first / "best")
    assert manifest.base.source == f"{bucket}/models/tiny"
    at = f"{bucket}/out/lora_fine_tuning/me/first"
    assert set(list_files(open_place(at, OutputError))) == {*manifest.files, "tunesmith.json"}

    second = finetune(
        tmp_path, tiny, rows, custom_model_tag="second", initial_adapter_model_ckpt_path=at, **places
    )
    after = read_manifest(second / "best")
    assert (after.parent, after.parent_adapter.tag) == (at, "me/first")

    # The same as from local files: a bucket changes where things lie, and no bit of what is trained.
    local = finetune(tmp_path, tiny, rows, custom_model_tag="local", lora_config=LORA)
    weights = "adapter_model.safetensors"
    assert read_manifest(local / "best").files[weights] == manifest.files[weights]


def test_a_bucket_that_is_not_there_is_told_before_training(bucket, tiny, rows, tmp_path, capfd):
    place = {"remote_uri": "s3://no-such-bucket-here/out"}
    text = refused_run(capfd, tmp_path, tiny, rows, lora_config=LORA, forward_checkpoint_config=place)
    assert "s3://no-such-bucket-here/out/lora_fine_tuning: cannot be used (there is no such bucket)" in text
    text = refused_run(capfd, tmp_path, tiny, rows, train_path=f"{bucket}/none.jsonl")
    assert f"{bucket}/none.jsonl: does not exist" in text
    text = refused_run(capfd, tmp_path, tiny, rows, lora_config=LORA, output_dir=f"{bucket}/runs")
    assert "is a URL; a run is written to a folder" in text


def test_a_server_finds_adapters_of_a_bucket_within_seconds(bucket, line, tmp_path, monkeypatch):
    base, said = save_base(tmp_path / "base"), []
    put(save_adapter(tmp_path / "one", 1), f"{bucket}/lora/one")
    with local_root(f"{bucket}/lora", said.append) as root, served(base, root) as server:
        client = server.client()

        def names() -> set[str]:
            return {model["id"] for model in client.get("/v1/models").json()["data"]} - {"base"}

        def answer(model: str) -> str:
            body = {"model": model, "prompt": "ab", "max_tokens": 8, "temperature": 0}
            return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

        assert names() == {"one"}
        before = answer("one")
        put(save_adapter(tmp_path / "two", 2), f"{bucket}/lora/two")
        line.cut(times=2, after=3000)
        began = time.monotonic()
        while "two" not in names() and time.monotonic() < began + 20:
            time.sleep(0.2)
        assert names() == {"one", "two"}
        assert answer("two") != before

        line.is_down = True
        line.hang_up()
        assert answer("one") == before  # what is here needs no bucket
        line.is_down = False
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            open_place(f"{bucket}/lora/one/{file}", OutputError).fs.rm_file(f"{bucket}/lora/one/{file}")
        while "one" in names() and time.monotonic() < began + 60:
            time.sleep(0.2)
        assert names() == {"two"}
    assert said[0] == f"1 of the models at {bucket}/lora are here"
