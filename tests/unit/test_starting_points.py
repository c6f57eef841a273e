"""What the manifests of a run say of the checkpoints it went on from."""

import hashlib

import pytest

from tunesmith.checkpoints.manifest import FORMAT, BaseWeights, Manifest, hash_files, write_manifest
from tunesmith.checkpoints.signature import VERIFY_KEY
from tunesmith.config.schema import ModelSettings
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.starting_points import Origin, adapter_to_continue, origin_of


@pytest.fixture
def save(tmp_path):
    def save(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "weights").write_text(name)
        write_manifest(
            folder,
            Manifest(
                format=FORMAT,
                method="lora",
                tag=f"{name}-tag",
                run=f"{name}-run",
                model_id="org/tiny",
                base=BaseWeights("org/tiny", None, {}, "cd" * 32),
                step=7,
                epoch=1.0,
                eval_loss=None,
                metrics={},
                config={},
                data={},
                versions={},
                created="2026-01-02T03:04:05+00:00",
                parent=None,
                files=hash_files(folder),
            ),
        )
        return folder

    return save


def digest(folder):
    return hashlib.sha256((folder / "tunesmith.json").read_bytes()).hexdigest()


def settings(**changed):
    return ModelSettings.model_validate({"model_id": "org/tiny", **changed})


def test_base_weights_have_no_parent(tmp_path):
    assert origin_of(settings(), BaseFolder("org/tiny", tmp_path, "0123"), None) == Origin(None, None, None)


def test_an_adapter_on_a_tuned_base_has_two_parents(save):
    adapter, tuned = save("adapter"), save("tuned")
    given = settings(initial_adapter_model_ckpt_path="runs/one", initial_base_model_ckpt_path=str(tuned))
    origin = origin_of(given, BaseFolder(str(tuned), tuned, None), adapter)
    assert origin.name == "runs/one"
    for parent, folder in ((origin.adapter, adapter), (origin.base, tuned)):
        assert parent is not None
        assert (parent.tag, parent.run, parent.step) == (f"{folder.name}-tag", f"{folder.name}-run", 7)
        assert (parent.folder, parent.manifest_sha256) == (str(folder), digest(folder))


def test_a_tuned_base_is_a_parent_however_it_is_named(save):
    tuned = save("tuned")
    base = BaseFolder(str(tuned), tuned, None)
    by_setting = origin_of(settings(initial_base_model_ckpt_path=str(tuned)), base, None)
    by_model_id = origin_of(settings(model_id=str(tuned)), base, None)
    assert (by_setting.name, by_model_id.name) == (str(tuned), None)
    assert by_setting.base == by_model_id.base
    assert by_setting.base is not None
    assert by_setting.base.manifest_sha256 == digest(tuned)


def test_a_base_at_a_url_is_checked_like_one_that_is_here(save):
    tuned = save("tuned")
    given, base = settings(initial_base_model_ckpt_path="s3://b/x"), BaseFolder("s3://b/x", tuned, None)
    assert origin_of(given, base, None).base is not None
    (tuned / "weights").write_text("nuted")
    with pytest.raises(CheckpointError, match="its content is not what was saved"):
        origin_of(given, base, None)


@pytest.mark.parametrize("start", ["s3://b/x", {"repo_id": "org/x"}])
def test_a_fetched_base_without_a_manifest_is_refused_where_signatures_are_asked_for(
    tmp_path, monkeypatch, start
):
    given, base = settings(initial_base_model_ckpt_path=start), BaseFolder("x", tmp_path, None)
    origin_of(given, base, None)
    monkeypatch.setenv(VERIFY_KEY, "verify.pem")
    with pytest.raises(CheckpointError, match="is not signed"):
        origin_of(given, base, None)


@pytest.mark.parametrize("start", ["~nobody-here/x", "x" * 5000, "none"])
def test_an_adapter_that_is_not_there_is_told_in_one_line(tmp_path, start):
    with pytest.raises(ModelError, match="no such adapter folder; check initial_adapter_model_ckpt_path"):
        adapter_to_continue(start, BaseFolder("org/tiny", tmp_path, None), {}, "x")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"peft_type": "NONE"}', '{"peft_type": "IA3"}'])
def test_an_adapter_config_that_is_none_is_told_in_one_line(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        adapter_to_continue(str(tmp_path), BaseFolder("org/tiny", tmp_path, None), {"r": 4}, "x")
    assert str(caught.value).startswith(f"{tmp_path}: its adapter_config.json ")
    assert "\n" not in str(caught.value)


def test_checkpoints_of_other_tools_are_known_by_name_alone(tmp_path):
    given = settings(initial_adapter_model_ckpt_path={"repo_id": "org/adapter"})
    origin = origin_of(given, BaseFolder("org/tiny", tmp_path, "0123"), tmp_path)
    assert origin == Origin("org/adapter", None, None)
