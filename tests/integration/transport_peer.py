"""A stage in a process of its own, for tests: sends to the parent's stage 1, or sits still. Reads one line of JSON.

It prints its address and key, connects to the parent, sends `frames` frames, and then receives for ever.
"""

import json
import sys

from eldric.transport.base import Peer, TransportOptions
from tests.transports import make_transport, numbered


def main() -> None:
    order = json.loads(sys.argv[1])
    options = TransportOptions(silence_s=order["silence_s"])
    with make_transport(order["scheme"], 0, options) as transport:
        transport.allow([order["key"]])
        print(json.dumps({"address": transport.listen(), "key": transport.public_key}), flush=True)
        link = transport.connect(Peer(order["address"], order["key"], 1))
        for number in range(order["frames"]):
            link.send(numbered(number), b"from another process")
        while True:
            transport.recv()


if __name__ == "__main__":
    main()
