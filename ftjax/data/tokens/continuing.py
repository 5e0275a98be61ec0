"""How a conversation goes on after a turn that a model has written, as token ids behind those that it wrote.

Nothing that was sampled is tokenized again, or looked at: the template renders the conversation with a word of ours in
place of every such turn, and what it writes after the last of these is what follows, whatever the turn says. A template
that writes what comes before in another way once the conversation goes on has no such rest, and is refused.
"""

import json

from ftjax.data.tokens.masks import encode
from ftjax.data.tokens.rendering import Messages, Tokenizer, Tools, render, traits
from ftjax.errors import UserError

WRITTEN = {"role": "assistant", "content": "Zebra"}  # stands for a turn that the model wrote


def continuation(
    messages: Messages, further: Messages, tokenizer: Tokenizer, tools: Tools = None, origin: str = "the episode"
) -> list[int]:
    """The ids from the token that ends the model's turn to the end of the next generation prompt.

    The first of them is that end token: leave it out where the model wrote one. It is a special token at which text is
    split, so that the ids after it are the same whatever stands before it.

    Args:
      messages: what the turn answered, WRITTEN in place of earlier turns of the model.
      further: what is said after it.

    Raises:
      UserError: a template that writes `messages` or the turn in another way once the conversation goes on, leaves out
        some of `further`, or ends turns without such a token.
    """
    before = render(messages, tokenizer, origin, tools, generation_prompt=True)
    after = render([*messages, WRITTEN, *further], tokenizer, origin, tools, generation_prompt=True)
    turn = after[len(before) :].lstrip()
    if not after.startswith(before) or not turn.startswith(WRITTEN["content"]):
        raise UserError(
            f"{origin}: the chat template rewrites earlier turns, or begins them in another way than its generation "
            "prompt does, so that a conversation cannot go on behind the tokens that the model wrote; take one that "
            "does not, such as config.data.chat_template=chatml"
        )
    rest = turn.removeprefix(WRITTEN["content"]).lstrip()
    ids = encode([rest], tokenizer)[0]
    its = traits(tokenizer)
    if not ids or ids[0] not in its.ends & its.borders:
        raise UserError(
            f"{origin}: the chat template ends a turn of the assistant with no special token, behind which the "
            "conversation could go on; take one that does, such as config.data.chat_template=chatml"
        )
    for message in further:
        said = [message["content"], json.dumps(message["content"], ensure_ascii=False)[1:-1]]
        if not any(_squeezed(text) in _squeezed(rest) for text in said):
            raise UserError(
                f"{origin}: the chat template leaves out a {message['role']} message, or part of it, after a turn of "
                "the assistant; take a template that renders it"
            )
    return ids


def _squeezed(text: str) -> str:
    return "".join(text.split())
