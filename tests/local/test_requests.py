"""Who may ask for what."""

from __future__ import annotations

import inspect

import pytest

from libhsock import wire
from libhsock.errors import Denied
from sessiond.edges.local.caller import Caller
from sessiond.edges.local.requests import Requests
from tests.local.support import MemoryBackend

CHANGES = [wire.Pin("server.test", "aaaa"), wire.Forget("server.test")]


async def ask(call: wire.Call[object], *, admin: bool) -> MemoryBackend:
    backend = MemoryBackend()
    answer = Requests(backend, Caller(1000, 1000, 1, admin, -1)).answer(1, call, [])
    if inspect.iscoroutine(answer):
        await answer
    return backend


@pytest.mark.parametrize("call", CHANGES, ids=lambda call: call.method)
async def test_only_administrators_change_whose_keys_are_accepted(
    call: wire.Call[object],
) -> None:
    with pytest.raises(Denied, match="user 1000 may not change"):
        await ask(call, admin=False)
    await ask(call, admin=True)


@pytest.mark.parametrize(
    "call", [wire.Peers(), wire.Peer("a.test"), wire.Fingerprint()], ids=lambda call: call.method
)
async def test_everybody_may_look(call: wire.Call[object]) -> None:
    await ask(call, admin=False)
