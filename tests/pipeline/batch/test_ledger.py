"""The summary of a job, whoever has opened it in between."""

import csv
from pathlib import Path

import pytest
from longslide.errors import LongslideError
from longslide.pipeline.batch.ledger import SUMMARY, SlideResult, record


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / SUMMARY).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_summary_that_a_spreadsheet_has_saved_again_goes_on_as_plain_csv(tmp_path: Path) -> None:
    first = SlideResult("007", "a.svs", "done", "a; b", tiles=3, slide_mpp=0.25, tissue_mm2=1.5, seconds=2.125)
    record(tmp_path, first)
    before = rows(tmp_path)
    cells = [before[0].keys(), before[0].values()]
    lines = [
        '"' + '";"'.join(cell.replace(".", ",") if cell[:1].isdigit() else cell for cell in row) + '"' for row in cells
    ]
    (tmp_path / SUMMARY).write_bytes(("\r\n".join(lines) + "\r\n").encode("utf-8-sig"))
    record(tmp_path, SlideResult("b", "b.svs", "failed", "broken"))
    after = rows(tmp_path)
    assert after[0] == before[0]
    assert [row["slide_id"] for row in after] == ["007", "b"]


def test_a_file_of_that_name_that_is_no_summary_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / SUMMARY).write_text("name,age\nx,1\n")
    with pytest.raises(LongslideError, match="not the summary of a job"):
        record(tmp_path, SlideResult("b", "b.svs", "failed", "broken"))
    assert (tmp_path / SUMMARY).read_text() == "name,age\nx,1\n"
