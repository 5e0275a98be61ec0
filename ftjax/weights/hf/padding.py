"""The token that pads what a reward model or a classifier scores.

transformers reads the score of a text at its last token that is not the padding token. Where padding is done with the
end token, as many models do it, that is a token before the end: another number, and no error.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast


def padding_token(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int], vocab_size: int) -> int | None:
    """The id of a token that no document ends with; None where there is none.

    It is the tokenizer's own padding token if that will do, else one that is called so, the unknown token, a token that
    the chat template does not write, or the token that begins a text, in this order.

    ends: all tokens at which generation ends. vocab_size: rows of the model's embedding.
    """
    rendered, last = _rendered(tokenizer)
    unfit = {*ends, tokenizer.eos_token_id, last, None}
    added = dict(sorted(tokenizer.added_tokens_decoder.items()))
    candidates = [
        tokenizer.pad_token_id,
        *(i for i, token in added.items() if "pad" in token.content.lower()),
        tokenizer.unk_token_id,
        *(i for i, token in added.items() if token.special and i not in rendered and i != tokenizer.bos_token_id),
        tokenizer.bos_token_id,
    ]
    return next((i for i in candidates if i not in unfit and i < vocab_size), None)


def _rendered(tokenizer: PreTrainedTokenizerFast) -> tuple[set[int], int | None]:
    """(the tokens of a conversation as the chat template writes it, the last of them)"""
    if not tokenizer.chat_template:
        return set(), None
    turns = [{"role": "user", "content": "Hi there."}, {"role": "assistant", "content": "Hello!"}] * 2
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    return set(ids), ids[-1]
