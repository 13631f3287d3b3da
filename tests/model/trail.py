"""A trail that Spin replays, in words: what ``tell`` of handover.pml prints."""

from __future__ import annotations

from collections.abc import Iterator

STATES = ("PLAIN", "ESTABLISHED", "PREPARING", "MOVING", "FOLLOWING", "WAITING")
GUARDS = ("", "shielded ", "locked ")
MESSAGES = ("", "Prepare", "Prepared", "Move", "Moved", "Settled", "Refused", "Close")
EVENTS = (
    *("", "", "an engine's result", "its deadline", "the network changed", "asked to move", ""),
    *("TCP sends", "TCP probes", "detached", "the daemon is started anew"),
)
HOSTS = ("client", "server")
MESSAGE, SEGMENT = 1, 6
NO_TUPLE = 4


def in_words(replayed: str) -> Iterator[str]:
    """One line for each event, two for what the hosts are after it.

    Args:
        replayed: the output of ``spin -T -k``.
    """
    for line in replayed.splitlines():
        _, mark, told = line.partition("@ ")
        if mark:
            (host, event, taken, out, sent), *sides, (calm, rounds) = (
                [int(number) for number in part.split()] for part in told.split("|")
            )
            yield f"{_event(host, event, taken)}{_sent(_message(out))}{_sent(_segment(sent))}"
            yield from (f"    {who} {_side(side)}" for who, side in zip(HOSTS, sides, strict=True))
            if calm:
                yield f"    calm, round {rounds}"
        elif "assertion" in line:
            yield line.strip()


def _event(host: int, event: int, taken: int) -> str:
    if not event:
        return "* the world: a write, a loss, a break, the calm, or a round of timers"
    what = EVENTS[event]
    if event == MESSAGE:
        what = f"reads {_message(taken)}"
    elif event == SEGMENT:
        what = f"receives {_segment(taken)}"
    return f"* {HOSTS[host]}: {what}"


def _sent(what: str) -> str:
    return what and f" -> {what}"


def _message(packed: int) -> str:
    if not packed:
        return ""
    pending = " pending" if packed >> 12 & 1 else ""
    generation, path, offset = packed >> 3 & 31, packed >> 8 & 3, packed >> 10 & 3
    return f"{MESSAGES[packed & 7]}(g{generation}, path {path}, R={offset}{pending})"


def _segment(packed: int) -> str:
    if not packed:
        return ""
    where, first, end, ack = (packed >> shift & 3 for shift in (1, 3, 5, 7))
    if packed >> 9 & 1:
        return f"RST({where}, seq {first})"
    if packed >> 10 & 1:
        return f"probe({where})"
    return f"segment({where}, bytes {first} to {end}, ack {ack})"


def _side(side: list[int]) -> str:
    state, generation, agreed, held, up, where, guard, opened, una, nxt, written, rcv = side
    window = "" if opened else "window closed, "
    tombstone = "" if held == NO_TUPLE else f", holds {held}"
    return (
        f"{STATES[state]} g{generation} tuple {agreed}, addresses {up:02b}; socket on {where}: "
        f"{GUARDS[guard]}{window}una {una} nxt {nxt} written {written} rcv {rcv}{tombstone}"
    )
