"""The talk on one connection, without a daemon: packets in and out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from libhsock import wire
from libhsock.dialog import Dialog
from libhsock.errors import DaemonUnavailable, NotFound, ProtocolError, UsageError


@pytest.fixture
def dialog() -> Iterator[Dialog]:
    dialog = Dialog("/nowhere")
    yield dialog
    dialog.close()
    dialog.close()


def event(kind: str, **more: Any) -> bytes:
    told = wire.Event(session="ab", kind=kind, time=0.0, **more)
    return wire.notification(told.to_map())


def monitoring(dialog: Dialog, session: str | None) -> None:
    dialog.request(wire.Monitor(session))
    dialog.reply(wire.reply(1, {})).unwrap()


def test_a_reply_belongs_to_the_last_request(dialog: Dialog) -> None:
    for id in (1, 2, 3):
        asked = wire.decode(dialog.request(wire.Show("ab")))
        assert asked == wire.Request(id, "show", {"session": "ab"})
        assert dialog.reply(wire.reply(id, {"id": id})).unwrap() == {"id": id}
    with pytest.raises(ProtocolError, match="not the reply to request 3"):
        dialog.reply(wire.reply(2, {}))
    with pytest.raises(ProtocolError, match="not the reply"):
        dialog.reply(event("moved"))


def test_errors_are_the_requests_or_the_connections(dialog: Dialog) -> None:
    dialog.request(wire.Show("ab"))
    for id, error in ((1, NotFound("gone")), (0, DaemonUnavailable("in vain"))):
        with pytest.raises(type(error), match=error.message):
            dialog.reply(wire.failure(id, error)).unwrap()
    with pytest.raises(UsageError, match="the limit is 65536"):
        dialog.request(wire.Show("x" * wire.MAX_PACKET))


@pytest.mark.parametrize("hear", [Dialog.reply, Dialog.event])
def test_nothing_is_the_daemons_end(dialog: Dialog, hear: Any) -> None:
    with pytest.raises(ConnectionResetError, match="sessiond closed the connection"):
        hear(dialog, b"")


@pytest.mark.parametrize(
    ("session", "last"), [("ab", "closed"), ("ab", "overflow"), (None, "overflow")]
)
def test_events_end_with_their_session_or_with_an_overflow(
    dialog: Dialog, session: str | None, last: str
) -> None:
    monitoring(dialog, session)
    for kind in ("moving", "moved", *(["closed"] if session is None else [])):
        heard = dialog.event(event(kind))
        assert heard is not None
        assert (heard.kind, dialog.over) == (kind, False)
    dialog.event(event(last))
    assert dialog.over


def test_news_of_a_newer_daemon_is_no_event(dialog: Dialog) -> None:
    monitoring(dialog, None)
    assert dialog.event(wire._pack([2, "weather", {}])) is None
    assert not dialog.over


def test_a_stream_of_events_ends_with_the_daemons_reason(dialog: Dialog) -> None:
    monitoring(dialog, None)
    with pytest.raises(DaemonUnavailable, match="in vain"):
        dialog.event(wire.failure(0, DaemonUnavailable("in vain")))


def test_what_fails_leaves_no_descriptor(dialog: Dialog) -> None:
    with dialog.closed_by_errors():
        pass
    assert dialog.sock.fileno() >= 0
    with pytest.raises(KeyboardInterrupt), dialog.closed_by_errors():
        raise KeyboardInterrupt
    assert dialog.sock.fileno() == -1
