"""Chat templates, and the sentences and special tokens of the small tokenizer that the tests render them with."""

SENTENCES = [
    "You are a helpful assistant.",
    "system user assistant tool",
    "Where is my order? It was sent on Monday and comes tomorrow.",
    "The blue lamp is broken, please send another lamp to Anna.",
    "one\n\ntwo\n\n\n\nthree\n\n\n\n",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>"]

# As SmolLM2's: a default system prompt, and a line break after each turn.
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3's: BOS written by the template, contents trimmed, no line break between turns.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)


def marked(before_end: str, after_end: str = "") -> str:
    """ChatML with generation markers; `before_end` and `after_end` are what an assistant turn has in and after them."""
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m['content'] + '" + before_end + "' }}{% endgeneration %}{{ '" + after_end + "' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# As reasoning models do: what an assistant thought is dropped from all turns but the last.
REWRITES = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
