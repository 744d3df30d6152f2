"""`--ray`: workers on the nodes of a real Ray cluster, all on this machine; nodes die and nothing is lost."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_files import ENCODER, write_classifier
from commands import longslide
from longslide import LongslideError, embed, predict, read_features, write_synthetic_slide
from longslide.pipeline.batch import ray_cluster, workers
from longslide.pipeline.batch.ray_cluster import _Node, _RayWorker, _Requests, ray_workers, refuse_other_nodes
from longslide.pipeline.batch.tasks import TaskRun

ray = pytest.importorskip("ray", reason="needs ray: pip install 'longslide[cluster]'")


SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, and two nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **SMALL)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slides/`, a tile encoder, and what a single process makes of them."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.yaml").write_text(ENCODER)
    (home / "slides").mkdir()
    for seed in range(8):
        write_synthetic_slide(home / "slides" / f"{seed}.svs", size=(1024 + 256 * (seed % 3), 1024), seed=seed)
    embed(output=home / "features", device="cpu", **job(home))
    return home


def job(home: Path) -> dict[str, Any]:
    # Tiles one by one: on a CPU the last bits depend on how many are in a batch, and so on which slides are neighbours.
    encoder = {"tile_encoder": home / "tiny.yaml", "tile_checkpoint": "random", "batch_size": 1, "threads": 1}
    return {"slides": home / "slides", **encoder}


WAITING = """
import os, threading, time
from pathlib import Path
from longslide.data.slides.openslide import OpenSlideReader

class Waiting(OpenSlideReader):  # the first process that reads tiles of 5.svs waits for its end
    SUFFIXES = frozenset({".svs"})
    reopens = False

    def __init__(self, path):
        super().__init__(path)
        self.waits = path.name == "5.svs"

    def read_region(self, *where):
        here = Path(__file__).parent
        while self.waits and threading.current_thread().name.startswith("tiles") and not (here / "killed").exists():
            (here / "in-hand").write_text(str(os.getpid()))
            time.sleep(0.1)
        return super().read_region(*where)
"""


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def kill_the_node_that_reads(cluster: Any, folder: Path) -> None:
    while not (folder / "in-hand").exists() or not (folder / "in-hand").read_text():
        time.sleep(0.1)
    raylet = parent_of(parent_of(int((folder / "in-hand").read_text())))  # the actor's process is in between
    [node] = [node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet]
    cluster.remove_node(node, allow_graceful=False)
    (folder / "killed").touch()


def test_a_node_that_is_killed_loses_nothing_and_all_is_as_of_one_process(
    cluster: Any, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add_node(num_cpus=1, **SMALL)
    (tmp_path / "waiting.py").write_text(WAITING)
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "out"
    killer = threading.Thread(target=kill_the_node_that_reads, args=(cluster, tmp_path), daemon=True)
    killer.start()
    results = embed(output=output, ray=cluster.address, reader="waiting:Waiting", **job(home))
    said = capfd.readouterr().err
    assert "its process has died (its node, or Ray's process there, is gone); its slides are given to others" in said
    assert [(one.slide_id, one.status) for one in results] == [(str(number), "done") for number in range(8)]
    assert len((output / "summary.csv").read_text().splitlines()) == 9
    for number in range(8):
        alone, shared = (read_features(folder / f"{number}.h5") for folder in (home / "features", output))
        for name in ("features", "coords", "blur"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(shared, name))


CRASHING = """
import os, threading
from longslide.data.slides.openslide import OpenSlideReader

class Crashing(OpenSlideReader):
    SUFFIXES = frozenset({".svs"})
    reopens = False

    def __init__(self, path):
        super().__init__(path)
        self.crashes = path.name == "1.svs"

    def read_region(self, *where):
        if self.crashes and threading.current_thread().name.startswith("tiles"):
            os._exit(7)
        return super().read_region(*where)
"""


def test_a_slide_that_takes_two_processes_down_fails_by_name(
    cluster: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)  # relative paths mean the same on the nodes, and modules there are found
    for number in "012":
        shutil.copy(home / "slides" / f"{number}.svs", tmp_path)
    slides = [f"{number}.svs" for number in "012"]
    options = job(home) | {"slides": slides, "reader": "crashing:Crashing", "threads": 2}
    results = embed(output="out", ray=cluster.address, **options)
    assert [one.status for one in results] == ["done", "failed", "done"]
    assert "1.svs: 2 processes died while they had this slide" in results[1].reason


def test_predictions_and_explanations_are_those_of_one_process(cluster: Any, home: Path, tmp_path: Path) -> None:
    write_classifier(tmp_path / "best.ckpt", home / "features")
    common: dict[str, Any] = {
        "checkpoint": tmp_path / "best.ckpt",
        "features": home / "features",
        "explain": "occlusion",
    }
    slides = [home / "slides" / f"{number}.svs" for number in range(3)]
    predict(slides, output=tmp_path / "alone", device="cpu", **common)
    predict(slides, output=tmp_path / "ray", ray=cluster.address, **common)
    for name in ("predictions.csv", "slides/0/tiles.csv", "slides/2/tiles.geojson", "slides/1/overlay.png"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


TELLING = """
import os, time
from pathlib import Path
from longslide.pipeline.batch.tasks import TaskFeed

def tell(here, tasks, device, pipe):  # begins only when all processes have a task
    feed = TaskFeed(pipe)
    for number in feed:
        (Path(here) / f"begun-{number}").touch()
        while len(list(Path(here).glob("begun-*"))) < tasks:
            time.sleep(0.05)
        feed.ended(number, (device, os.environ.get("CUDA_VISIBLE_DEVICES")))
"""


def told(folder: Path, workers: list[Any], tasks: int) -> list[tuple[str, str | None]]:
    """What the processes of some workers say of their device."""
    from telling import tell

    found: list[tuple[str, str | None]] = []
    names = [f"task {number}" for number in range(tasks)]
    TaskRun(workers, partial(tell, str(folder), tasks), names, lambda _, result: found.append(result)).run()
    return found


def test_a_busy_cluster_is_waited_for_and_the_line_says_so(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "telling.py").write_text(TELLING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ray_cluster, "BUSY_AFTER", 1.0)
    monkeypatch.setattr(workers, "PATIENCE", 2.0)
    ray.init(address=cluster.address, logging_level="error")
    try:
        holder = ray.remote(num_cpus=1)(type("Holder", (), {"here": lambda self: True}))
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        holders = [holder.remote() for _ in nodes]
        assert all(ray.get([one.here.remote() for one in holders]))

        def release() -> None:
            time.sleep(6)
            for one in holders:
                ray.kill(one)

        threading.Thread(target=release, daemon=True).start()
        with ray_workers(cluster.address, tmp_path) as found:
            assert [device for device, _ in told(tmp_path, found, 1)] == ["cpu"]
    finally:
        ray.shutdown()
    said = capsys.readouterr().err
    assert "waits for a place, the cluster is busy with other work; see ray status" in said
    assert "died" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPUs are only declared")
def test_each_process_of_a_node_with_gpus_has_one_to_itself(
    cluster: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "telling.py").write_text(TELLING)
    monkeypatch.syspath_prepend(tmp_path)
    node = cluster.add_node(num_cpus=2, num_gpus=2, **SMALL)
    try:
        with ray_workers(cluster.address, tmp_path) as found:
            assert [one.name.partition(") ")[2] for one in found] == ["GPU 0", "GPU 1"], (
                "nodes without a GPU are left out"
            )
            devices = told(tmp_path, found, 2)
        assert sorted(devices) == [("cuda:0", "0"), ("cuda:0", "1")]
        with pytest.raises(LongslideError, match="device 'cuda:0' is not available here"):
            embed(output=tmp_path / "out", ray=cluster.address, **job(home))
    finally:
        cluster.remove_node(node)


def test_an_output_folder_that_nodes_do_not_see_is_refused(
    cluster: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_cluster, "PROBE_SEEN", 1.0)
    own = Path("/proc/self/cwd/out")  # of each process another folder
    with pytest.raises(LongslideError, match=r"node .* does not see the output folder /proc/self/cwd/out"):
        embed(output=own, ray=cluster.address, **job(home))
    assert not list((tmp_path / "out").glob("*.h5"))
    assert not list((tmp_path / "out").glob(".probe*"))


def test_another_version_of_ray_than_the_clusters_is_refused(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "__version__", "2.0.0")
    with pytest.raises(LongslideError, match=r"ersion mismatch.* install the same versions here and there") as error:
        ray_workers(cluster.address, tmp_path).__enter__()
    assert "2.0.0" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_nodes_of_other_versions_are_refused() -> None:
    own = {"longslide": "1.2", "cwd": "/home/me"}
    node = {"node": "gpu7", "longslide": "1.2", "folder": True, "output": True}
    refuse_other_nodes([node], own, Path("out"))
    for change, why in (
        ({"longslide": "1.1"}, "node gpu7 has longslide 1.1, this one 1.2; install the same on all nodes"),
        ({"longslide": ""}, "node gpu7 has no longslide; install version 1.2 there"),
        ({"folder": False}, "node gpu7 does not see the working folder /home/me; start the command in a shared one"),
        ({"output": False}, "node gpu7 does not see the output folder out"),
    ):
        with pytest.raises(LongslideError, match=why):
            refuse_other_nodes([node, node | change], own, Path("out"))


def test_an_address_without_ray_is_one_line_at_once(tmp_path: Path) -> None:
    with socket.socket() as free, socket.socket() as busy:
        free.bind(("127.0.0.1", 0))
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        threading.Thread(
            target=lambda: busy.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), daemon=True
        ).start()
        for address, why in (
            (f"127.0.0.1:{free.getsockname()[1]}", "nothing answers there"),
            (f"127.0.0.1:{busy.getsockname()[1]}", "the port is in use by another program, not by Ray"),
            ("head", "must be auto, or the address of the cluster's head such as"),
            ("ray://head:10001", "run the command on a node of the cluster"),
        ):
            with pytest.raises(LongslideError, match=why), ray_workers(address, tmp_path):
                pass


def test_auto_of_a_head_that_died_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{free.getsockname()[1]}"
        current = tmp_path / "ray_current_cluster"  # what `ray start` leaves in /tmp/ray
        current.write_text(dead)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        services = pytest.importorskip("ray._private.services")
        monkeypatch.setattr(services, "find_gcs_addresses", set)
        monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: current.read_text())
        with (
            pytest.raises(LongslideError, match=r"--ray auto \(.*:\d+\): nothing answers there"),
            ray_workers("auto", tmp_path),
        ):
            pass


def test_without_ray_or_a_cluster_the_command_says_so(home: Path, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('No module named ray', name='ray')")
    words = ["embed", str(home / "slides"), "--output", str(tmp_path / "out")]
    words += ["--tile-encoder", str(home / "tiny.yaml"), "--tile-checkpoint", "random", "--ray", "auto"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = longslide(*words, env=os.environ | {"PYTHONPATH": paths})
    assert ended.returncode == 2
    assert ended.stderr == "longslide embed: --ray needs the package ray: pip install 'longslide[cluster]'\n"
    ended = longslide(*words, "--device", "cpu")
    assert ended.returncode == 2
    assert ended.stderr == "longslide embed: --device and --ray: give only one of the two\n"


def test_a_worker_that_was_ended_is_gone_for_whoever_still_asks_it() -> None:
    worker = _RayWorker(_Node("id", "node", 0, 1), 0, 1, _Requests())
    with pytest.raises(OSError, match="it was ended"):
        worker.recv()
    assert worker.how_it_died() == "it was ended"
