"""The engine's greedy answers are those of transformers and PEFT, alone and in mixed batches."""

from pathlib import Path

import pytest
import torch

from engine_parts import ALL, LINEAR, VOCABULARY, ask, expected, prompt, reference, save_base, save_lora
from tunesmith.serving.engine import CpuEngine, EngineSettings

ADAPTERS = {
    "plain": {"target_modules": LINEAR},
    "all": {"target_modules": ALL},
    "one": {"target_modules": ["v_proj"], "r": 2},
    "scaled": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"q_proj": 2, "up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "layer": {"target_modules": ["k_proj", "up_proj", "down_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*mlp\.(up|down)_proj"},
    "everything": {"target_modules": "all-linear", "r": 8},
}


@pytest.fixture(scope="module", params=["llama", "untied", "mistral", "qwen2"])
def parts(request, tmp_path_factory):
    """A base, its adapters' folders, an engine with them loaded, and their keys."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(folder / "base", request.param)
    folders = {
        name: save_lora(base, folder / name, seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }
    engine = CpuEngine(base, EngineSettings(prompt_pass=16))
    keys = {name: engine.load(path) for name, path in folders.items()}
    yield base, folders, engine, keys
    engine.close()


def test_alone_the_base_and_every_adapter_answer_as_plain_peft(parts):
    base, folders, engine, keys = parts
    answers = set()
    for name in [None, *ADAPTERS]:
        ids = prompt(11, 5)
        wanted = expected(base, folders.get(name), ids, 12)
        assert ask(engine, ids, keys.get(name), 12).ids() == wanted, name
        answers.add(tuple(wanted))
    assert len(answers) == len(ADAPTERS) + 1  # else the test would not see one taken for another


def test_requests_for_different_adapters_in_one_batch_answer_as_alone(parts):
    base, folders, engine, keys = parts
    requests = [
        (name, prompt(length, length), count)
        for name, length, count in zip(
            [*ADAPTERS, None, "all"], (1, 3, 40, 7, 2, 25, 18, 9, 5, 33), (9, 20, 4, 13, 6, 17, 2, 11, 15, 8),
            strict=True,
        )
    ]  # fmt: skip
    answers = [ask(engine, ids, keys.get(name), count) for name, ids, count in requests]
    for answer, (name, ids, count) in zip(answers, requests, strict=True):
        assert answer.ids() == expected(base, folders.get(name), ids, count), name


def test_logprobs_of_the_whole_vocabulary_are_peft_s_to_1e_4(parts):
    base, folders, engine, keys = parts
    names = [None, *ADAPTERS]
    answers = [ask(engine, prompt(10, 3), keys.get(name), 3, top_logprobs=VOCABULARY) for name in names]
    for name, answer in zip(names, answers, strict=True):
        tokens = answer.tokens()
        ids = prompt(10, 3) + [token.id for token in tokens[:-1]]
        with torch.no_grad():
            wanted = reference(base, folders.get(name))(torch.tensor([ids])).logits[0, -3:].log_softmax(-1)
        found = torch.stack([torch.tensor([p for _, p in sorted(token.top)]) for token in tokens])
        assert (found - wanted).abs().max() < 1e-4, name
        assert [token.logprob for token in tokens] == [dict(token.top)[token.id] for token in tokens]


def test_ranks_too_large_to_be_stacked_go_segment_by_segment(tmp_path: Path):
    base = save_base(tmp_path / "base")
    folders = [save_lora(base, tmp_path / str(seed), seed, r=70, lora_alpha=20) for seed in range(4)]
    engine = CpuEngine(base)
    keys = [engine.load(folder) for folder in folders]
    order = [0, 2, 1, 3, 2, 0]
    answers = [ask(engine, prompt(4 + n, n), keys[adapter], 10) for n, adapter in enumerate(order)]
    for n, (adapter, answer) in enumerate(zip(order, answers, strict=True)):
        assert answer.ids() == expected(base, folders[adapter], prompt(4 + n, n), 10)
    engine.close()
