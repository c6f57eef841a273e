"""What a comparison says beside its numbers, and by what it knows the tokens it was made on."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from tunesmith.comparison.arms import parse_arms
from tunesmith.comparison.command import scored_base_alone, trained_otherwise
from tunesmith.comparison.experiment import token_digest
from tunesmith.data.rows import TokenizedRows

FULL, LORA = parse_arms(["full,lora"], None)


def test_runs_of_other_versions_are_told():
    old, new = (SimpleNamespace(versions={"torch": v, "gone": "1"}) for v in ("2.1", "2.2"))
    assert trained_otherwise([new, new], {"torch": "2.2"}) == []
    (note,) = trained_otherwise([new, old], {"torch": "2.2"})
    assert note.startswith("some runs were trained with other versions (torch 2.1, now 2.2)")


def test_an_arm_whose_only_run_scored_the_base_is_told():
    with_base, without = (SimpleNamespace(record=SimpleNamespace(before=b)) for b in (object(), None))
    (note,) = scored_base_alone((FULL, LORA), {"full": [with_base], "lora": [without]})
    assert note.startswith("full-parameter: its run scored the untuned base too")
    assert scored_base_alone((FULL, LORA), {"full": [with_base, without], "lora": []}) == []


def rows(ids: list[int], trained: list[bool], starts: list[int]) -> TokenizedRows:
    return TokenizedRows(
        path="a", sha256="s", ids=np.array(ids, np.int32), trained=np.array(trained),
        starts=np.array(starts, np.int64), files=("a",), file_numbers=np.zeros(len(starts) - 1, np.int32),
        line_numbers=np.arange(1, len(starts), dtype=np.int32),
    )  # fmt: skip


def test_other_tokens_of_the_same_file_are_another_experiment():
    one = rows([1, 2, 3], [False, True, True], [0, 2, 3])
    others = [
        rows([1, 2, 4], [False, True, True], [0, 2, 3]), rows([1, 2, 3], [True, True, True], [0, 2, 3]),
        rows([1, 2, 3], [False, True, True], [0, 1, 3]),
    ]  # fmt: skip
    assert token_digest([one]) == token_digest([replace(one, path="b")])
    assert len({token_digest([found]) for found in (one, *others)}) == 4
    assert token_digest([one, others[0]]) != token_digest([others[0], one])
