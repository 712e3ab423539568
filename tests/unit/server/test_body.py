import pytest

from loramux.server.edge.body import decode_json
from loramux.server.errors import RequestError


def test_ordinary_json_is_read() -> None:
    assert decode_json('{"a": [1, -2.5e3, true, null, "é"]}'.encode()) == {"a": [1, -2500.0, True, None, "é"]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a": "\xc3"}', "not UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [Infinity]}', "Infinity"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too long"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
    ],
)
def test_what_is_not_json_is_refused_with_the_reason(body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        decode_json(body)
    assert caught.value.code == "invalid_json"
