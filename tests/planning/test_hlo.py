"""The reader of HLO on a program written by hand, whose loops, bytes and products are counted by hand too."""

import pytest

from ftjax.planning import hlo, traffic

# A loop of 5 whose counter lies in a fusion, and in it a loop that goes up by 2 from 1 to 9 (4 times).
PROGRAM = """HloModule test, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%next (p.0: s32[]) -> s32[] {
  %p.0 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %sum = s32[] add(%p.0, %one)
}

%inner_condition (a: (s32[], f32[8,4])) -> pred[] {
  %a = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  %end = s32[] constant(9)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%inner_body (b: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %b = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %two = s32[] constant(2)
  %up = s32[] add(%j, %two)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %w = f32[4,4]{1,0:T(8,128)S(1)} constant({...})
  %y = f32[8,4]{1,0:T(8,128)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,4]{1,0:T(8,128)}) tuple(%up, %y)
}

%outer_condition (c: (s32[], f32[8,4], /*index=2*/s32[])) -> pred[] {
  %c = (s32[], f32[8,4]{1,0:T(8,128)}, s32[]) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %last = s32[] get-tuple-element(%c), index=2
  ROOT %before = pred[] compare(%k, %last), direction=LT
}

%outer_body (d: (s32[], f32[8,4], /*index=2*/s32[])) -> (s32[], f32[8,4], s32[]) {
  %d = (s32[], f32[8,4]{1,0:T(8,128)}, s32[]) parameter(0)
  %m = s32[] get-tuple-element(%d), index=0
  %n = s32[] fusion(%m), kind=kLoop, calls=%next, metadata={op_name="a (bracket) in a name"}
  %v = f32[8,4]{1,0:T(8,128)} get-tuple-element(%d), index=1
  %stop = s32[] get-tuple-element(%d), index=2
  %first = s32[] constant(1)
  %start = (s32[], f32[8,4]{1,0:T(8,128)}) tuple(%first, %v)
  %loop = (s32[], f32[8,4]{1,0:T(8,128)}) while(%start), condition=%inner_condition, body=%inner_body
  %done = f32[8,4]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %all = (s32[], f32[8,4]{1,0:T(8,128)}, s32[]) tuple(%n, %done, %stop)
}

ENTRY %main (x.0: f32[8,4]) -> f32[8,4] {
  %x.0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %five = s32[] constant(5)
  %begin = (s32[], f32[8,4]{1,0:T(8,128)}, s32[]) tuple(%zero, %x.0, %five)
  %whole = (s32[], f32[8,4]{1,0:T(8,128)}, s32[]) while(%begin), condition=%outer_condition, body=%outer_body
  ROOT %result = f32[8,4]{1,0:T(8,128)} get-tuple-element(%whole), index=1
}
"""


def test_loops_in_loops_are_multiplied():
    module = hlo.parse(PROGRAM)
    times = {one.name: times for one, _, times in module.walk()}
    assert times["whole"] == 1
    assert times["n"] == times["loop"] == 5
    assert times["y"] == 20
    assert module.unknown_loops == []


def test_products_are_counted_in_every_round():
    assert traffic.matrix_flops(hlo.parse(PROGRAM)) == 20 * 2 * 8 * 4 * 4


def test_what_lies_in_vector_memory_costs_no_traffic():
    product = 2 * 8 * 4 * 4  # read and written; the weight is in S(1)
    assert traffic.memory_bytes(hlo.parse(PROGRAM)) == 20 * (product + 3 * 4) + 5 * 2 * 4  # and the counters


def test_a_stated_trip_count_is_taken():
    stated = PROGRAM.replace("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"}}')
    assert traffic.matrix_flops(hlo.parse(stated)) == 35 * 2 * 8 * 4 * 4


def test_a_loop_that_depends_on_data_is_counted_once_and_named():
    module = hlo.parse(
        PROGRAM.replace("%five = s32[] constant(5)", '%five = s32[] custom-call(), custom_call_target="f"')
    )
    assert traffic.matrix_flops(module) == 4 * 2 * 8 * 4 * 4
    assert module.unknown_loops == ["whole"]


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_replica_groups_in_every_spelling(text, groups):
    assert traffic.replica_groups(text, 8).tolist() == groups


def test_windows_meet_no_padding():
    """[3 batches of 5x7] times 7x2, as a convolution over the batch: the padded places multiply nothing."""
    text = """HloModule conv

ENTRY %main (a: f32[3,5,7], b: f32[3,7,2]) -> f32[5,2,3] {
  %a = f32[3,5,7]{2,1,0} parameter(0)
  %b = f32[3,7,2]{2,1,0} parameter(1)
  ROOT %c = f32[5,2,3]{1,0,2} convolution(%a, %b), window={WINDOW}, dim_labels=0bf_0io->bf0
}
"""
    text = text.replace("WINDOW", "size=3 stride=2 pad=2_2 lhs_dilate=3")
    assert traffic.matrix_flops(hlo.parse(text)) == 2 * 5 * 7 * 2 * 3


def test_experts_multiply_their_own_rows():
    """Six rows over three groups: in the text each row meets every kernel under a mask, on the chip its own only."""
    text = """HloModule ragged

%inside (a: f32[3,6,7], b: f32[3,7,2]) -> f32[6,2,3] {
  %a = f32[3,6,7]{2,1,0} parameter(0)
  %b = f32[3,7,2]{2,1,0} parameter(1)
  ROOT %c = f32[6,2,3]{1,0,2} convolution(%a, %b), window={WINDOW}, dim_labels=0bf_0io->bf0
}

ENTRY %main (a: f32[3,6,7], b: f32[3,7,2]) -> f32[6,2,3] {
  %a.1 = f32[3,6,7]{2,1,0} parameter(0)
  %b.1 = f32[3,7,2]{2,1,0} parameter(1)
  ROOT %d = f32[6,2,3]{1,0,2} fusion(%a.1, %b.1), kind=kOutput, calls=%inside, CONFIG
}
"""
    text = text.replace("WINDOW", "size=3 stride=2 pad=2_2 lhs_dilate=3")
    every = "backend_config={}"
    own = 'backend_config={"convolution_algorithm_config":{"is_ragged_dot":true,"num_groups_in_ragged_dot":"3"}}'
    assert traffic.matrix_flops(hlo.parse(text.replace("CONFIG", every))) == 3 * 2 * 6 * 7 * 2
    assert traffic.matrix_flops(hlo.parse(text.replace("CONFIG", own))) == 2 * 6 * 7 * 2


def test_what_is_gathered_beside_two_products_moves_once():
    """A part of [2,8] is gathered to [4,8] while two products run; each fusion hands the buffers on."""
    fusion = """%NAME (p: f32[2,8], w: f32[4,8], x: f32[4,4]) -> (f32[4,4], f32[2,8], f32[4,8]) {
  %p.NAME = f32[2,8]{1,0} parameter(0)
  %w.NAME = f32[4,8]{1,0} parameter(1)
  %x.NAME = f32[4,4]{1,0} parameter(2)
  %g.NAME = f32[4,8]{1,0} all-gather(%p.NAME), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  %y.NAME = f32[4,4]{1,0} dot(%x.NAME, %x.NAME), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t.NAME = (f32[4,4]{1,0}, f32[2,8]{1,0}, f32[4,8]{1,0}) tuple(%y.NAME, %p.NAME, %g.NAME)
}

"""
    entry = """ENTRY %main (p: f32[2,8], w: f32[4,8], x: f32[4,4]) -> f32[4,4] {
  %p = f32[2,8]{1,0} parameter(0)
  %w = f32[4,8]{1,0} parameter(1)
  %x = f32[4,4]{1,0} parameter(2)
  %a = (f32[4,4]{1,0}, f32[2,8]{1,0}, f32[4,8]{1,0}) fusion(%p, %w, %x), kind=kOutput, calls=%async_1
  %p.2 = f32[2,8]{1,0} get-tuple-element(%a), index=1
  %w.2 = f32[4,8]{1,0} get-tuple-element(%a), index=2
  %x.2 = f32[4,4]{1,0} get-tuple-element(%a), index=0
  %b = (f32[4,4]{1,0}, f32[2,8]{1,0}, f32[4,8]{1,0}) fusion(%p.2, %w.2, %x.2), kind=kOutput, calls=%async_2
  ROOT %out = f32[4,4]{1,0} get-tuple-element(%b), index=0
}
"""
    both = fusion.replace("NAME", "async_1") + fusion.replace("NAME", "async_2")
    products, gathered = 2 * (4 * 4 + 4 * 4) * 4, (2 * 8 + 4 * 8) * 4
    assert traffic.memory_bytes(hlo.parse("HloModule gather\n\n" + both + entry)) == products + gathered
