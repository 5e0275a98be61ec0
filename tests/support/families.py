"""Tokenizers with the templates of `family_templates`, what each is to train on, and random conversations for them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support import family_templates as templates
from support.chat_templates import SENTENCES, make_tokenizer


@dataclass(frozen=True)
class Family:
    """A template, the special tokens of its tokenizer, and what it can do.

    Attributes:
      says: (message, last) -> the text that the model is to write for an assistant turn, its end token included.
      tools: whether calls and results are rendered; listed: whether the list of tools is, too.
      system: whether a system prompt is.
      metaspace: a tokenizer in SentencePiece's manner, else byte-level BPE.
      once: only the last turn of a conversation can be trained on, since the template rewrites earlier ones.
      text: whether the template takes arguments as JSON text.
      calls: how many calls a turn may make; beside: whether text may stand beside them.
    """

    template: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    says: Callable[[dict, bool], str]
    tools: bool = False
    listed: bool = True
    system: bool = True
    metaspace: bool = False
    once: bool = False
    text: bool = False
    calls: int = 2
    beside: bool = True
    extra: dict = field(default_factory=dict)

    def tokenizer(self):
        if self.metaspace:
            return _metaspace_tokenizer(self)
        specials = ["<unk>", *(one for one in self.specials if one != "<unk>")]
        return make_tokenizer(self.template, self.eos, self.bos, specials=specials, **self.extra)


def _metaspace_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """BPE over "▁" for spaces, bytes for what is not in the vocabulary, as SentencePiece trains it for Llama 2."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()  # no piece goes on over a space
    learner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    scores = sorted(learner.get_vocab().items(), key=lambda one: one[1])
    specials = ["<unk>", *family.specials]
    names = [*specials, *(f"<0x{i:02X}>" for i in range(256)), *(piece for piece, _ in scores), "\n"]
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token="<unk>",
        additional_special_tokens=[one for one in family.specials if one not in (family.bos, family.eos)],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = family.template
    return tokenizer


def _json(calls, form, between):
    return between.join(
        form.replace("%NAME", call["function"]["name"])
        .replace("%ARGS", json.dumps(call["function"]["arguments"], ensure_ascii=False))
        .replace("%ID", call.get("id", ""))
        for call in calls
    )


def _hermes(message, end="<|im_end|>"):
    calls = message.get("tool_calls", ())
    written = _json(calls, '<tool_call>\n{"name": "%NAME", "arguments": %ARGS}\n</tool_call>', "\n")
    return message["content"] + ("\n" if message["content"] and calls else "") + written + end


def _qwen_3(message, last):
    if message.get("reasoning_content"):
        return f"<think>\n{message['reasoning_content']}\n</think>\n\n" + _hermes(message)
    return ("<think>\n\n</think>\n\n" if last else "") + _hermes(message)


def _llama_3(message, last):
    calls = _json(message.get("tool_calls", ()), '{"name": "%NAME", "parameters": %ARGS}', "")
    return (calls or message["content"].strip()) + "<|eot_id|>"


def _mistral_v3(message, last):
    calls = _json(message.get("tool_calls", ()), '{"name": "%NAME", "arguments": %ARGS, "id": "%ID"}', ", ")
    # The tokenizer puts a space of its own after each special token.
    return ("[TOOL_CALLS]  [" + calls + "]" if calls else "  " + message["content"].strip()) + "</s>"


def _granite(message, last):
    calls = _json(message.get("tool_calls", ()), '{"name": "%NAME", "arguments": %ARGS}', ", ")
    return message["content"] + (f"<|tool_call|>[{calls}]" if calls else "") + "<|end_of_text|>"


def _smollm_3(message, last):
    calls = _json(message.get("tool_calls", ()), '<tool_call>{"name": "%NAME", "arguments": %ARGS}</tool_call>', "")
    return "<|im_start|>assistant\n" + message["content"] + calls + "<|im_end|>"


def _gpt_oss(message, last):
    thought = message.get("thinking") or (message["content"] if "tool_calls" in message else "")
    thought = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if "tool_calls" in message:
        form = " to=functions.%NAME<|channel|>commentary json<|message|>%ARGS<|call|>"
        return thought + _json(message["tool_calls"], form, "")
    return thought + f"<|channel|>final<|message|>{message['content']}<|return|>"


def _deepseek(message, last):
    form = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%NAME\n```json\n%ARGS\n```<｜tool▁call▁end｜>"
    calls = _json(message.get("tool_calls", ()), form, "\n")
    calls = f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else ""
    return message["content"] + calls + "<｜end▁of▁sentence｜>"


def _plain(end: str, strip: bool = False):
    return lambda message, last: (message["content"].strip() if strip else message["content"]) + end


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_MISTRAL += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]")
_LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
_LLAMA_3 += ("<|eot_id|>",)
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "<|endoftext|>")
_TOOL = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "output▁begin", "output▁end", "sep")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_DEEPSEEK += tuple(f"<｜tool▁{name}｜>" for name in _TOOL)
_COHERE = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>")
_COHERE += ("<|CHATBOT_TOKEN|>",)
_GRANITE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")

FAMILIES = {
    "Llama 2": Family(
        templates.LLAMA_2,
        ("<s>", "</s>"),
        "<s>",
        "</s>",
        lambda m, last: f" {m['content'].strip()} </s>",
        metaspace=True,
    ),
    "Llama 3, first template": Family(
        templates.LLAMA_3_FIRST, _LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", _plain("<|eot_id|>", True)
    ),
    "Llama 3.1": Family(
        templates.LLAMA_3_1, _LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", _llama_3, tools=True, calls=1, beside=False
    ),
    "Mistral v3": Family(
        templates.MISTRAL_V3, _MISTRAL, "<s>", "</s>", _mistral_v3, tools=True, beside=False, metaspace=True, once=True
    ),
    "Mistral v7": Family(
        templates.MISTRAL_V7,
        _MISTRAL,
        "<s>",
        "</s>",
        lambda m, last: m["content"] + _json(m.get("tool_calls", ()), "[TOOL_CALLS]%NAME[ARGS]%ARGS", "") + "</s>",
        tools=True,
    ),
    "Gemma 2": Family(
        templates.GEMMA_2, _GEMMA, "<bos>", "<eos>", _plain("<end_of_turn>", True), system=False, metaspace=True
    ),
    "Gemma 3": Family(templates.GEMMA_3, _GEMMA, "<bos>", "<eos>", _plain("<end_of_turn>", True), metaspace=True),
    "Qwen 2.5": Family(
        templates.unmarked(templates.QWEN_2_5),
        _CHATML,
        None,
        "<|im_end|>",
        lambda m, last: _hermes(m),
        tools=True,
        extra={"pad_token": "<|endoftext|>"},
    ),
    "Qwen 2.5, marked": Family(templates.QWEN_2_5, _CHATML, None, "<|im_end|>", lambda m, last: _hermes(m), tools=True),
    "Qwen 3": Family(templates.QWEN_3, _CHATML, None, "<|im_end|>", _qwen_3, tools=True, once=True),
    "Phi 3": Family(
        templates.PHI_3,
        ("<s>", "<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>"),
        "<s>",
        "<|endoftext|>",
        lambda m, last: m["content"] + "<|end|>" + ("\n<|endoftext|>" if last else ""),
    ),
    "Phi 4": Family(templates.PHI_4, (*_CHATML, "<|im_sep|>"), "<|endoftext|>", "<|im_end|>", _plain("<|im_end|>")),
    "OLMo 2": Family(templates.OLMO_2, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>", _plain("<|endoftext|>")),
    "Granite 3": Family(templates.GRANITE_3, _GRANITE, "<|end_of_text|>", "<|end_of_text|>", _granite, tools=True),
    "SmolLM3, marked": Family(templates.SMOLLM_3, _CHATML, None, "<|im_end|>", _smollm_3, tools=True),
    "GPT-OSS": Family(
        templates.GPT_OSS, _HARMONY, "<|endoftext|>", "<|return|>", _gpt_oss, tools=True, calls=1, once=True
    ),
    "DeepSeek V3": Family(
        templates.DEEPSEEK_V3, _DEEPSEEK, *_DEEPSEEK[:2], _deepseek, tools=True, listed=False, text=True
    ),
    "Command R": Family(
        templates.COMMAND_R,
        _COHERE,
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        _plain("<|END_OF_TURN_TOKEN|>", True),
    ),
}


def random_content(rng, low: int = 1, high: int = 9) -> str:
    """Words, special characters, and white space that no template trims (for it stands inside)."""
    pieces = [*" ".join(SENTENCES).split(), "é", "日本", "🙂", "a\nb", "{'k': 1}", "x  y", "<|", "im_end"]
    return " ".join(rng.choice(pieces, rng.integers(low, high)))


def random_conversation(rng, family: Family | None = None, exchanges: int = 5) -> tuple[list[dict], list[dict]]:
    """Messages that a family's template takes, and tools where it has them: some turns think or call tools."""
    messages, tools = [], []
    if (family is None or family.system) and rng.random() < 0.4:
        messages.append({"role": "system", "content": random_content(rng)})
    use_tools = family is not None and family.tools and rng.random() < 0.5
    if use_tools:
        parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
        tools = [
            {
                "type": "function",
                "function": {"name": name, "description": random_content(rng), "parameters": parameters},
            }
            for name in ("get_weather", "send")[: rng.integers(1, 3)]
        ]
    for _ in range(rng.integers(1, exchanges + 1)):
        messages.append({"role": "user", "content": random_content(rng)})
        if use_tools and rng.random() < 0.6:
            calls = [
                {
                    "id": f"call{rng.integers(10**4, 10**5)}",
                    "type": "function",
                    "function": {"name": tools[-1]["function"]["name"], "arguments": {"city": random_content(rng)}},
                }
                for _ in range(rng.integers(1, family.calls + 1))
            ]
            said = random_content(rng) if family.beside and rng.random() < 0.3 else ""
            messages.append({"role": "assistant", "content": said, "tool_calls": calls})
            for call in calls:
                messages.append({"role": "tool", "content": random_content(rng), "tool_call_id": call["id"]})
        messages.append({"role": "assistant", "content": random_content(rng)})
    return messages, tools if family is not None and family.listed else []
