"""``tunesmith plan``: what it tells of configurations whose model is not there, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tiny_models import save_tiny_model, tiny_config, write_rows
from tunesmith.cli import main
from tunesmith.config.load import load_config
from tunesmith.planning import machines
from tunesmith.planning.plan import PlanOptions, make_plan, plan_facts
from tunesmith.planning.report import print_plan
from tunesmith.planning.verdict import verdict

LLAMA = "meta-llama/Meta-Llama-3-8B"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 100 GFLOP/s and 20 GB, whatever the tests run on."""
    monkeypatch.setattr(machines, "matrix_tflops", lambda: 0.1)
    monkeypatch.setattr(machines, "available_bytes", lambda: 20_000_000_000)


def config(folder: Path, **settings: Any) -> str:
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump({"train_path": "nowhere.jsonl", "num_epochs": 1, **settings}))
    return str(file)


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_llama_3_8b_at_512_tokens_in_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = config(
        tmp_path, model_id=LLAMA, context_length=512, lora_config={"r": 8}, train_batch_size_per_device=1
    )
    found = facts(capsys, file, "--rows", "1000")
    assert found["parameters"] == 8_030_261_248
    lora, full = found["methods"]["lora"]["one_gpu"], found["methods"]["full"]["one_gpu"]
    assert found["methods"]["lora"]["trained_parameters"] == 23_089_152
    assert full["weights"] == full["gradients"] == 16_060_522_496
    assert full["optimizer"] == 96_363_134_976
    assert full["activations"] == 32 * 512 * 221_184
    assert lora["weights"] == 16_060_522_496 + 4 * 23_089_152
    assert lora["gradients"] + lora["optimizer"] == 12 * 23_089_152
    assert 0.1 < lora["total"] / full["total"] < 0.2
    assert lora["basis"] == "formula, not measured"
    fewest = {
        (c["gpu"], c["zero_stage"], c["offload"]): c["devices"] for c in found["methods"]["full"]["clusters"]
    }
    # 123.6 GiB of states and activations: an H200 has 131.8 that can be filled, an A100-80 has 74.2.
    assert fewest["H200", 0, "none"] == 1
    assert fewest["A100-80", 0, "none"] is None
    assert fewest["A100-80", 3, "none"] == 2
    # Stage 1 leaves 4 bytes a parameter, 29.9 GiB, and a share of 89.7.
    assert fewest["A100-80", 1, "none"] == 4
    assert fewest["A10G", 1, "none"] is None
    assert found["workload"]["steps"] == 1000
    said = " ".join(found["verdict"])
    assert "At 512 tokens a row, LoRA needs 2" in said
    assert "full-parameter 123.6 GiB" in said
    here = found["methods"]["full"]["machines"][0]
    assert not here["fits"]
    assert here["weights"] == 4 * 8_030_261_248  # float32
    assert here["basis"] == "memory model of this program"


def test_a_folder_with_nothing_but_a_config_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_config().save_pretrained(tmp_path / "m")
    file = config(tmp_path, model_id=str(tmp_path / "m"), context_length=64)
    found = facts(capsys, file, "--rows", "20")
    assert found["configured"] == "full"
    assert found["workload"]["rows"] == 20
    assert found["workload"]["tokens"] == 20 * 64
    assert found["workload"]["steps"] == 3  # of 8 rows
    full = found["methods"]["full"]["machines"][0]
    assert full["gradients"] == full["weights"] == 4 * found["parameters"]
    assert full["optimizer"] == 2 * full["gradients"]
    assert full["fits"]
    assert full["seconds"] > 0


def test_rows_and_lengths_are_the_datas_where_it_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_tiny_model(tmp_path / "m")
    write_rows(tmp_path / "train.jsonl", 30)
    file = config(
        tmp_path, model_id=str(tmp_path / "m"), train_path=str(tmp_path / "train.jsonl"), lora_config={}
    )
    found = facts(capsys, file)
    assert main(["check", file, "--json"]) == 0
    check = json.loads(capsys.readouterr().out)
    census = check["splits"][0]["census"]
    for key in ("rows", "tokens", "trained_tokens", "longest"):
        assert found["workload"][key] == census[key]
    assert found["workload"]["steps"] == check["steps"]
    assert found["configured"] == "lora"
    assert found["notices"] == []


def test_rows_are_counted_where_there_is_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_rows(tmp_path / "train.jsonl", 30)
    file = config(tmp_path, model_id=LLAMA, train_path=str(tmp_path / "train.jsonl"), context_length=128)
    found = facts(capsys, file)
    assert (found["workload"]["rows"], found["workload"]["tokens"]) == (30, 30 * 128)
    assert "no tokenizer" in found["workload"]["source"]


def test_weights_that_are_no_such_model_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_tiny_model(tmp_path / "m")
    tiny_config(vocab_size=500).save_pretrained(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").unlink()
    file = config(tmp_path, model_id=str(tmp_path / "m"), context_length=64)
    found = facts(capsys, file, "--rows", "20")
    assert "*.safetensors hold" in found["notices"][0]


def test_the_tables_fit_100_columns_and_say_what_is_a_formula(tmp_path: Path):
    loaded = load_config(config(tmp_path, model_id=LLAMA, context_length=512, lora_config={}))
    plan = make_plan(loaded, PlanOptions(rows=100_000, price_per_hour=0.5), lambda _: None)
    console = Console(width=100, record=True, highlight=False)
    with console.capture() as captured:
        print_plan(console, plan)
    text = captured.get()
    tables = [line for line in text.splitlines() if line.startswith(("┃", "│", "┏", "└"))]
    assert len(tables) > 45
    assert max(map(len, tables)) <= 100
    assert "…" not in "".join(tables)
    assert "formula, not measured" in text
    assert "GPU (formula)" in text
    assert "assumptions" in text
    assert all(sentence in text for sentence in verdict(plan))
    assert json.dumps(plan_facts(plan, verdict(plan)))


def test_own_hardware_takes_the_place_of_the_shipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_config().save_pretrained(tmp_path / "m")
    (tmp_path / "h.yaml").write_text(
        "reserved_gib: 0\nfragmentation: 0\ndevices:\n  box: {kind: cpu, memory_gib: 64, bandwidth_gb_s: 50, "
        "peak_tflops: 1.0, efficiency: 0.5, price_per_hour: 2.0}\n"
    )
    file = config(tmp_path, model_id=str(tmp_path / "m"), context_length=64)
    found = facts(
        capsys, file, "--rows", "20", "--hardware", str(tmp_path / "h.yaml"), "--price-per-hour", "3"
    )
    full = found["methods"]["full"]
    assert full["clusters"] == []
    this, box = full["machines"]
    assert (this["name"], box["name"]) == ("this machine", "box")
    # 0.1 TFLOP/s at 0.7 here, 1.0 at 0.5 there.
    assert this["seconds"] / box["seconds"] == pytest.approx(0.5 / 0.07)
    assert this["money"] == pytest.approx(this["seconds"] / 3600 * 3)
    assert box["money"] == pytest.approx(box["seconds"] / 3600 * 2)


def test_a_model_the_kernels_do_not_compute_is_planned_by_formula(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tiny_config("neox").save_pretrained(tmp_path / "m")
    found = facts(capsys, config(tmp_path, model_id=str(tmp_path / "m"), context_length=64), "--rows", "20")
    assert found["methods"]["full"]["machines"][0]["basis"].startswith("formula, not measured: GPTNeoX")


def test_what_does_not_fit_here_is_told_with_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machines, "available_bytes", lambda: 6_000_000_000)
    file = config(tmp_path, model_id="meta-llama/Llama-3.2-1B", context_length=64)
    monkeypatch.setattr(machines, "resident_bytes", lambda: 400_000_000)
    monkeypatch.setattr("tunesmith.planning.plan.resident_bytes", lambda: 400_000_000)
    found = facts(capsys, file, "--rows", "20")
    said = [s for s in found["verdict"] if "does not fit" in s]
    assert len(said) == 1
    assert said[0].startswith("On this machine full-parameter does not fit: ")
    assert said[0].endswith("; it would fit with lora_config instead of full-parameter.")


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"model_id": LLAMA}, ["--rows", "5"], "context_length: is not set, and no lengths"),
        ({"model_id": LLAMA, "context_length": 512}, [], "or plan without the file: --rows N"),
        ({"model_id": "./nothing", "context_length": 5}, ["--rows", "5"], "./nothing: no such model folder"),
        ({"model_id": LLAMA, "context_length": 1}, ["--rows", "5"], "leaves nothing to predict"),
        (
            {"model_id": LLAMA, "context_length": 512, "lora_config": {"target_modules": ["q"]}},
            ["--rows", "5"],
            "no layer of this model is called q",
        ),
        (
            {"model_id": LLAMA, "context_length": 512},
            ["--hardware", "none.yaml", "--rows", "5"],
            "none.yaml: cannot",
        ),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    arguments: list[str],
    message: str,
):
    assert main(["plan", config(tmp_path, **settings), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_rows_must_be_a_number_above_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", config(tmp_path, model_id=LLAMA), "--rows", "0"]) == 2
    assert "--rows" in capsys.readouterr().err


GPUS = """
reserved_gib: 0
fragmentation: 0
devices:
  small: {kind: gpu, memory_gib: 24, host_memory_gib: 64, bandwidth_gb_s: 1000, link_gb_s: 100, host_link_gb_s: 20,
          peak_tflops: 100, efficiency: 0.5, price_per_hour: 1}
  large: {kind: gpu, memory_gib: 80, host_memory_gib: 64, bandwidth_gb_s: 1000, link_gb_s: 100, host_link_gb_s: 20,
          peak_tflops: 100, efficiency: 0.5, price_per_hour: 4}
"""


def test_the_devices_and_the_deepspeed_file_of_the_configuration_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "h.yaml").write_text(GPUS)
    zero = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    file = config(
        tmp_path, model_id=LLAMA, context_length=512, num_devices=4, train_batch_size_per_device=1,
        deepspeed={"config_path": str(tmp_path / "zero.json")},
    )  # fmt: skip
    found = facts(capsys, file, "--rows", "1000", "--hardware", str(tmp_path / "h.yaml"))
    asked = found["asked"]
    assert (asked["devices"], asked["zero_stage"], asked["offload"]) == (4, 3, "weights")
    small, large = asked["clusters"]
    assert (small["gpu"], small["fits"], large["gpu"], large["fits"]) == ("small", False, "large", True)
    # Of each: a quarter of 12 bytes a parameter; the weights' share lies in main memory.
    assert large["optimizer"] == 96_363_134_976 // 4
    assert large["host"] == 16_060_522_496 // 4
    assert (found["workload"]["rows_per_step"], found["workload"]["steps"], large["steps"]) == (4, 250, 250)
    assert found["verdict"][0].startswith(
        "What CONFIG asks for, full-parameter on 4 GPUs with ZeRO-3 + weight offload, fits on large ("
    )
    assert found["verdict"][0].endswith("; too small: small.")
    assert any("num_devices is 4: rows of machines without a GPU" in note for note in found["notices"])
    assert any("planned as the file says" in note for note in found["notices"])


def test_workers_that_each_hold_everything_are_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "h.yaml").write_text(GPUS)
    file = config(tmp_path, model_id=LLAMA, context_length=512, num_devices=2)
    found = facts(capsys, file, "--rows", "1000", "--hardware", str(tmp_path / "h.yaml"))
    assert found["verdict"][0].startswith(
        "What CONFIG asks for, full-parameter on 2 GPUs, each holding everything, fits on none of the named GPUs: on "
        "large it takes 12"
    )
    assert not any("planned as the file says" in note for note in found["notices"])


def test_the_configured_method_leads_every_table(tmp_path: Path):
    texts = {}
    for kind, more in (("LoRA", {"lora_config": {}}), ("full", {})):
        loaded = load_config(config(tmp_path, model_id=LLAMA, context_length=512, num_devices=2, **more))
        plan = make_plan(loaded, PlanOptions(rows=1000), lambda _: None)
        console = Console(width=100, record=True, highlight=False)
        with console.capture() as captured:
            print_plan(console, plan)
        texts[kind] = text = captured.get()
        first = next(line for line in text.splitlines() if "GPU (formula)" in line)
        assert kind in first
        assert text.index("What CONFIG asks for") < text.index("Memory of one device")
        assert max(len(line) for line in text.splitlines() if line.startswith(("┃", "│", "┏", "└"))) <= 100
    assert "full-parameter on 2 GPUs" in texts["full"]


def test_a_configuration_that_says_nothing_of_devices_asks_for_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = facts(capsys, config(tmp_path, model_id=LLAMA, context_length=512), "--rows", "1000")
    assert found["asked"]["devices"] == 1
    assert not any("What CONFIG asks for" in sentence for sentence in found["verdict"])


def test_a_long_held_out_row_counts_as_it_does_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_tiny_model(tmp_path / "m")
    write_rows(tmp_path / "train.jsonl", 30)
    long = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "word " * 40}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    settings: dict[str, Any] = {
        "model_id": str(tmp_path / "m"), "train_path": str(tmp_path / "train.jsonl"), "train_batch_size_per_device": 1,
    }  # fmt: skip
    without = facts(capsys, config(tmp_path, **settings))
    found = facts(capsys, config(tmp_path, **settings, valid_path=str(tmp_path / "long.jsonl")))
    here, there = (f["methods"]["full"]["machines"][0] for f in (without, found))
    assert there["activations"] > 2 * here["activations"]


def test_many_rows_of_a_step_are_not_all_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = config(tmp_path, model_id=LLAMA, context_length=8192, train_batch_size_per_device=1_000_000)
    found = facts(capsys, file, "--rows", "1000000")
    assert (found["workload"]["rows"], found["workload"]["steps"]) == (1_000_000, 1)


def test_dora_is_said_to_take_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_config().save_pretrained(tmp_path / "m")
    file = config(tmp_path, model_id=str(tmp_path / "m"), context_length=64, lora_config={"use_dora": True})
    found = facts(capsys, file, "--rows", "20")
    assert any(note.startswith("use_dora: ") for note in found["notices"])
