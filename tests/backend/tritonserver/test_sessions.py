"""Sessions: what a turn keeps, LMDeploy's codes, and the limits."""

from typing import Any

import pytest


def store(**limits: int) -> Any:
    from turbotriton.backend.tritonserver.sessions import SessionStore

    return SessionStore(**limits)


def begin(sessions: Any, session_id: int, ids: list[int], **how: Any) -> Any:
    defaults = {"start": False, "end": False, "step": None, "seed": None, "session_len": 20, "request": object()}
    return sessions.begin(session_id, ids, **defaults | how)


def turn(sessions: Any, session_id: int, ids: list[int], **how: Any) -> Any:
    """A whole turn that generates nothing."""
    session = begin(sessions, session_id, ids, **how)
    sessions.done(session_id, session)
    return session


def refused(code: int, call: Any) -> None:
    from turbotriton.backend.tritonserver.sessions import SessionError

    with pytest.raises(SessionError, match=rf"^TurboMind execute failure:  {code} \(") as caught:
        call()
    assert caught.value.code == code


def test_turns_append_to_what_the_session_has() -> None:
    sessions = store()
    turn(sessions, 1, [5, 6], start=True)
    assert turn(sessions, 1, [7]).token_ids == [5, 6, 7]
    assert turn(sessions, 1, []).token_ids == [5, 6, 7]


@pytest.mark.parametrize(
    ("step", "kept"), [(None, [5, 6, 7]), (0, []), (1, [5]), (3, [5, 6, 7]), (4, [5, 6, 7]), (-1, [5, 6, 7])]
)
def test_step_rewinds_and_is_ignored_outside_the_stored_length(step: int | None, kept: list[int]) -> None:
    sessions = store()
    turn(sessions, 1, [5, 6, 7], start=True)
    assert turn(sessions, 1, [9], step=step).token_ids == [*kept, 9]


def test_start_replaces_a_known_session_and_its_seed() -> None:
    sessions = store()
    turn(sessions, 1, [5, 6], start=True, seed=3)
    session = turn(sessions, 1, [7], start=True, seed=4, step=1)
    assert (session.token_ids, session.seed) == ([7], 4)


def test_the_seed_is_read_at_the_start_only() -> None:
    sessions = store()
    turn(sessions, 1, [5], start=True, seed=3)
    assert turn(sessions, 1, [6], seed=4).seed == 3


def test_end_erases_the_session_when_its_request_is_done() -> None:
    sessions = store()
    session = begin(sessions, 1, [5], start=True, end=True)
    assert sessions.find(1) is session
    sessions.done(1, session)
    assert len(sessions) == 0


def test_unknown_session_is_code_1() -> None:
    sessions = store()
    refused(1, lambda: begin(sessions, 1, [5]))
    refused(1, lambda: sessions.stop(1, start=False, end=False))
    assert len(sessions) == 0


def test_start_with_stop_is_code_1() -> None:
    refused(1, lambda: store().stop(1, start=True, end=False))


def test_a_second_request_of_a_running_session_is_code_3_and_changes_nothing() -> None:
    sessions = store()
    session = begin(sessions, 1, [5], start=True)
    refused(3, lambda: begin(sessions, 1, [6]))
    refused(3, lambda: begin(sessions, 1, [6], start=True, end=True))
    assert (session.token_ids, session.ends_when_done) == ([5], False)
    assert sessions.find(1) is session


def test_stop_of_an_idle_session_is_code_4_and_erases_it_with_end() -> None:
    sessions = store()
    turn(sessions, 1, [5], start=True)
    refused(4, lambda: sessions.stop(1, start=False, end=False))
    assert sessions.stop(1, start=False, end=True).running is None
    assert sessions.find(1) is None


def test_stop_names_the_running_request_and_end_erases_after_it() -> None:
    sessions = store()
    session = begin(sessions, 1, [5], start=True, request="the interrupt")
    assert sessions.stop(1, start=False, end=True).running == "the interrupt"
    assert sessions.find(1) is session
    sessions.done(1, session)
    assert sessions.find(1) is None


@pytest.mark.parametrize("how", [{"start": True}, {}])
def test_more_than_session_len_is_code_6_and_changes_nothing(how: dict[str, bool]) -> None:
    sessions = store()
    turn(sessions, 1, [5] * 4, start=True)
    assert len(turn(sessions, 1, [6] * 16, step=4).token_ids) == 20
    refused(6, lambda: begin(sessions, 1, [6] * 21, **how))
    refused(6, lambda: begin(sessions, 1, [6] * 17, step=4))
    session = sessions.find(1)
    assert (len(session.token_ids), session.running) == (20, None)


def test_a_failed_turn_leaves_what_was_kept() -> None:
    sessions = store()
    turn(sessions, 1, [5, 6, 7], start=True)
    session = begin(sessions, 1, [8, 9], step=2)
    session.token_ids += [10, 11]
    sessions.failed(1, session)
    assert (session.token_ids, session.running) == ([5, 6], None)
    assert turn(sessions, 1, [12]).token_ids == [5, 6, 12]


def test_a_failed_last_turn_erases_the_session() -> None:
    sessions = store()
    sessions.failed(1, begin(sessions, 1, [5], start=True, end=True))
    assert len(sessions) == 0


def test_the_least_recently_used_idle_session_goes_first() -> None:
    sessions = store(max_sessions=3)
    for session_id in (1, 2, 3):
        turn(sessions, session_id, [5], start=True)
    turn(sessions, 1, [6])
    turn(sessions, 4, [5], start=True)
    assert [session_id for session_id in range(1, 5) if sessions.find(session_id)] == [1, 3, 4]
    refused(1, lambda: begin(sessions, 2, [6]))


def test_tokens_are_bounded_over_all_sessions() -> None:
    sessions = store(max_tokens=10)
    turn(sessions, 1, [5] * 4, start=True)
    turn(sessions, 2, [5] * 4, start=True)
    turn(sessions, 3, [5] * 5, start=True)
    assert [session_id for session_id in (1, 2, 3) if sessions.find(session_id)] == [2, 3]
    assert sessions.num_tokens == 9


def test_running_sessions_are_never_evicted() -> None:
    sessions = store(max_sessions=1, max_tokens=3)
    running = [begin(sessions, session_id, [5] * 3, start=True) for session_id in (1, 2, 3)]
    assert len(sessions) == 3
    for session_id, session in zip((1, 2, 3), running, strict=True):
        sessions.done(session_id, session)
    turn(sessions, 4, [5], start=True)
    assert [session_id for session_id in (1, 2, 3, 4) if sessions.find(session_id)] == [4]
