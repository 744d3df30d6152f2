"""Free memory is that of the machine, or of the control group that has less."""

from pathlib import Path

import pytest
from longslide.data import free_memory as module
from longslide.data.free_memory import free_memory


def group(folder: Path, limit: str, used: int, inactive: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_a_system_without_files_about_its_memory_has_a_share_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_it = 4 * (module._quarter_of_all() or 0)
    assert all_of_it > 2**28

    def missing(path: Path) -> dict[str, int]:
        raise FileNotFoundError(path)

    monkeypatch.setattr(module, "_fields", missing)
    assert free_memory() == all_of_it // 4


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_the_lower_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUPS", tmp_path)
    machine = free_memory()
    assert machine is not None
    assert machine > 2**20
    # The process's own group, as of a job; where it is not there, as in a container, that of the root counts.
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    if not any(line.startswith("0::") for line in lines):
        pytest.skip("no control groups of version 2")
    group(tmp_path, "max", 10, 0)
    assert free_memory() > 2**20
    group(tmp_path, "10000", 4000, 1000)
    assert free_memory() == 7000, "cache of files can be had"
    group(tmp_path, "10000", 20_000, 0)
    assert free_memory() == 0
