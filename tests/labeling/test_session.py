"""Each labeler gets pairs of their own, but for those that all share; nothing is asked twice, and undo goes back."""

import pytest
from support.labeling import Clock, make_pairs, session_of

from ftjax.errors import UserError
from ftjax.labeling.session import Stale, name_of


def judge(session, who, choice="left"):
    """Returns the pair judged."""
    pair = session.current(who).pair
    session.judge(who, pair.id, choice)
    return pair


def test_pairs_come_in_their_order_and_the_side_is_drawn_and_recorded(tmp_path):
    pairs = make_pairs(tmp_path, prompts=60)
    session, kept = session_of(tmp_path, pairs, seed=3)
    for pair in pairs:
        shown = session.current("anna")
        assert shown.pair == pair
        assert session.current("anna") == shown  # as after a page is loaded again
        session.judge("anna", pair.id, "left")
        label = kept.labels[pair.id]["anna"]
        assert (label.choice, label.left) == (shown.left, shown.left)
    assert session.current("anna") is None
    lefts = [kept.labels[pair.id]["anna"].left for pair in pairs]
    assert 15 < lefts.count("a") < 45
    session.undo("anna")
    session.judge("anna", pairs[-1].id, "right")
    last = kept.labels[pairs[-1].id]["anna"]
    assert last.left == lefts[-1] != last.choice


def test_two_labelers_share_the_overlap_and_nothing_else(tmp_path):
    pairs = make_pairs(tmp_path, prompts=100)
    session, _ = session_of(tmp_path, pairs, overlap=0.2)
    mine = {"anna": [], "ben": []}
    while any(session.current(who) for who in mine):
        shown = {who: session.current(who) for who in mine}
        for who, found in mine.items():
            if shown[who]:
                found.append(judge(session, who, "tie").id)
    assert len(set(mine["anna"])) == len(mine["anna"])
    shared = set(mine["anna"]) & set(mine["ben"])
    assert set(mine["anna"]) | set(mine["ben"]) == {pair.id for pair in pairs}
    assert 0.1 < len(shared) / 100 < 0.3
    assert len(mine["anna"]) > 45 < len(mine["ben"])
    late, _ = session_of(
        tmp_path, pairs, overlap=0.2
    )  # somebody new, after a restart: all that is shared, nothing else
    found = set()
    while late.current("carl"):
        found.add(judge(late, "carl").id)
    assert found == shared


def test_a_pair_that_somebody_has_is_free_again_when_they_leave(tmp_path):
    pairs = make_pairs(tmp_path, prompts=2)
    session, _ = session_of(tmp_path, pairs)
    assert [session.current(who).pair for who in ("anna", "ben")] == pairs
    assert session.current("carl") is None
    assert session.progress("carl") == (0, 0, None, 2)
    session.leave("anna")
    assert session.current("carl").pair == pairs[0]
    with pytest.raises(Stale):
        session.judge("anna", pairs[0].id, "left")


def test_a_pair_that_somebody_has_for_too_long_goes_to_the_next(tmp_path):
    pairs, clock = make_pairs(tmp_path, prompts=1), Clock()
    session, kept = session_of(tmp_path, pairs, clock=clock)
    assert session.current("anna").pair == pairs[0]
    clock.seconds += 1799
    assert session.current("ben") is None
    clock.seconds += 2  # anna may still judge it, as long as nobody else has it
    assert session.progress("ben") == (0, 1, None, 0)
    assert session.current("anna").pair == pairs[0]
    assert judge(session, "ben") == pairs[0]
    with pytest.raises(Stale):
        session.judge("anna", pairs[0].id, "left")
    assert list(kept.labels[pairs[0].id]) == ["ben"]


def test_a_skipped_pair_stays_open_for_others_only(tmp_path):
    (pair,) = make_pairs(tmp_path, prompts=1)
    session, kept = session_of(tmp_path, [pair])
    judge(session, "anna", "skip")
    assert session.current("anna") is None
    assert session.current("ben").pair == pair
    session.undo("anna")  # ben has it now
    assert session.current("anna") is None
    judge(session, "ben", "tie")
    assert session.current("anna") is None
    assert kept.labels[pair.id].keys() == {"ben"}


def test_undo_goes_back_over_several_also_after_a_restart(tmp_path):
    pairs = make_pairs(tmp_path, prompts=4)
    session, kept = session_of(tmp_path, pairs)
    assert not session.can_undo("anna")
    session.undo("anna")
    for _ in range(3):
        judge(session, "anna")
    session, kept = session_of(tmp_path, pairs)
    assert session.current("anna").pair == pairs[3]
    session.undo("anna")
    assert session.current("ben").pair == pairs[3]  # which anna had before
    session.undo("anna")
    assert session.current("anna").pair == pairs[1]
    assert kept.labels.keys() - {pairs[0].id} == {pairs[1].id, pairs[2].id}
    assert [bool(kept.labels[pair.id]) for pair in pairs[:3]] == [True, False, False]
    judge(session, "anna", "tie")
    assert session.current("anna").pair == pairs[2]


def test_a_second_window_cannot_judge_what_the_first_one_judged(tmp_path):
    session, _ = session_of(tmp_path, make_pairs(tmp_path))
    pair = judge(session, "anna")
    with pytest.raises(Stale):
        session.judge("anna", pair.id, "right")
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 1


def test_progress_and_speed(tmp_path):
    clock = Clock()
    session, kept = session_of(tmp_path, make_pairs(tmp_path, prompts=9), clock=clock)
    for seconds in (10, 20, 3600, 10, 20.04):  # one of them at lunch
        session.current("anna")
        clock.seconds += seconds
        judge(session, "anna")
    assert session.progress("anna") == (5, 4, 180, 0)
    assert [label["anna"].seconds for label in kept.labels.values()] == [10, 20, 3600, 10, 20]
    assert session.progress("ben") == (0, 4, None, 0)


@pytest.mark.parametrize("name", ["", "  ", "x" * 65, "a\x1bb", "a\u202eb", None, 7])
def test_names_are_short_and_printable(name):
    assert name_of("  Anna  Berg ") == "Anna Berg"
    with pytest.raises(UserError, match="1 to 64 printable characters"):
        name_of(name)
