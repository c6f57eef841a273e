"""What a job takes along, and what it may not."""

import errno
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config.load import load_config
from tunesmith.errors import ConfigError, DataError, OutputError
from tunesmith.jobs import bundle
from tunesmith.jobs.bundle import pack, shown_sizes

ROW = '{"text": "a"}\n'


@pytest.fixture
def made(tmp_path):
    """A function: (changed settings) -> (what was packed, the folder, its configuration)."""

    def make(**changed):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / "train.jsonl").write_text(ROW)
        values = {
            "model_id": "org/model",
            "train_path": str(tmp_path / "in" / "train.jsonl"),
            "output_dir": "/mnt/shared/outputs",
            **changed,
        }
        values = {key: value for key, value in values.items() if value is not None or key == "lora_config"}
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(values))
        folder = tmp_path / "job"
        folder.mkdir()
        parcels = pack(load_config(str(config)), folder)
        return parcels, folder, yaml.safe_load((folder / "config.yaml").read_text())

    return make


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_rows_go_along_and_the_configuration_names_the_copy(made, tmp_path):
    parcels, folder, config = made()
    assert config["train_path"] == "files/train_path/00000-train.jsonl"
    assert (folder / config["train_path"]).read_text() == ROW
    assert files_in(folder) == {"config.yaml", config["train_path"]}
    assert config["model_id"] == "org/model"
    assert list(shown_sizes(parcels)) == ["train_path: 1 file, 0.0 MB"]
    load_config(str(folder / "config.yaml"))  # is one that the cluster reads


def test_what_is_not_asked_for_is_not_sent_as_if_it_were(made):
    assert set(made()[2]) == {"model_id", "train_path", "output_dir"}


def test_an_empty_lora_config_still_selects_lora(made):
    _, folder, config = made(lora_config=None, optimizer={"weight_decay": 0.1})
    assert config["lora_config"] == {}
    assert config["optimizer"]["weight_decay"] == 0.1
    assert load_config(str(folder / "config.yaml")).config.method.kind == "lora"


def test_several_files_keep_their_order(made, tmp_path):
    for place in ("x/b.jsonl", "y/a.jsonl"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text(ROW)
    _, folder, config = made(valid_path=str(tmp_path / "*" / "?.jsonl"))
    assert config["valid_path"] == "files/valid_path/*"
    assert sorted(files_in(folder / "files/valid_path")) == ["00000-b.jsonl", "00001-a.jsonl"]


def test_local_models_and_nested_settings_go_along(made, tmp_path):
    model = tmp_path / "tiny"
    (model / "sub").mkdir(parents=True)
    for name in ("config.json", "sub/x.json", ".hidden"):
        (model / name).write_text("{}")
    (tmp_path / "test.jsonl").write_text(ROW)
    _, folder, config = made(
        model_id=str(model), evaluation={"metric": "exact_match", "test_path": str(tmp_path / "test.jsonl")}
    )
    assert config["model_id"] == "files/model_id/tiny"
    assert files_in(folder / "files/model_id/tiny") == {"config.json", "sub/x.json"}
    assert config["evaluation"]["test_path"] == "files/evaluation-test_path/00000-test.jsonl"


def test_a_deepspeed_file_goes_along(made, tmp_path):
    (tmp_path / "z.json").write_text('{"gradient_clipping": 0.5}')
    _, folder, config = made(deepspeed={"config_path": str(tmp_path / "z.json")})
    name = config["deepspeed"]["config_path"]
    assert name == "files/deepspeed-config_path/z.json"
    assert (folder / name).read_text() == '{"gradient_clipping": 0.5}'
    assert config["optimizer"]["max_grad_norm"] == 0.5


def test_a_shipped_deepspeed_file_stays_a_name(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, folder, config = made(deepspeed={"config_path": "deepspeed_configs/zero_3.json"})
    assert config["deepspeed"]["config_path"] == "deepspeed_configs/zero_3.json"
    assert files_in(folder) == {"config.yaml", config["train_path"]}


def test_urls_stay_urls(made):
    parcels, _, config = made(train_path="s3://bucket/rows.jsonl", model_id="s3://bucket/model")
    assert (config["train_path"], config["model_id"]) == ("s3://bucket/rows.jsonl", "s3://bucket/model")
    assert parcels == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"output_dir": "./outputs"}, "output_dir is ./outputs, in the job's own folder"),
        ({"output_dir": None}, "setting output_dir is ./outputs, in the job's own folder"),
        ({"output_dir": "outputs"}, "which the cluster removes after the job"),
        (
            {"output_dir": "s3://bucket/out"},
            "output_dir: s3://bucket/out is a URL; a run is written to a folder",
        ),
        (
            {"forward_checkpoint_config": {"remote_uri": "models"}},
            "remote_uri is models, in the job's own folder",
        ),
        (
            {"logger": {"provider": "mlflow", "provider_config": {"tracking_uri": "./mlruns"}}},
            "tracking_uri is ./mlruns, in the job's own folder",
        ),
        (
            {"logger": {"provider": "mlflow", "provider_config": {"tracking_uri": "http://me:hush@host"}}},
            "http://host: has credentials in it",
        ),
        ({"model_id": "./none"}, "model_id: ./none is no folder here"),
        ({"model_id": "~nobody-here/x"}, "model_id: ~nobody-here/x is no folder here"),
        ({"train_path": "s3://k:hush@bucket/rows.jsonl"}, "s3://bucket/rows.jsonl: has credentials in it"),
    ],
)
def test_refused(made, changed, says):
    with pytest.raises(ConfigError) as caught:
        made(**changed)
    text = str(caught.value)
    assert says in text.replace(": is ", " is ")
    assert "hush" not in text


@pytest.mark.parametrize("place", ["/mnt/x", "file:///mnt/x", "file:/mnt/x", "s3://bucket/x", "databricks"])
def test_places_that_last_are_not_refused(made, place):
    _, _, config = made(logger={"provider": "mlflow", "provider_config": {"tracking_uri": place}})
    assert config["logger"]["provider_config"]["tracking_uri"] == place


def test_a_file_of_the_name_of_a_hub_model_is_no_model(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt2").write_text("notes")
    parcels, _, config = made(model_id="gpt2")
    assert config["model_id"] == "gpt2"
    assert [parcel.setting for parcel in parcels] == ["train_path"]


def test_paths_written_as_urls_are_of_this_machine(made, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text(ROW)
    _, folder, config = made(model_id=f"file://{tmp_path}/tiny", train_path=f"file://{tmp_path}/rows.jsonl")
    assert (config["model_id"], config["train_path"]) == (
        "files/model_id/tiny",
        "files/train_path/00000-rows.jsonl",
    )
    assert (folder / config["train_path"]).read_text() == ROW


def test_a_file_that_cannot_be_copied_is_named(made, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle.shutil, "copyfile", full)
    with pytest.raises(OutputError) as caught:
        made()
    assert str(caught.value) == (
        f"{tmp_path}/in/train.jsonl: cannot be copied for the job (No space left on device); "
        "check its rights and the room in TMPDIR"
    )


def test_missing_rows(made, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        made(train_path=str(tmp_path / "none.jsonl"))


def test_what_is_too_large_is_named_with_its_size(made, monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "MOST_BYTES", 1_500_000)
    (tmp_path / "big.jsonl").write_bytes(b"x" * 2_000_000)
    with pytest.raises(ConfigError) as caught:
        made(valid_path=str(tmp_path / "big.jsonl"))
    text = str(caught.value)
    assert "have 2 MB, a job may take 2 MB along" in text
    assert f"put {tmp_path / 'big.jsonl'} (2 MB) to a URL and name that" in text
    assert files_in(tmp_path / "job") == set()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["a.jsonl", "b c.jsonl", "ü.jsonl", "x/a.jsonl", "*.jsonl", "-z.jsonl"]), unique=True
    )
)
def test_whatever_files_are_called_each_is_there_once(tmp_path_factory, names):
    here = tmp_path_factory.mktemp("names")
    for name in names:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(f'{{"text": "{name}"}}\n')
    top = [name for name in names if "/" not in name]
    if not top:
        return
    config = load_config(None, ["model_id=org/m", f"train_path={here}", "output_dir=/out", "num_epochs=1"])
    job = here / "job"
    job.mkdir()
    pack(config, job)
    texts = sorted(path.read_text() for path in (job / "files").rglob("*") if path.is_file())
    assert texts == sorted(f'{{"text": "{name}"}}\n' for name in top)
