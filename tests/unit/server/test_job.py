import itertools

import pytest

from loramux.server.job import ENDS, IllegalTransition, Job, State

PATH = [State.ROUTED, State.MERGING, State.WAITING, State.PREFILL, State.DECODE, State.FINISHED]


def ticking() -> "itertools.count[float]":
    return itertools.count(0.0, 1.0)


def job() -> Job:
    ticks = ticking()
    return Job("j", "auto", clock=lambda: next(ticks))


def test_a_job_walks_its_states_and_stamps_each() -> None:
    walked = job()
    for state in PATH:
        walked.to(state)
    assert walked.ended
    assert [walked.stamps[state] for state in [State.RECEIVED, *PATH]] == list(range(7))
    assert walked.seconds(State.WAITING, State.DECODE) == 2
    assert walked.seconds(State.WAITING, State.ABORTED) is None


@pytest.mark.parametrize("reached", range(len(PATH)))
def test_only_the_next_state_is_legal_and_any_state_may_fail_or_abort(reached: int) -> None:
    legal = {PATH[reached], State.FAILED, State.ABORTED}
    if PATH[reached] is State.DECODE:
        legal.add(State.FINISHED)
    for target in State:
        walked = job()
        for state in PATH[:reached]:
            walked.to(state)
        if target in legal:
            walked.to(target)
            assert walked.state is target
        else:
            with pytest.raises(IllegalTransition, match=str(target)):
                walked.to(target)


@pytest.mark.parametrize("end", sorted(ENDS))
def test_an_ended_job_goes_nowhere(end: State) -> None:
    ended = job()
    if end is State.FINISHED:
        for state in PATH:
            ended.to(state)
    else:
        ended.to(end)
    for target in State:
        with pytest.raises(IllegalTransition):
            ended.to(target)


def test_gaps_between_tokens_are_per_sequence() -> None:
    running = job()
    for state in (State.ROUTED, State.MERGING, State.WAITING):
        running.to(state)
    assert running.token(0) is None
    assert running.state is State.DECODE
    assert running.token(1) is None
    assert running.token(0) == 2
    assert running.completion_tokens == 3
