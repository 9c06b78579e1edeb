"""Scheduling against a deterministic fake runner: exact plans, exact block ids, and a property over random traffic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.backend.scheduling.fakes import Bench, oracle

from turbotriton.backend.scheduling.plan import StepPlan
from turbotriton.contract.errors import InvalidInputError, UnavailableError
from turbotriton.contract.ini import SCHEDULE_POLICIES, RopeConfig
from turbotriton.contract.wire import GenerateRequest, SamplingParams

DYNAMIC_ROPE = RopeConfig(dim=8, theta=10000.0, scaling_type="dynamic", factor=2.0, max_position_embeddings=16)


def test_step_mixes_decodes_and_a_prefill_chunk_under_the_budget_decodes_first() -> None:
    bench = Bench(budget=6)
    bench.add(1, range(5), 8)
    bench.step()
    bench.add(2, range(100, 112), 2)
    plan = bench.step()
    assert [(row.start, row.num_tokens, row.samples) for row in plan.rows] == [(5, 1, True), (0, 5, False)]
    assert [joined.block_ids for joined in plan.joined] == [(2, 3, 4)]
    bench.run()
    assert bench.tokens(1) == oracle(range(5), 8)
    assert bench.tokens(2) == oracle(range(100, 112), 2)


def chunks(plan: StepPlan) -> list[tuple[int, int]]:
    """(start, num_tokens) of the rows that are no decodes."""
    return [(row.start, row.num_tokens) for row in plan.rows if row.num_tokens > 1]


def test_a_prompt_beside_as_many_decodes_comes_in_small_chunks() -> None:
    bench = Bench(num_blocks=16, budget=12, beside_decodes=6)
    bench.add(1, range(5), 8)
    bench.add(2, range(20, 25), 8)
    assert chunks(bench.step()) == [(0, 5), (0, 5)]  # nobody decodes yet: the whole budget
    bench.add(3, range(100, 110), 9)
    plans = [bench.step() for _ in range(4)]
    assert [chunks(plan) for plan in plans] == [[(0, 4)], [(4, 4)], [(8, 2)], []]
    assert [sum(row.num_tokens == 1 for row in plan.rows) for plan in plans] == [2, 2, 2, 3]  # six tokens a step
    bench.run()
    assert [bench.tokens(i) for i in (1, 2, 3)] == [oracle(range(5), 8), oracle(range(20, 25), 8), oracle(range(100, 110), 9)]


def test_the_longest_decodes_stand_first_whoever_came_first() -> None:
    bench = Bench(num_blocks=24, budget=64, max_batch_size=6)
    for request_id, length in ((1, 3), (2, 9), (3, 5)):
        bench.add(request_id, range(10 * request_id, 10 * request_id + length), 6)
    bench.step()
    bench.add(4, range(100, 112), 6)
    plans = [bench.step(), bench.step()]
    assert [(row.start, row.num_tokens) for row in plans[0].rows] == [(9, 1), (5, 1), (3, 1), (0, 12)]
    assert [row.start for row in plans[1].rows] == [12, 10, 6, 4]
    bench.run()
    assert [bench.tokens(i) for i in (1, 2, 3)] == [oracle(range(10 * i, 10 * i + n), 6) for i, n in ((1, 3), (2, 9), (3, 5))]


def test_small_chunks_are_shared_by_the_prompts_of_a_step() -> None:
    bench = Bench(num_blocks=24, budget=12, beside_decodes=7, max_batch_size=6)
    for request_id in (1, 2, 3):
        bench.add(request_id, range(10 * request_id, 10 * request_id + 3), 9)
    bench.step()
    bench.add(4, range(100, 103), 9)
    bench.add(5, range(110, 115), 9)
    assert [chunks(bench.step()) for _ in range(3)] == [[(0, 3)], [(1, 3)], []]  # and single tokens: seven a step


def test_of_a_long_queue_a_step_takes_a_quarter() -> None:
    bench = Bench(num_blocks=60, budget=40, beside_decodes=4, max_batch_size=6)
    for request_id in (1, 2, 3):
        bench.add(request_id, range(10 * request_id, 10 * request_id + 3), 20)
    bench.step()
    bench.add(4, range(100, 140), 21)
    bench.add(5, range(200, 224), 20)
    taken = [[row.num_tokens for row in bench.step().rows if row.num_tokens > 1] for _ in range(6)]
    # With the three decodes a quarter of the 64, 51, 42, 35, 30 and 26 that wait; of the last, one is the next prompt's first.
    assert taken == [[13], [9], [7], [5], [4], [2]]
    bench.run()
    assert bench.tokens(4) == oracle(range(100, 140), 21)


def test_prompts_get_the_whole_budget_while_more_wait_for_their_first_token_than_decode() -> None:
    bench = Bench(num_blocks=24, budget=12, beside_decodes=4)
    bench.add(1, range(5), 8)
    bench.step()
    for request_id in (2, 3):
        bench.add(request_id, range(100 * request_id, 100 * request_id + 10), 9)
    assert chunks(bench.step()) == [(0, 10)]  # one decodes, two wait; one token of the budget is left for the second of them


def test_second_prompt_computes_only_after_the_last_full_cached_block() -> None:
    bench = Bench()
    bench.add(1, range(10), 1)
    bench.run()
    bench.add(2, range(10), 1)
    plan = bench.step()
    assert plan.joined[0].block_ids[:2] == (0, 1)
    assert (plan.rows[0].start, plan.rows[0].num_tokens) == (8, 2)
    assert bench.deltas[-1].delta.num_cached_tokens == 8


def test_requests_of_another_rotary_base_share_no_block() -> None:
    bench = Bench(num_blocks=16, rope=DYNAMIC_ROPE)
    bench.add(1, range(10), 1)
    bench.run()
    bench.add(2, range(10), 20)  # may grow past max_position_embeddings: its keys are rotated otherwise
    plan = bench.step()
    assert plan.rows[0].start == 0
    assert not {0, 1} & set(plan.joined[0].block_ids)
    bench.run()
    assert bench.tokens(2) == oracle(range(10), 20)


def test_fully_cached_prompt_still_computes_its_last_block() -> None:
    bench = Bench()
    for request_id in (1, 2):
        bench.add(request_id, range(8), 1)
        bench.run()
    assert [(row.start, row.num_tokens, row.samples) for plan in bench.plans for row in plan.rows] == [(0, 8, True), (4, 4, True)]
    assert bench.tokens(2) == bench.tokens(1) == oracle(range(8), 1)


def test_two_running_requests_share_the_full_blocks_of_a_common_prompt() -> None:
    bench = Bench()
    bench.add(1, range(9), 8)
    bench.step()
    bench.add(2, range(9), 8)
    plan = bench.step()
    assert plan.joined[0].block_ids == (0, 1, 3)
    bench.scheduler.cancel("test", 1)
    bench.run()
    assert bench.tokens(2) == oracle(range(9), 8)
    assert bench.scheduler.blocks.num_free_blocks == 8


def test_least_recently_freed_prefix_is_given_away_first() -> None:
    bench = Bench(num_blocks=4)
    bench.add(1, [1, 2, 3, 4, 5], 1)  # blocks 0, 1; free afterwards: 2 3 1 0
    bench.run()
    bench.add(2, [6, 7, 8, 9, 10], 1)  # blocks 2, 3; free afterwards: 1 0 3 2
    bench.run()
    bench.add(3, range(100, 108), 1)  # takes 1 and 0: the first prompt is forgotten, the second is not
    assert bench.step().joined[0].block_ids == (1, 0)
    bench.run()
    bench.add(4, [6, 7, 8, 9, 10], 1)
    bench.add(5, [1, 2, 3, 4, 5], 1)
    plan = bench.step()
    assert [row.start for row in plan.rows] == [4, 0]


def test_preempted_request_computes_again_only_what_was_given_away() -> None:
    bench = Bench(num_blocks=5)
    bench.add(1, range(7), 8)
    bench.add(2, range(100, 107), 8)
    bench.run()
    again = [(plan.joined[0], plan.rows) for plan in bench.plans[1:] if plan.joined]
    assert len(again) == bench.scheduler.num_preemptions == 1
    joined, rows = again[0]
    assert joined.num_prompt_tokens == 7
    assert list(joined.token_ids[7:]) == oracle(range(100, 107), 8)[: len(joined.token_ids) - 7]
    assert [row.start for row in rows if row.slot == joined.slot] == [4]  # the first block was still in the cache
    assert bench.tokens(2) == oracle(range(100, 107), 8)


def test_preempted_request_resumes_with_the_same_tokens() -> None:
    bench = Bench(num_blocks=6)
    prompts = {1: range(8), 2: range(100, 108), 3: range(200, 207)}
    for request_id, prompt in prompts.items():
        bench.add(request_id, prompt, 12)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    for request_id, prompt in prompts.items():
        assert bench.tokens(request_id) == oracle(prompt, 12)
        assert bench.reasons(request_id) == ["length"]


def test_lower_priority_value_is_admitted_first_then_arrival() -> None:
    bench = Bench(max_batch_size=1)
    for request_id, priority in ((1, 5), (2, 0), (3, 0)):
        bench.add(request_id, [request_id], 1, priority=priority)
    bench.run()
    assert [delta.request_id for _, delta in bench.deltas] == [2, 3, 1]


def test_the_longest_output_is_admitted_first_where_asked_for() -> None:
    bench = Bench(max_batch_size=1, schedule_policy="lof", session_len=20)
    for request_id, priority, count in ((1, 0, 3), (2, 1, 9), (3, 0, 5), (4, 0, 3), (5, 0, None)):
        bench.add(request_id, [request_id], count, priority=priority)
    bench.run()
    ended = [delta.request_id for _, delta in bench.deltas if delta.finish_reason is not None]
    assert ended == [5, 3, 1, 4, 2]  # the fifth may give as many as find room
    for request_id in (1, 2, 3, 4):
        assert bench.tokens(request_id) == oracle([request_id], (3, 9, 5, 3)[request_id - 1])


@pytest.mark.parametrize("policy", SCHEDULE_POLICIES)
def test_prompts_of_shorter_answers_are_spread_over_the_steps_of_longer_ones(policy: str) -> None:
    bench = Bench(num_blocks=60, budget=40, beside_decodes=16, max_batch_size=6, schedule_policy=policy)
    bench.add(1, range(38), 30)
    bench.add(2, range(100, 150), 15)
    bench.add(3, range(200, 210), 10)
    taken = [[row.num_tokens for row in bench.step().rows] for _ in range(10)]
    # All of the budget while nothing decodes, then half of beside_decodes: 8 tokens, though many wait.
    assert taken == [[38, 2], *[[1, 7]] * 6, [1, 6, 1], [1, 1, 6], [1, 1, 3]]
    bench.run()
    assert bench.tokens(3) == oracle(range(200, 210), 10)


def test_prompts_are_not_spread_where_nobody_said_how_long_the_answer_may_be() -> None:
    for counts in ((30, None), (None, 15)):
        bench = Bench(num_blocks=60, budget=40, beside_decodes=16, max_batch_size=6, session_len=100)
        bench.add(1, range(38), counts[0])
        bench.step()
        bench.add(2, range(100, 150), counts[1])
        assert [[row.num_tokens for row in bench.step().rows] for _ in range(4)] == [[1, 15], [1, 15], [1, 15], [1, 5]]


def test_of_requests_that_come_at_once_the_longest_output_is_first() -> None:
    """Those that come after a step are behind all that came before it, and those who named no number are as long as any."""
    bench = Bench(max_batch_size=1, session_len=20)
    for request_id, count in ((1, 3), (2, 3), (3, 5), (4, None)):
        bench.add(request_id, [request_id], count)
    bench.step()
    bench.add(5, [5], 9)
    bench.add(6, [6], 10)
    bench.run()
    assert [delta.request_id for _, delta in bench.deltas if delta.finish_reason is not None] == [4, 3, 1, 2, 6, 5]


def test_whoever_has_begun_is_not_held_up_by_longer_ones_that_come() -> None:
    """Blocks for 48 tokens; a request of 24, and one of 28 every seven steps: what has begun keeps its blocks, or gets them back first."""
    bench = Bench(num_blocks=12, max_batch_size=4, schedule_policy="lof", enable_prefix_caching=False)
    bench.add(0, range(4), 20)
    for step in range(60):
        if step % 7 == 1:
            bench.add(1 + step, range(step, step + 4), 24)
        bench.step()
        if bench.reasons(0):
            break
    assert bench.tokens(0) == oracle(range(4), 20)
    assert step < 30
    bench.run()


def test_who_began_first_keeps_its_blocks_longest() -> None:
    """Of a burst the long answer came last and begins first: the other makes room for it."""
    bench = Bench(num_blocks=10, budget=6, max_batch_size=4, enable_prefix_caching=False, session_len=64)
    bench.add(1, range(12), 13)
    bench.add(2, range(20, 32), 26)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert [joined.token_ids[0] for plan in bench.plans for joined in plan.joined] == [20, 0, 0], (
        "the first to begin was computed again"
    )
    assert bench.tokens(1) == oracle(range(12), 13)
    assert bench.tokens(2) == oracle(range(20, 32), 26)


def test_a_long_prompt_is_not_spread_past_the_answer_in_whose_shadow_it_was() -> None:
    """Three tokens beside a decode in each of 20 steps, and 29 of its own are left: an answer of eight ends before it, of nine not."""
    for count, num_tokens in ((8, 3), (9, 14)):
        bench = Bench(num_blocks=60, budget=40, beside_decodes=8, session_len=200)
        bench.add(1, range(38), 31)
        bench.step()
        bench.add(2, range(100, 160), count)
        assert chunks(bench.step()) == [(0, num_tokens)]
        bench.run()
        assert bench.tokens(2) == oracle(range(100, 160), count)


def test_no_new_token_prefills_and_ends_with_length() -> None:
    bench = Bench(budget=4)
    bench.add(1, range(10), 0)
    bench.run()
    assert (bench.tokens(1), bench.reasons(1), bench.scheduler.num_computed_tokens) == ([], ["length"], 10)


def test_generation_ends_at_session_len() -> None:
    bench = Bench(session_len=10)
    bench.add(1, range(7), None)
    bench.run()
    assert (bench.tokens(1), bench.reasons(1)) == (oracle(range(7), 3), ["length"])


def test_stop_rules() -> None:
    wanted = oracle([1, 2], 8)
    for rule in ({"stop_token_ids": (wanted[2],)}, {"stop_sequences": ((wanted[1], wanted[2]),)}):
        bench = Bench()
        bench.add(1, [1, 2], 8, **rule)
        bench.run()
        assert (bench.tokens(1), bench.reasons(1)) == (wanted[:3], ["stop"])
    for ignore_eos, count in ((False, 3), (True, 8)):
        bench = Bench(eos=(wanted[2],))
        bench.add(1, [1, 2], 8, ignore_eos=ignore_eos)
        bench.run()
        assert bench.tokens(1) == wanted[:count]
    bench = Bench()
    bench.add(1, [1, 2], 8, stop_token_ids=(wanted[2],), min_new_tokens=4)
    bench.run()
    assert bench.tokens(1) == wanted


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["queued", "prefilling", "decoding"])
def test_cancel_frees_the_blocks_at_once(steps: int) -> None:
    bench = Bench(budget=6)
    bench.add(1, range(10), 8)
    for _ in range(steps):
        bench.step()
    owned = bench.scheduler.cancel("test", 1)
    assert owned is not None
    assert owned.delta.finish_reason is not None
    assert owned.delta.finish_reason.value == "cancelled"
    assert bench.scheduler.blocks.num_free_blocks == 8
    assert bench.scheduler.cancel("test", 1) is None


def test_preempted_request_can_be_cancelled() -> None:
    bench = Bench(num_blocks=4)
    bench.add(1, range(7), 8)
    bench.add(2, range(100, 107), 8)
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert bench.scheduler.num_waiting == 1
    assert bench.scheduler.cancel("test", 2) is not None
    assert bench.scheduler.num_waiting == bench.scheduler.num_waiting_tokens == 0
    bench.run()
    assert bench.tokens(1) == oracle(range(7), 8)
    assert bench.scheduler.blocks.num_free_blocks == 4


def test_cancelled_requests_do_not_pile_up_behind_one_that_waits() -> None:
    bench = Bench(max_batch_size=1)
    bench.add(1, [1], 30)
    bench.add(2, [2], 1)
    bench.step()
    for request_id in range(3, 1003):
        bench.add(request_id, [3], 1, priority=1)
        bench.scheduler.cancel("test", request_id)
    assert len(bench.scheduler._waiting) < 100


def test_an_owner_that_is_gone_takes_only_its_own_requests_along() -> None:
    bench = Bench()
    bench.add(1, [1], 5)
    bench.scheduler.add("other", GenerateRequest(2, (2,), SamplingParams(max_new_tokens=5)))
    bench.step()
    assert [delta.request_id for _, delta in bench.scheduler.cancel_all("other")] == [2]
    bench.run()
    assert bench.tokens(1) == oracle([1], 5)


def test_deadline_ends_a_running_and_a_waiting_request() -> None:
    bench = Bench(max_batch_size=1)
    bench.add(1, [1], 20, deadline_ms=100)
    bench.add(2, [2], 20, deadline_ms=100)
    bench.step()
    bench.now = 0.2
    bench.run()
    assert bench.reasons(1) == bench.reasons(2) == ["deadline"]
    assert bench.scheduler.blocks.num_free_blocks == 8


def test_refusals_name_the_limit() -> None:
    bench = Bench(session_len=30, max_queued_requests=2, max_queued_tokens=20)
    with pytest.raises(InvalidInputError, match="too long"):
        bench.add(1, range(30), 1)
    with pytest.raises(InvalidInputError, match="outside the vocabulary"):
        bench.add(1, [1000], 1)
    with pytest.raises(InvalidInputError, match="logit_bias names token id 1000"):
        bench.add(1, [1], 1, logit_bias=((3, 1.0), (1000, 1.0)))
    bench.add(1, range(15), 1)
    with pytest.raises(UnavailableError, match="max_queued_tokens is 20"):
        bench.add(2, range(10), 1)
    bench.add(2, [1], 1)
    with pytest.raises(UnavailableError, match="max_queued_requests is 2"):
        bench.add(3, [1], 1)
    with pytest.raises(InvalidInputError, match="raise cache_max_entry_count"):
        Bench(num_blocks=2).add(1, range(8), 2)


def test_a_request_that_ends_while_its_next_step_runs_gives_up_that_row_alone() -> None:
    """The stop is seen one step late: its extra token is dropped, its blocks go to the next request, the neighbour loses nothing."""
    prompt = [1, 2, 3]
    wanted = oracle(prompt, 3)
    bench = Bench(num_blocks=4, max_batch_size=2, overlap=True)
    bench.add(1, prompt, 8, stop_token_ids=(wanted[1],))
    bench.add(2, [9, 9], 5)
    bench.add(3, range(20, 28), 3)  # waits for a slot
    bench.run()
    assert (bench.tokens(1), bench.reasons(1)) == (wanted[:2], ["stop"])
    assert bench.tokens(2) == oracle([9, 9], 5)
    assert bench.tokens(3) == oracle(range(20, 28), 3)
    rows = [row.start for plan in bench.plans for row in plan.rows if row.slot == bench.plans[0].rows[0].slot and row.samples]
    assert rows[:3] == [0, 3, 4], "the third row was scheduled before the stop was seen"


def test_no_row_is_scheduled_past_the_last_token_asked_for() -> None:
    bench = Bench(overlap=True)
    bench.add(1, [1, 2, 3], 4)
    bench.run()
    assert [row.start for plan in bench.plans for row in plan.rows] == [0, 3, 4, 5]


def test_what_depends_on_the_last_token_waits_for_it() -> None:
    bench = Bench(overlap=True)
    bench.add(1, [1, 2, 3], 4)
    bench.step()
    assert not bench.scheduler.needs_every_token
    bench.add(2, [4, 5], 4, bad_sequences=((6, 7),))
    bench.step()
    assert bench.scheduler.needs_every_token


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 14), st.integers(0, 10), st.integers(0, 2)),
        st.tuples(st.just("cancel"), st.integers(0, 15), st.just(0), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, budget=st.integers(1, 9), policy=st.sampled_from(SCHEDULE_POLICIES))
def test_random_traffic_leaks_no_block_and_ends_every_request_once(
    actions: list[tuple[str, int, int, int]], budget: int, policy: str, overlap: bool
) -> None:
    """Prompts begin alike often enough for prefix hits; the longer ones get another rotary base. FakeRunner checks each read."""
    bench = Bench(
        num_blocks=6,
        budget=budget,
        max_batch_size=3,
        rope=DYNAMIC_ROPE,
        overlap=overlap,
        schedule_policy=policy,
        beside_decodes=8,
    )
    asked: dict[int, tuple[range, int]] = {}
    for kind, a, b, c in actions:
        if kind == "add":
            request_id = len(asked)
            asked[request_id] = (range(c, c + a), b)
            bench.add(request_id, range(c, c + a), b, priority=c)
        elif kind == "cancel":
            owned = bench.scheduler.cancel("test", a)
            bench.deltas += [owned] if owned else []
        else:
            bench.step()
    bench.run()
    assert bench.scheduler.blocks.num_free_blocks == 6
    assert bench.scheduler.num_waiting == bench.scheduler.num_waiting_tokens == 0
    assert not any(bench.scheduler.blocks._ref_counts)
    for request_id, (prompt, count) in asked.items():
        (reason,) = bench.reasons(request_id)
        tokens = bench.tokens(request_id)
        assert tokens == oracle(prompt, count)[: len(tokens)]
        assert reason == "cancelled" or len(tokens) == count
