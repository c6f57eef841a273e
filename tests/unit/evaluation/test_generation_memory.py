"""Memory of generation: counted by hand on small numbers, and against a real process."""

import subprocess
import sys

import pytest

from tiny_models import tiny_model
from tunesmith.evaluation.generation_memory import ModelSizes, generation_bytes, sizes_of

SIZES = ModelSizes(layers=3, width=10, inner=20, queries=12, keys=4, vocabulary=50, element=4)


def test_one_prompt_counted_by_hand():
    # Cache: 2 x 3 layers x 4 elements x 9 places. A pass over 7 tokens: 3 x 10 + 8 x 12 + 2 x 4 + 4 x 20.
    assert generation_bytes(SIZES, [7], 2) == 4 * (2 * 3 * 4 * 7 + 7 * 214)
    # Long answers: the cache of 207 places, a copy of a layer's for all heads of queries, the logits of one token.
    assert generation_bytes(SIZES, [7], 200) == 4 * (2 * 3 * 4 * 207 + 2 * 12 * 207 + 50)


def test_of_many_prompts_the_cache_holds_all_and_a_pass_takes_a_part():
    # 5 rows of 403 places in the cache, filled up to 400; 1,024 tokens at once are 2 rows of 400.
    assert generation_bytes(SIZES, [400] * 5, 3) == 4 * (2 * 3 * 4 * 5 * 400 + 800 * 214)


def test_the_batch_that_takes_most_counts():
    one = generation_bytes(SIZES, [7], 2)
    assert generation_bytes(SIZES, [7] * 5, 2) == 5 * one
    assert generation_bytes(SIZES, [7] * 5, 2, batch_tokens=18) == 2 * one
    assert generation_bytes(SIZES, [7] * 5, 2, batch_tokens=1) == one
    assert generation_bytes(SIZES, [], 2) == 0


def test_sizes_of_a_model():
    model = tiny_model()
    sizes, layer = sizes_of(model), model.model.layers[0]
    assert sizes.layers == len(model.model.layers)
    assert (sizes.width, sizes.queries) == (
        layer.self_attn.q_proj.in_features,
        layer.self_attn.q_proj.out_features,
    )
    assert (sizes.inner, sizes.keys) == (layer.mlp.up_proj.out_features, layer.self_attn.k_proj.out_features)
    assert (sizes.vocabulary, sizes.element) == (model.lm_head.out_features, 4)


PROCESS = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, AutoModelForCausalLM
from tunesmith.evaluation.generate import generate_greedy
from tunesmith.evaluation.generation_memory import generation_bytes, sizes_of
from tunesmith.free_memory import resident_bytes
from tunesmith.training.loop import peak_memory_bytes

model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=4000, hidden_size=256, intermediate_size=768,
    num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2), dtype=torch.float32)
if "adapter" in sys.argv:
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
prompts = [[7 + (row + place) % 3000 for place in range(120)] for row in range(48)]
ask = dict(stop_token_ids=[], pad_token_id=0)
generate_greedy(model, [prompts[0][:4]], max_new_tokens=2, **ask)
resident = resident_bytes()
generate_greedy(model, prompts, max_new_tokens=24, **ask)
print(resident + generation_bytes(sizes_of(model), [120] * 48, 24), peak_memory_bytes())
"""


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_the_predicted_peak_is_that_of_a_real_process(kind: str):
    done = subprocess.run([sys.executable, "-c", PROCESS, kind], capture_output=True, text=True, check=True)
    predicted, measured = map(int, done.stdout.split()[-2:])
    assert measured < predicted * 1.05
    assert predicted < measured * 1.10
