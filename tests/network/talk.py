"""Two programs for the tests of the test network itself: one answers what it is sent with a hash, the other asks."""

import hashlib
import os
import socket
import sys
import threading
import time


def _exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes; says "silent" for each half second in which none come."""
    received = b""
    while len(received) < size:
        try:
            part = connection.recv(size - len(received))
        except TimeoutError:
            print("silent", flush=True)
            continue
        if not part:
            sys.exit("closed")
        received += part
    return received


def _answer(connection: socket.socket) -> None:
    while True:
        size = int.from_bytes(_exactly(connection, 8), "big")
        connection.sendall(hashlib.sha256(_exactly(connection, size)).digest())


def serve(address: str, port: int) -> None:
    """Answer everyone."""
    with socket.create_server((address, port)) as listener:
        print("listening", flush=True)
        while True:
            connection = listener.accept()[0]
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def ask(address: str, port: int, size: int, times: int) -> None:
    """Send messages of so many bytes one after another and print for each how many seconds its answer took."""
    with socket.create_connection((address, port), timeout=20) as connection:
        connection.settimeout(0.5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(f"connected from {connection.getsockname()[0]} of {socket.gethostname()}", flush=True)
        for _ in range(times):
            message = os.urandom(size)
            began = time.monotonic()
            # Sent by a thread: a message may be larger than what the system takes at once.
            sender = threading.Thread(target=_send, args=(connection.dup(), size.to_bytes(8, "big") + message))
            sender.start()
            assert _exactly(connection, 32) == hashlib.sha256(message).digest()
            sender.join()
            print(f"answered {time.monotonic() - began:.6f}", flush=True)
            time.sleep(0.01)


def _send(connection: socket.socket, message: bytes) -> None:
    with connection:
        connection.settimeout(None)
        connection.sendall(message)


if __name__ == "__main__":
    arguments = [int(each) for each in sys.argv[3:]]
    {"serve": serve, "ask": ask}[sys.argv[1]](sys.argv[2], *arguments)
