"""Workers on a Ray cluster: on each of its GPUs the process that `--devices` starts on this machine."""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import LongslideError
from ...version import __version__
from ..signals import ENDING
from .workers import LocalWorker, Worker, cores_of

logger = logging.getLogger(__name__)

NODE_ANSWERS = 120.0
"""Seconds in which a node starts a process and looks at the output folder."""
PROBE_SEEN = 10.0
"""Seconds in which a node sees a new file there: NFS takes a while."""
BUSY_AFTER = 15.0
"""Seconds that a worker waits for a place until it says so: a process takes some to start."""


def _ray() -> Any:
    """The package, which is large and optional."""
    return import_module("ray")


@contextmanager
def ray_workers(address: str, output: Path) -> Iterator[list[Worker]]:
    """A worker for each GPU of a Ray cluster; where it has none, for each node with CPUs.

    Args:
        address: `auto` for the cluster that this machine is a node of, or the address of its head.
        output: The output folder, which all nodes must see.

    Raises:
        LongslideError: There is no Ray, here or there; or a node has another version, or does not see the folders.
    """
    try:
        ray = _ray()
    except ImportError as error:
        raise LongslideError("--ray needs the package ray: pip install 'longslide[cluster]'") from error
    ours = not ray.is_initialized()
    if ours:
        _connect(address)
    try:
        nodes = [_Node.of(node) for node in _alive()]
        gpus = any(node.gpus for node in nodes)
        nodes = [node for node in nodes if (node.gpus if gpus else node.cpus)]
        refuse_other_nodes(*_look_from(nodes, output), output)
        if not nodes:
            raise LongslideError(f"--ray {address}: no node of the cluster has a GPU or a CPU for Ray to use")
        requests = _Requests()
        yield [
            _RayWorker(node, number, max(1, node.gpus), requests)
            for node in nodes
            for number in range(max(1, node.gpus))
        ]
    finally:
        if ours:
            ray.shutdown()


@dataclass(frozen=True)
class _Node:
    id: str
    name: str
    gpus: int
    cpus: int

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> "_Node":
        resources = node["Resources"]
        name = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"  # several may be on one machine
        return cls(node["NodeID"], name, int(resources.get("GPU", 0)), int(resources.get("CPU", 0)))

    def options(self, *, soft: bool) -> dict[str, Any]:
        strategies = import_module("ray.util.scheduling_strategies")
        return {"scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(self.id, soft=soft)}


def _connect(address: str) -> None:
    ray = _ray()
    if address.startswith("ray://"):
        raise LongslideError(
            f"--ray {address}: run the command on a node of the cluster, with its address without ray://, or auto"
        )
    if address != "auto":
        _check_address(address)
    elif (found := _address_that_ray_finds()) is not None:
        _check_address(found, f"auto ({found})")
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        ray.init(address=address, log_to_driver=True, logging_level="error")
    except Exception as error:  # ConnectionError, RuntimeError, ValueError: Ray has no class for it
        ray.shutdown()  # it may be half connected
        text = " ".join(str(error).split())
        if "ersion mismatch" in text:
            raise LongslideError(f"--ray {address}: {text}; install the same versions here and there") from error
        raise LongslideError(
            f"--ray {address}: {text or type(error).__name__}; is Ray running? ray start --head"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():  # Ray puts its own in place of that for SIGTERM
                signal.signal(number, handler)


def _address_that_ray_finds() -> str | None:
    """The head that `auto` means, such as one that died and is still noted in `/tmp/ray`; None where only Ray knows."""
    try:
        address = import_module("ray._private.services").canonicalize_bootstrap_address("auto")
    except Exception:  # no cluster, of which Ray says it itself; or another version of Ray, inside
        return None
    return address if isinstance(address, str) and re.fullmatch(r"[^/]+:\d+", address) else None


def _check_address(address: str, given: str | None = None) -> None:
    """Refuse an address where no Ray can be, which Ray itself would try for minutes."""
    given = address if given is None else given
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise LongslideError(f"--ray {given}: must be auto, or the address of the cluster's head such as 10.0.0.1:6379")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as connection:
            # Ray's is a gRPC server: to the beginning of HTTP/2 it answers with a frame of settings (type 4).
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            answer = b""
            while len(answer) < 4 and (more := connection.recv(64)):
                answer += more
    except (OSError, OverflowError) as error:
        if not isinstance(error, TimeoutError):
            raise LongslideError(
                f"--ray {given}: nothing answers there ({error}); start Ray: ray start --head"
            ) from error
        answer = b""
    if answer[3:4] != b"\4":
        raise LongslideError(f"--ray {given}: the port is in use by another program, not by Ray; see ray status")


def _look_from(nodes: list[_Node], output: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What each node sees, and what this process does; nodes that run nothing are taken out."""
    ray = _ray()
    folder, token = os.getcwd(), uuid.uuid4().hex
    probe = output / f".probe-{token}"
    module = f"{__name__.partition('.')[0]}.version"

    def look(
        module: str, path: str, folder: str, token: str, patience: float
    ) -> dict[str, Any]:  # a nested function travels whole: no import there
        import importlib
        import os
        import time

        try:
            version = importlib.import_module(module).__version__
        except ImportError:
            version = ""
        deadline = time.monotonic() + patience
        sees_output = False
        while not sees_output and time.monotonic() < deadline:
            try:
                with open(os.path.join(folder, path)) as file:
                    sees_output = file.read() == token
            except OSError:
                time.sleep(0.5)
        here = os.path.isdir(folder)
        return {"longslide": version, "folder": here, "output": sees_output}

    try:
        probe.write_text(token)
        remote = ray.remote(num_cpus=0, max_retries=0)(look)
        calls = {
            remote.options(**node.options(soft=False)).remote(module, str(probe), folder, token, PROBE_SEEN): node
            for node in nodes
        }
        late = ray.wait(list(calls), num_returns=len(calls), timeout=NODE_ANSWERS)[1]
        if late:
            raise LongslideError(
                f"--ray: node {calls[late[0]].name} has not answered in {NODE_ANSWERS:g} s; see ray status"
            )
        found = []
        for call, node in calls.items():
            try:
                found.append({"node": node.name, **ray.get(call)})
            except ray.exceptions.RayError as error:  # Ray lists a node for a while that has died
                logger.warning("%s is left out: %s", node.name, " ".join(str(error).split())[:300])
                nodes.remove(node)
    finally:
        probe.unlink(missing_ok=True)
    return found, {"longslide": __version__, "cwd": folder}


def refuse_other_nodes(nodes: Sequence[Mapping[str, Any]], own: Mapping[str, Any], output: Path) -> None:
    """Refuse nodes whose results would be others, or elsewhere.

    Args:
        nodes: What each node says: `node`, the version of `longslide`, whether it sees `folder` and `output`.
        own: The version here, and the working folder `cwd`.
        output: The output folder.

    Raises:
        LongslideError: One is not like this machine.
    """
    for node in nodes:
        where = f"--ray: node {node['node']}"
        if not node["longslide"]:
            raise LongslideError(f"{where} has no longslide; install version {own['longslide']} there")
        if node["longslide"] != own["longslide"]:
            raise LongslideError(
                f"{where} has longslide {node['longslide']}, this one {own['longslide']}; install the same on all nodes"
            )
        if not node["folder"]:
            raise LongslideError(
                f"{where} does not see the working folder {own['cwd']}; start the command in a shared one"
            )
        if not node["output"]:
            raise LongslideError(f"{where} does not see the output folder {output}; choose one on a shared file system")


def _has_place(gpus: int, cpus: int) -> bool:
    """Whether a node has so many GPUs and CPUs, in use or not."""
    return any(node.gpus >= gpus and node.cpus >= cpus for node in map(_Node.of, _alive()))


def _alive() -> list[Mapping[str, Any]]:
    return [node for node in _ray().nodes() if node["Alive"]]


class _Requests:
    """What workers are to do, which travels to each node once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._references: dict[int, Any] = {}

    def reference(self, request: bytes) -> Any:
        ray = _ray()
        with self._lock:
            if id(request) not in self._references:
                self._references[id(request)] = (ray.put(request), request)
            return self._references[id(request)][0]


class _Remote:
    """The Ray actor: it has a `LocalWorker` on its node."""

    def __init__(self, name: str, device: str, number: int, of: int, folder: str, path: list[str]) -> None:
        os.chdir(folder)  # so that relative paths mean there what they mean here, and modules of the user's are found
        sys.path[:] = [*path, *(one for one in sys.path if one not in path)]
        self._worker = LocalWorker(name, device, cores_of(number, of))

    def start(self, request: bytes) -> None:
        self._worker.start(request, lambda _: True, lambda _: None)

    def recv(self) -> tuple[Any, ...]:
        return self._worker.recv()

    def send(self, answer: object) -> None:
        self._worker.send(answer)

    def how_it_died(self) -> str:
        return self._worker.how_it_died()

    def end(self) -> None:
        self._worker.terminate()
        self._worker.wait()


class _RayWorker:
    """A worker on a node; when that is gone, on another one that has room."""

    def __init__(self, node: _Node, number: int, of: int, requests: _Requests) -> None:
        self.name = f"{node.name} GPU {number}" if node.gpus else node.name
        self._node = node
        self._number, self._of = number, of
        self._requests = requests
        self._actor: Any = None
        self._started = False
        self._ended: Any = None

    def start(self, request: bytes, wanted: Callable[[float], bool], note: Callable[[str], None]) -> bool:
        """Start the actor, as soon as there is a place for it, and its process.

        Where the cluster is busy it waits as long as that takes; where no node has such a place, as long as `wanted` says.
        """
        ray = _ray()
        reference = self._requests.reference(request)
        if self._actor is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._actor.start.remote(reference))
                return True
            self._kill()  # its node has died
            self._started = False
        gpus, cpus = int(self._node.gpus > 0), self._node.cpus // self._of
        actor = ray.remote(_Remote).options(
            num_gpus=gpus,
            num_cpus=cpus,
            max_concurrency=4,  # to answer while it waits for a message
            **self._node.options(soft=True),
        )
        device = "cuda:0" if gpus else "cpu"  # Ray shows it one GPU
        self._actor = actor.remote(self.name, device, self._number, self._of, os.getcwd(), sys.path)
        started = self._actor.start.remote(reference)
        begun, said = time.monotonic(), False
        while not ray.wait([started], timeout=0.5)[0]:
            waited = time.monotonic() - begun
            somewhere = _has_place(gpus, cpus)
            if waited > BUSY_AFTER and somewhere and not said:
                note(f"{self.name}: waits for a place, the cluster is busy with other work; see ray status")
                said = True
            if not wanted(0.0 if somewhere else waited):
                self._kill()
                return False
        self._started = True
        return True  # if its node has died meanwhile, so will `recv` say

    def recv(self) -> tuple[Any, ...]:
        """The next message."""
        message: tuple[Any, ...] = self._call("recv")
        return message

    def send(self, answer: object) -> None:
        """Answer it."""
        self._call("send", answer)

    def how_it_died(self) -> str:
        """What the actor says, if that lives."""
        try:
            return str(self._call("how_it_died"))
        except OSError as error:
            return str(error)

    def terminate(self) -> None:
        """Send its process SIGTERM."""
        if self._actor is not None and self._started:
            self._ended = self._actor.end.remote()

    def wait(self) -> None:
        """Wait twenty seconds, then kill it."""
        ray = _ray()
        if self._ended is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._ended, timeout=20)
        self._kill()

    def _call(self, method: str, *args: object) -> Any:
        ray = _ray()
        actor = self._actor
        if actor is None:
            raise ConnectionError("it was ended")
        try:
            return ray.get(getattr(actor, method).remote(*args))
        except ray.exceptions.RayTaskError as error:  # of the process, not of Ray
            raise ConnectionError(" ".join(str(error.cause).split())) from None
        except ray.exceptions.RayError:
            raise ConnectionError("its node, or Ray's process there, is gone") from None

    def _kill(self) -> None:
        ray = _ray()
        if self._actor is not None:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(self._actor)
            self._actor = None
