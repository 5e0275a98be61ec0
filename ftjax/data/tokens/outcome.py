"""What becomes of a row: the one decision that training takes and inspection tells."""

from typing import NamedTuple

from ftjax.data.format.conversation import unanswered
from ftjax.data.format.example import Example, Row
from ftjax.data.read.rows import Rows
from ftjax.data.tokens import chat
from ftjax.data.tokens.kinds import ROW_KINDS, Documents, cut, divide
from ftjax.data.tokens.rendering import Tokenizer
from ftjax.errors import SourceError, UserError


class TokenRules(NamedTuple):
    """What decides the tokens of a row, apart from the tokenizer."""

    max_length: int  # of each document
    vocab_size: int | None
    train_on: str
    kind: str  # of kinds.ROW_KINDS
    long_text: str  # divide or cut


class Outcome(NamedTuple):
    """What becomes of a row: it is trained on (`examples`), dropped, or bad.

    Attributes:
      row: as it was read; None where that failed.
      documents: its documents before the cut; {} for a row that has none, because it is bad or of weight 0.
      examples: what is trained on, one or, of a long text, several; none where the row is dropped or bad.
      dropped: why a good row gives no example.
      bad: what is wrong with a bad row, with its origin.
    """

    row: Row | None
    documents: Documents
    examples: tuple[Example, ...] = ()
    dropped: str = ""
    bad: str = ""

    @property
    def longest(self) -> int:
        """The tokens of its longest document, before the cut."""
        return max((len(document.tokens) for document in self.documents.values()), default=0)

    @property
    def unanswered(self) -> bool:
        return self.row is not None and unanswered(self.row.fields)


def outcome(rows: Rows, i: int, tokenizer: Tokenizer, rules: TokenRules) -> Outcome | None:
    """What becomes of row i; None where it is on the other side of the hold-out.

    Raises:
      SourceError: its file was changed, or cannot be read any more.
    """
    row, documents = None, {}
    try:
        row = rows.check(i)
        if row is None:
            return None
        documents = ROW_KINDS[rules.kind].tokenize(row, tokenizer, rules.vocab_size, rules.train_on)
        if "text" in row.fields and rules.long_text == "divide":
            examples = divide(documents, rules.max_length, row.origin)
        else:
            examples = (cut(documents, rules.max_length, row.origin),)
    except SourceError:
        raise
    except chat.NothingTrained:  # not a bad row: its weights say so
        return Outcome(row, {}, dropped="weight 0")
    except UserError as error:
        return Outcome(row, documents, bad=str(error))
    found = Outcome(row, documents, examples)
    if not any(example.trained.any() for example in examples):
        return found._replace(examples=(), dropped=f"{found.longest} tokens")
    return found
