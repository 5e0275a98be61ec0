"""Chat templates that a run chooses: known ones by name and those in files, and the system prompt that a run injects.

Both become the tokenizer's own template, so that training, evaluation, generation and exports render alike.
"""

import json
import re
from pathlib import Path

from ftjax.atomic import write_text
from ftjax.data.tokens.rendering import TEMPLATE_ERRORS, Tokenizer, traits
from ftjax.errors import UserError

_KEPT = "chat_template.jinja"  # in the workdir of a run that chose one
_DIRECTORY = Path(__file__).with_name("chat_templates")
# name -> the tokens by which it structures a conversation, beside the tokenizer's own BOS and end token
KNOWN = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "zephyr": (),
}
_ANSWER = "Zebra"
_TURNS = [{"role": "user", "content": "Name an animal."}, {"role": "assistant", "content": _ANSWER}]
_SYSTEM = (
    "{{%- if messages[0]['role'] not in ('system', 'developer') %}}"
    "{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}"
    "{{%- endif %}}{{{{ '' }}}}"  # which keeps white space at the start of the template, as a block would not
)


def located(name: str) -> str:
    """A value of config.data.chat_template, a file's path made absolute."""
    return name if not name or name in KNOWN else str(Path(name).expanduser().absolute())


def read(name: str, tokenizer: Tokenizer) -> str:
    """The source of a known template, with a BOS where this tokenizer puts one before a text; or that of a file.

    Raises:
      UserError: it is neither known nor a file of text.
    """
    if name in KNOWN:
        source = (_DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")
        text, bos = tokenizer("a")["input_ids"], tokenizer.bos_token_id
        return "{{- bos_token }}" + source if bos is not None and text[0] == bos else source
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"config.data.chat_template={name!r} is no known template ({', '.join(KNOWN)}) and cannot be read as a "
            f"file ({reason}); correct the name or the path"
        ) from error


def keep(name: str, tokenizer: Tokenizer, workdir: Path) -> None:
    """Keeps a template that the run chose in its workdir, since a file of the user's may change or move."""
    if name:
        write_text(workdir / _KEPT, read(name, tokenizer))
    else:  # that of a run here which ended before it saved anything
        (workdir / _KEPT).unlink(missing_ok=True)


def kept(name: str, workdir: Path) -> str:
    """config.data.chat_template as the run in `workdir` keeps it, where it has chosen one; else as it is."""
    return str(workdir / _KEPT) if (workdir / _KEPT).is_file() else name


def check(tokenizer: Tokenizer, name: str) -> None:
    """That the tokenizer has the tokens of the chosen template, and an answer ends with one of its special tokens.

    Raises:
      UserError: with the tokens that config.model.add_tokens would have to add.
    """
    missing = [token for token in KNOWN.get(name, ()) if token not in tokenizer.get_vocab()]
    if missing:
        raise _lacks(name, f"writes {', '.join(missing)}", missing)
    try:
        text = tokenizer.apply_chat_template(_TURNS, tokenize=False)
    except TEMPLATE_ERRORS as error:
        raise UserError(
            f"config.data.chat_template={name!r} does not render a user and an assistant: {error}"
        ) from error
    if _ANSWER not in text:
        raise UserError(f"config.data.chat_template={name!r} leaves out the assistant's answer; correct the template")
    tail = text.rpartition(_ANSWER)[2].strip()
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    if ids and ids[0] in traits(tokenizer).ends:
        return
    if not tail:
        raise UserError(
            f"config.data.chat_template={name!r} ends an answer with no token, so the model would never learn to stop; "
            "write one after it, such as {{ eos_token }}"
        )
    end = re.match(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\S+", tail)[0]
    raise _lacks(name, f"ends an answer with {end}", [end])


def with_system(tokenizer: Tokenizer, text: str) -> str | dict[str, str]:
    """The tokenizer's template, or templates by name, with `text` as the system turn of conversations without one.

    Raises:
      UserError: there is no template, or it takes no system turn.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            "config.data.system needs a chat template, which this model lacks; set config.data.chat_template, or put "
            "the text into the prompts"
        )
    turns = [{"role": "system", "content": text}, *_TURNS]
    try:
        reason = "" if text.strip() in tokenizer.apply_chat_template(turns, tokenize=False) else "it leaves it out"
    except TEMPLATE_ERRORS as error:
        reason = str(error)
    if reason:
        raise UserError(
            f"config.data.system: the chat template takes no system turn ({reason}); put the text into the user turns, "
            "or choose another template with config.data.chat_template"
        )
    before = _SYSTEM.format(text=json.dumps(text, ensure_ascii=False))
    if isinstance(template, str):
        return before + template
    return {name: before + source for name, source in template.items()}


def _lacks(name: str, what: str, tokens: list[str]) -> UserError:
    return UserError(
        f"config.data.chat_template={name!r} {what}, which the tokenizer has not as special token(s); add them with "
        f"config.model.add_tokens={tuple(tokens)!r}, or choose a template whose tokens it has"
    )
