"""Names to endpoints: DNS by dnspython, the hosts file by getaddrinfo.

Each address family is a lookup of its own, and a lookup is made once for all who want it at that
time. Answers are kept as long as their TTL says, within limits; failures for a moment, so that a
thousand sessions that look for a lost peer ask once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import dns.asyncresolver
import dns.exception
import dns.message
import dns.name
import dns.nameserver
import dns.rdatatype
import dns.resolver

from sessiond.core.names import (
    BadName,
    NoAddress,
    NoAnswer,
    NoSuchName,
    Resolution,
    ResolveError,
    ServersFailed,
    Source,
)
from sessiond.core.network import Network
from sessiond.core.paths import canonical, destinations
from sessiond.core.tuples import Endpoint

__all__ = ["Resolution", "ResolveError", "Resolver"]

log = logging.getLogger(__name__)

TTL = 1.0, 86_400.0
"""Seconds an answer is kept at least and at most. 2^31 and more means 0 (RFC 2181 section 8)."""
NEGATIVE_TTL = 1.0, 30.0
"""RFC 2308 allows hours; a host that has just moved must be found sooner."""
FAILURE_TTL = 1.0
"""RFC 9520 section 3.2: a failure is not asked about again for a second."""
LOCAL_TTL = 10.0
"""What getaddrinfo says has no TTL; an edited hosts file counts at once all the same."""
LAG = 0.05
"""Seconds the second family may take longer than the first (RFC 8305 section 3)."""
ATTEMPT = 1.0
"""Seconds until the next nameserver is asked, where resolv.conf has no ``timeout``."""
QUERIES_AT_ONCE = 200
SRV_TARGETS = 16


class _Answer(NamedTuple):
    """One lookup's outcome, as it is kept."""

    values: tuple[Any, ...]
    expires: float
    error: ResolveError | None = None

    def checked(self) -> _Answer:
        """Itself, or its error. A fresh one: raising adds to an exception."""
        if self.error is not None:
            raise type(self.error)(str(self.error), self.error.tried)
        return self


_Key = tuple[object, ...]
_Ask = Callable[[], Coroutine[Any, Any, _Answer]]


class Resolver:
    """Looks names up for one network namespace.

    Args:
        nameservers: addresses of nameservers; empty: those of resolv.conf, read again whenever it
            has changed.
        timeout: seconds until a lookup that nobody answers is given up.
        cache_size: lookups remembered at most.
        network: this host's network now, for the order of what is found (RFC 6724).
        resolv_conf, hosts: those two files.
    """

    def __init__(
        self,
        *,
        nameservers: Sequence[str] = (),
        timeout: float = 3.0,
        cache_size: int = 1000,
        network: Callable[[], Network] = Network,
        resolv_conf: str = "/etc/resolv.conf",
        hosts: str = "/etc/hosts",
    ) -> None:
        self._nameservers = list(nameservers)
        self._timeout = timeout
        self._cache_size = cache_size
        self._network = network
        self._resolv_conf = _Watched(resolv_conf)
        self._hosts = _Watched(hosts)
        self._dns: dns.asyncresolver.Resolver | None = None
        self._local_names: frozenset[str] = frozenset()
        self._cache: OrderedDict[_Key, _Answer] = OrderedDict()
        self._running: dict[_Key, asyncio.Task[_Answer]] = {}
        self._queries = asyncio.Semaphore(QUERIES_AT_ONCE)

    async def resolve(
        self, name: str, service: str, version: int = 0, *, srv: bool = False, fresh: bool = False
    ) -> Resolution:
        """Find an endpoint's candidates.

        Args:
            name: a DNS name, a name of the hosts file, or an IP address.
            service: a service's name or a port number.
            version: 4, 6, or 0 for both.
            srv: look for ``_service._tcp.name`` first (RFC 2782).
            fresh: ask even if an answer is still remembered.

        Raises:
            ResolveError: there is none; the class says why.
        """
        versions = (6, 4) if version == 0 else (version,)
        if (literal := _literal(name)) is not None:
            port = await self._port(service)
            _check_version(literal, versions)
            return Resolution((Endpoint(literal, port),), "literal", float("inf"))
        if srv:
            targets, expires = await self._targets(name, service, fresh)
            results = await asyncio.gather(
                *(self._at(target, port, versions, fresh) for target, port in targets),
                return_exceptions=True,
            )
            return _joined(results, expires)
        return await self._at(name, await self._port(service), versions, fresh)

    async def reresolve(
        self, name: str, service: str, version: int = 0, *, srv: bool = False
    ) -> Resolution:
        """``resolve``, but what is remembered does not count: the peer is not where it was."""
        return await self.resolve(name, service, version, srv=srv, fresh=True)

    async def addresses(self, name: str, service: str) -> tuple[str, ...]:
        """Where a name is by now, best first; nowhere if that can't be found out."""
        try:
            found = await self.reresolve(name, service)
        except ResolveError as error:
            log.warning("%s; tried: %s", error, "; ".join(error.tried) or "nothing")
            return ()
        return tuple(dict.fromkeys(candidate.address for candidate in found.candidates))

    async def _at(self, name: str, port: int, versions: Sequence[int], fresh: bool) -> Resolution:
        source: Source = "dns"
        if self._is_local(name):
            source, answers = "hosts", [await self._local(name, fresh)]
        else:
            answers = await self._both(_dns_name(name), versions, fresh)
        found = [a for answer in answers for a in answer.values if _version(a) in versions]
        if not found:
            raise _worst(name, versions, answers)
        expires = min(answer.expires for answer in answers if answer.values)
        ordered = destinations(self._network(), found)
        return Resolution(tuple(Endpoint(address, port) for address in ordered), source, expires)

    # Lookups, each made once at a time

    async def _once(self, key: _Key, ask: _Ask, fresh: bool) -> _Answer:
        kept = self._cache.get(key)
        if kept is not None and kept.expires > time.monotonic() and not fresh:
            self._cache.move_to_end(key)
            return kept
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(self._keep(key, ask))
            task.add_done_callback(lambda _: self._running.pop(key))
        # One who gives up waiting does not end it for the others.
        return await asyncio.shield(task)

    async def _keep(self, key: _Key, ask: _Ask) -> _Answer:
        answer = await ask()
        self._cache[key] = answer
        self._cache.move_to_end(key)
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return answer

    async def _both(
        self, name: dns.name.Name, versions: Sequence[int], fresh: bool
    ) -> list[_Answer]:
        """A and AAAA in parallel, IPv6 first; one that is much later than the other is left out."""
        tasks = [
            asyncio.ensure_future(self._query(name, _RECORDS[version], fresh))
            for version in versions
        ]
        waiting, patience = set(tasks), None
        try:
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                if any(task.result().values for task in done):
                    patience = LAG
        finally:
            for task in waiting:
                task.cancel()
        return [task.result() for task in tasks if task not in waiting]

    async def _query(self, name: dns.name.Name, record: str, fresh: bool) -> _Answer:
        key = (name.canonicalize(), record)
        return await self._once(key, lambda: self._ask_dns(name, record), fresh)

    async def _ask_dns(self, name: dns.name.Name, record: str) -> _Answer:
        try:
            resolver = self._configured()
            async with self._queries, asyncio.timeout(self._timeout + 1):  # clocks may jump
                answer = await resolver.resolve(
                    name, record, raise_on_no_answer=False, search=True, lifetime=self._timeout
                )
        except (dns.exception.DNSException, TimeoutError, ValueError) as error:
            return _failure(f"{name} {record}", error)
        ttl = answer.chaining_result.minimum_ttl
        if answer.rrset is None:
            tried = f"{name} {record}: no such record, says {answer.nameserver}"
            return _negative(NoAddress(f"{name} has no {record} record", [tried]), ttl)
        values = (answer.rrset,) if record == "SRV" else tuple(r.address for r in answer.rrset)
        return _Answer(values, time.monotonic() + min(max(ttl, TTL[0]), TTL[1]))

    def _configured(self) -> dns.asyncresolver.Resolver:
        """dnspython's resolver, by the resolv.conf of now."""
        if self._resolv_conf.changed() or self._dns is None:
            resolver = dns.asyncresolver.Resolver(configure=False)
            resolver.timeout = ATTEMPT
            try:
                resolver.read_resolv_conf(self._resolv_conf.path)
            except dns.resolver.NoResolverConfiguration:
                if not self._nameservers:
                    raise
            if self._nameservers:
                resolver.nameservers = self._nameservers
            resolver.nameservers = [_Nameserver(str(one)) for one in resolver.nameservers]
            self._dns = resolver
        return self._dns

    # What the host itself knows

    def _is_local(self, name: str) -> bool:
        """Whether getaddrinfo is to be asked: it can't be asked about the hosts file alone."""
        if self._hosts.changed():
            self._local_names = _names_in(self._hosts.path)
        lower = name.lower().rstrip(".")
        # RFC 6761 section 6.3, RFC 6762 section 3: these are no names of the DNS.
        return lower in self._local_names or lower.rpartition(".")[2] in ("localhost", "local")

    async def _local(self, name: str, fresh: bool) -> _Answer:
        key = (name.lower(), "hosts", self._hosts.signature)
        return await self._once(key, lambda: self._getaddrinfo(name, None), fresh)

    async def _port(self, service: str) -> int:
        if service.isascii() and service.isdigit():
            if not 0 < int(service) < 65536:
                raise BadName(f"port {service} is not from 1 to 65535")
            return int(service)
        if not service:
            raise BadName("the service is empty: give its name or a port number")
        key = (service, "services")
        answer = await self._once(key, lambda: self._getaddrinfo(None, service), False)
        return int(answer.checked().values[0])

    async def _getaddrinfo(self, name: str | None, service: str | None) -> _Answer:
        """Addresses of a name, or ports of a service."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                found = await loop.getaddrinfo(name, service, type=socket.SOCK_STREAM)
        except (socket.gaierror, TimeoutError, UnicodeError) as error:
            return _unknown_here(name, service, error)
        values = dict.fromkeys(canonical(str(at[0])) if name else at[1] for *_, at in found)
        return _Answer(tuple(values), time.monotonic() + LOCAL_TTL)

    # Services (RFC 2782)

    async def _targets(
        self, name: str, service: str, fresh: bool
    ) -> tuple[list[tuple[str, int]], float]:
        """The hosts and ports that serve, in the order to try them."""
        if service.isdigit():
            raise BadName(f"SRV records are of services by name, and {service} is a port number")
        answer = await self._query(_dns_name(f"_{service}._tcp.{name}"), "SRV", fresh)
        if isinstance(answer.error, NoSuchName | NoAddress):
            return [(name, await self._port(service))], answer.expires
        records = answer.checked().values[0].processing_order()[:SRV_TARGETS]
        targets = [(str(record.target), record.port) for record in records]
        if targets[0][0] == ".":
            raise NoAddress(f"{name} says that it does not offer {service}", [str(records[0])])
        return targets, answer.expires


class _Nameserver(dns.nameserver.Do53Nameserver):
    """Signs what it answers: dnspython's NXDOMAIN doesn't tell who said so."""

    async def async_query(self, *args: Any, **options: Any) -> dns.message.Message:
        response = await super().async_query(*args, **options)
        response.nameserver = self.address  # type: ignore[attr-defined]
        return response


class _Watched:
    """A file that is read again when it has changed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.signature: tuple[int, ...] | None = ()

    def changed(self) -> bool:
        """Whether it is another one than at the last call."""
        before = self.signature
        try:
            status = os.stat(self.path)
            self.signature = (status.st_mtime_ns, status.st_ino, status.st_size)
        except OSError:
            self.signature = None
        return self.signature != before


_RECORDS = {4: "A", 6: "AAAA"}


def _version(address: str) -> int:
    return 6 if ":" in address else 4


def _literal(name: str) -> str | None:
    """An address, also in brackets; None: a name."""
    text = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    if "%" in text and canonical(text) is not None:
        raise BadName(f"{name} is only valid on one link, so a session can't follow it elsewhere")
    return canonical(text)


def _check_version(address: str, versions: Sequence[int]) -> None:
    if _version(address) not in versions:
        raise NoAddress(f"{address} is no IPv{versions[0]} address, and only that was asked for")


def _dns_name(name: str) -> dns.name.Name:
    try:
        parsed = dns.name.from_text(name, None)
    except (dns.exception.DNSException, UnicodeError) as error:
        raise BadName(f"{name!r} is not a DNS name: {error}") from error
    if parsed in (dns.name.empty, dns.name.root):
        raise BadName(f"{name!r} is not the name of a host")
    return parsed


def _names_in(hosts: str) -> frozenset[str]:
    """Every name of a hosts file, hosts(5)."""
    try:
        with open(hosts, encoding="utf-8", errors="replace") as lines:
            fields = [line.partition("#")[0].split() for line in lines]
    except OSError:
        return frozenset()
    return frozenset(name.lower().rstrip(".") for line in fields for name in line[1:])


def _joined(results: Sequence[Resolution | BaseException], expires: float) -> Resolution:
    """What a service's targets gave, in their order; its first error if none gave anything."""
    found = [result for result in results if isinstance(result, Resolution)]
    for result in results:
        if isinstance(result, BaseException) and not (found and isinstance(result, ResolveError)):
            raise result
    candidates = dict.fromkeys(c for result in found for c in result.candidates)
    return Resolution(tuple(candidates), found[0].source, min(expires, *(r.expires for r in found)))


# Failures


def _worst(name: str, versions: Sequence[int], answers: Sequence[_Answer]) -> ResolveError:
    """What to say of lookups that all gave nothing: the surest, then the most alarming."""
    errors = [answer.error for answer in answers if answer.error is not None]
    tried = [line for error in errors for line in error.tried]
    for kind in (NoSuchName, ServersFailed, NoAnswer):
        for error in errors:
            if isinstance(error, kind):
                return kind(str(error), tried)
    wanted = " or ".join(f"IPv{version}" for version in versions)
    return NoAddress(f"{name} exists but has no {wanted} address", tried)


def _negative(error: ResolveError, ttl: float) -> _Answer:
    lasts = min(max(ttl, NEGATIVE_TTL[0]), NEGATIVE_TTL[1])
    return _Answer((), time.monotonic() + lasts, error)


def _failure(what: str, error: Exception) -> _Answer:
    """dnspython's errors, and what to do about them."""
    if isinstance(error, dns.resolver.NXDOMAIN):
        responses: dict[dns.name.Name, Any] = error.kwargs["responses"]
        tried = [f"{qname} {what.partition(' ')[2]}: no such name" for qname in responses]
        ttl = min(response.resolve_chaining().minimum_ttl for response in responses.values())
        servers = ", ".join(dict.fromkeys(one.nameserver for one in responses.values()))
        message = f"{what.split()[0]}: no such name, says {servers}; check its spelling"
        return _negative(NoSuchName(message, tried), ttl)
    return _Answer((), time.monotonic() + FAILURE_TTL, _problem(what, error))


def _problem(what: str, error: Exception) -> ResolveError:
    name = what.partition(" ")[0]
    if isinstance(error, dns.resolver.YXDOMAIN | dns.name.NameTooLong):
        return BadName(f"{name} is too long for a DNS name", [f"{what}: {error}"])
    if isinstance(error, dns.resolver.NoResolverConfiguration | ValueError):
        return NoAnswer(
            f"{name} can't be looked up, there is no usable nameserver ({error}): name one in "
            "resolv.conf or as nameservers in [resolver]"
        )
    attempts = error.kwargs["errors"] if isinstance(error, _EXHAUSTED) else []
    tried = [_attempt(what, *attempt) for attempt in attempts]
    causes = [cause for _, _, _, cause, _ in attempts]
    if any(isinstance(cause, dns.message.ChainTooLong) for cause in causes):
        return ServersFailed(f"{name} is an alias that leads nowhere; tell its owner", tried)
    if isinstance(error, dns.resolver.NoNameservers) and not _all_unreachable(causes):
        return ServersFailed(
            f"no nameserver could answer for {name}; tell who runs them, or use others", tried
        )
    return NoAnswer(
        f"no nameserver answered for {name}; is there a network, and are they in it?", tried
    )


_EXHAUSTED = (dns.resolver.NoNameservers, dns.resolver.LifetimeTimeout)
"""What dnspython raises after trying all there is, with the list of what it tried."""


def _all_unreachable(causes: Sequence[object]) -> bool:
    return all(isinstance(cause, OSError) for cause in causes)


def _attempt(
    what: str, server: str, tcp: bool, port: int, cause: Exception | str, response: object
) -> str:
    reason = str(cause) or type(cause).__name__
    return f"{what} at {server}{' by TCP' if tcp else ''}: {reason}"


def _unknown_here(name: str | None, service: str | None, error: Exception) -> _Answer:
    problem: ResolveError
    if service is not None:
        problem = BadName(f"no service {service!r} in /etc/services; a port number will do")
    elif isinstance(error, TimeoutError):
        problem = NoAnswer(f"this host's own lookup of {name} takes too long", ["getaddrinfo"])
    else:
        problem = NoSuchName(f"this host does not know {name}", [f"getaddrinfo: {error}"])
    return _Answer((), time.monotonic() + FAILURE_TTL, problem)
