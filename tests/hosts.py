"""Hosts with addresses of their own on this machine: network namespaces joined by a cable."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


@dataclass(frozen=True)
class Host:
    """A network namespace with one network card. Files and processes are the machine's."""

    name: str
    address: str
    card: str

    def start(self, *command: object, **options: Any) -> subprocess.Popen[str]:
        """A process on this host; `options` are those of `subprocess.Popen`."""
        words = ["ip", "netns", "exec", self.name, *map(str, command)]
        return subprocess.Popen(words, text=True, **options)

    def cut(self) -> None:
        """Pull the plug: connections fall silent, new ones find no way."""
        ip("-n", self.name, "link", "set", self.card, "down")

    def mend(self) -> None:
        """Put it back: what was sent meanwhile arrives late."""
        ip("-n", self.name, "link", "set", self.card, "up")

    def kill_all(self) -> None:
        """End what runs here."""
        for process in ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def remove(self) -> None:
        """End what runs here, and the host."""
        self.kill_all()
        ip("netns", "delete", self.name)


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two hosts that reach each other and nobody else; skips the test where none can be made."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (iproute2) to make network namespaces")
    hosts = [
        Host(f"host-{os.getpid()}-{index}", f"10.231.7.{index + 1}", f"card{index}")
        for index in (0, 1)
    ]
    made: list[Host] = []
    try:
        try:
            for host in hosts:
                ip("netns", "add", host.name)
                made.append(host)
            first, second = hosts
            cable = ["link", "add", first.card, "netns", first.name, "type", "veth"]
            ip(*cable, "peer", "name", second.card, "netns", second.name)
            for host in hosts:
                inside = ["-n", host.name]
                ip(*inside, "address", "add", f"{host.address}/24", "dev", host.card)
                ip(*inside, "link", "set", host.card, "up")
                ip(*inside, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield hosts
    finally:
        for host in made:
            host.remove()
