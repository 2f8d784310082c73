"""Programs of ours that start from a process which has imported torch already, and has read GPT-2's vocabulary.

`python -m trainer.train` spends three seconds of a core on imports before its first line, and the tests start it often.
`warm.Popen` is subprocess.Popen, except that a server process forks instead of starting an interpreter: the child gets
the arguments, environment, folder, session and pipes that a new interpreter would have had, and runs the module as
`__main__`. With WARM_CHILDREN in its environment the Python programs that it starts are warm too: torchrun's ranks, or
what launch.node runs. Tests of starting itself (imports, signals at the first instant) use subprocess.

    python -m tests.warm FD     the server, on the socket with this number
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).parent.parent
# The entries run anew in each child, as `__main__`; these are what they import.
PRELOADED = """
    torch torch.distributed torch.nn.parallel torch._dynamo torch._inductor.utils torch.distributed.launcher.api
    pyarrow.parquet tiktoken trainer.loop.segment trainer.stages.pretrain
    trainer.stages.finetune trainer.stages.dpo trainer.stages.distil trainer.inference.engine trainer.evals.harness
    trainer.weights.folder costs.show launch.node.preflight
    trainer.synthesis.make trainer.inference.server trainer.inference.terminal data_prep.build data_prep.booking
""".split()
TORCHRUN_STARTS = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
LONGEST_REQUEST = 1 << 20
PR_SET_CHILD_SUBREAPER = 36
ColdPopen = subprocess.Popen
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
# A variable whose value becomes the name of a warm process, instead of its module: /proc shows the server's environment
# and command line for it.
NAME = "PROCESS_NAME"


class Popen(ColdPopen):
    """`[sys.executable, "-m", module, *arguments]` or `[sys.executable, script, *arguments]`, warm on Linux."""

    def _execute_child(self, *given, **named):
        bound = inspect.signature(super()._execute_child).bind(*given, **named).arguments
        command = [str(each) for each in bound["args"]]
        is_ours = command[0] == sys.executable and bound["preexec_fn"] in (None, default_signals)
        if sys.platform != "linux" or not is_ours:
            return super()._execute_child(*given, **named)
        request = {
            "arguments": command[1:],
            "folder": str(bound["cwd"] or os.getcwd()),
            "environment": dict(os.environ if bound["env"] is None else bound["env"]),
            "is_session": bound["start_new_session"],
            "has_default_signals": bound["preexec_fn"] is default_signals,
        }
        streams = [bound[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = _fork_in_server(request, [own if given == -1 else given for own, given in enumerate(streams)])
        self._child_created = True
        pipes = {bound["p2cread"]: bound["p2cwrite"], bound["c2pwrite"]: bound["c2pread"]}
        pipes |= {bound["errwrite"]: bound["errread"]} if bound["errread"] != -1 else {}
        for descriptor in {each for each, end in pipes.items() if end != -1} | {getattr(self, "_devnull", -1)} - {-1}:
            os.close(descriptor)  # the caller keeps those that it has opened itself


_servers: dict[int, socket.socket] = {}  # by the process that asks
_adopting = threading.Lock()


def default_signals() -> None:
    """For `preexec_fn`: a program inherits what is ignored, as SIGINT is in the background and SIGHUP under nohup."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    """subprocess.run with capture_output and text, by a warm process."""
    timeout, text = options.pop("timeout", None), options.pop("input", None)
    stdin = subprocess.DEVNULL if text is None else subprocess.PIPE
    with Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            output, errors = process.communicate(text, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _fork_in_server(request: dict, streams: list[int]) -> int:
    """The process number of a new child of ours: the server forks twice, and we adopt the orphan."""
    if os.getpid() not in _servers:
        _servers[os.getpid()] = _start_server()
    server = _servers[os.getpid()]
    with _adopting:
        _adopt_orphans(True)
        try:
            message = json.dumps(request).encode()
            socket.send_fds(server, [len(message).to_bytes(4, "little")], streams)
            server.sendall(message)
            answer = server.recv(4)
        finally:
            _adopt_orphans(False)
    if not answer:
        raise RuntimeError("the warm process has ended; its error is above")
    return int.from_bytes(answer, "little")


def _adopt_orphans(is_wanted: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(is_wanted), 0, 0, 0)


def _start_server() -> socket.socket:
    """The socket of a running server, which ends with this process."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    process = ColdPopen(command, cwd=REPOSITORY, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def serve(connection: socket.socket, handlers: Mapping[int, Any] = {}) -> list[str]:
    """Fork for each request. Returns, in the child only, the arguments to run.

    `handlers` are the children's, by signal, where the server's own are different.
    """
    while True:
        head, streams, _, _ = socket.recv_fds(connection, 4, 3)
        if not head:
            os._exit(0)
        length, message = int.from_bytes(head, "little"), b""
        while len(message) < length:
            message += connection.recv(LONGEST_REQUEST)
        number, into = os.pipe()
        if (between := os.fork()) == 0:
            parent = os.getpid()
            if (child := os.fork()) == 0:
                connection.close()
                while os.getppid() == parent:  # programs remember their parent, to notice that it has gone
                    time.sleep(0.001)
                for signum, handler in handlers.items():
                    signal.signal(signum, handler)
                return become(json.loads(message), streams)
            os.write(into, child.to_bytes(4, "little"))
            os._exit(0)
        os.waitpid(between, 0)  # from here on the child is an orphan, and its parent is who asked
        connection.sendall(os.read(number, 4))
        for descriptor in (number, into, *streams):
            os.close(descriptor)


def become(request: dict, streams: list[int]) -> list[str]:
    if request["is_session"]:
        os.setsid()
    for own, given in enumerate(streams):
        os.dup2(given, own)
    os.closerange(3, 4096)
    if request["is_session"] and os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal of the session: its Ctrl-C reaches the program
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["has_default_signals"]:
        default_signals()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through="PYTHONUNBUFFERED" in os.environ or request["arguments"][0] == "-u")
    _rename(os.environ.get(NAME) or next(each for each in request["arguments"] if not each.startswith("-")))
    if os.environ.get("WARM_CHILDREN") and (arguments := _fork_server()):
        return arguments
    return request["arguments"]


def _rename(name: str) -> None:
    Path("/proc/self/comm").write_text(name[-15:])


def _fork_server() -> list[str] | None:
    """Give this process a server that is its child, and whose orphans it can adopt.

    Returns the arguments to run, in these orphans only. Such a server ends with its owner, and not by a signal that the
    owner sends to its children.
    """
    ours, theirs = socket.socketpair()
    if os.fork():
        theirs.close()
        _servers[os.getpid()] = ours
        subprocess.Popen = Popen
        sys.modules[TORCHRUN_STARTS].Popen = Popen
        return None
    _rename("warm")
    ours.close()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    return serve(theirs, handlers)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    from core.data import vocabulary
    from tests import corpus

    # The vocabulary too, without core.storage, which no process may use before it is forked.
    vocabulary.parse(corpus.vocab_bpe().read_bytes(), "vocab.bpe").encoding()
    # It takes 50 ms at the end of each process, and has nothing to say there.
    atexit.unregister(importlib.import_module("torch._dynamo.utils").dump_compile_times)
    gc.freeze()
    arguments = serve(socket.socket(fileno=int(sys.argv[1])), {})
    end(_code_of(arguments))


def _code_of(arguments: list[str]) -> int:
    """Runs a program as `__main__`. Returns its exit code."""
    try:
        if arguments[0] == "-u":
            arguments.pop(0)
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            given = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
            sys.path[:1] = [os.getcwd(), *given, str(REPOSITORY)]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as request:
        if isinstance(request.code, int):
            return request.code & 0xFF
        if request.code is not None:
            print(request.code, file=sys.stderr)
        return int(request.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def end(code: int) -> NoReturn:
    """Ends this process as the interpreter does, but without freeing its objects, which takes half a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    os._exit(code)


if __name__ == "__main__":
    main()
