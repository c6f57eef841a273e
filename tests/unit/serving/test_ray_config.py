"""The YAML of ``serve --ray``: what is written is read back, what is wrong is refused with its line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_parts import refused
from tunesmith.cli import main
from tunesmith.errors import ConfigError, OutputError
from tunesmith.serving.ray_config import (
    BaseSettings,
    RayConfig,
    RaySettings,
    ReplicaSettings,
    as_yaml,
    read_config,
    write_config,
)


def written(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def fault(folder: Path, text: str) -> str:
    """What is said of a file, with its name left out."""
    path = written(folder, text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    return str(caught.value).replace(str(path), "FILE")


counts = st.integers(1, 1_000)
texts = st.text(min_size=1, max_size=20)
replicas = {
    "max_replicas": st.just(1_000),
    "min_replicas": counts,
    "target_ongoing_requests": st.floats(0.01, 1e6),
    "max_num_multiplexed_models_per_replica": counts,
    "cpus": st.floats(0.01, 64),
    "memory_gb": st.none() | st.floats(0.001, 1e4),
}


@given(
    st.lists(
        st.builds(BaseSettings, base=texts, **replicas), min_size=1, max_size=3, unique_by=lambda b: b.base
    ),
    st.builds(ReplicaSettings, **replicas),
    st.none() | texts,
    st.lists(texts, max_size=2),
    st.builds(RaySettings, dashboard=st.booleans(), snapshots=st.none() | texts),
    st.lists(st.sampled_from(["models.example.org", "*.lan", "*", "::1"]), max_size=2),
)
def test_what_is_written_is_read_back(tmp_path_factory, bases, checkpoints, root, outputs, ray, hosts):
    config = RayConfig(
        bases=tuple(bases), checkpoints=checkpoints, dynamic_lora_loading_path=root, output_dirs=tuple(outputs),
        ray=ray, allowed_hosts=tuple(hosts),
    )  # fmt: skip
    assert read_config(written(tmp_path_factory.mktemp("yaml"), as_yaml(config))) == config


def test_every_setting_stands_in_the_file_below_what_it_does():
    lines = as_yaml(RayConfig(bases=(BaseSettings(base="tiny"),))).splitlines()
    settings = [line.strip().partition(":")[0] for line in lines if ":" in line and "#" not in line]
    groups = (RayConfig, BaseSettings, ReplicaSettings, RaySettings)
    assert sorted(settings) == sorted(name for group in groups for name in group.model_fields)
    place = lines.index("    base: tiny")
    assert lines[place - 2 : place] == [
        "  -",
        "    # catalog name, folder, hub id, or tag of a full-parameter run",
    ]
    assert "max_running: 16" in lines
    assert lines[lines.index("port: 8000") - 1] == "# 0: any free one"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bases:\n- base: a\n  max_replica: 2\n",
         "FILE line 3: no setting bases.0.max_replica; closest is max_replicas"),
        ("bases:\n- base: a\nprot: 80\n", "FILE line 3: no setting prot; closest is port"),
        ("bases:\n- base: a\nray:\n  dashbord: true\n", "FILE line 4: no setting ray.dashbord; closest is dashboard"),
        ("bases:\n- base: a\ncheckpoints:\n  base: b\n",
         "FILE line 4: no setting checkpoints.base; `tunesmith serve --write-config FILE` shows every setting"),
        ("port: 80\n", "FILE: setting bases is missing; add `bases: …`"),
        ("bases:\n- cpus: 1.0\n", "FILE line 2: setting bases.0.base is missing; add `base: …`"),
        ("bases:\n- base: a\nport: 70000\n",
         "FILE line 3: port is 70000; it should be less than or equal to 65535; change the value"),
        ("bases:\n- base: a\n  max_replicas: two\n",
         "FILE line 3: bases.0.max_replicas is two; it should be a valid integer; change the value"),
        ("bases:\n- base: a\nallowed_hosts:\n- a:80\n",
         "FILE line 4: allowed_hosts.0 is a:80; it should be a name as in models.example.org, without a port; "
         "change the value"),
        ("bases:\n- base: a\n  min_replicas: 2\n",
         "FILE line 2: bases.0 must have max_replicas no smaller than min_replicas; change one of them"),
        ("bases: []\n",
         "FILE line 1: bases is (); it should have at least 1 item after validation, not 0; change the value"),
        ("bases:\n- base: a\n- base: a\n", "should name each base once"),
        ("bases:\n- base: a\n  cpus: .nan\n", "FILE line 3: bases.0.cpus is nan; it should be"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_line(tmp_path, text, said):
    assert said in fault(tmp_path, text)


def test_several_faults_give_a_line_each(tmp_path):
    said = fault(tmp_path, "bases:\n- base: a\nprot: 1\nhots: x\n")
    assert sorted(said.splitlines()) == [
        "FILE line 3: no setting prot; closest is port",
        "FILE line 4: no setting hots; closest is host",
    ]


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    config, path = RayConfig(bases=(BaseSettings(base="tiny"),)), written(tmp_path, "mine")
    with pytest.raises(OutputError, match="is there already"):
        write_config(config, path)
    assert path.read_text() == "mine"


def test_the_cores_that_have_to_be_there_are_those_of_the_least_replicas():
    bases = (
        BaseSettings(base="a", min_replicas=2, max_replicas=9, cpus=1.5), BaseSettings(base="b", cpus=0.5)
    )  # fmt: skip
    assert RayConfig(bases=bases).least_cpus == 3.5


# The command line


def test_the_command_writes_what_its_options_say(tmp_path, capfd):
    path = tmp_path / "serve.yaml"
    options = ["--base", "a", "--base", "b/c", "--dynamic-lora-loading-path", "models", "--port", "0"]
    options += ["--max-running", "3", "--grace-seconds", "7", "--output-dir", "there", "--log-requests"]
    options += ["--allowed-host", "models.lan", "--allowed-host", "*.example.org"]
    assert main(["serve", *options, "--write-config", str(path)]) == 0
    assert f"tunesmith serve --ray --config {path}" in capfd.readouterr().err
    found = read_config(path)
    assert found == RayConfig(
        bases=(BaseSettings(base="a"), BaseSettings(base="b/c")), dynamic_lora_loading_path="models", port=0,
        max_running=3, grace_seconds=7, output_dirs=("there",), log_requests=True,
        allowed_hosts=("models.lan", "*.example.org"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray"], "Error: --base: is missing; name a base, or a YAML with --config"),
        (["--base", "a", "--config", "FILE"], "Error: --config: is for --ray; add --ray, or leave it out"),
        (["--ray", "--config", "FILE", "--port", "1"],
         "Error: --port: stands in FILE; change it there, or leave out --config"),
        (["--ray", "--base", "a", "--engine", "vllm"],
         "Error: --ray: runs the engine of tunesmith alone; leave out --engine"),
        (["--ray", "--base", "a", "--max-memory", "1GB"],
         "Error: --max-memory: counts for one process; --ray has several, each with its memory_gb; "
         "set that in the YAML of --write-config"),
        (["--ray", "--base", "a", "--base", "a"], "Error: --base: names one twice; name each once"),
        (["--ray", "--config", "FILE"], "Error: FILE line 1: no setting base; closest is bases"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(tmp_path, capfd, options, said):
    path = written(tmp_path, "base: a\nbases:\n- base: a\n")
    words = [str(path) if word == "FILE" else word for word in options]
    assert refused(capfd, ["serve", *words]).strip() == said.replace("FILE", str(path))


def test_a_base_has_to_be_named(capfd):
    assert main(["serve"]) == 2
    assert "Missing option '--base'" in capfd.readouterr().err
