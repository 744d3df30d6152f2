"""A cohort that tests of training do not change."""

from pathlib import Path

import pytest
from training_cohort import write_cohort


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("cohort")
    return folder, write_cohort(folder)
