from hypothesis import given
from hypothesis import strategies as st

from loramux.server.text.stops import StopScanner

words = st.text(alphabet="ab", min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        shown += scanner.feed(piece)
    return shown + scanner.finish(), scanner.matched


def oracle(stops: list[str], text: str) -> tuple[str, str | None]:
    """By hand: the first end of any stop, there the longest."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_a_stop_fed_one_character_at_a_time_is_never_shown() -> None:
    scanner = StopScanner(["STOP"])
    shown = [scanner.feed(char) for char in "one STOP two"]
    assert "".join(shown) == "one "
    assert scanner.matched == "STOP"
    assert scanner.finish() == ""


def test_text_that_only_looks_like_a_stop_comes_out_in_the_end() -> None:
    scanner = StopScanner(["</answer>"])
    assert scanner.feed("see </ans") == "see "
    assert scanner.feed("x") == "</ansx"
    assert scanner.feed(" </answer") == " "
    assert scanner.finish() == "</answer"
    assert scanner.matched is None


def test_the_stop_that_ends_first_wins_and_then_the_longer() -> None:
    assert run(["abcd", "bc"], ["xabcd"]) == ("xa", "bc")
    assert run(["bc", "abc"], ["xabcd"]) == ("x", "abc")


def test_nothing_is_shown_after_a_stop() -> None:
    scanner = StopScanner(["."])
    assert scanner.feed("a.b") == "a"
    assert scanner.feed("c") == ""


@given(st.lists(words, min_size=1, max_size=4), st.lists(st.text(alphabet="abc", max_size=5), max_size=12))
def test_how_the_text_is_cut_makes_no_difference(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == oracle(stops, "".join(pieces))


@given(st.lists(words, max_size=3), st.text(alphabet="abc", max_size=30))
def test_what_is_held_back_could_still_become_a_stop(stops: list[str], text: str) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for position, char in enumerate(text, 1):
        shown += scanner.feed(char)
        if scanner.matched:
            return
        held = text[len(shown) : position]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
