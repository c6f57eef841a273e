"""LLMForge's ``prompt_format`` -> a Jinja chat template.

The template is set on the tokenizer, so that one renderer serves training, evaluation and serving, and is
saved with every checkpoint.
"""

import json
import re

from tunesmith.config.schema import PromptFormat


def chat_template(fmt: PromptFormat) -> str:
    """The Jinja template that renders conversations as ``fmt`` says.

    With ``system_in_user`` the system text stands at ``{system}`` in the first user turn, with
    ``system_in_last_user`` in the last one. ``trailing_assistant`` is the generation prompt. Braces that are
    no slot mean themselves.
    """
    trim = " | trim" if fmt.strip_whitespace else ""
    text = {"{instruction}": f"{{{{ m.content{trim} }}}}"}
    shown = "true" if fmt.add_system_tags_even_if_message_is_empty else "system"
    system_turn = _filled(fmt.system, {"{instruction}": f"{{{{ system{trim} }}}}"})
    system_part = f"{{% if {shown} %}}{system_turn}{{% endif %}}"
    carrier = "users.last" if fmt.system_in_last_user else "users.first"
    carried = f"{{% if loop.index0 == {carrier} %}}{system_part}{{% endif %}}"
    parts = [
        f"{{% set system = messages[0].content if messages[0].role == 'system' else "
        f"{_quoted(fmt.default_system_message)} %}}",
        "{% set users = namespace(first=-1, last=-1) %}",
        "{% for m in messages %}{% if m.role == 'user' %}{% set users.last = loop.index0 %}"
        "{% if users.first < 0 %}{% set users.first = loop.index0 %}{% endif %}{% endif %}{% endfor %}",
        _literal(fmt.bos),
        "" if fmt.system_in_user else system_part,
        "{% for m in messages %}{% if m.role == 'user' %}",
        _filled(fmt.user, text | {"{system}": carried} if fmt.system_in_user else text),
        "{% elif m.role == 'assistant' %}",
        _filled(fmt.assistant, text),
        "{% elif m.role == 'tool' %}{{ raise_exception('prompt_format has no tool messages') }}",
        "{% endif %}{% endfor %}",
        f"{{% if add_generation_prompt %}}{_literal(fmt.trailing_assistant)}{{% endif %}}",
    ]
    return "".join(parts)


def _filled(template: str, slots: dict[str, str]) -> str:
    pieces = re.split(f"({'|'.join(map(re.escape, slots))})", template)
    return "".join(slots[piece] if piece in slots else _literal(piece) for piece in pieces)


def _literal(text: str) -> str:
    # An expression rather than bare text: braces and line ends then mean themselves.
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    # Not as ASCII: Jinja does not join the two \u escapes with which JSON writes an emoji.
    return json.dumps(text, ensure_ascii=False)
