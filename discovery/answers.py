"""Makes the answers to questions about our zone, and keeps their bytes for the next one who asks the same.

    SERVICE.discoverd              A, AAAA, SRV        every instance, shuffled
    leader.SERVICE.discoverd       A, AAAA, SRV        the leader
    _SERVICE._tcp.discoverd        SRV (A, AAAA)       RFC 2782
    INSTANCE.SERVICE._i.discoverd  A, AAAA, SRV        one instance

Case does not matter and comes back as it was asked, time to live 0 (instances move), ANY gives all
there is. A name that does not exist is NXDOMAIN, one without the type asked for (or with nothing but
names below it) an empty answer, both with the SOA. What does not fit is cut to whole records with the
TC flag; addresses that an SRV answer has no room for are left out without (RFC 2181, 9).

All messages are written by dnspython, which takes a third of a millisecond. So `Answers.quick` keeps
what it wrote, by question and options; a change of a service drops what was written of it. Only the
id and the case of the question differ from one asker to the next, and which record comes first: other
names in the answer are pointers into the question, or behind the answers, or names of ours written in
full. Of an answer that was cut, other records are shown after a while. `dns` is the caller.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.rdataclass import RdataClass
from dns.rdatatype import RdataType
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.AAAA import AAAA
from dns.rdtypes.IN.SRV import SRV

from discovery.services import Directory
from discovery.types import Instance

ZONE = dns.name.from_text("discoverd.")
UDP_BYTES = 512
UDP_BYTES_MAX = 1232
"""The largest UDP answer that is sure to pass unfragmented (DNS flag day 2020)."""
TCP_BYTES_MAX = 65535
CUT_USES = 32
"""About so often a cut answer is used, before others of the service have their turn."""
KEPT_MAX = 4096
_TAIL_BYTES_MAX = 64

_SOA = dns.rrset.from_text(ZONE, 0, "IN", "SOA", "ns.discoverd. hostmaster.discoverd. 1 3600 600 86400 0")
_ZONE_WIRE = ZONE.to_wire() or b""
_KINDS = (RdataType.A, RdataType.AAAA, RdataType.SRV)
_RECORD_BYTES = 12
"""Of each record beside its data: a pointer to the name, type, class, time to live, length."""
_TRANSFERS = (RdataType.AXFR, RdataType.IXFR)


@dataclass(slots=True)
class _Kept:
    """An answer's bytes: head and question, the records that may come in any order, and the rest."""

    head: bytes
    records: list[bytes]
    tail: bytes
    is_cut: bool


Key = tuple[bytes, bytes, bytes, bool]
"""The name in lower case; the head but for the id; type, class and options; whether it came by UDP."""
K = TypeVar("K")
T = TypeVar("T")


class Answers:
    """Answers from a directory; the only chance in it is the order of the records."""

    def __init__(self, directory: Directory, dice: random.Random | None = None) -> None:
        self._directory = directory
        self._dice = dice or random.Random()  # noqa: S311 — spreads load, guards nothing
        self._kept: dict[Key, _Kept] = {}
        self._keys_of: dict[str, set[Key]] = {}
        self._absent: dict[tuple[int, bytes, bytes, bool], bytes] = {}  # all names of one length that do not exist
        directory.on_changed(self._forget)

    def quick(self, raw: bytes, *, is_udp: bool) -> bytes | None:
        """Return the answer to a query if its like was answered before, else `None`."""
        name_end = _glance(raw)
        if not name_end:
            return None
        name = raw[12:name_end].lower()
        options = (raw[2:12], raw[name_end:], is_udp)
        if kept := self._kept.get((name, *options)):
            if kept.is_cut and self._dice.random() < 1 / CUT_USES:
                return None
            records = kept.records
            if len(records) > 1:
                at = int(self._dice.random() * len(records))
                records = records[at:] + records[:at]
            return b"".join((raw[:2], kept.head, raw[12:name_end], raw[name_end : name_end + 4], *records, kept.tail))
        if (len(name), *options) in self._absent and self._find(_labels(name))[1] is None:
            written = self._absent[len(name), *options]
            return raw[:2] + written[2:12] + raw[12:name_end] + written[name_end:]
        return None

    def answer(self, raw: bytes, query: dns.message.Message, *, is_udp: bool) -> bytes:
        """Answer a query whose one question is about our zone, and keep the answer."""
        response, service = self._respond(query, is_udp=is_udp)
        written = _fit(response, _limit(query, is_udp=is_udp))
        name_end = _glance(raw)
        if name_end and written[12:name_end] == raw[12:name_end]:
            name, options = raw[12:name_end].lower(), (raw[2:12], raw[name_end:], is_udp)
            if response.rcode() == dns.rcode.NXDOMAIN:
                _bound(self._absent)[len(name), *options] = written
            else:
                self._keep((name, *options), written, name_end + 4, service)
        return written

    def _respond(self, query: dns.message.Message, *, is_udp: bool) -> tuple[dns.message.Message, str]:
        """Return the answer and the service that it depends on."""
        question = query.question[0]
        response = dns.message.make_response(query, recursion_available=True, our_payload=UDP_BYTES_MAX)
        response.flags |= dns.flags.AA
        if question.rdclass not in (RdataClass.IN, RdataClass.ANY) or question.rdtype in _TRANSFERS:
            response.flags &= ~dns.flags.AA
            response.set_rcode(dns.rcode.REFUSED)
            return response, ""
        if question.name.canonicalize() == ZONE:
            if question.rdtype in (RdataType.SOA, RdataType.ANY):
                response.answer.append(_SOA)
            else:
                response.authority.append(_SOA)
            return response, ""
        labels = [label.decode("ascii", "replace").lower() for label in question.name.labels[:-2]]
        service, instances = self._find(labels)
        if instances is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif instances:
            room = _limit(query, is_udp=is_udp) - len(question.name.to_wire() or b"") - 12 - 4 - 11
            self._add_instances(response, question.rdtype, instances, room)
        if not response.answer:
            response.authority.append(_SOA)
        return response, service

    def _find(self, labels: list[str]) -> tuple[str, Sequence[Instance] | None]:
        """Return the service of a name and the instances that it stands for; `None` if there is no such name."""
        match labels:
            case ["_tcp" | "_udp" | "_i"]:
                return "", ()  # there are names below, so these exist (RFC 8020)
            case [service]:
                # A service may have this name; if none has, there still are names below it.
                found = self._of_service(service)
                return service, () if found is None and service == "leader" else found
            case [service, "_i"]:
                return service, None if self._of_service(service) is None else ()
            case ["leader", service]:
                if self._directory.service(service) is None:
                    return service, None
                leader = self._directory.leader(service)
                return service, (leader,) if leader is not None else ()
            case [service, "_tcp" | "_udp" as protocol] if service.startswith("_"):
                found = self._of_service(service[1:])
                if found is None:
                    return service[1:], None
                return service[1:], [instance for instance in found if instance.protocol == protocol[1:]]
            case [id, service, "_i"]:
                instance = self._directory.instance(service, id)
                return service, (instance,) if instance is not None else None
        return "", None

    def _of_service(self, service: str) -> Sequence[Instance] | None:
        instances = self._directory.instances(service)
        if not instances and self._directory.service(service) is None:
            return None
        return instances

    def _add_instances(
        self, response: dns.message.Message, wanted: RdataType, instances: Sequence[Instance], room: int
    ) -> None:
        name = response.question[0].name
        chosen = self._dice.sample(instances, len(instances))
        for kind in _KINDS if wanted == RdataType.ANY else (wanted,):
            if kind not in _KINDS:
                continue
            if kind == RdataType.SRV:
                records: list[dns.rdata.Rdata] = [_srv(instance) for instance in _within_srv(chosen, room)]
                is_cut = len(records) < len(chosen)
            else:
                records, is_cut = _addresses(chosen, kind, room)
            if is_cut:
                response.flags |= dns.flags.TC
            if records:
                response.answer.append(dns.rrset.from_rdata_list(name, 0, records))
        if wanted == RdataType.SRV and not response.flags & dns.flags.TC:
            self._add_addresses(response, chosen, room)

    def _add_addresses(self, response: dns.message.Message, instances: Sequence[Instance], room: int) -> None:
        """Say where the instances of an SRV answer are, as far as there may be room for it."""
        room -= sum(_RECORD_BYTES + 6 + _name_bytes(instance) for instance in instances)
        for instance in instances:
            room -= _RECORD_BYTES + 4
            if room < 0:
                return
            rrset = dns.rrset.from_rdata_list(
                _instance_name(instance.id, instance.service), 0, [_address(instance.host)]
            )
            response.additional.append(rrset)

    def _keep(self, key: Key, written: bytes, question_end: int, service: str) -> None:
        if len(self._kept) >= KEPT_MAX:
            self._keys_of.clear()
        records, end = _records(written, question_end)
        _bound(self._kept)[key] = _Kept(written[2:12], records, written[end:], bool(written[2] & 0x02))
        self._keys_of.setdefault(service, set()).add(key)

    def _forget(self, service: str) -> None:
        for key in self._keys_of.pop(service, ()):
            self._kept.pop(key, None)


def is_ours(query: dns.message.Message) -> bool:
    """Tell whether the one question of a query is about our zone."""
    return query.question[0].name.is_subdomain(ZONE)


def _glance(raw: bytes) -> int:
    """Return the end of the name in a query with one plain question about our zone, without parsing the rest.

    0 for everything else, which is then parsed properly.
    """
    if raw[2] & 0xF8 or raw[4:10] != b"\0\1\0\0\0\0":
        return 0
    at = last = 12
    try:
        while length := raw[at]:
            if length > 63:
                return 0
            last, at = at, at + length + 1
    except IndexError:
        return 0
    end = at + 1
    if raw[last:end].lower() != _ZONE_WIRE or end - 12 > 255 or not 4 <= len(raw) - end <= _TAIL_BYTES_MAX:
        return 0
    return end


def _records(written: bytes, at: int) -> tuple[list[bytes], int]:
    """Cut the answer section of a message of ours, which begins at `at`, into its records; return where it ends."""
    found = []
    for _ in range(int.from_bytes(written[6:8])):
        end = at
        while 0 < written[end] < 0xC0:
            end += written[end] + 1
        end += 2 if written[end] else 1
        end += 10 + int.from_bytes(written[end + 8 : end + 10])
        found.append(written[at:end])
        at = end
    return found, at


def _labels(name: bytes) -> list[str]:
    """Return the labels of a name on the wire, without those of the zone."""
    found, at = [], 0
    while at < len(name) - len(_ZONE_WIRE):
        found.append(name[at + 1 : at + 1 + name[at]].decode("ascii", "replace"))
        at += name[at] + 1
    return found


def _bound(kept: dict[K, T]) -> dict[K, T]:
    """Empty what is full: whoever asks for thousands of names pays for it with time, not we with memory."""
    if len(kept) >= KEPT_MAX:
        kept.clear()
    return kept


def _limit(query: dns.message.Message, *, is_udp: bool) -> int:
    if not is_udp:
        return TCP_BYTES_MAX
    return min(max(query.payload, UDP_BYTES), UDP_BYTES_MAX) if query.edns >= 0 else UDP_BYTES


@lru_cache(maxsize=16384)
def _address(host: str) -> dns.rdata.Rdata:
    if ipaddress.ip_address(host).version == 4:
        return A(RdataClass.IN, RdataType.A, host)  # type: ignore[no-untyped-call]
    return AAAA(RdataClass.IN, RdataType.AAAA, host)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=16384)
def _instance_name(id: str, service: str) -> dns.name.Name:
    return dns.name.Name((id.encode(), service.encode(), b"_i", *ZONE.labels))


def _name_bytes(instance: Instance) -> int:
    return len(instance.id) + len(instance.service) + 5 + len(_ZONE_WIRE)


def _srv(instance: Instance) -> SRV:
    target = _instance_name(instance.id, instance.service)
    return SRV(RdataClass.IN, RdataType.SRV, 1, 1, instance.port, target)  # type: ignore[no-untyped-call]


def _within_srv(instances: Iterable[Instance], room: int) -> Iterable[Instance]:
    """Yield as many instances as there is room for; each takes a name of its own."""
    for instance in instances:
        room -= _RECORD_BYTES + 6 + _name_bytes(instance)
        if room < 0:
            return
        yield instance


def _addresses(instances: Iterable[Instance], kind: RdataType, room: int) -> tuple[list[dns.rdata.Rdata], bool]:
    """Return the addresses of a family, each once since instances share hosts, and whether some had no room."""
    is_v6 = kind == RdataType.AAAA
    hosts = list(dict.fromkeys(instance.host for instance in instances if (":" in instance.host) == is_v6))
    count_max = max(1, room // (_RECORD_BYTES + (16 if is_v6 else 4)))
    return [_address(host) for host in hosts[:count_max]], len(hosts) > count_max


def _fit(response: dns.message.Message, limit: int) -> bytes:
    """Write an answer of at most `limit` bytes: extras go first, then records from the end, with TC set."""
    while True:
        try:
            return response.to_wire(max_size=limit)
        except dns.exception.TooBig:
            if response.additional:
                del response.additional[len(response.additional) // 2 :]
                continue
            response.flags |= dns.flags.TC
            last = response.answer[-1]
            keep = list(last)[: len(last) // 2]
            response.answer[-1:] = [dns.rrset.from_rdata_list(last.name, 0, keep)] if keep else []
