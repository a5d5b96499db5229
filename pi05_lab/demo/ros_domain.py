"""A ROS domain that no node on this machine uses, for the demo and the tests.

A participant of domain d binds UDP port 7410 + 250·d + 2·k of the machine, where k counts the
participants (the DDSI-RTPS port mapping). A domain is free when none of its first ports is bound.
Discovery is limited to this machine (ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST), so other machines
do not matter.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable

DOMAINS = range(232, 101, -1)
"""Above 101: robots use low domains. 215 to 232 come first, their ports are not among those that
Linux gives to outgoing connections."""
FIRST_PORT = 7400
PORTS_PER_DOMAIN = 250
UNICAST_OFFSET = 10
CHECKED_PARTICIPANTS = 10
_claims: list[socket.socket] = []


class NoFreeDomain(RuntimeError):
    """Every domain that may be chosen is in use."""


def is_free(domain: int) -> bool:
    """Whether no process of this machine has a participant in the domain."""
    first = FIRST_PORT + PORTS_PER_DOMAIN * domain + UNICAST_OFFSET
    for port in range(first, first + 2 * CHECKED_PARTICIPANTS, 2):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True


def claim_domain(domains: Iterable[int] = DOMAINS) -> int:
    """The first free domain; it stays claimed until this process ends.

    The claim is a TCP socket bound to the domain's first port, which DDS does not use over TCP: two
    processes that look at the same time get different domains, and a process that dies releases
    its claim.

    Raises:
        NoFreeDomain: none is free.
    """
    for domain in domains:
        claim = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            claim.bind(("127.0.0.1", FIRST_PORT + PORTS_PER_DOMAIN * domain))
        except OSError:
            claim.close()
            continue
        if is_free(domain):
            _claims.append(claim)
            return domain
        claim.close()
    raise NoFreeDomain("no ROS domain from 102 to 232 is free: give one")


def use_own_domain(domain: int | None = None) -> int:
    """Keep this process and its children in a domain of their own on this machine.

    Args:
        domain: None claims a free one. ROS_DOMAIN_ID does not count: it may be the robot's.

    Raises:
        NoFreeDomain: none is free.
    """
    chosen = claim_domain() if domain is None else domain
    os.environ["ROS_DOMAIN_ID"] = str(chosen)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    return chosen
