"""What can be known of the copy's place before the run, and by which name it is told."""

import pytest

from tunesmith.config.schema import OutputSettings
from tunesmith.errors import ConfigError, OutputError
from tunesmith.forwarding import forward_storage, refuse_unusable_place


@pytest.fixture(autouse=True)
def no_storage(monkeypatch):
    for name in ("TUNESMITH_STORAGE", "ANYSCALE_ARTIFACT_STORAGE"):
        monkeypatch.delenv(name, raising=False)


def output(tmp_path, **changed):
    return OutputSettings.model_validate({"output_dir": str(tmp_path), **changed})


def fault(settings):
    with pytest.raises((OutputError, ConfigError)) as caught:
        refuse_unusable_place(settings, forwards=True)
    return str(caught.value)


@pytest.mark.parametrize("variable", ["TUNESMITH_STORAGE", "ANYSCALE_ARTIFACT_STORAGE"])
def test_a_storage_of_the_environment_is_blamed_by_its_variable(tmp_path, monkeypatch, variable):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    assert forward_storage(output(tmp_path)) == str(tmp_path / "file")
    assert fault(output(tmp_path)).endswith(f"; set {variable} to a folder you can write")
    monkeypatch.setenv(variable, "nosuch://bucket")
    assert fault(output(tmp_path)).startswith(f"{variable} nosuch://bucket/")


def test_the_setting_comes_before_the_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_STORAGE", str(tmp_path))
    named = output(tmp_path, forward_checkpoint_config={"remote_uri": "nosuch://bucket"})
    assert fault(named).startswith("forward_checkpoint_config.remote_uri nosuch://bucket/")


def test_a_place_that_can_be_none_is_told_in_one_line(tmp_path):
    for place in ("~nobody-here/x", "a" * 300):
        text = fault(output(tmp_path, forward_checkpoint_config={"remote_uri": place}))
        assert "is no place that can be" in text
        assert text.endswith("; set forward_checkpoint_config.remote_uri to a folder you can write")


def test_a_tag_whose_place_is_taken_is_told_before_the_run(tmp_path):
    place = tmp_path / "lora_fine_tuning" / "mine"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("of somebody")
    settings = output(tmp_path, custom_model_tag="mine")
    assert fault(settings) == f"{place}: exists and is no checkpoint; move it away or choose another tag"
    (place / "tunesmith.json").write_text("{}")
    refuse_unusable_place(settings, forwards=True)
    below = output(tmp_path, forward_checkpoint_config={"tag": "mine/two"})
    assert fault(below) == f"{place}: is itself a forwarded model; choose another tag than mine/two"
    refuse_unusable_place(below, forwards=False)


def test_credentials_in_the_trackers_address_are_refused_and_not_repeated(tmp_path):
    logger = {"provider": "mlflow", "provider_config": {"tracking_uri": "https://me:hush@host/x"}}
    text = fault(output(tmp_path, logger=logger))
    assert text.startswith("https://host/x: has credentials in it, which end in logs and checkpoints")
    assert "hush" not in text
