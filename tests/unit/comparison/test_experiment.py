"""What a comparison knows before its first training: rates, rows of short runs, what the DeepSpeed file says."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tiny_models import tiny_config
from tunesmith.comparison.arms import parse_arms
from tunesmith.comparison.experiment import _check_arms, _rates, _Subsets, deepspeed_identity
from tunesmith.config.load import LoadedConfig, load_config
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import ConfigError, DataError, ModelError
from tunesmith.models.base import BaseFolder

ARMS = parse_arms(["full,lora"], None)


def loaded(folder: Path, **settings: object) -> LoadedConfig:
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump({"model_id": "m", "train_path": "a.jsonl", "num_epochs": 1, **settings}))
    return load_config(str(file))


def test_rates_of_one_arm_stand_whatever_is_said_of_all(tmp_path: Path):
    for texts in (["lora=1e-3", "1e-5,1e-4"], ["1e-5,1e-4", "lora=1e-3"]):
        rates, given = _rates(ARMS, texts, loaded(tmp_path))
        assert rates == {"full": (1e-5, 1e-4), "lora": (1e-3,)}
        assert given == {"full", "lora"}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["lora=1e-3", "lora=1e-4"], "gives rates for lora a second time; put them into one list"),
        (["1e-3", "1e-4"], "gives rates for every arm a second time"),
    ],
)
def test_rates_that_are_given_twice_are_not_dropped_in_silence(tmp_path: Path, texts: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        _rates(ARMS, texts, loaded(tmp_path))


def rows_of(path: Path, lines: list[int]) -> TokenizedRows:
    count = len(lines)
    return TokenizedRows(
        path=str(path), sha256="ab" * 32, ids=np.arange(count * 2, dtype=np.int32), trained=np.ones(count * 2, bool),
        starts=np.arange(count + 1, dtype=np.int64) * 2, files=(str(path),),
        file_numbers=np.zeros(count, np.int32), line_numbers=np.array(lines, np.int32),
    )  # fmt: skip


def test_other_rows_of_the_same_file_make_another_subset(tmp_path: Path):
    """As with a smaller context_length that drops some: a subset of an earlier call may hold what is left out now."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(1, 13)))
    every, few = (rows_of(path, lines) for lines in (list(range(1, 13)), [2, 4, 6, 8, 10, 12]))
    first = _Subsets(every, tmp_path / "rows").file(4)
    second = _Subsets(few, tmp_path / "rows").file(4)
    texts = [json.loads(line)["text"] for line in Path(second).read_text().splitlines()]
    assert len(texts) == 4
    assert {int(text.split()[1]) % 2 for text in texts} == {0}
    assert _Subsets(every, tmp_path / "rows").file(4) == first != second
    path.write_text(json.dumps({"text": "row 1"}) + "\n\n")
    with pytest.raises(DataError, match=r"train\.jsonl: has changed: [01] of 5 rows are where they were"):
        _Subsets(every, tmp_path / "rows").file(5)


def test_a_deepspeed_file_is_known_by_what_it_asks_for(tmp_path: Path):
    def identity(name: str, **content: object) -> dict[str, object]:
        (tmp_path / name).write_text(json.dumps(content))
        return deepspeed_identity(loaded(tmp_path, deepspeed={"config_path": str(tmp_path / name)}))

    second = identity("a.json", zero_optimization={"stage": 2})
    assert second == identity("b.json", zero_optimization={"stage": 2}, steps_per_print=7)
    assert second != identity("a.json", zero_optimization={"stage": 3})
    assert json.dumps(second)
    assert deepspeed_identity(loaded(tmp_path)) == {}


def test_a_model_that_transformers_does_not_know_is_told_in_one_line(tmp_path: Path):
    tiny_config().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nothing-like-it"}))
    with pytest.raises(ModelError, match="cannot be built") as caught:
        _check_arms(ARMS, BaseFolder("mine", tmp_path, None))
    assert "\n" not in str(caught.value)
