"""The requests that every job costs, packed once and answered in one go: a veth pair, an address, a route.

pyroute2 says everything else (`netns.links`); it takes 4.4 ms of CPU for the seven requests of a job where the kernel
takes 0.8. The kernel carries a request out while it is being sent (netlink_unicast_kernel in net/netlink/af_netlink.c),
so the answers are there when `send` returns: nothing here waits. Refuses nothing by itself; what the kernel refuses is
a `KernelError` that names request and target. Called by `netns.links`.

Source: netlink(7), rtnetlink(7), linux/if_link.h, linux/rtnetlink.h, linux/if_addr.h.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface

from netns.errors import KernelError

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, sender
_NUMBER = struct.Struct("=i")
_ATTRIBUTE = struct.Struct("=HH")  # rtattr: length, type
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, hardware type, index, flags, which of the flags
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_ROUTE = struct.Struct("=8BI")  # rtmsg: family, dst length, src length, tos, table, protocol, scope, type, flags

_NLMSG_ERROR = 2
_REQUEST, _ACK, _REPLACE, _EXCL, _CREATE = 1, 4, 0x100, 0x200, 0x400
_NEWLINK, _GETLINK, _NEWADDR, _NEWROUTE, _NEWNEIGH = 16, 18, 20, 24, 28
_IFF_UP = 1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 4, 10, 18, 28
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 1, 2, 4, 5
_VETH_INFO_PEER = 1
_BRPORT_HAIRPIN, _BRPORT_LEARNING, _BRPORT_ISOLATED, _BRPORT_LOCKED = 4, 8, 33, 39
_BRPORT_FLOODS = (9, 27, 30)  # unicast to unknown addresses, multicast, broadcast
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_NOARP, _NUD_PERMANENT, _NTF_MASTER = 0x40, 0x80, 4
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_GATEWAY = 4, 5
_RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST = 254, 4, 0, 1

_ANSWER_BYTES_MAX = 1 << 16
_sequence = itertools.count(1)


@dataclass(frozen=True)
class Request:
    """One request: its name and target for the error, its type, flags and body for the kernel."""

    name: str
    target: str
    kind: int
    flags: int
    body: bytes


def new_veth(name: str, bridge_index: int, mtu: int, peer: str, peer_mac: bytes, netns_fd: int) -> Request:
    """Ask for a veth pair: `name` is up and a port of the bridge, `peer` is inside the namespace.

    `peer` is down yet: the kernel refuses to raise an end before the other one is there.
    """
    inner = _link() + _text(_IFLA_IFNAME, peer) + _attribute(_IFLA_ADDRESS, peer_mac)
    inner += _number(_IFLA_MTU, mtu) + _number(_IFLA_NET_NS_FD, netns_fd)
    body = _link(flags=_IFF_UP) + _text(_IFLA_IFNAME, name) + _number(_IFLA_MTU, mtu)
    body += _number(_IFLA_MASTER, bridge_index)
    kind = _text(_INFO_KIND, "veth") + _attribute(_INFO_DATA, _attribute(_VETH_INFO_PEER, inner))
    body += _attribute(_IFLA_LINKINFO, kind)
    return Request("RTM_NEWLINK", name, _NEWLINK, _CREATE | _EXCL, body)


def isolate_port(name: str) -> Request:
    """Ask that a port of a bridge speaks to no other isolated port, and may get back what it sent (hairpin).

    Locked: it takes frames only from senders that `pin_sender` named, and hears nothing that is not for one of them.
    """
    options = _attribute(_BRPORT_HAIRPIN, b"\1") + _attribute(_BRPORT_ISOLATED, b"\1")
    options += _attribute(_BRPORT_LEARNING, b"\0") + _attribute(_BRPORT_LOCKED, b"\1")
    options += b"".join(_attribute(each, b"\0") for each in _BRPORT_FLOODS)
    port = _text(_INFO_SLAVE_KIND, "bridge") + _attribute(_INFO_SLAVE_DATA, options)
    body = _link() + _text(_IFLA_IFNAME, name) + _attribute(_IFLA_LINKINFO, port)
    return Request("RTM_NEWLINK", name, _NEWLINK, 0, body)


def pin_sender(index: int, mac: bytes) -> Request:
    """Ask that a hardware address belongs to a port of a bridge for ever."""
    body = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, _NUD_NOARP, _NTF_MASTER, 0) + _attribute(_NDA_LLADDR, mac)
    return Request("RTM_NEWNEIGH", mac.hex(":"), _NEWNEIGH, _CREATE | _REPLACE, body)


def pin_neighbour(index: int, address: IPv4Address, mac: bytes) -> Request:
    """Ask that an address on a link has this hardware address for ever, whoever else claims it."""
    body = _NEIGHBOUR.pack(socket.AF_INET, index, _NUD_PERMANENT, 0, 0) + _attribute(_NDA_DST, address.packed)
    body += _attribute(_NDA_LLADDR, mac)
    return Request("RTM_NEWNEIGH", str(address), _NEWNEIGH, _CREATE | _REPLACE, body)


def raise_link(name: str) -> Request:
    """Ask that a link is up."""
    return Request("RTM_NEWLINK", name, _NEWLINK, 0, _link(flags=_IFF_UP) + _text(_IFLA_IFNAME, name))


def get_link(name: str) -> Request:
    """Ask for a link; `index_in` reads the answer."""
    return Request("RTM_GETLINK", name, _GETLINK, 0, _link() + _text(_IFLA_IFNAME, name))


def index_in(answer: bytes) -> int:
    """Return the index of the link that an answer to `get_link` tells."""
    return int(_LINK.unpack_from(answer)[2])


def new_address(index: int, address: IPv4Interface) -> Request:
    """Ask that a link has an address."""
    packed = address.ip.packed
    body = _ADDRESS.pack(socket.AF_INET, address.network.prefixlen, 0, _RT_SCOPE_UNIVERSE, index)
    body += _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
    return Request("RTM_NEWADDR", str(address), _NEWADDR, _CREATE | _EXCL, body)


def new_default_route(index: int, gateway: IPv4Address) -> Request:
    """Ask that everything else leaves through a link and a gateway."""
    body = _ROUTE.pack(
        socket.AF_INET, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST, 0
    ) + _attribute(_RTA_GATEWAY, gateway.packed) + _number(_RTA_OIF, index)  # fmt: skip
    return Request("RTM_NEWROUTE", f"default via {gateway}", _NEWROUTE, _CREATE | _EXCL, body)


def exchange(netlink: socket.socket, requests: Sequence[Request]) -> list[bytes]:
    """Send all requests in one message, and return the bodies of what is told apart from the acknowledgements.

    The kernel goes on after a refused request, so a later one must do no harm without it.

    Raises:
        KernelError: the first that was refused.
    """
    numbered = {next(_sequence) & 0xFFFFFFFF: request for request in requests}
    netlink.send(b"".join(_message(number, request) for number, request in numbered.items()))
    refused: KernelError | None = None
    told = []
    while numbered:
        answers = netlink.recv(_ANSWER_BYTES_MAX, socket.MSG_DONTWAIT)  # all are read: the next exchange starts clean
        at = 0
        while at < len(answers):
            length, kind, _, number, _ = _HEADER.unpack_from(answers, at)
            body = answers[at + _HEADER.size : at + length]
            at += _aligned(length)
            if kind != _NLMSG_ERROR:
                if number in numbered:
                    told.append(body)
            elif (request := numbered.pop(number, None)) is not None:
                code = -_NUMBER.unpack_from(body)[0]
                if code and refused is None:
                    refused = KernelError(code, request.name, request.target)
    if refused is not None:
        raise refused
    return told


def open_socket(netlink_fd: int = -1) -> socket.socket:
    """Open a socket to the network namespace of the calling thread, or take one over that was opened in another."""
    if netlink_fd >= 0:
        return socket.socket(fileno=netlink_fd)
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)


def _message(number: int, request: Request) -> bytes:
    size = _HEADER.size + len(request.body)
    return _HEADER.pack(size, request.kind, request.flags | _REQUEST | _ACK, number, 0) + request.body


def _link(*, flags: int = 0) -> bytes:
    """Pack an ifinfomsg that sets `flags` and leaves all others; the link's name follows as an attribute."""
    return _LINK.pack(socket.AF_UNSPEC, 0, 0, flags, flags)


def _attribute(kind: int, payload: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(size, kind) + payload + bytes(_aligned(size) - size)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, _NUMBER.pack(value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, os.fsencode(value) + b"\0")


def _aligned(size: int) -> int:
    return size + 3 & ~3
