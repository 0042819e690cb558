"""Chat templates of the shapes that models have, written for the tests, and a tokenizer with one of them.

`APPENDS` has the shape of Qwen's: tools in the system message, a tool's results in a user message, nothing ever
rewritten. The others are it with one trait that some published templates have.
"""

from __future__ import annotations

from otcrl.models.tokenizer import HFTokenizer
from tests.tiny import tiny_tokenizer

APPENDS = """
{%- set system = messages[0].content if messages[0].role == 'system' else 'Be of help.' %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\nYou may call these:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\nTo call one, write\\n<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' }}
"""

TOOL, ANY = "message.content + '\\n</tool_response>'", "message.content + '<|im_end|>\\n'"
FORGETS = APPENDS.replace(ANY, ANY.replace("content", "content.split('</think>')[-1]"))  # thoughts, as R1's does
BEGINS = APPENDS.replace("assistant\\n' if", "assistant\\n<think>\\n\\n</think>\\n\\n' if")  # the turn itself
ESCAPES = APPENDS.replace(TOOL, TOOL.replace("content", "content | tojson"))  # results
REFUSES = APPENDS.replace("'\\n<tool_response>\\n' +", "raise_exception('no tools here') +")
HIDES = APPENDS.replace("if tools", "if false")
UNENDED = APPENDS.replace(ANY, ANY.replace("<|im_end|>", ""))
SILENT = APPENDS.replace("messages[0].content if messages[0].role == 'system' else ", "")  # about the system message
DEAF = APPENDS.replace(ANY, "'<|im_end|>\\n'")  # to what the user says
OTHERWISE = APPENDS.replace("<tool_call>", "<function>")  # written


def chat_tokenizer(template: str = APPENDS, *pieces: str) -> HFTokenizer:
    """One token for each character, the two control tokens of `APPENDS`, and each of `pieces`; it ends texts with
    another token than turns, as base models do."""
    plain = tiny_tokenizer(*pieces)
    plain.hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    plain.hf.chat_template = template
    return HFTokenizer(hf=plain.hf, chat=True)
