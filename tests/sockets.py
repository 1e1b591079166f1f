"""Known socket calls: run as a program, this makes them and says which it made.

It waits for a line on its input, makes the calls under the command name given, noting each as a
program sees it - result, bytes, errno, addresses, time - and prints all that as one line of JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
V4, V6 = "127.0.0.1", "::1"
ENDS = ("family", "address", "port", "local_address", "local_port")
_PR_SET_NAME = 15


class Truth:
    """What the calls gave, by call."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    def note(self, call: str, result: int | OSError, size: int = 0) -> None:
        row = self.calls.setdefault(call, {"calls": 0, "errors": 0, "bytes": 0, "errnos": {}})
        row["calls"] += 1
        row["bytes"] += size
        if isinstance(result, OSError):
            name = errno.errorcode[result.errno or 0]
            row["errors"] += 1
            row["errnos"][name] = row["errnos"].get(name, 0) + 1

    def attempt(self, call: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Make a call that may fail; its result, None when it did."""
        try:
            result = function(*arguments)
        except OSError as error:
            self.note(call, error)
            return None
        if call == "send":
            self.note(call, 0, result)
        elif call == "recv":
            self.note(call, 0, len(result[0] if isinstance(result, tuple) else result))
        else:
            self.note(call, 0)
        return result

    def connect(self, sock: socket.socket, address: Any) -> bool:
        """Connect, and note the event that this is."""
        begin = time.monotonic_ns()
        event: dict[str, Any] = {"call": "connect", "ret": 0, "error": None}
        try:
            sock.connect(address)
        except OSError as error:
            took = time.monotonic_ns() - begin
            self.note("connect", error)
            event |= {"ret": -(error.errno or 0), "error": errno.errorcode[error.errno or 0]}
        else:
            took = time.monotonic_ns() - begin
            self.note("connect", 0)
        event |= {**name_ends(sock, address), "at_most_ns": took}
        if event["error"] == "ECONNREFUSED":  # the port it was given is taken back
            event |= {"local_address": None, "local_port": None}
        self.events.append(event)
        return event["ret"] == 0

    def accept(self, listener: socket.socket) -> socket.socket:
        begin = time.monotonic_ns()
        sock, peer = listener.accept()
        took = time.monotonic_ns() - begin
        self.note("accept", 0)
        event = {"call": "accept", "ret": sock.fileno(), "error": None, **name_ends(sock, peer)}
        self.events.append({**event, "at_most_ns": took})
        return sock

    def fail_on_no_socket(self, call: str, function: Callable[[], int]) -> None:
        """A connect or accept on a descriptor that is closed."""
        assert self.attempt(call, function) is None
        event = {"call": call, "ret": -errno.EBADF, "error": "EBADF"}
        self.events.append({**event, **dict.fromkeys(ENDS), "at_most_ns": 1_000_000_000})

    def close(self, *socks: socket.socket) -> None:
        for sock in socks:
            sock.close()
            self.note("close", 0)

    def send(self, sock: socket.socket, size: int) -> None:
        self.attempt("send", sock.send, bytes(size))

    def recv(self, sock: socket.socket, size: int) -> None:
        """Receive exactly so much, in as many calls as it takes."""
        while size > 0:
            size -= len(self.attempt("recv", sock.recv, size))


def name_ends(sock: socket.socket, peer: Any) -> dict[str, Any]:
    """Family and both ends as net-monitor names them."""
    family = {socket.AF_INET: "inet", socket.AF_INET6: "inet6", socket.AF_UNIX: "unix"}[sock.family]
    if family == "unix":
        ends = {"port": None, "local_port": None}
        for name, path in (("address", peer), ("local_address", sock.getsockname())):
            if isinstance(path, bytes):  # an abstract name
                path = path.replace(b"\0", b"@").decode()
            ends[name] = path or None
        return {"family": family, **ends}
    local = sock.getsockname()
    if not local[1]:
        local = (None, None)
    return {
        "family": family,
        "address": peer[0],
        "port": peer[1],
        "local_address": local[0],
        "local_port": local[1],
    }


def check(result: int) -> int:
    """The result of a C function, as an OSError where it is one."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def stream_pairs(truth: Truth, family: int, host: str, count: int, size: int) -> None:
    """Connections one after another, each carrying ``size`` bytes there and twice that back."""
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        for _ in range(count):
            client = socket.socket(family)
            truth.connect(client, listener.getsockname()[:2])
            server = truth.accept(listener)
            truth.send(client, size)
            truth.recv(server, size)
            truth.send(server, 2 * size)
            truth.recv(client, 2 * size)
            truth.close(client, server)
    truth.note("close", 0)


def mapped_pair(truth: Truth) -> None:
    """An IPv4 client of an IPv6 socket."""
    with socket.socket(socket.AF_INET6) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
        listener.listen()
        client = socket.socket()
        truth.connect(client, (V4, listener.getsockname()[1]))
        truth.close(truth.accept(listener), client)
    truth.note("close", 0)


def datagrams(truth: Truth, family: int, host: str, count: int, size: int) -> None:
    """Datagrams by sendto and by a connected socket, read by recvfrom, peeked at before."""
    receiver, sender = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
    receiver.bind((host, 0))
    address = receiver.getsockname()
    for _ in range(count):
        truth.attempt("send", sender.sendto, bytes(size), address)
        receiver.recv(size, socket.MSG_PEEK)
        truth.note("recv", 0)
        truth.attempt("recv", receiver.recvfrom, size)
    truth.connect(sender, address[:2])
    truth.send(sender, size)
    truth.attempt("recv", receiver.recvmsg, size)
    truth.close(receiver, sender)


def unix_streams(truth: Truth, address: str | bytes, count: int, size: int) -> None:
    """Connections to a path or an abstract name; the first client has a name of its own."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        for number in range(count):
            client = socket.socket(socket.AF_UNIX)
            if number == 0:
                client.bind(address + (".client" if isinstance(address, str) else b".client"))
            truth.connect(client, address)
            server = truth.accept(listener)
            truth.attempt("send", client.sendmsg, [bytes(size), bytes(1)])
            truth.attempt("recv", server.recvmsg, size + 1)
            truth.close(client, server)
    truth.note("close", 0)


def unix_datagrams(truth: Truth, path: str, count: int, size: int) -> None:
    receiver, sender = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
    receiver.bind(path)
    truth.connect(sender, path)
    for _ in range(count):
        truth.send(sender, size)
        truth.recv(receiver, size)
    truth.close(receiver, sender)


def many_messages(truth: Truth, sizes: list[int]) -> None:
    """One sendmmsg and one recvmmsg (through libc: Python has neither)."""
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock, function, call in (
        (sender, LIBC.sendmmsg, "send"),
        (receiver, LIBC.recvmmsg, "recv"),
    ):
        buffers = [ctypes.create_string_buffer(max(sizes)) for _ in sizes]
        vectors = [
            (ctypes.c_uint64 * 2)(ctypes.addressof(b), size if call == "send" else max(sizes))
            for b, size in zip(buffers, sizes, strict=True)
        ]
        messages = (ctypes.c_uint64 * (8 * len(sizes)))()
        for number, vector in enumerate(vectors):  # msg_iov and msg_iovlen are the third and fourth
            messages[8 * number + 2] = ctypes.addressof(vector)
            messages[8 * number + 3] = 1
        done = check(function(sock.fileno(), messages, len(sizes), socket.MSG_DONTWAIT, None))
        assert done == len(sizes), f"{done} of {len(sizes)} messages"
        truth.note(call, 0, sum(messages[8 * number + 7] & 0xFFFFFFFF for number in range(done)))
    truth.close(sender, receiver)


def failures(truth: Truth, refused: int, empty: int) -> None:
    """Refused connections, reads from an empty socket, and descriptors that are no sockets."""
    with socket.socket() as taken:  # bound, not listening: nobody else gets the port
        taken.bind((V4, 0))
        for _ in range(refused):
            sock = socket.socket()
            truth.connect(sock, taken.getsockname())
            truth.close(sock)
    truth.note("close", 0)
    one, other = socket.socketpair()
    one.setblocking(False)
    for _ in range(empty):
        truth.attempt("recv", one.recv, 1)
    truth.fail_on_no_socket("connect", lambda: check(LIBC.connect(-1, None, 0)))
    truth.fail_on_no_socket("accept", lambda: check(LIBC.accept(999_999, None, None)))
    pipe = os.pipe()
    truth.attempt("send", lambda: check(LIBC.send(pipe[1], b"x", 1, 0)))
    os.write(one.fileno(), b"not by a socket call")
    os.read(other.fileno(), 100)
    for fd in pipe:
        os.close(fd)
    truth.close(one, other)


def silent_accept(truth: Truth, waiting: float) -> None:
    """accept(2) that asks for no address, and waits so many seconds until a thread connects."""
    number = {"x86_64": "43", "aarch64": "202"}[os.uname().machine]
    state = Path(f"/proc/self/task/{threading.get_native_id()}/syscall")
    with socket.create_server((V4, 0)) as listener:
        client = socket.socket()

        def connect() -> None:
            while state.read_text().split()[0] != number:  # not yet inside accept
                time.sleep(0.001)
            time.sleep(waiting)
            truth.connect(client, listener.getsockname())

        thread = threading.Thread(target=connect)
        thread.start()
        begin = time.monotonic_ns()
        fd = check(LIBC.accept(listener.fileno(), None, None))
        took = time.monotonic_ns() - begin
        thread.join()
        truth.note("accept", 0)
        server = socket.socket(fileno=fd)
        event = {"call": "accept", "ret": fd, "error": None, "asked": False, "at_most_ns": took}
        truth.events.append({**event, **name_ends(server, server.getpeername())})
        truth.close(server, client)
    truth.note("close", 0)


def pending_connect(truth: Truth) -> None:
    """A connect that does not wait: EINPROGRESS, though it succeeds a moment later."""
    with socket.create_server((V4, 0)) as listener:
        client = socket.socket()
        client.setblocking(False)
        truth.connect(client, listener.getsockname())
        truth.close(truth.accept(listener), client)
    truth.note("close", 0)


def close_files(count: int) -> None:
    """Closes that are not of sockets, one of nothing, and one of a socket's mere name."""
    for _ in range(count):
        os.close(os.open("/dev/null", os.O_RDONLY))
    for fd in (999_999, -1):
        try:
            os.close(fd)
        except OSError as error:
            assert error.errno == errno.EBADF


def call_from_thread(comm: str) -> Truth:
    """Seven datagrams sent by a thread that has a name of its own."""
    truth = Truth()
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def send() -> None:
        name_myself(f"{comm}-thread")
        for _ in range(7):
            truth.send(one, 5)

    thread = threading.Thread(target=send)
    thread.start()
    thread.join()
    truth.close(one, other)
    return truth


def storm(directory: str) -> Truth:
    """More failing connects than the ring buffer has room for."""
    truth, missing = Truth(), f"{directory}/missing.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        for _ in range(5003):
            truth.attempt("connect", sock.connect, missing)
    truth.note("close", 0)
    return truth


def make_calls(directory: Path, ipv6: bool) -> Truth:
    """All of the above, in prime numbers."""
    truth = Truth()
    stream_pairs(truth, socket.AF_INET, V4, 7, 1009)
    datagrams(truth, socket.AF_INET, V4, 11, 101)
    if ipv6:
        stream_pairs(truth, socket.AF_INET6, V6, 5, 20_011)
        datagrams(truth, socket.AF_INET6, V6, 13, 103)
        mapped_pair(truth)
    path = str(directory / "stream.sock")
    unix_streams(truth, path, 3, 307)
    unix_streams(truth, b"\0hmebpf-test-%d" % os.getpid(), 2, 211)
    unix_datagrams(truth, str(directory / "dgram.sock"), 17, 53)
    for number in (5, 16, 37):  # the program adds them up sixteen at a time
        many_messages(truth, list(range(3, 3 + number)))
    failures(truth, refused=19, empty=23)
    silent_accept(truth, waiting=0.05)
    pending_connect(truth)
    close_files(29)
    descriptor = os.open(path, os.O_PATH)  # has a socket's file type and is none
    os.close(descriptor)
    return truth


def name_myself(name: str) -> None:
    """Change the calling thread's command name, the process's own in its first thread."""
    LIBC.prctl(_PR_SET_NAME, name.encode())


def main(comm: str, directory: str, what: str) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    name_myself(comm)
    if what == "threads":
        truth = call_from_thread(comm)
    elif what == "storm":
        truth = storm(directory)
    else:
        truth = make_calls(Path(directory), ipv6=os.path.exists("/proc/net/if_inet6"))
    name_myself("done")
    print(json.dumps({"pid": os.getpid(), "calls": truth.calls, "events": truth.events}))


if __name__ == "__main__":
    main(*sys.argv[1:])
