"""Keys and values of answers lie in one piece of memory, taken once, and are those of transformers' own cache."""

import torch
from transformers.cache_utils import DynamicLayer

from tiny_models import tiny_model
from tunesmith.evaluation import generate
from tunesmith.evaluation.answer_cache import RoomyLayer, answer_cache, parts
from tunesmith.evaluation.generate import generate_greedy

IDS = torch.tensor([[5, 9, 31, 77], [20, 3, 8, 6], [4, 4, 9, 1]])


def test_all_layers_share_one_piece_of_memory_for_as_long_as_the_batch_lasts():
    model = tiny_model()
    cache = answer_cache(model, 3, places=7)
    with torch.inference_mode():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
        states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        # 2 layers, keys and values, 3 rows, 2 heads, 7 places, 8 numbers of 4 bytes.
        assert {tensor.untyped_storage().nbytes() for tensor in states} == {2 * 2 * 3 * 2 * 7 * 8 * 4}
        (piece,) = {tensor.untyped_storage().data_ptr() for tensor in states}
        cache.reorder_cache(torch.tensor([0, 2]))
        model(input_ids=IDS[[0, 2], :1], past_key_values=cache, use_cache=True)
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert {tensor.untyped_storage().data_ptr() for tensor in states} == {piece}
    assert states[0].shape == (2, 2, 5, 8)


def test_logits_are_those_of_the_ordinary_cache_to_the_bit():
    model = tiny_model()
    cache = answer_cache(model, 3, places=6)
    with torch.inference_mode():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
        found = model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True).logits
        plain = model(input_ids=IDS, use_cache=True).past_key_values
        wanted = model(input_ids=IDS[:, :1], past_key_values=plain, use_cache=True).logits
    assert torch.equal(found, wanted)


def test_a_layer_unlike_the_first_has_memory_of_its_own():
    model = tiny_model()
    first, second = answer_cache(model, 2, places=4).layers
    assert isinstance(first, RoomyLayer)
    assert isinstance(second, RoomyLayer)
    wide, narrow = torch.ones(2, 2, 3, 8), torch.full((2, 1, 3, 8), 2.0)
    first.update(wide, wide)
    keys, values = second.update(narrow, narrow)
    assert torch.equal(keys, narrow)
    assert torch.equal(values, narrow)
    assert torch.equal(first.keys, wide)
    assert keys.untyped_storage().data_ptr() != first.keys.untyped_storage().data_ptr()


def test_prompts_read_in_parts_give_the_cache_and_the_answers_of_those_read_at_once(monkeypatch):
    model = tiny_model().double()
    cache = answer_cache(model, 3, places=6)
    with torch.inference_mode():
        seen = []
        for part in parts(cache, 3, most=2, places=4):
            seen.append(part)
            model(input_ids=IDS[part], past_key_values=cache, use_cache=True)
        plain = model(input_ids=IDS, use_cache=True).past_key_values
        assert seen == [slice(0, 2), slice(2, 3)]
        for layer, wanted in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(layer.keys, wanted.keys, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(layer.values, wanted.values, rtol=1e-12, atol=1e-12)
    ask = {"stop_token_ids": [3, 11], "pad_token_id": 0, "max_new_tokens": 9}
    prompts = [[5 + (7 * row + 3 * place) % 60 for place in range(2 + row % 5)] for row in range(13)]
    at_once = generate_greedy(model, prompts, **ask)
    monkeypatch.setattr(generate, "READ_TOKENS", 14)  # two rows of six tokens
    assert generate_greedy(model, prompts, **ask) == at_once


def test_a_model_with_a_cache_of_its_own_kind_reads_all_prompts_at_once():
    model = tiny_model()
    cache = answer_cache(model, 3, places=6)
    cache.layers[1] = DynamicLayer()
    assert list(parts(cache, 3, most=1, places=4)) == [slice(0, 3)]
