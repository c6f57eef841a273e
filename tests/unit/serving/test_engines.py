"""One engine for every base, and one pair of engines on one set of weights."""

import gc
import threading

import pytest
import torch
from safetensors.torch import load_file

from engine_parts import LINEAR, ask, expected, prompt, save_base, save_lora
from plain_parts import save_any, save_other_base
from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.engine import CpuEngine, EngineSettings
from tunesmith.serving.engines import PairedEngine, open_engine
from tunesmith.serving.plain_engine import PlainEngine
from tunesmith.serving.seam import EngineError, EngineFull, Sampling, UnknownAdapter
from tunesmith.serving.shared_base import SharedLinear

KINDS = {
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "biases": {"bias": "all"},
    "dora, biases, head": {"use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head", "norm"]},
    "whole": {"target_modules": ["o_proj"], "modules_to_save": ["layers.0.mlp", "q_proj"]},
}


@pytest.mark.parametrize("kind", ["llama", "untied", "mistral", "qwen2"])
def test_plain_lora_and_every_other_kind_answer_as_peft_at_once(kind, tmp_path):
    base = save_base(tmp_path / "base", kind)
    engine = open_engine(base, EngineSettings(prompt_pass=16))
    assert isinstance(engine, PairedEngine)
    folders = {"plain": save_lora(base, tmp_path / "plain", target_modules=LINEAR)}
    keys = {"plain": engine.load(folders["plain"])}
    assert len(engine._engines) == 1  # nothing has needed the second
    for seed, (name, settings) in enumerate(KINDS.items()):
        folders[name] = save_any(base, tmp_path / name, seed, **{"target_modules": LINEAR, **settings})
        keys[name] = engine.load(folders[name])
    requests = [(name, prompt(n, n)) for name in (None, *folders) for n in (4, 19)]
    answers = [ask(engine, ids, keys.get(name), 9) for name, ids in requests]
    for (name, ids), answer in zip(requests, answers, strict=True):
        assert answer.ids() == expected(base, folders.get(name), ids, 9), name
    facts = engine.facts()
    assert set(facts.loaded) == set(keys.values())
    assert facts.output_tokens == 9 * len(requests)
    assert facts.prompt_tokens == 23 * len(folders) + 23
    assert facts.adapter_bytes == sum(
        t.nbytes for folder in folders.values() for t in load_file(folder / "adapter_model.safetensors").values()
    )  # fmt: skip
    for key in keys.values():
        engine.unload(key)
    assert engine.facts().adapter_bytes == 0
    with pytest.raises(UnknownAdapter):
        engine.unload(keys["dora"])
    with pytest.raises(UnknownAdapter):
        ask(engine, prompt(3), keys["dora"])
    engine.close()


def test_the_second_engine_holds_no_weight_of_its_own(tmp_path):
    base = save_base(tmp_path / "base", "untied")
    fast = CpuEngine(base)
    engine = PairedEngine(fast, lambda: open_beside(fast, base))
    adapter = save_any(base, tmp_path / "dora", use_dora=True)
    memory()
    before = memory()
    engine.unload(engine.load(adapter))
    after = memory()
    whole = sum(t.nbytes for t in load_file(base.path / "model.safetensors").values())
    assert after[0] - before[0] < whole / 50  # tables of positions
    assert after[1] == before[1]
    model = engine._engines[1]._model._model
    held = {fast._base.embeddings.data_ptr(), fast._base.norm.weight.data_ptr()}
    for layer in fast._base.layers:
        held |= {layer.attention_norm.weight.data_ptr(), layer.mlp_norm.weight.data_ptr()}
    biases = {p.data_ptr() for n, p in model.named_parameters() if n.endswith("bias")}
    assert {p.data_ptr() for p in model.parameters()} - biases == held
    ranges = [(g.product.bias.data_ptr(), g.product.bias.nbytes) for g in fast._base.groups[:-1]]
    assert all(any(start <= p < start + size for start, size in ranges) for p in biases)
    engine.close()


def open_beside(fast: CpuEngine, base: BaseFolder) -> PlainEngine:
    from tunesmith.serving.engines import _beside, _config

    return _beside(fast, base, _config(base), EngineSettings())


def memory() -> tuple[int, int]:
    """Bytes of all tensors, each storage once, and how many tensors in oneDNN's own layout there are."""
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta]
    plain = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in found
        if t.layout == torch.strided
    }
    return sum(plain.values()), sum(t.layout != torch.strided for t in found)


@pytest.mark.parametrize("kind", ["untied", "qwen2"])
def test_shared_layers_give_their_weights_back_bit_for_bit(kind, tmp_path):
    base = save_base(tmp_path / "base", kind)
    fast = CpuEngine(base)
    model = open_beside(fast, base)
    saved = load_file(base.path / "model.safetensors")
    layers = {n: m for n, m in model._model.modules.items() if isinstance(m, SharedLinear)}
    assert len(layers) == 15  # seven in each of two layers, and the head
    for name, layer in layers.items():
        weight = saved.get(f"{name}.weight", saved["model.embed_tokens.weight"])
        assert layer.dense().equal(weight), name
    model.close()
    fast.close()


def test_what_neither_serves_is_refused_by_name(tmp_path):
    base = save_base(tmp_path / "base")
    engine = open_engine(base)
    folder = save_any(base, tmp_path / "tokens", target_modules=["q_proj"], trainable_token_indices=[3, 5])
    with pytest.raises(
        ModelError, match=r"has trainable_token_indices \[3, 5\], which no engine here serves"
    ):
        engine.load(folder)
    assert engine.facts().loaded == ()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        ask(engine, prompt(3))


def test_other_families_get_the_plain_engine_alone(tmp_path):
    for kind in ("qwen3", "neox"):
        base = save_other_base(tmp_path / kind, kind)
        engine = open_engine(base)
        assert isinstance(engine, PlainEngine)
        assert ask(engine, prompt(6), None, 5).ids() == expected(base, None, prompt(6), 5)
        engine.close()


def test_a_base_that_only_looks_like_one_of_the_fast_engine_s_gets_the_plain_one(tmp_path):
    base = save_base(tmp_path / "base")
    path = base.path / "config.json"
    path.write_text(path.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
    engine = open_engine(base)
    assert isinstance(engine, PlainEngine)
    assert ask(engine, prompt(6), None, 5).ids() == expected(base, None, prompt(6), 5)
    engine.close()


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "wonder"}')
    with pytest.raises(ModelError, match=r"its config\.json cannot be loaded") as error:
        open_engine(BaseFolder("wonder", tmp_path, None))
    assert "\n" not in str(error.value)


def test_both_engines_take_no_more_than_one_and_tickets_are_not_mixed_up(tmp_path):
    base = save_base(tmp_path / "base")
    engine = open_engine(base, EngineSettings(running=2, waiting=1))
    dora = engine.load(save_any(base, tmp_path / "dora", use_dora=True))
    go = threading.Event()
    started = [threading.Event(), threading.Event()]

    def deliver(number: int):
        def wait(_):
            started[number].set()
            go.wait(30)

        return wait

    tickets = [
        engine.submit(prompt(3), key, Sampling(50, temperature=0.0), deliver(n))
        for n, key in enumerate((None, dora))
    ]
    assert len(set(tickets)) == 2
    assert all(event.wait(30) for event in started)  # both at once
    last = ask(engine, prompt(4), dora, 4)
    with pytest.raises(EngineFull):
        ask(engine, prompt(4))
    for ticket in tickets:
        engine.cancel(ticket)
    go.set()
    assert len(last.ids()) == 4
    assert engine.facts().running == 0
    engine.close()


def test_both_engines_together_run_no_more_than_one_may(tmp_path):
    base = save_base(tmp_path / "base")
    engine = open_engine(base, EngineSettings(running=2, waiting=8))
    dora = engine.load(save_any(base, tmp_path / "dora", use_dora=True))
    seen: list[int] = []
    ended = threading.Semaphore(0)

    def look(token):
        seen.append(engine.facts().running)
        if token.finish:
            ended.release()

    for number in range(8):
        engine.submit(prompt(3), dora if number % 2 else None, Sampling(12, temperature=0.0), look)
    assert all(ended.acquire(timeout=30) for _ in range(8))
    assert len(seen) == 8 * 12
    assert max(seen) == 2
    engine.close()


def test_a_place_goes_to_whoever_waited_longest_for_it(tmp_path):
    base = save_base(tmp_path / "base")
    engine = open_engine(base, EngineSettings(running=1, waiting=8))
    dora = engine.load(save_any(base, tmp_path / "dora", use_dora=True))
    order: list[int] = []
    ended = threading.Semaphore(0)

    def deliver(number: int):
        def note(token):
            if token.finish:
                order.append(number)
                ended.release()

        return note

    models = [None, dora, dora, None, None, dora, None]
    for number, key in enumerate(models):
        engine.submit(prompt(3), key, Sampling(5, temperature=0.0), deliver(number))
    assert all(ended.acquire(timeout=30) for _ in models)
    assert order == list(range(len(models)))
    assert engine.facts().running == 0
    engine.close()
