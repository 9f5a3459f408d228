"""An interpreter that has imported the package already, so that what takes seconds starts in milliseconds.

A server imports everything once and forks for each command that is asked of it. What stands in python's place is a
small client, which hands the server its arguments, environment, folder and standard streams, passes signals on, and
ends with the command's exit code. It asks the real interpreter to run whatever is not a script, ``-m`` or ``-c``. A
command that starts ``sys.executable`` itself, as launchers do, starts the client again.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = ["lightning_megatron.cli.training", "transformers", "torch.distributed.run", "datasets"]
_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
arguments = sys.argv[1:]
alone = "-P" in arguments[:1]
while arguments and arguments[0] in ("-u", "-P"):
    del arguments[0]
if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-m", "-c")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps([arguments, alone, dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(asked).to_bytes(8, "little")], [0, 1, 2])
server.sendall(asked)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
code = int.from_bytes(server.recv(4), "little", signed=True)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


_servers: list[subprocess.Popen] = []


@functools.cache
def executable() -> str:
    """The path of the client; starts the server."""
    folder = Path(tempfile.mkdtemp(prefix="preloaded_python"))
    client, address = folder / "python", str(folder / "socket")
    client.write_text(_CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    read, write = os.pipe()
    command = [sys.executable, "-m", __name__, address, str(client), str(write)]
    server = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, pass_fds=[write])
    os.close(write)
    assert os.read(read, 1), f"{command} did not start"
    os.close(read)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _servers.append(server)  # it ends when its standard input does
    return str(client)


def _serve(address: str, client: str, ready: int) -> NoReturn:
    for name in PRELOADED:
        importlib.import_module(name)
    sys.executable = client
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    wakeup, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    os.write(ready, b"1")
    os.close(ready)
    clients: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(listening, selectors.EVENT_READ)
        selector.register(wakeup, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    _end_all(clients)
                elif key.fileobj is listening:
                    connection, _ = listening.accept()
                    asked, streams = _receive(connection)
                    if not (pid := os.fork()):
                        _run(asked, streams)
                    for stream in streams:
                        os.close(stream)
                    clients[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                elif key.fileobj is wakeup:
                    wakeup.recv(4096)
                    for pid, status in _ended(clients):
                        connection = clients.pop(pid)
                        if connection in selector.get_map():
                            selector.unregister(connection)
                        _tell(connection, os.waitstatus_to_exitcode(status))
                elif key.data in clients and not _pass_on(clients[key.data], key.data):
                    selector.unregister(key.fileobj)


def _receive(connection: socket.socket) -> tuple[Any, list[int]]:
    header, streams, *_ = socket.recv_fds(connection, 8, 3)
    wanted, content = int.from_bytes(header, "little"), b""
    while len(content) < wanted:
        content += connection.recv(wanted - len(content))
    return json.loads(content), streams


def _ended(clients: dict[int, socket.socket]) -> list[tuple[int, int]]:
    found = (os.waitpid(pid, os.WNOHANG) for pid in clients)
    return [(pid, status) for pid, status in found if pid]


def _tell(connection: socket.socket, code: int) -> None:
    with contextlib.suppress(OSError):  # the client was killed
        connection.sendall(code.to_bytes(4, "little", signed=True))
    connection.close()


def _pass_on(connection: socket.socket, pid: int) -> bool:
    """The client's signals; where it was killed the command is killed too, and the answer is False."""
    try:
        numbers = connection.recv(64)
    except OSError:
        numbers = b""
    for number in numbers or [signal.SIGKILL]:
        os.kill(pid, number)
    return bool(numbers)


def _end_all(clients: dict[int, socket.socket]) -> NoReturn:
    for pid in clients:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _run(asked: Any, streams: list[int]) -> NoReturn:
    """Become the interpreter that was asked for, in this forked process."""
    arguments, alone, environment, folder = asked
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 4096)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "w" if n else "r", closefd=False) for n in range(3))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed()
    module = arguments[0] == "-m"
    sys.argv = [arguments[1 if module else 0], *arguments[2 if module or arguments[0] == "-c" else 1 :]]
    first = "" if arguments[0] == "-c" else folder if module else str(Path(arguments[0]).resolve().parent)
    given = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*([] if alone else [first]), *given, *(path for path in sys.path[1:] if path not in given)]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    code = 0
    try:
        if module:
            runpy._run_module_as_main(arguments[1], alter_argv=True)  # type: ignore[attr-defined]
        elif arguments[0] == "-c":
            exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
        else:
            main.__file__ = arguments[0]
            exec(compile(Path(arguments[0]).read_bytes(), arguments[0], "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 255)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
