"""The plain engine's greedy answers are those of transformers and PEFT, for every kind of adapter and base."""

import pytest
import torch

from engine_parts import ALL, LINEAR, VOCABULARY, ask, expected, prompt, reference, save_base
from plain_parts import save_any, save_other_base
from tunesmith.serving.engine import EngineSettings
from tunesmith.serving.plain_engine import PlainEngine

KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 3},
    "saved": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "norm"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved targets": {"target_modules": LINEAR, "modules_to_save": ["mlp"], "use_dora": True},
    "all biases": {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
    "own biases": {"target_modules": ["k_proj", "down_proj"], "bias": "lora_only"},
    "pair biases": {"target_modules": LINEAR, "lora_bias": True},
    "embeddings": {"target_modules": ALL},
    "dora on all": {"target_modules": ALL, "use_dora": True},
    "dora, biases, head": {"target_modules": LINEAR, "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "untied", "qwen2"])
def parts(request, tmp_path_factory):
    """A base, its adapters' folders, an engine with them loaded, and their keys."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(folder / "base", request.param)
    folders = {
        name: save_any(base, folder / name, seed, **settings)
        for seed, (name, settings) in enumerate(KINDS.items())
    }
    engine = PlainEngine(base, EngineSettings(prompt_pass=16))
    keys = {name: engine.load(path) for name, path in folders.items()}
    yield base, folders, engine, keys
    engine.close()


def test_every_kind_of_adapter_answers_as_peft_alone_and_beside_all_others(parts):
    base, folders, engine, keys = parts
    names = [None, *KINDS]
    wanted = {name: expected(base, folders.get(name), prompt(11, 5), 10) for name in names}
    assert len({tuple(ids) for ids in wanted.values()}) > len(KINDS) - 2  # adapters are told apart
    for name in names:
        assert ask(engine, prompt(11, 5), keys.get(name), 10).ids() == wanted[name], name
    answers = [ask(engine, prompt(11, 5), keys.get(name), 10) for name in names]
    for name, answer in zip(names, answers, strict=True):
        assert answer.ids() == wanted[name], name


def test_requests_of_one_adapter_join_and_leave_its_batch_and_answer_as_alone(parts):
    base, folders, engine, keys = parts
    for name in ("dora", None):
        requests = [
            (prompt(length, length), count) for length, count in ((1, 9), (40, 4), (7, 20), (18, 12), (3, 6))
        ]
        answers = [ask(engine, ids, keys.get(name), count) for ids, count in requests]
        for answer, (ids, count) in zip(answers, requests, strict=True):
            assert answer.ids() == expected(base, folders.get(name), ids, count), name


def test_logprobs_of_the_whole_vocabulary_are_peft_s(parts):
    base, folders, engine, keys = parts
    for name in ("dora on all", "all biases", "saved"):
        tokens = ask(engine, prompt(10, 3), keys[name], 3, top_logprobs=VOCABULARY).tokens()
        ids = prompt(10, 3) + [token.id for token in tokens[:-1]]
        with torch.no_grad():
            wanted = reference(base, folders[name])(torch.tensor([ids])).logits[0, -3:].log_softmax(-1)
        found = torch.stack([torch.tensor([p for _, p in sorted(token.top)]) for token in tokens])
        assert (found - wanted).abs().max() < 1e-4, name
        assert [token.logprob for token in tokens] == [dict(token.top)[token.id] for token in tokens]


FAMILIES = {
    "qwen3": ("together", {"target_modules": "all-linear", "use_dora": True}),
    "neox": ("together", {"target_modules": ["query_key_value", "embed_in"], "bias": "all"}),
    "gemma3": ("together", {"target_modules": ["q_proj", "embed_tokens", "o_proj"], "use_dora": True}),
    "gpt2": ("together", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "lfm2": ("alone", {"target_modules": ["in_proj", "q_proj", "w1"], "use_rslora": True}),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families_answer_as_transformers(kind, tmp_path):
    base = save_other_base(tmp_path / "base", kind)
    way, settings = FAMILIES[kind]
    adapter = save_any(base, tmp_path / "adapter", **settings)
    engine = PlainEngine(base, EngineSettings(prompt_pass=8))
    assert engine._model.way == way
    key = engine.load(adapter)
    requests = [(folder, prompt(n, n)) for folder in (None, adapter) for n in (5, 21, 2)]
    answers = [ask(engine, ids, key if folder else None, 12) for folder, ids in requests]
    wanted = [expected(base, folder, ids, 12) for folder, ids in requests]
    assert [answer.ids() for answer in answers] == wanted
    assert wanted[0] != wanted[3]
    engine.close()


def test_a_model_whose_cache_is_of_no_known_kind_is_read_anew_for_every_token(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such cache")

    base = save_base(tmp_path / "base")
    monkeypatch.setattr("tunesmith.serving.plain_model.PlainModel._probe", fail)
    engine = PlainEngine(base)
    assert engine._model.way == "anew"
    answers = [ask(engine, prompt(n, n), None, 6) for n in (4, 9)]
    assert [a.ids() for a in answers] == [expected(base, None, prompt(n, n), 6) for n in (4, 9)]
    engine.close()


def test_exact_answers_are_the_same_to_the_last_bit_whatever_else_runs(tmp_path):
    base = save_base(tmp_path / "base")
    engine = PlainEngine(base, is_exact=True)
    sampling = {"temperature": 0.9, "seed": 5, "top_logprobs": 20}
    alone = ask(engine, prompt(9), None, 20, **sampling).tokens()
    beside = [ask(engine, prompt(n, n), None, 30, temperature=1.0) for n in (3, 30, 12)]
    assert ask(engine, prompt(9), None, 20, **sampling).tokens() == alone
    for answer in beside:
        answer.tokens()
    engine.close()
