"""The manuals say what the code does."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from pathlib import Path

import msgpack
import pytest

import libhsock
from libhsock import errors, wire
from libhsock.testing import FakeDaemon
from sessiond.edges.local import Limits
from tests.local.support import raw, serving

DOCS = Path(__file__).parents[2] / "docs"
PROTOCOL = (DOCS / "local-protocol.md").read_text()
GUIDE = (DOCS / "libhsock.md").read_text()


def exchange() -> list[tuple[str, object, bytes]]:
    """Direction, value and bytes of each message of the manual's example."""
    (block,) = re.findall(r"```exchange\n(.*?)```", PROTOCOL, re.DOTALL)
    messages = re.findall(r"^([<>]) (.*)\n((?:    .*\n)+)", block, re.MULTILINE)
    return [(way, json.loads(text), bytes.fromhex(octets)) for way, text, octets in messages]


def test_the_examples_bytes_are_its_messages() -> None:
    messages = exchange()
    assert len(messages) == 11
    for way, value, data in messages:
        assert msgpack.unpackb(data) == value
        message = wire.decode(data)
        assert isinstance(message, wire.Request) == (way == ">")
        match message:
            case wire.Request():
                assert wire.request(message.id, wire.parse(message)) == data
            case wire.Reply(error=None):
                assert wire.reply(message.id, message.result) == data
            case wire.Reply(error=error) if error is not None:
                assert wire.failure(message.id, error) == data
            case wire.Notification():
                told = wire.event(data)
                assert told is not None
                assert wire.notification(told.to_map()) == data


def test_the_example_happens(tmp_path: Path) -> None:
    with (
        serving(tmp_path) as served,
        raw(served.path) as client,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
    ):
        session = "9f86d081884c7d659a2feaa0c55ad015"
        served.backend.add(0, session=session)
        answers = [a for a in exchange() if a[0] == "<"]
        for way, value, data in exchange():
            if way != ">":
                continue
            assert isinstance(value, list)
            wire.send(client, data, [sock.fileno()] if value[2] == "attach" else [])
            answer = msgpack.unpackb(client.recv(wire.MAX_PACKET))
            expected = answers.pop(0)[1]
            assert isinstance(expected, list)
            assert answer[:2] == expected[:2]
            for told, documented in zip(answer[2:], expected[2:], strict=True):
                assert (told or {}).keys() == (documented or {}).keys()
        served.run(served.backend.emit, session, "moved")
        event = wire.event(client.recv(wire.MAX_PACKET))
        assert event is not None
        assert (event.session, event.kind) == (session, "moved")


@pytest.mark.parametrize("call", wire.CALLS.values(), ids=lambda call: call.method)
def test_every_method_is_described_with_its_fields(call: type[wire.Call[object]]) -> None:
    (heading,) = re.findall(rf"^### {call.method} \{{(.*?)\}} → (.*)$", PROTOCOL, re.MULTILINE)
    fields = [*call._fields]
    assert re.findall(r"(\w+):", heading[0]) == sorted(fields, key=heading[0].index)
    if call.reply in (wire.Record, wire.Event):
        assert heading[1] == "record"
    elif call.reply is not wire.Stats:
        told = [*call.reply._fields]
        assert all(re.search(rf"\b{name}\b", heading[1]) for name in told)


@pytest.mark.parametrize("shape", [wire.Record, wire.Event])
def test_every_field_is_described(shape: type[wire.Record | wire.Event]) -> None:
    title = "## Records" if shape is wire.Record else "## Events"
    table = PROTOCOL.split(title)[1].split("##")[0]
    described = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE)))
    assert set(described) == {*shape._fields}


def test_every_state_kind_and_error_code_is_described() -> None:
    for word in [*wire.State, *wire.Kind, *errors.BY_CODE]:
        assert f"`{word}`" in PROTOCOL


def test_the_limits_are_as_described() -> None:
    limits = Limits()
    for said in (
        f"**{wire.MAX_PACKET:,} bytes**",
        f"nested at most **{wire.MAX_DEPTH}** deep",
        f"at most {wire.MAX_PAGE} at a time",
        f"within {limits.greeting:g} s",
        f"at most {limits.pending} requests",
        f"after {limits.stall:g} s",
        f"more than {limits.queue} events",
        f"Version {wire.VERSION}.",
        wire.DEFAULT_PATH,
    ):
        assert said in " ".join(PROTOCOL.split())


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


def test_every_example_is_python() -> None:
    for source in examples():
        compile(source, "docs/libhsock.md", "exec", flags=0x2000)  # PyCF_ALLOW_TOP_LEVEL_AWAIT


def example(text: str) -> str:
    (found,) = [source for source in examples() if text in source]
    return found


def test_the_first_two_examples_run(fake: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    server = libhsock.create_server(("", 0))
    port = str(server.getsockname()[1])
    serve = example("server.accept()").replace("while True:", "for _ in range(1):")
    server.close()
    ready = threading.Event()

    def create_server(address: tuple[str, int]) -> libhsock.HSocket:
        listening = libhsock.create_server(address)
        ready.set()
        return listening

    def run_server() -> None:
        source = serve.replace("7000", port).replace("libhsock.create_server", "create_server")
        exec(source, {"create_server": create_server})

    thread = threading.Thread(target=run_server)
    thread.start()
    assert ready.wait(10)
    exec(example("with libhsock.create_connection").replace("7000", port))
    thread.join()
    assert capsys.readouterr().out == "b'HELLO\\n'\n"


def test_the_asyncio_example_runs(fake: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    source = example("asyncio.run(main())").replace("7000", port)
    exec(source.replace("asyncio.run(main())", ""), namespace := {"__name__": "example"})

    async def main() -> None:
        await namespace["main"]()  # type: ignore[operator]
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(others or [asyncio.create_task(asyncio.sleep(0))])

    asyncio.run(main())
    assert capsys.readouterr().out == "b'HELLO\\n' True\n"


def test_the_testing_example_runs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        exec(example("FakeDaemon() as fake"), namespace := {"libhsock": libhsock})
        namespace["test_my_application_survives_a_move"](server.getsockname()[1])  # type: ignore[operator]


def test_the_guide_names_what_there_is() -> None:
    for name in re.findall(r"libhsock\.(\w+)", GUIDE):
        assert name == "testing" or hasattr(libhsock, name)
    for name in re.findall(r"session\.(\w+)", GUIDE):
        assert hasattr(libhsock.Session, name)
