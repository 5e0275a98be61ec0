"""scripts/ppo.py: the table of its runs. What it trains takes an hour and more."""

import json

from support import ROOT


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
