"""The tunnel of a node behind NAT: many TCP connections over one that the node made to an edge.

    session.py   channels, windows, and what is kept until it is acknowledged: pure
    pipe.py      one TCP connection at the end of a channel
    carrier.py   a session with its pipes, over one stream after another
    client.py    the node's end

The edge's end is eldric.edge. The contract is protos/eldric/v1/tunnel.proto.
"""
