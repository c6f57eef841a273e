"""A run whose rows, model and result lie in a bucket of Google's interface, at an emulator on loopback."""

import os
from collections.abc import Iterator

import pytest

from flow_parts import LORA, finetune, refused_run
from store_parts import Line, google_server, line_to, put
from tunesmith.checkpoints.manifest import read_manifest, verify
from tunesmith.errors import OutputError
from tunesmith.storage.places import list_files, open_place

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")
pytestmark = pytest.mark.flow


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    from gcsfs import GCSFileSystem

    with google_server() as address, line_to(*address) as line, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", line.url)
        GCSFileSystem.clear_instance_cache()
        yield line
    GCSFileSystem.clear_instance_cache()


@pytest.fixture
def bucket(line: Line) -> Iterator[str]:
    name = f"b{os.urandom(6).hex()}"
    open_place(f"gs://{name}", OutputError).fs.mkdir(name)
    yield f"gs://{name}"
    line.heal()


def test_everything_of_a_run_in_a_bucket(bucket, line, tiny, rows, tmp_path):
    put(tiny, f"{bucket}/models/tiny")
    put(rows, f"{bucket}/rows")
    line.cut(times=2, after=20_000)
    run = finetune(
        tmp_path, tiny, rows, custom_model_tag="me/first", lora_config=LORA, model_id=f"{bucket}/models/tiny",
        train_path=f"{bucket}/rows/train.jsonl", valid_path=f"{bucket}/rows/valid*.jsonl",
        forward_checkpoint_config={"remote_uri": f"{bucket}/out"},
    )  # fmt: skip
    manifest = verify(run / "best")
    at = f"{bucket}/out/lora_fine_tuning/me/first"
    assert set(list_files(open_place(at, OutputError))) == {*manifest.files, "tunesmith.json"}
    local = finetune(tmp_path, tiny, rows, custom_model_tag="local", lora_config=LORA)
    weights = "adapter_model.safetensors"
    assert read_manifest(local / "best").files[weights] == manifest.files[weights]


def test_what_is_not_there_is_told_in_one_line(bucket, tiny, rows, tmp_path, capfd):
    text = refused_run(capfd, tmp_path, tiny, rows, train_path=f"{bucket}/none.jsonl")
    assert f"{bucket}/none.jsonl: does not exist" in text
    place = {"remote_uri": "gs://no-such-bucket-here/out"}
    text = refused_run(capfd, tmp_path, tiny, rows, lora_config=LORA, forward_checkpoint_config=place)
    assert (
        "gs://no-such-bucket-here/out/lora_fine_tuning: cannot be used (there is no such bucket); check its name"
        in text
    )
