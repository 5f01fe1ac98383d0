"""A server that can be away or slow, and waiting for what happens in the background."""

import time


class Server:
    """Takes records, or is away."""

    def __init__(self):
        self.got, self.away, self.attempts = [], False, 0

    def send(self, calls):
        self.attempts += 1
        if self.away:
            raise RuntimeError("nobody answers")
        self.got.append(calls[0]["n"])
        return 1


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
