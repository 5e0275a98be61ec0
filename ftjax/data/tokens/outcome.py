"""What becomes of a row: the one decision that training takes and inspection tells."""

from typing import NamedTuple

from ftjax.data.format.conversation import unanswered
from ftjax.data.format.example import Example, Row
from ftjax.data.read.rows import Rows
from ftjax.data.tokens import chat, pictured
from ftjax.data.tokens.kinds import PLAIN, ROW_KINDS, Documents, Settings, cut, divide, documents
from ftjax.data.tokens.pictured import NONE, Pictures
from ftjax.data.tokens.rendering import Tokenizer
from ftjax.errors import SourceError, UserError


class TokenRules(NamedTuple):
    """What decides the tokens of a row, apart from the tokenizer."""

    max_length: int  # of each document
    vocab_size: int | None
    train_on: str
    kind: str  # of kinds.ROW_KINDS
    long_text: str  # divide or cut
    settings: Settings = PLAIN

    @property
    def lacking(self) -> str:
        """Why rows are dropped."""
        within = f"within data.max_length = {self.max_length}"
        if not ROW_KINDS[self.kind].answered:
            return f"no room for a completion of {self.settings.room} tokens {within}"
        return f"no trained token {within}"


class Outcome(NamedTuple):
    """What becomes of a row: it is trained on (`examples`), dropped, or bad.

    Attributes:
      row: as it was read; None where that failed.
      parts: the documents of each of its examples, before the cut; several where a template rewrites earlier answers
        (`chat.tokenize_answers`), none where it is bad or of weight 0.
      examples: what is trained on: those of `parts` with a trained token after the cut, or those of a long text that is
        divided; none where the row is dropped or bad.
      dropped: why a good row gives no example.
      bad: what is wrong with a bad row, with its origin.
      pictures: the images of the row, where the model sees them.
    """

    row: Row | None
    parts: tuple[Documents, ...]
    examples: tuple[Example, ...] = ()
    dropped: str = ""
    bad: str = ""
    pictures: Pictures = NONE

    @property
    def longest(self) -> int:
        """The tokens of its longest document, before the cut."""
        return max((len(document.tokens) for part in self.parts for document in part.values()), default=0)

    @property
    def split(self) -> bool:
        """Whether each of its answers is an example."""
        return len(self.parts) > 1

    @property
    def divided(self) -> bool:
        """Whether it is a long text that goes on in further examples."""
        return len(self.parts) == 1 and len(self.examples) > 1

    @property
    def unanswered(self) -> bool:
        return self.row is not None and unanswered(self.row.fields)


def outcome(rows: Rows, i: int, tokenizer: Tokenizer, rules: TokenRules) -> Outcome | None:
    """What becomes of row i; None where it is on the other side of the hold-out.

    Raises:
      SourceError: its file was changed, or cannot be read any more.
    """
    row, parts, pictures = None, (), NONE
    try:
        row = rows.check(i)
        if row is None:
            return None
        if rules.settings.images:
            pictured.check_column(row, rows.raw(i))
        made, pictures = documents(rules.kind, row, tokenizer, rules.vocab_size, rules.train_on, rules.settings)
        parts = tuple(made)
        if rules.kind == "conversation" and "text" in row.fields and rules.long_text == "divide":
            examples = divide(parts[0], rules.max_length, row.origin)
        else:
            images = rules.settings.images
            examples = tuple(cut(part, rules.max_length, row.origin, images) for part in parts)
    except SourceError:
        raise
    except chat.NothingTrained:  # not a bad row: its weights say so
        return Outcome(row, (), dropped="weight 0")
    except UserError as error:
        return Outcome(row, parts, bad=str(error))
    found = Outcome(row, parts, tuple(one for one in examples if one.trained.any()), pictures=pictures)
    if not ROW_KINDS[rules.kind].answered:  # a prompt is whole, or nothing to go on from
        fits = found.longest + rules.settings.room <= rules.max_length
        found = found._replace(examples=examples if fits else ())
    return found if found.examples else found._replace(dropped=f"{found.longest} tokens")
