"""Batched generation on tiny random models in float64, where rounding cannot flip a choice of token."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from tunesmith.errors import NonFiniteError
from tunesmith.evaluation.generate import cut_at_stop, generate_greedy

VOCABULARY, PAD, STOPS, NEW = 64, 2, (2, 11, 23, 40), 24
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # large enough that what is attended to, and where, decides the answers
    "bos_token_id": 1,
    "eos_token_id": PAD,
    "pad_token_id": PAD,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    # a window shorter than prompts and answers, and states that are no keys and values
    "sliding_window": MistralConfig(**GROUPED, sliding_window=8),
    "convolution": Lfm2Config(
        **GROUPED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
}


def tiny_model(name):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa")
    return model.to(torch.float64).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for each other on models this small, for minutes where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def some_prompts(count=12, longest=17):
    generator = random.Random(4)
    lengths = [1, longest, *(generator.randint(1, longest) for _ in range(count - 2))]
    return [[generator.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def one_at_a_time(model, prompts, stops=STOPS, new=NEW):
    """The definition: no batch, no padding, no cache."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + new:
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
        answers.append(ids[len(prompt) :])
    return answers


def generate(model, prompts, **changes):
    settings = {"stop_token_ids": STOPS, "pad_token_id": PAD, "max_new_tokens": NEW, **changes}
    return generate_greedy(model, prompts, **settings)


def test_equals_one_prompt_at_a_time(model):
    prompts = some_prompts()
    expected = one_at_a_time(model, prompts)
    lengths = {len(answer) for answer in expected}
    assert NEW in lengths, "some answers must run to the limit"
    assert len(lengths) >= 3, "the others must stop at different steps"
    for batch_tokens in (1, 130, 8192):
        assert generate(model, prompts, batch_tokens=batch_tokens) == expected


def test_equals_generate_of_transformers(model):
    prompts = some_prompts()
    answers = generate(model, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        reference = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=list(STOPS),
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()
        if reference[-1] in STOPS:
            reference.pop()
        assert answer == reference


def test_eager_attention_gives_the_same():
    torch.manual_seed(7)
    # In float64 the mask of transformers' eager attention overflows to NaN on padding: it takes its softmax
    # in float32.
    eager = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="eager").eval()
    assert generate(eager, some_prompts()) == one_at_a_time(eager, some_prompts())


def test_adapters_take_part(llama):
    base_answers = generate(llama, some_prompts())
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5
    )
    torch.manual_seed(1)
    tuned = get_peft_model(tiny_model("llama"), config).double()
    tuned.train()
    answers = generate(tuned, some_prompts())
    assert tuned.training
    tuned.eval()  # dropout would make the comparison random
    assert answers == one_at_a_time(tuned, some_prompts())
    assert answers != base_answers


def test_rows_that_are_done_leave_the_batch(llama):
    seen = []
    handle = llama.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        answers = generate(llama, some_prompts())
    finally:
        handle.remove()
    rows = [shape[0] for shape in seen]
    assert seen[0] == (12, 17)
    assert {width for _, width in seen[1:]} == {1}, "later steps must use the cache"
    assert rows == sorted(rows, reverse=True)
    unfinished = [sum(len(answer) >= step for answer in answers) for step in range(len(seen))]
    # never more than a quarter of the rows go along for nothing
    assert all(row * 0.75 < left <= row for row, left in zip(rows, unfinished, strict=True))
    assert rows[-1] < rows[0]


def test_batches_stay_within_their_tokens(llama):
    shapes = []
    handle = llama.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    prompts = [[5] * length for length in (3, 40, 9, 4, 9)]
    try:
        generate(llama, prompts, max_new_tokens=1, batch_tokens=20)
    finally:
        handle.remove()
    # 40 + 1 is too long and goes alone; 2 x (9 + 1) and 2 x (4 + 1) fit into 20
    assert [tuple(shape) for shape in shapes] == [(1, 40), (2, 9), (2, 4)]


def test_padding_id_is_never_seen(llama):
    prompts = some_prompts()
    expected = generate(llama, prompts, pad_token_id=PAD)
    assert generate(llama, prompts, pad_token_id=50) == expected
    # a prompt may itself hold the padding id
    with_pad = [[PAD, PAD, *prompt, PAD] for prompt in prompts]
    assert generate(llama, with_pad) == one_at_a_time(llama, with_pad)


def test_progress_counts_prompts(llama):
    calls = []
    prompts = some_prompts()
    generate(llama, prompts, batch_tokens=130, on_progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert {total for _, total in calls} == {len(prompts)}
    assert done == sorted(set(done))
    assert done[-1] == len(prompts)
    assert len(done) > 3


def letters(ids):
    """A tokenizer in which every third token is two letters long."""
    return "".join(chr(97 + i % 26) * (2 if i % 3 == 0 else 1) for i in ids)


def test_stop_strings_end_with_the_token_that_completes_them(llama):
    prompts = some_prompts()
    free = generate(llama, prompts, stop_token_ids=())
    text = letters(free[0])
    stop = text[5:8]
    answers = generate(llama, prompts, stop_token_ids=(), stop_strings=["never!", stop], decode=letters)
    for answer, whole in zip(answers, free, strict=True):
        cut = next((n for n in range(1, NEW + 1) if stop in letters(whole[:n])), NEW)
        assert answer == whole[:cut]
        assert cut_at_stop(letters(answer), [stop]) == letters(whole).partition(stop)[0]
    assert len(answers[0]) < NEW


def test_cutting_at_stop_strings():
    assert cut_at_stop("one\n## two", ["two", "##"]) == "one\n"
    assert cut_at_stop("one", ["##"]) == "one"
    assert cut_at_stop("one", []) == "one"
    assert cut_at_stop("##", ["##"]) == ""


def test_modes_of_modules_are_restored(llama):
    trained = tiny_model("llama")
    trained.train()
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    trained.model.layers[0].eval()  # frozen there on purpose
    before = {name: module.training for name, module in trained.named_modules()}
    assert generate(trained, some_prompts()) == generate(llama, some_prompts())
    assert {name: module.training for name, module in trained.named_modules()} == before
    # nothing made in inference mode is left in the model: it can still be trained
    trained(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert trained.lm_head.weight.grad is not None


def test_an_interruption_passes_through_and_restores_the_mode():
    trained = tiny_model("llama")
    trained.train()

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(trained, some_prompts(), on_progress=interrupt)
    assert all(module.training for module in trained.modules())
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_it_is_asked_before_each_pass_whether_to_go_on(llama):
    """Also while no prompt is done, for which ``on_progress`` has nothing to say."""
    calls: list[None] = []
    generate(llama, [[5, 6, 7]], stop_token_ids=[], max_new_tokens=4, check=lambda: calls.append(None))
    assert len(calls) == 4


def test_nan_logits_are_an_error():
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="generation: the model's logits are NaN"):
        generate(broken, some_prompts())


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "empty prompt"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"stop_strings": ["x"]}, "need decode"),
        ([[1]], {"stop_strings": [""], "decode": letters}, "empty stop string"),
    ],
)
def test_impossible_requests(llama, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(llama, prompts, **changes)


def test_nothing_to_do(llama):
    assert generate(llama, []) == []
