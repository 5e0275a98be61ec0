"""scripts/ppo.py: the table of its runs. What it trains takes an hour and more."""

import json
from collections import Counter

from support import ROOT

from ftjax.tasks import support_ticket


def test_the_table_compares_the_same_tickets_before_and_after(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import ppo

    records = [{"step": 0, "eval_general/change": 0.0}]
    of_rounds = {
        "objective/scores": lambda number: number / 10,
        "objective/kl": float,
        "episode": lambda number: 8.0 * number,
    }
    for step in range(1, 21):  # two to a round
        records.append({"step": step} | {name: function((step + 1) // 2) for name, function in of_rounds.items()})
    records += [{"step": 20, "eval_general/change": 0.0312}]
    samples = [{"step": step, "score": float(i < right)} for step, right in ((0, 4), (20, 6)) for i in range(10)]
    for name, lines in (("metrics", records), ("samples", samples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    *_, row = ppo.table({"PPO": tmp_path}).splitlines()
    name, reward, kl, right, against, general = row.strip("| ").split(" | ")
    assert (name, reward, kl, right, general) == ("PPO", "0.20 to 0.90", "9.0", "40% to 60%", "+0.031")
    assert against.startswith("+20 % [")


def test_pairs_are_of_a_right_and_a_wrong_ticket_to_the_same_message(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import ppo

    (example,) = support_ticket.train_examples(1)
    right = example["messages"][-1]["content"]
    spaced = right.replace(":", ": ")  # right, too
    pairs = ppo.pairs_of(example, ["no", right, "", "no", spaced, "{}", "[]", "[1]"])
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        (right, "no"), (spaced, "{}"), (right, "[]")
    ]  # fmt: skip
    assert all(pair["prompt"] == example["messages"][:-1] for pair in pairs)
    assert ppo.pairs_of(example, [right, spaced]) == []
    assert ppo.pairs_of(example, ["no", "{}"]) == []


def test_every_issue_is_as_often_preferred_as_rejected(monkeypatch):
    """So that no issue is better than another whatever the message says."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import ppo

    first, *spare = support_ticket.train_examples(60)
    right, good = first["messages"][-1]["content"], ppo.issue_of(first["messages"])
    others = [issue for issue in support_ticket.ISSUES if issue != good]
    texts = [right] * 3 + [right.replace(good, issue) for issue in others[:2]] + ["no ticket"]
    pairs = ppo.balanced(ppo.pairs_of(first, texts), iter(spare))
    assert len(pairs) == 5  # the one of "no ticket" has no opposite
    sides = {side: Counter(ppo.issue_of(pair[side]) for pair in pairs) for side in ("chosen", "rejected")}
    assert sides["rejected"].pop(None) == 1
    assert sides["chosen"] - sides["rejected"] == Counter({good: 1})
    for pair in pairs:
        message = pair["prompt"]
        assert all(pair["chosen"][0] == e["messages"][-1] for e in spare if e["messages"][:-1] == message)
