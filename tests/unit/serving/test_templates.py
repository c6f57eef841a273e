"""Rendering in workers: the same text as transformers gives, and an end to templates that have none."""

import time
from collections.abc import Iterator

import psutil
import pytest

from tiny_chats import named
from tiny_models import chatml_tokenizer
from tiny_tokenizers import FAMILIES
from tunesmith.serving.templates import TemplateWorkers, bound_rendering

CHAT = [
    {"role": "user", "content": "hello é"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "x"},
]
FOREVER = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
IN_C = "{{ 10 ** (10 ** 9) }}"
DOUBLING = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"


@pytest.fixture(scope="module")
def workers() -> Iterator[TemplateWorkers]:
    found = TemplateWorkers(1, 1.0)
    yield found
    found.close()


def rendered(workers: TemplateWorkers, template: str) -> str:
    return workers.render(conversations=[CHAT], chat_template=template)


def idle(workers: TemplateWorkers) -> psutil.Process:
    (worker,) = workers._idle
    return psutil.Process(worker.pid)


def test_the_text_is_that_of_transformers(workers: TemplateWorkers) -> None:
    for family in FAMILIES:
        plain, bound = family.build(), bound_rendering(family.build(), workers)
        for add in (True, False):
            asked = {"tools": None, "chat_template": plain.chat_template, "tokenize": False}
            assert bound.apply_chat_template(
                CHAT, add_generation_prompt=add, **asked
            ) == plain.apply_chat_template(CHAT, add_generation_prompt=add, **asked), family


def test_tools_are_rendered_alike(workers: TemplateWorkers) -> None:
    plain, bound = named("qwen2.5").build(), bound_rendering(named("qwen2.5").build(), workers)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "b": 1, "a": "é"}}}
    asked = {"tools": [tool], "chat_template": plain.chat_template, "tokenize": False}
    text = bound.apply_chat_template(CHAT, add_generation_prompt=True, **asked)
    assert text == plain.apply_chat_template(CHAT, add_generation_prompt=True, **asked)
    assert '"é"' in text


@pytest.mark.parametrize("template", [FOREVER, IN_C, DOUBLING], ids=["loops", "one long operation", "memory"])
def test_a_template_without_end_is_ended_and_its_work_too(workers: TemplateWorkers, template: str) -> None:
    assert rendered(workers, "{{ messages | length }}") == "3"  # the worker is there
    worker = idle(workers)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"does not end within 1 s|too much memory"):
        rendered(workers, template)
    assert time.monotonic() - began < 5
    survivors = psutil.Process().children()  # of other tests too, all of them idle
    assert template == DOUBLING or not worker.is_running()
    before = [sum(child.cpu_times()[:2]) for child in survivors]
    own = time.process_time()
    time.sleep(0.3)
    after = [sum(child.cpu_times()[:2]) for child in survivors]
    # A rendering that went on would take all of the 0.3 s; idle helpers of other tests wake up now and then.
    assert sum(after) - sum(before) < 0.1
    assert time.process_time() - own < 0.1
    assert rendered(workers, "{{ messages | length }}") == "3"


def test_a_refusal_keeps_its_words_and_the_worker(workers: TemplateWorkers) -> None:
    rendered(workers, "a")
    worker = idle(workers)
    with pytest.raises(ValueError, match=r"^no systems here$"):
        rendered(workers, "{{ raise_exception('no systems here') }}")
    assert idle(workers) == worker


def test_the_words_of_a_refusal_are_bounded(workers: TemplateWorkers) -> None:
    with pytest.raises(ValueError, match=r"^x+\Z") as refused:
        rendered(workers, "{{ raise_exception('x' * 1000000) }}")
    assert len(str(refused.value)) == 2_000


def test_keys_are_not_in_the_workers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_API_KEY", "secret")
    workers = TemplateWorkers(1, 5.0)
    before = set(psutil.Process().children())
    try:
        assert rendered(workers, "a") == "a"
        (worker,) = set(psutil.Process().children()) - before
        assert "TUNESMITH_API_KEY" not in worker.environ()
    finally:
        workers.close()


def test_a_tokenizer_that_was_not_bound_is_left_alone() -> None:
    assert "apply_chat_template" not in vars(chatml_tokenizer())
