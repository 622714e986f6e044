"""The round trip of a TCP connection, as the kernel measures it from its own acknowledgements: it costs nothing."""

import socket
import struct
import sys

#: Offset of tcpi_min_rtt in struct tcp_info (https://github.com/torvalds/linux/blob/v6.1/include/uapi/linux/tcp.h).
_MIN_RTT = 148
_NO_SAMPLE = 0xFFFFFFFF


def tcp_round_trip_s(descriptor: int) -> float:
    """The shortest round trip of the last minutes, in seconds; 0 where it is not known.

    The shortest, because the smoothed one counts the 40 ms by which a receiver may put its acknowledgements off. The
    descriptor stays its owner's. One that was closed meanwhile gives 0; one that was given to another connection by
    then gives that one's.
    """
    if sys.platform != "linux" or descriptor < 0:
        return 0.0
    try:
        borrowed = socket.socket(fileno=descriptor)
    except OSError:
        return 0.0
    try:
        info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT + 4)
    except OSError:
        return 0.0
    finally:
        borrowed.detach()
    if len(info) < _MIN_RTT + 4:
        return 0.0
    (micros,) = struct.unpack_from("=I", info, _MIN_RTT)
    return 0.0 if micros == _NO_SAMPLE else float(micros) / 1e6
