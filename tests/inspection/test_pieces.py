"""Pieces are all of a row's tokens in order, and readable: whole characters, special tokens by name."""

import numpy as np
import pytest
from support.chat_templates import CHATML, HEADERS

from ftjax.data.format.example import Row
from ftjax.data.format.formats import check_row
from ftjax.data.tokens import chat
from ftjax.data.tokens.kinds import ROW_KINDS, kind_of
from ftjax.inspection.pieces import pieces, plain

TEXT = "Where is my order? 日本 🙂 \ufffd caf\u00e9\n\ttab"


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer(HEADERS, eos="<|eot|>", bos="<s>")


def shown(tokenizer, text=TEXT):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    example = chat.tokenize(Row({"messages": messages}, "x:1"), tokenizer)
    return example, pieces(example.tokens, example.trained, tokenizer)


def test_pieces_are_the_text_and_their_tokens_are_all_tokens(tokenizer):
    example, row_pieces = shown(tokenizer)
    assert "".join(piece.text for piece in row_pieces) == tokenizer.decode(example.tokens)
    assert sum(piece.tokens for piece in row_pieces) == len(example.tokens)
    trained = sum(piece.tokens for piece in row_pieces if piece.trained)
    assert trained == example.trained.sum()
    assert "".join(piece.text for piece in row_pieces if piece.trained) == TEXT + "<|eot|>"


def test_characters_of_several_tokens_are_whole(tokenizer):
    _, row_pieces = shown(tokenizer)
    assert sum("\ufffd" in piece.text for piece in row_pieces) == 2  # the two that are really there
    assert any(piece.text == "🙂" and piece.tokens > 1 for piece in row_pieces) or any(
        "🙂" in piece.text for piece in row_pieces
    )


def test_special_tokens_bos_and_eos_are_marked(tokenizer):
    _, row_pieces = shown(tokenizer)
    assert (row_pieces[0].text, row_pieces[0].special) == ("<s>", "bos")
    assert {piece.special for piece in row_pieces if piece.text == "<|eot|>"} == {"eos"}
    assert {piece.special for piece in row_pieces if piece.text == "<|start|>"} == {"special"}


def test_a_bos_is_named_only_where_the_row_begins(make_tokenizer):
    _, row_pieces = shown(make_tokenizer(CHATML, bos="<|im_start|>"))
    assert [piece.special for piece in row_pieces if piece.text == "<|im_start|>"] == ["bos", "special", "special"]


def test_without_color_trained_tokens_stand_in_brackets(make_tokenizer):
    row_pieces = pieces([5, 6], np.array([False, False]), make_tokenizer(CHATML))
    assert "[[" not in plain(row_pieces)
    _, row_pieces = shown(make_tokenizer(CHATML), "a b")
    text = plain(row_pieces)
    assert text.count("[[") == text.count("]]") == 1
    inside = text.split("[[")[1].split("]]")[0]
    assert inside.replace("|", "") == "a b<im_end>(EOS)"
    assert "⏎" in text


def test_a_preference_shows_both_answers_and_an_unpaired_row_its_label(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    pair = check_row({"prompt": "q", "chosen": "good", "rejected": "bad"}, "x:1")
    assert list(documents_of(pair, tokenizer)) == ["chosen", "rejected"]
    label = check_row({"prompt": "q", "completion": "a", "label": False}, "x:1")
    assert list(documents_of(label, tokenizer)) == ["bad"]


def documents_of(row, tokenizer):
    (documents,) = ROW_KINDS[kind_of(row)].tokenize(row, tokenizer, None, "assistant")
    return documents


def test_the_tokens_of_an_image_are_one_piece(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    image = tokenizer.convert_tokens_to_ids("<|start|>")
    row_pieces = pieces([20, *[image] * 256, 21, image, image], np.zeros(260, bool), tokenizer)
    assert [(piece.text, piece.tokens) for piece in row_pieces][1] == ("<|start|> × 256", 256)
    assert [piece.tokens for piece in row_pieces] == [1, 256, 1, 1, 1]
