"""A small real tokenizer (byte-level BPE) for the tests of data."""

import pytest
from chat_templates import CHATML, SENTENCES, SPECIALS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(template, eos, bos=None, add_bos=False, **overrides of PreTrainedTokenizerFast's arguments)."""

    def make(template=None, eos="<|im_end|>", bos=None, add_bos=False, trim_offsets=False, **overrides):
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        # Runs of line breaks are pieces of their own, as in Llama 3's tokenizer.
        breaks = pre_tokenizers.Split(Regex(r"\s*[\r\n]+"), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([breaks, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        core.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(SENTENCES, trainer)
        steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
        if add_bos:
            steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, SPECIALS.index(bos))]))
        core.post_processor = processors.Sequence(steps)
        arguments = {"unk_token": "<unk>", "bos_token": bos, "eos_token": eos, **overrides}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            additional_special_tokens=SPECIALS[3:],
            clean_up_tokenization_spaces=False,
            **arguments,
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer):
    return make_tokenizer(CHATML)
