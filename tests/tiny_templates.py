"""Chat templates in the style of well-known families, written for the tests."""

CHATML = """
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

LLAMA3 = """
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

# The system text stands in the first user turn.
MISTRAL = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{- '[INST] ' + (system + '\\n\\n' if system and loop.index0 == 1 else '') + m.content + ' [/INST]' -}}
{%- elif m.role == 'assistant' -%}
{{- ' ' + m.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

MISTRAL_V1 = MISTRAL.replace("' ' + m.content", "m.content")

GEMMA = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for m in messages -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
{{- m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

QWEN25 = """
{%- set system = messages[0].content if messages[0].role == 'system' else 'You are Q.' -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
{{- '\\n\\n# Tools\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif m.tool_calls -%}
{{- '<|im_start|>assistant' + ('\\n' + m.content if m.content else '') -}}
{%- for call in m.tool_calls -%}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif m.role != 'system' -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Reasoning is shown in the last turn only, where it is empty if there is none.
QWEN3 = """
{%- for m in messages -%}
{%- set answer = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.last -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') -}}
{%- elif '</think>' in m.content -%}
{{- answer.lstrip('\\n') -}}
{%- else -%}
{{- answer -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

ZEPHYR = """
{%- for m in messages -%}
{{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

LLAMA2 = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{- bos_token + '[INST] ' -}}
{{- ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system and loop.index0 == 1 else '') -}}
{{- m.content | trim + ' [/INST]' -}}
{%- elif m.role == 'assistant' -%}
{{- ' ' + m.content | trim + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

PHI3 = """
{%- for m in messages -%}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

# No control token ends an answer: here there is none at all, below one opens each turn.
BARE = """
{%- for m in messages -%}
{{- '### ' + {'system': 'Note', 'user': 'Question', 'assistant': 'Answer'}[m.role] + ': ' -}}
{{- m.content + '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Answer: ' -}}{%- endif -%}
"""

HEADERS_ONLY = """
{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
