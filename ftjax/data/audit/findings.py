"""What the checks of data report: each kind of finding once, with how often it occurs and its first places."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ftjax.data.audit import private

ERROR, WARNING = "error", "warning"
NEAR = 0.8  # similarity from which two rows count as near duplicates
MAX_DROPPED = 0.05  # share of the rows that may have no trained token; as `tokenize.tokenize`
SMALL_SHARE = 0.01  # of the rows: a source that gives less is lost in the mixture
# code -> the share of the rows from which it is an error, and why fewer are a warning
MATTERS = {
    "leak": (0.01, "so few known rows move the loss of the evaluation by less than its noise"),
    "leak_prompt": (0.05, "short prompts such as greetings come more than once, and their answers differ"),
    "special_in_text": (0.05, "a text may speak of such a tag; one that was rendered before has them in most rows"),
    "same_pair": (0.01, "so few pairs without a difference teach nothing, and hide nothing"),
}
# Errors with which training does not start, whatever config.data.checks says.
STOPPING = {"refused", "empty", "dropped", "eval_empty"}
_PLACES = 3  # that a message names
_VARIES = re.compile(r"\d+|'[^']*'")  # numbers and quotations: messages that differ in nothing else are one finding


class Kind(NamedTuple):
    """What the findings of one code have in common."""

    severity: str  # ERROR or WARNING
    what: str  # is wrong; "" where each finding has words of its own
    fix: str


# code -> what is wrong, and the fix
_ERRORS = {
    "refused": ("", "or allow some with config.data.max_bad_rows"),
    "empty": ("no rows", "fill the source or name another"),
    "dropped": (
        f"more than {MAX_DROPPED:.0%} of the rows have no trained token within config.data.max_length",
        "raise config.data.max_length, shorten the prompts or remove the rows",
    ),
    "double_bos": ("starts with two BOS tokens", "remove it from the text or from the chat template"),
    "end_untrained": (
        "no end token is trained in the whole set, so the model would never learn to stop",
        "end the turns in the chat template with the end token that config.json and generation_config.json name; where "
        "rows are cut, raise config.data.max_length",
    ),
    "end_masked": (
        "an answer is trained, but not the end token after it",
        "let the template's {% generation %} block hold the end token",
    ),
    "pad_is_end": (
        "the padding token is also the end token and is masked with the padding, so the model would not learn to stop",
        "give the tokenizer a padding token of its own",
    ),
    "empty_turn": ("an empty assistant turn", "write the answer or remove the turn"),
    "no_answer": ("a prompt without an answer", "write the answer or remove the row"),
    "same_pair": (
        "the chosen and the rejected answer are the same but for white space",
        "correct the pair or remove the row",
    ),
    "leak": (
        "rows of the evaluation are also trained on (same prompt, same answer)",
        "remove them from one side (python -m ftjax.curate split keeps prompts apart), or hold rows out with "
        "config.data.holdout",
    ),
    "leak_prompt": (
        "prompts of the evaluation are also trained on, with another answer",
        "remove them from one side; python -m ftjax.curate split keeps all answers to a prompt together",
    ),
    "special_in_text": (
        "a special token of the tokenizer stands in the text of an answer, and would be learned as the control token "
        "that it is",
        "take it out of the text; the chat template writes those that belong there",
    ),
    "eval_empty": (
        "no evaluation row has a trained token within config.data.max_length",
        "raise config.data.max_length, give an answer weight 1, or name other rows",
    ),
}
_WARNINGS = {
    "few": ("", "more rows help most"),
    "unbalanced": ("", "or add rows of the other kind"),
    "skipped": ("", "it is skipped, as config.data.max_bad_rows allows"),
    "untrained": (
        "no trained token within config.data.max_length, so the row is dropped",
        "raise config.data.max_length, shorten the prompt or remove the row",
    ),
    "end_unknown": (
        "an answer ends with a special token at which generation does not stop, here or in an export",
        "add its id to eos_token_id in the generation_config.json of the base model",
    ),
    "leak_near": (
        "rows of the evaluation have a near copy in training",
        "look at the pairs; python -m ftjax.curate dedup --method near removes them before splitting",
    ),
    "contradiction": (
        "the same prompt has several answers",
        "keep the right one, if they contradict each other; for samples of one question it is meant",
    ),
    "leak_sampled": (
        "prompts of the evaluation are also trained on, with several answers",
        "if these are not samples of one question, remove them from one side",
    ),
    "contradicted_label": (
        "the same answer to the same prompt is called good here and bad there",
        "keep one of the rows",
    ),
    "duplicate": ("exact copies of an earlier row", "python -m ftjax.curate dedup removes them"),
    "near_duplicate": (
        f"nearly the same as an earlier row (similarity {NEAR:g} or more)",
        "python -m ftjax.curate dedup --method near removes them",
    ),
    "unanswered": (
        "the last turn is of the user or a tool, and nothing answers it",
        "add the answer or take the turn off: nothing is learned from it",
    ),
    "truncated": (
        "longer than config.data.max_length and cut on the right: the end of the answer, and its end token, are lost",
        "raise config.data.max_length or shorten the rows",
    ),
    "length": (
        "a length far from all others",
        "look at them: empty or run-together rows are often mistakes of a conversion",
    ),
    "garbled": (
        "replacement or control characters, or text decoded with the wrong encoding",
        "read the original again as UTF-8",
    ),
    "special_in_prompt": (
        "a special token of the tokenizer stands in the text, and is read as the control token that it is",
        "take it out, unless the text was rendered with a chat template on purpose",
    ),
    "eval_untrained": (
        "an evaluation row has no trained token within config.data.max_length, and no part in the loss",
        "raise config.data.max_length, shorten the prompt or remove the row",
    ),
    "refusal": (
        "an answer that speaks of itself as an AI language model",
        "remove the row unless the model is to speak so",
    ),
    "mixture": (f"a source gives less than {SMALL_SHARE:.0%} of an epoch's rows", "raise its weight, or leave it out"),
}
_WARNINGS |= {
    f"private_{pattern}": (f"what looks like {what}", "remove or replace them if they are real")
    for pattern, what in private.PATTERNS.items()
}
FINDING_KINDS = {code: Kind(ERROR, *texts) for code, texts in _ERRORS.items()}
FINDING_KINDS |= {code: Kind(WARNING, *texts) for code, texts in _WARNINGS.items()}


@dataclass(frozen=True)
class Finding:
    """One kind of trouble in a data set.

    Attributes:
      severity: "error" (training on the data, or its evaluation, would be in vain) or "warning".
      code: a key of FINDING_KINDS.
      origin: the first place, "file.jsonl:12"; "" where it concerns the whole set.
      message: what is wrong, how often, where (at most three places) and what to do; one line.
      count: how many rows it concerns.
      places: the first three.
    """

    severity: str
    code: str
    origin: str
    message: str
    count: int = 1
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.code}]"


@dataclass
class _Group:
    code: str
    what: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def finding(self, rows: int) -> Finding:
        """The finding among so many rows; 0: their number is not known."""
        where = ", ".join(self.places)
        if len(self.places) == 1 and self.count == 1:
            text = f"{where}: {self.what}"
        elif self.places:
            more = ", ..." if self.count > len(self.places) else ""
            text = f"{self.count:,} rows: {self.what}: {where}{more}"
        else:
            text = self.what
        origin = self.places[0].split(" (")[0] if self.places else ""
        severity, _, fix = FINDING_KINDS[self.code]
        least, why = MATTERS.get(self.code, (0, ""))
        if self.count < least * rows:
            severity = WARNING
            text += f" ({self.count:,} of {rows:,} rows, an error from {least:.0%} on: {why})"
        return Finding(severity, self.code, origin, f"{text}; {fix}", self.count, tuple(self.places))


class Findings:
    """Gathers findings in memory that does not grow with their number: ten thousand equal ones are one line."""

    def __init__(self):
        self._groups: dict[tuple[str, str], _Group] = {}

    def add(self, code: str, place: str = "", detail: str = "", count: int = 1, what: str = "") -> None:
        """One more row (or `count` rows) with a finding.

        Args:
          code: a key of FINDING_KINDS.
          place: where it is, "file.jsonl:12"; "" for the whole set.
          detail: is shown behind the place, "as rows.jsonl:3".
          what: what is wrong, instead of the words of the kind.
        """
        what = what or FINDING_KINDS[code].what
        group = self._groups.setdefault(_key(code, what), _Group(code, what))
        group.count += count
        if place and len(group.places) < _PLACES:
            group.places.append(f"{place} ({detail})" if detail else place)

    def wants_place(self, code: str) -> bool:
        """Whether the place of one more finding in the words of its kind would be kept."""
        group = self._groups.get(_key(code, FINDING_KINDS[code].what))
        return group is None or len(group.places) < _PLACES

    def all(self, checked: int = 0, evaluated: int = 0) -> list[Finding]:
        """Errors first, then warnings, each in the order in which they were first met.

        checked: rows that were looked at; evaluated: those among them of the evaluation, of which leaks are a share.
        """
        findings = [
            group.finding(evaluated if group.code.startswith("leak") else checked) for group in self._groups.values()
        ]
        return sorted(findings, key=lambda finding: finding.severity != ERROR)


def _key(code: str, what: str) -> tuple[str, str]:
    return code, _VARIES.sub("#", what)
