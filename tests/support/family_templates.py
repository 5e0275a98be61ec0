"""Chat templates that have the features of published model families', in words of their own.

Special tokens, roles, where a system prompt, tools and results go, and what is trimmed, dropped or moved are the
families'; what their templates say in prose is shortened.
`families` has the tokenizers to match.
"""

LLAMA_2 = """
{%- if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}
{%- else %}{% set rest = messages %}{% set system = none %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}
{%- set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content if loop.first and system else m.content %}
{{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

# The generation prompt is always there.
LLAMA_3_FIRST = """
{%- for m in messages %}
{{- bos_token if loop.first }}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"""

LLAMA_3_1 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}{{ 'Environment: ipython\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' }}
{{- (date_string if date_string is defined else '26 Jul 2024') + '\n\n' + system + '<|eot_id|>' }}
{%- if tools is not none %}
{{- '<|start_header_id|>user<|end_header_id|>\n\nCall one of these functions as JSON.\n\n' }}
{%- for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}
{{- rest[0].content | trim + '<|eot_id|>' }}{% set rest = rest[1:] %}
{%- endif %}
{%- for m in rest %}
{%- if m.role in ('tool', 'ipython') %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
{{- (m.content | tojson if m.content is mapping or m.content is iterable else m.content) + '<|eot_id|>' }}
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('Only single tool calls are supported') }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + f.name + '", "parameters": ' }}
{{- (f.arguments | tojson) + '}<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# The system prompt and the tools stand at the last user turn, so they move as the conversation goes on.
MISTRAL_V3 = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = none %}{% set rest = messages %}{% endif %}
{%- set ns = namespace(last=none) %}
{%- for m in rest %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for m in rest %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + (system + '\n\n' if system and loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}
{%- if c.id is not defined or c.id | length != 9 %}{{ raise_exception('Tool call ids have 9 characters') }}{% endif %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + ', "id": "' + c.id + '"}' }}
{{- ']' + eos_token if loop.last else ', ' }}
{%- endfor %}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user, assistant and tool roles') }}{% endif %}
{%- endfor %}"""

MISTRAL_V7 = """
{{- bos_token }}
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{%- elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- else %}
{{- m.content }}
{%- for c in m.tool_calls or [] %}
{{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}
{%- endfor %}
{{- eos_token }}
{%- endif %}
{%- endfor %}"""

GEMMA_2 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

GEMMA_3 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

_HERMES_HEAD = """
{%- set system = messages[0].content if messages[0].role == 'system' else DEFAULT %}
{%- if tools %}
{{- '<|im_start|>system\n' + system + '\n\n# Tools\n\n<tools>' }}
{%- for t in tools %}{{ '\n' + t | tojson }}{% endfor %}
{{- '\n</tools>\n\nAnswer with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n' }}
{%- elif system %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}"""
_HERMES_CALLS = """
{%- for c in m.tool_calls or [] %}
{{- '\n' if m.content or not loop.first }}
{{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}"""
_HERMES_RESULT = """
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"""

QWEN_2_5 = (
    _HERMES_HEAD.replace("DEFAULT", "'You are Qwen. You are a helpful assistant.'")
    + """
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}{%- generation %}{{- m.content }}"""
    + _HERMES_CALLS
    + """{{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}
{%- elif m.role == 'tool' %}"""
    + _HERMES_RESULT
    + """{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)

# Thoughts are kept after the last question only, and an answer there that has none gets an empty block.
QWEN_3 = (
    _HERMES_HEAD.replace("DEFAULT", "''")
    + """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content %}{% set thought = m.reasoning_content or '' %}
{%- if '</think>' in content and not thought %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{ content }}{% endif %}"""
    + _HERMES_CALLS
    + """{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}"""
    + _HERMES_RESULT
    + """{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
)

# Qwen3-Thinking-2507's: the generation prompt opens the thought.
QWEN_3_THINKING = QWEN_3.replace(
    "{{- '<|im_start|>assistant\n' }}\n{%- if enable", "{{- '<|im_start|>assistant\n<think>\n' }}\n{%- if enable"
)

# The whole conversation ends with another token than its turns.
PHI_3 = """
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI_4 = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

# Headers are plain text, and the token that ends a turn also begins the conversation.
OLMO_2 = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}
{%- else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

GRANITE_3 = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'Knowledge Cutoff Date: April 2024.\nYou are Granite.' %}{% set rest = messages %}{% endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}
{%- if tools %}
{{- '<|start_of_role|>tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\n' }}
{%- endif %}
{%- for m in rest %}
{%- if m.role == 'tool' %}{{ '<|start_of_role|>tool_response<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}
{%- else %}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}
{%- if m.tool_calls %}
{{- '<|tool_call|>[' }}
{%- for c in m.tool_calls %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + '}' }}
{{- '' if loop.last else ', ' }}
{%- endfor %}
{{- ']' }}
{%- endif %}
{{- '<|end_of_text|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

SMOLLM_3 = """
{%- set custom = messages[0].content if messages[0].role == 'system' else 'You are SmolLM.' %}
{%- set custom = custom.replace('/no_think', '').rstrip() %}
{{- '<|im_start|>system\n## Metadata\n\nToday Date: 01 July 2025\nReasoning Mode: /think\n\n' }}
{{- '## Instructions\n\n' + custom }}
{%- if tools %}{{ '\n### Tools\n\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{% endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- generation %}{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') }}
{%- for c in m.tool_calls or [] %}
{{- '<tool_call>{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + '}</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endgeneration %}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Channels; an answer ends with another token where the conversation ends with it; earlier thoughts are dropped.
GPT_OSS = """
{{- '<|start|>system<|message|>You are ChatGPT.\nKnowledge cutoff: 2024-06\n' }}
{{- '# Valid channels: analysis, commentary, final.<|end|>' }}
{%- if messages[0].role in ('system', 'developer') %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- if system or tools %}
{{- '<|start|>developer<|message|># Instructions\n\n' + system }}
{%- if tools %}
{{- '\n\n# Tools\n\nnamespace functions {\n' }}
{%- for t in tools %}
{{- 'type ' + t.function.name + ' = (_: ' + t.function.parameters | tojson + ') => any;\n' }}
{%- endfor %}
{{- '}' }}
{%- endif %}
{{- '<|end|>' }}
{%- endif %}
{%- for m in rest %}
{%- if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.' + rest[loop.index0 - 1].tool_calls[0].function.name + ' to=assistant<|channel|>commentary' }}
{{- '<|message|>' + m.content | tojson + '<|end|>' }}
{%- elif m.tool_calls %}
{%- if m.content %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' + f.arguments | tojson }}
{{- '<|call|>' }}
{%- else %}
{%- if m.thinking and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# Writes arguments as the text that they come as, and drops every thought.
DEEPSEEK = """
{{- bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}
{{- ('<｜Assistant｜>' if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' else '') }}
{{- m.content.split('</think>')[-1] }}
{%- for c in m.tool_calls or [] %}
{{- '<｜tool▁calls▁begin｜>' if loop.first }}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name }}
{{- '\n```json\n' + c.function.arguments + '\n```' }}
{{- '<｜tool▁call▁end｜>' + ('<｜tool▁calls▁end｜>' if loop.last else '\n') }}
{%- endfor %}
{{- eos_token }}
{%- elif m.role == 'tool' %}
{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜>PROMPT' }}{% endif %}"""
DEEPSEEK_V3 = DEEPSEEK.replace("PROMPT", "")
DEEPSEEK_R1 = DEEPSEEK.replace("PROMPT", "<think>\n")

COMMAND_R = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0].content + '<|END_OF_TURN_TOKEN|>' }}
{%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>') }}
{{- m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""


def unmarked(template: str) -> str:
    """The same template without generation markers."""
    for marker in ("{%- generation %}", "{% generation %}", "{%- endgeneration %}", "{% endgeneration %}"):
        template = template.replace(marker, "")
    return template
