"""The kinds of findings by their codes: how bad each is, what is said of it, and what to do."""

from ftjax.data.audit import private
from ftjax.data.audit.findings import ERROR, WARNING

NEAR = 0.8  # similarity from which two rows count as near duplicates
MAX_DROPPED = 0.05  # as `tokenize.tokenize`
SMALL_SHARE = 0.01  # of the rows: a source that gives less is lost in the mixture

# code -> severity, what is wrong, what to do.
KINDS = {
    "refused": (ERROR, "", "or allow some with config.data.max_bad_rows"),
    "skipped": (WARNING, "", "it is skipped, as config.data.max_bad_rows allows"),
    "empty": (ERROR, "no rows", "fill the source or name another"),
    "few": (
        ERROR,
        "an epoch does not fill one batch",
        "set config.data.batch_size to what an epoch has, or less, or add data",
    ),
    "dropped": (
        ERROR,
        f"more than {MAX_DROPPED:.0%} of the rows have no trained token within config.data.max_length",
        "raise config.data.max_length, shorten the prompts or remove the rows",
    ),
    "untrained": (
        WARNING,
        "no trained token within config.data.max_length, so the row is dropped",
        "raise config.data.max_length, shorten the prompt or remove the row",
    ),
    "double_bos": (ERROR, "starts with two BOS tokens", "remove it from the text or from the chat template"),
    "end_untrained": (
        ERROR,
        "no end token is trained in the whole set, so the model would never learn to stop",
        "end the turns in the chat template with the end token that config.json and generation_config.json name; where "
        "rows are cut, raise config.data.max_length",
    ),
    "end_masked": (
        ERROR,
        "an answer is trained, but not the end token after it",
        "let the template's {% generation %} block hold the end token",
    ),
    "pad_is_end": (
        ERROR,
        "the padding token is also the end token and is masked with the padding, so the model would not learn to stop",
        "give the tokenizer a padding token of its own",
    ),
    "empty_turn": (ERROR, "an empty assistant turn", "write the answer or remove the turn"),
    "no_answer": (ERROR, "a prompt without an answer", "write the answer or remove the row"),
    "same_pair": (ERROR, "the chosen and the rejected answer are the same", "correct the pair or remove the row"),
    "leak": (
        ERROR,
        "rows of the evaluation are also trained on (same prompt, same answer)",
        "remove them from one side (python -m ftjax.curate split keeps prompts apart), or hold rows out with "
        "config.data.holdout",
    ),
    "leak_prompt": (
        ERROR,
        "prompts of the evaluation are also trained on, with another answer",
        "remove them from one side; python -m ftjax.curate split keeps all answers to a prompt together",
    ),
    "leak_near": (
        WARNING,
        "rows of the evaluation have a near copy in training",
        "look at the pairs; python -m ftjax.curate dedup --method near removes them before splitting",
    ),
    "contradiction": (
        WARNING,
        "the same prompt has several answers",
        "keep the right one, if they contradict each other; for samples of one question it is meant",
    ),
    "leak_sampled": (
        WARNING,
        "prompts of the evaluation are also trained on, with several answers",
        "if these are not samples of one question, remove them from one side",
    ),
    "contradicted_label": (
        WARNING,
        "the same answer to the same prompt is called good here and bad there",
        "keep one of the rows",
    ),
    "duplicate": (WARNING, "exact copies of an earlier row", "python -m ftjax.curate dedup removes them"),
    "near_duplicate": (
        WARNING,
        f"nearly the same as an earlier row (similarity {NEAR:g} or more)",
        "python -m ftjax.curate dedup --method near removes them",
    ),
    "truncated": (
        WARNING,
        "longer than config.data.max_length and cut on the right: the end of the answer, and its end token, are lost",
        "raise config.data.max_length or shorten the rows",
    ),
    "length": (
        WARNING,
        "a length far from all others",
        "look at them: empty or run-together rows are often mistakes of a conversion",
    ),
    "garbled": (
        WARNING,
        "replacement or control characters, or text decoded with the wrong encoding",
        "read the original again as UTF-8",
    ),
    "special_in_text": (
        ERROR,
        "a special token of the tokenizer stands in the text of an answer, and would be learned as the control token "
        "that it is",
        "take it out of the text; the chat template writes those that belong there",
    ),
    "special_in_prompt": (
        WARNING,
        "a special token of the tokenizer stands in the text, and is read as the control token that it is",
        "take it out, unless the text was rendered with a chat template on purpose",
    ),
    "eval_untrained": (
        WARNING,
        "an evaluation row has no trained token within config.data.max_length, and no part in the loss",
        "raise config.data.max_length, shorten the prompt or remove the row",
    ),
    "eval_empty": (
        ERROR,
        "no evaluation row has a trained token within config.data.max_length",
        "raise config.data.max_length, give an answer weight 1, or name other rows",
    ),
    "refusal": (
        WARNING,
        "an answer that speaks of itself as an AI language model",
        "remove the row unless the model is to speak so",
    ),
    "mixture": (
        WARNING,
        f"a source gives less than {SMALL_SHARE:.0%} of an epoch's rows",
        "raise its weight, or leave it out",
    ),
}
KINDS |= {
    f"private_{kind}": (WARNING, f"what looks like {what}", "remove or replace them if they are real")
    for kind, what in private.KINDS.items()
}
