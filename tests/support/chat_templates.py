"""Chat templates, and a small real tokenizer that renders them."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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

# ChatML with tools as Hermes has them.
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>\\n' + c.function | tojson + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
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


def make_tokenizer(
    template=None, eos="<|im_end|>", bos=None, add_bos=False, trim_offsets=False, specials=SPECIALS, **overrides
):
    """Byte-level BPE of 400 tokens, trained here; overrides are arguments of PreTrainedTokenizerFast."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    # Runs of line breaks are pieces of their own, as in Llama 3's tokenizer.
    breaks = pre_tokenizers.Split(Regex(r"\s*[\r\n]+"), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([breaks, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(SENTENCES, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if add_bos:
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, specials.index(bos))]))
    core.post_processor = processors.Sequence(steps)
    arguments = {"unk_token": "<unk>", "bos_token": bos, "eos_token": eos, **overrides}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        additional_special_tokens=[one for one in specials if one not in (bos, eos, "<unk>", "<s>", "</s>")],
        clean_up_tokenization_spaces=False,
        **arguments,
    )
    tokenizer.chat_template = template
    return tokenizer
