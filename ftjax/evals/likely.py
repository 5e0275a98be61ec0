"""What of `data.eval` is measured by likelihoods, not by what a model writes: multiple choice, perplexity."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ftjax.data.tokens.rendering import Tokenizer
from ftjax.errors import UserError
from ftjax.evals import general, multiple_choice
from ftjax.evals.entries import MULTIPLE_CHOICE, entry_name, likely_entries
from ftjax.evals.likelihood import log_likelihoods, perplexity
from ftjax.models.decoder import Decoder
from ftjax.tree import Tree


class LikelySet(NamedTuple):
    """The rows of one entry.

    Attributes:
      name: as of a `ScoredSet`.
      score: "multiple_choice" or "perplexity".
      rows: `multiple_choice.Question`s, or `general.Text`s.
    """

    name: str
    score: str
    rows: Sequence[Any]

    @property
    def metric(self) -> str:
        """The name of what is measured in metrics.jsonl."""
        return f"eval_{self.name}/{self.score}"

    def contents(self) -> list[list]:
        """The rows as plain values, for a digest."""
        if self.score == MULTIPLE_CHOICE:
            return [list(question) for question in self.rows]
        return [[part.tolist() for part in text.item] for text in self.rows]

    def measure(
        self, model: Decoder, variables: Tree, tokenizer: Tokenizer, on_progress: Callable[[int, int], None]
    ) -> dict[str, float]:
        """{metric: value}; the arguments are those of `likelihood.log_likelihoods`.

        Of questions the share of right choices, by log p and by log p per byte; of texts and of the last answers of
        conversations exp of the mean loss of a token.
        """
        if self.score == MULTIPLE_CHOICE:
            chosen = multiple_choice.choose(model, variables, tokenizer, self.rows, on_progress)
            right = np.array([question.answer for question in self.rows])
            by_sum, by_bytes = (float((its == right).mean()) for its in (chosen.by_sum, chosen.by_bytes))
            return {self.metric: by_sum, f"{self.metric}_by_bytes": by_bytes}
        items = [text.item for text in self.rows]
        return {self.metric: perplexity(log_likelihoods(model, variables, items, on_progress))}


def likely_sets(config: ConfigDict, tokenizer: Tokenizer, positions: int) -> list[LikelySet]:
    """The entries of data.eval with such a score, read; texts are cut to the model's `positions`.

    Raises:
      UserError: an entry that cannot be read, or has a weight; a row that is no question with choices, or no text.
    """
    sets = []
    for entry in likely_entries(config):
        if "weight" in entry:
            raise UserError(f"config.data.eval: {entry['source']} is scored, which knows no 'weight'; leave it out")
        source = {key: value for key, value in entry.items() if key != "score"}
        is_choice = entry["score"] == MULTIPLE_CHOICE
        rows = multiple_choice.read([source]) if is_choice else general.read([source], tokenizer, positions)
        sets.append(LikelySet(entry_name(entry), entry["score"], rows))
    metrics = [its.metric for its in sets]
    if twice := next((metric for metric in metrics if metrics.count(metric) > 1), None):
        raise UserError(f"config.data.eval: two entries are recorded as {twice}; rename one of the files")
    return sets
