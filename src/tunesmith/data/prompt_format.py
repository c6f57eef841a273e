"""LLMForge's ``prompt_format`` -> a Jinja chat template.

The template is set on the tokenizer, so that one renderer serves training, evaluation and serving, and is
saved with every checkpoint.
"""

import json

from tunesmith.config.schema import PromptFormat

_SLOT = "{instruction}"


def chat_template(fmt: PromptFormat) -> str:
    """The Jinja template that renders conversations as ``fmt`` says.

    ``system_in_user`` puts the system text into the first user turn, ``system_in_last_user`` into the last
    one. ``trailing_assistant`` is the generation prompt.
    """
    text = "m.content" + (" | trim" if fmt.strip_whitespace else "")
    system_text = "system" + (" | trim" if fmt.strip_whitespace else "")
    shown = "true" if fmt.add_system_tags_even_if_message_is_empty else "system"
    system_part = f"{{% if {shown} %}}{_wrapped(fmt.system, system_text)}{{% endif %}}"
    carrier = "users.last" if fmt.system_in_last_user else "users.first"
    parts = [
        f"{{% set system = messages[0].content if messages[0].role == 'system' else "
        f"{json.dumps(fmt.default_system_message)} %}}",
        "{% set users = namespace(first=-1, last=-1) %}",
        "{% for m in messages %}{% if m.role == 'user' %}{% set users.last = loop.index0 %}"
        "{% if users.first < 0 %}{% set users.first = loop.index0 %}{% endif %}{% endif %}{% endfor %}",
        _literal(fmt.bos),
        "" if fmt.system_in_user else system_part,
        "{% for m in messages %}{% if m.role == 'user' %}",
        _user_turn(fmt.user, text, system_part, carrier) if fmt.system_in_user else _wrapped(fmt.user, text),
        "{% elif m.role == 'assistant' %}",
        _wrapped(fmt.assistant, text),
        "{% elif m.role == 'tool' %}{{ raise_exception('prompt_format has no tool messages') }}",
        "{% endif %}{% endfor %}",
        f"{{% if add_generation_prompt %}}{_literal(fmt.trailing_assistant)}{{% endif %}}",
    ]
    return "".join(parts)


def _literal(text: str) -> str:
    # An expression rather than bare text: braces and line ends then mean themselves.
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""


def _wrapped(template: str, expression: str) -> str:
    before, _, after = template.partition(_SLOT)
    return f"{_literal(before)}{{{{ {expression} }}}}{_literal(after)}"


def _user_turn(template: str, text: str, system_part: str, carrier: str) -> str:
    before, _, after = template.partition(_SLOT)
    carried = f"{{% if loop.index0 == {carrier} %}}{system_part}{{% endif %}}"
    return f"{_literal(before)}{carried}{{{{ {text} }}}}{_literal(after)}"
