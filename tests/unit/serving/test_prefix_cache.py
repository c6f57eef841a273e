"""The prefix cache: what is known is not computed again, answers stay the same, memory stays bounded."""

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_parts import ask, expected, prompt, save_base, save_lora
from tunesmith.models.kernels.arrangement import Shape
from tunesmith.serving.engine import CpuEngine, EngineSettings
from tunesmith.serving.kv_cache import BLOCK, KvCache, PrefixCache


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def engine(base):
    engine = CpuEngine(base, EngineSettings(prefix_tokens=256))
    yield engine
    engine.close()


def test_a_second_request_reads_only_what_is_new(engine, base):
    ids = prompt(70)
    assert ask(engine, ids, None, 10).ids() == expected(base, None, ids, 10)
    assert engine.facts().reused_tokens == 0
    longer = [*ids[:50], *prompt(9, 4)]
    assert ask(engine, longer, None, 10).ids() == expected(base, None, longer, 10)
    assert engine.facts().reused_tokens == 48  # whole blocks of 16 of the 50
    assert ask(engine, ids, None, 10).ids() == expected(base, None, ids, 10)
    assert engine.facts().reused_tokens == 48 + 64


def test_an_answer_is_part_of_the_next_turns_prefix(engine, base):
    ids = prompt(20)
    answer = ask(engine, ids, None, 30).ids()
    turn = [*ids, *answer, *prompt(5, 8)]
    assert ask(engine, turn, None, 10).ids() == expected(base, None, turn, 10)
    assert engine.facts().reused_tokens == 48  # of 20 + 30, the last of which was never read


def test_one_adapters_prefix_is_not_anothers(engine, base, tmp_path):
    folders = [save_lora(base, tmp_path / str(seed), seed) for seed in range(2)]
    keys = [engine.load(folder) for folder in folders]
    for key, folder in zip([*keys, None], [*folders, None], strict=True):
        assert ask(engine, prompt(40), key, 8).ids() == expected(base, folder, prompt(40), 8)
    assert engine.facts().reused_tokens == 0
    engine.unload(keys[0])
    assert engine.load(folders[0]) == keys[0]  # the same content once more
    assert ask(engine, prompt(40), keys[0], 8).ids() == expected(base, folders[0], prompt(40), 8)
    assert engine.facts().reused_tokens == 32


def test_memory_is_bounded_and_the_least_recently_used_goes_first(engine):
    for seed in range(3):
        ask(engine, prompt(100, seed), None, 1).tokens()
        ask(engine, prompt(100, 0), None, 1).tokens()
    assert engine.facts().prefix_tokens == 256
    before = engine.facts().reused_tokens
    ask(engine, prompt(100, 0), None, 1).tokens()
    assert engine.facts().reused_tokens == before + 96
    ask(engine, prompt(100, 1), None, 1).tokens()
    assert engine.facts().reused_tokens < before + 96 + 96  # a part of it had to go


SHAPE = Shape(heads=2, groups=1, size=2, scale=1.0, window=None)
TEXTS = st.lists(
    st.tuples(st.sampled_from(["", "a", "b"]), st.lists(st.sampled_from([1, 2]), min_size=1, max_size=6)),
    max_size=25,
)


@given(TEXTS, st.integers(0, 7))
def test_what_is_restored_is_what_was_kept_for_that_adapter_and_prefix(texts, blocks):
    """Keys and values are made from the adapter and all tokens so far, as a model makes them."""
    cache = KvCache([SHAPE, SHAPE], slots=2, capacity=8 * BLOCK)
    prefixes = PrefixCache(cache, blocks * BLOCK)

    def values(adapter: str, tokens: list[int], number: int) -> torch.Tensor:
        return torch.tensor(
            [[float(hash((adapter, number, *tokens[: at + 1])) % 9973)] * 4 for at in range(len(tokens))]
        )

    for adapter, pieces in texts:
        tokens = [piece for piece in pieces for _ in range(BLOCK)]
        count = prefixes.restore(adapter, tokens, slot=1)
        assert count < len(tokens)
        assert count % BLOCK == 0
        for number, layer in enumerate(cache.layers):
            wanted = values(adapter, tokens, number)
            assert torch.equal(layer[8 * BLOCK : 8 * BLOCK + count], wanted[:count])
            layer[8 * BLOCK : 8 * BLOCK + len(tokens)] = wanted
        prefixes.keep(adapter, tokens, slot=1)
        assert prefixes.tokens <= blocks * BLOCK
        kept = min(len(pieces), blocks) * BLOCK
        assert prefixes.restore(adapter, [*tokens, 1], slot=0) == kept


def test_idle_capacity_takes_no_memory():
    def resident() -> int:
        return psutil.Process().memory_info().rss

    before = resident()
    wide = Shape(heads=8, groups=8, size=64, scale=1.0, window=None)
    cache = KvCache([wide] * 4, slots=16, capacity=4096)
    prefixes = PrefixCache(cache, tokens=4096)
    assert sum(layer.nbytes for layer in cache.layers) == 4 * 16 * 4096 * 2 * 8 * 64 * 4  # a gigabyte
    assert prefixes.tokens == 0
    assert resident() - before < 50e6
    assert not cache.layers[3][-1].any()
