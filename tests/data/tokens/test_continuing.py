"""How conversations go on behind what was sampled, against transformers' rendering of the whole conversation."""

import pytest
from support.chat_templates import CHATML, make_tokenizer
from support.families import FAMILIES
from support.family_templates import DEEPSEEK_R1, QWEN_3_THINKING

from ftjax.data.tokens.continuing import WRITTEN, continuation
from ftjax.data.tokens.rendering import render, traits
from ftjax.errors import UserError

ASKED = [{"role": "user", "content": "Where is my order?"}]
FURTHER = [{"role": "user", "content": "And the blue lamp?"}]
RESULT = [{"role": "tool", "name": "add", "content": "42", "tool_call_id": "call00000"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
# The rest have no role for results, or want the call before them.
WITH_TOOLS = ("Llama 3.1", "Mistral v7", "Qwen 2.5", "Qwen 3", "Phi 4", "Granite 3")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "GPT-OSS"])
def test_what_follows_are_the_last_tokens_of_the_whole_conversation(name):
    tokenizer = FAMILIES[name].tokenizer()
    for further, tools in ((FURTHER, None), (RESULT, TOOLS))[: 1 + (name in WITH_TOOLS)]:
        ids = continuation(ASKED, further, tokenizer, tools)
        assert ids[0] in traits(tokenizer).ends
        for text in ("It comes tomorrow.", "a\n\nb", "éü 漢"):  # whatever the turn says
            conversation = [*ASKED, {"role": "assistant", "content": text}, *further]
            whole = tokenizer.encode(
                render(conversation, tokenizer, "", tools, generation_prompt=True), add_special_tokens=False
            )
            assert whole[-len(ids) :] == ids
        again = [*ASKED, WRITTEN, *FURTHER] if tools is None else ASKED
        assert continuation(again, further, tokenizer, tools)[-4:] == ids[-4:]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML.replace("<|im_end|>", "&"), "ends a turn of the assistant with no special token"),
        (CHATML.replace("m['content']", "(m['content'] if m.role != 'tool' else '')"), "leaves out a tool message"),
        (CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"), "rewrites earlier turns"),
        (CHATML.replace("m['content']", "(loop.length ~ m['content'])"), "rewrites earlier turns"),
    ],
)
def test_a_template_in_which_nothing_can_go_on_is_refused(template, said):
    with pytest.raises(UserError, match=said):
        continuation(ASKED, RESULT, make_tokenizer(template))


def test_templates_that_think_first_are_refused_where_they_leave_thoughts_out():
    for name, template in (("Qwen 3", QWEN_3_THINKING), ("DeepSeek V3", DEEPSEEK_R1)):
        tokenizer = FAMILIES[name].tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(UserError, match="rewrites earlier turns"):
            continuation(ASKED, FURTHER, tokenizer)
    with pytest.raises(UserError, match="rewrites earlier turns"):  # its generation prompt leaves the channel open
        continuation(ASKED, FURTHER, FAMILIES["GPT-OSS"].tokenizer())
