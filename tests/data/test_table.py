"""Tables as spreadsheets, statistics programs and people write them."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longslide.data.table import csv_of, csv_of_frame, decimal_points, find_column, read_table, typed

from .refusals import refused

ROWS = [["slide_id", "Größe", "age"], ["007", "groß; sehr", "1.5"], ["1.0", 'a "b", c', ""], ["1e5", "é", "3"]]


def read(path: Path, content: bytes) -> pd.DataFrame:
    path.write_bytes(content)
    return read_table(path)


refusal = partial(refused, read_table)


def delimited(separator: str, rows: list[list[str]] = ROWS) -> str:
    return pd.DataFrame(rows[1:], columns=rows[0]).to_csv(index=False, sep=separator, lineterminator="\r\n")


def is_as_spelt(frame: pd.DataFrame) -> None:
    assert list(frame) == ROWS[0]
    assert frame.fillna("").to_numpy().tolist() == ROWS[1:]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".CSV"])
def test_any_separator_in_any_encoding_is_the_same_table(
    tmp_path: Path, encoding: str, separator: str, suffix: str
) -> None:
    is_as_spelt(read(tmp_path / f"t{suffix}", delimited(separator).encode(encoding)))


def test_parquet_and_excel_are_the_same_table_too(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS[1:], columns=ROWS[0])
    frame.to_parquet(tmp_path / "t.parquet")
    is_as_spelt(read_table(tmp_path / "t.parquet"))
    frame.to_excel(tmp_path / "t.xlsx", index=False)
    is_as_spelt(read_table(tmp_path / "t.xlsx"))


def test_excel_cells_are_read_as_they_are_shown(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["slide_id", "patient_id", "date", "event", "age", "weight", ""])
    sheet.append([7, 1.0, pd.Timestamp("2026-01-31").to_pydatetime(), True, 61, 70.25])
    sheet["A2"].number_format = "000"
    sheet.append([None])  # an empty row
    book.save(tmp_path / "t.xlsx")
    [row] = read_table(tmp_path / "t.xlsx").to_dict("records")
    assert row == {
        "slide_id": "007",
        "patient_id": "1",
        "date": "2026-01-31",
        "event": "True",
        "age": "61",
        "weight": "70.25",
    }


def test_the_first_sheet_with_something_in_it_is_read_and_the_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = openpyxl.Workbook()  # with an empty sheet
    for title in ("cohort", "notes"):
        book.create_sheet(title).append(["slide_id"])
        book[title].append([title])
    book.save(tmp_path / "t.xlsx")
    assert list(read_table(tmp_path / "t.xlsx")["slide_id"]) == ["cohort"]
    assert "'cohort' is read; the others are not: notes" in caplog.text


def test_an_error_in_a_spreadsheet_is_named_by_its_cell(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["slide_id", "age"])
    book.active.append(["a", "#REF!"])
    book.active["B2"].data_type = "e"
    book.save(tmp_path / "t.xlsx")
    assert "cell B2 holds the error #REF!" in refusal(tmp_path / "t.xlsx")


def test_blanks_around_names_and_cells_do_not_count(tmp_path: Path) -> None:
    frame = read(tmp_path / "t.csv", b' slide_id , label\n a , "x, y" \n\t b,y \n,\n')
    assert frame.to_dict("list") == {"slide_id": ["a", "b"], "label": ["x, y", "y"]}


def test_cells_that_say_nothing_are_empty_but_an_id_may_be_na(tmp_path: Path) -> None:
    frame = read(tmp_path / "t.csv", b"Slide ID,label\nNA,x\nb,NA\nc,None\n")
    assert frame["Slide ID"].notna().all()
    assert list(frame["label"].notna()) == [True, False, False]
    assert list(read_table(tmp_path / "t.csv", {""})["label"]) == ["x", "NA", "None"]


def test_what_the_gdc_tcga_and_sas_write_for_nothing_is_nothing(tmp_path: Path) -> None:
    frame = read(tmp_path / "t.csv", b"slide_id,stage\na,'--\nb,[Not Available]\nc,.\nd,II\n")
    assert list(frame["stage"].notna()) == [False, False, False, True]


def test_the_line_that_tells_excel_the_separator_is_heeded(tmp_path: Path) -> None:
    assert list(read(tmp_path / "t.csv", b"sep=|\r\nslide_id|age\r\na|1,5\r\n")) == ["slide_id", "age"]


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        (b"slide_id\na;b\nc,d\n", ["slide_id"]),  # one column: no separator
        (b'slide_id,"a;b;c;d"\n1,2\n', ["slide_id", "a;b;c;d"]),
        (b"slide_id;age;size\na;1,5;2,5\nb;2,5;3,5\n", ["slide_id", "age", "size"]),
        (b"slide_id;a, b and c, d\nx;1\ny;2\n", ["slide_id", "a, b and c, d"]),
    ],
)
def test_the_separator_is_that_which_parts_all_rows_alike(tmp_path: Path, content: bytes, columns: list[str]) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    if columns == ["slide_id"]:
        assert "has 2 cells, the header 1" in refusal(tmp_path / "t.csv")
    else:
        assert list(read_table(tmp_path / "t.csv")) == columns


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no header"),
        ("a.csv", b"slide_id,label\n", "no rows"),
        ("a.csv", b"slide_id,label,label\na,1,2\n", "two columns are called 'label'"),
        ("a.csv", b"slide_id,label\na,1,2\n", "the row that begins with 'a' has 3 cells, the header 2"),
        ("a.csv", b'slide_id,label\na,"1\nb,2\n', "a quote is not closed in the row that begins with 'a'"),
        ("a.csv", b"\x89HDF\r\n\x1a\n\0\0\1\2" * 50, "cannot be read as a table: not text"),
        ("a.xlsx", b"slide_id,label\na,1\n", "cannot be read as a table"),
        ("a.parquet", b"slide_id,label\na,1\n", "cannot be read as a table"),
        ("a.xls", b"\xd0\xcf\x11\xe0", "save it as .xlsx or .csv"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused = refusal(tmp_path / name)
    assert message in refused
    assert str(tmp_path / name) in refused


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["0,253", "0,5"], ["0.253", "0.5"]),
        (["17,4", "1,5E-05", "3", None], ["17.4", "1.5E-05", "3", None]),
        (["-2,5", "1,234"], ["-2.5", "1.234"]),  # a comma that parts one decimal parts three
        (["1,234", "5,678"], ["1,234", "5,678"]),  # may be thousands
        (["1,5", "2.5"], ["1,5", "2.5"]),
        (["1,2,3", "4,5"], ["1,2,3", "4,5"]),
        (["a,5", "4,5"], ["a,5", "4,5"]),
        (["1.5", "2"], ["1.5", "2"]),
    ],
)
def test_decimal_commas_become_points_where_they_can_be_nothing_else(cells: list[Any], read: list[Any]) -> None:
    found = decimal_points(pd.Series(cells, dtype=object))
    assert [None if pd.isna(cell) else cell for cell in found] == read


def test_columns_of_numbers_become_numbers_and_ids_stay_text(tmp_path: Path) -> None:
    frame = read(tmp_path / "t.csv", b"slide_id;fold;age;p;ok;none\n007;0;61;0,1;TRUE;\n1e5;1;;1,5E-01;FALSE;\n")
    table = typed(frame, ("slide_id",))
    assert list(table["slide_id"]) == ["007", "1e5"]
    assert {name: str(kind) for name, kind in table.dtypes.items()} == {
        "slide_id": "str",
        "fold": "int64",
        "age": "float64",
        "p": "float64",
        "ok": "bool",
        "none": "float64",
    }
    np.testing.assert_array_equal(table["p"], [0.1, 0.15])


def test_a_columns_name_is_found_in_any_case(tmp_path: Path) -> None:
    frame = read(tmp_path / "t.csv", b"Slide-ID,Slide Path\na,b\n")
    assert find_column(frame, ("slide_id",)) == "Slide-ID"
    assert find_column(frame, ("slide", "slide_path")) == "Slide Path"
    assert find_column(frame, ("patient_id",)) is None


letters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp"))
cells = st.text(letters, max_size=8).map(lambda text: text.strip().lstrip("=").strip())  # pandas makes =0 a formula


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.text("ab7", min_size=1), cells, cells), min_size=1, max_size=6),
    separator=st.sampled_from([",", ";", "\t"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    kind=st.sampled_from([".csv", ".parquet", ".xlsx"]),
)
def test_whatever_is_written_is_read_back(
    tmp_path: Path, rows: list[tuple[str, str, str]], separator: str, encoding: str, kind: str
) -> None:
    frame = pd.DataFrame(rows, columns=["slide_id", "Größe", "label"])
    path = tmp_path / f"t{kind}"
    if kind == ".csv":
        path.write_bytes(frame.to_csv(index=False, sep=separator).encode(encoding))
    elif kind == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_excel(path, index=False)
    assert read_table(path, {""}).fillna("").to_numpy().tolist() == frame.to_numpy().tolist()


FORMULAS = [
    "=cmd|' /C calc'!A0",
    "+A1",
    "-x",
    "@SUM(A1)",
    "'=quoted",
    "''+twice",
    "=",
    "-",
    "plain",
    "it's",
    "'quoted'",
]
NUMBERS = ["-1.5", "+3", "-1e-5", "-inf", "0012"]


def test_what_a_spreadsheet_would_take_for_a_formula_is_written_as_text_and_read_as_it_was(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"slide_id": FORMULAS, "=header": range(len(FORMULAS)), "score": -np.arange(len(FORMULAS)) / 3}
    )
    for number, content in enumerate((csv_of_frame(frame), csv_of(list(frame), frame.to_dict("records")))):
        path = tmp_path / f"{number}.csv"
        path.write_bytes(content)
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        for row in [header, *rows]:
            for cell in row:
                assert cell[:1] not in ("=", "+", "@") and (cell[:1] != "-" or float(cell) <= 0), "no formula"  # noqa: PT018
        back = typed(read_table(path, {""}), {"slide_id"})
        assert back["slide_id"].tolist() == FORMULAS
        assert back.columns.tolist() == frame.columns.tolist()
        np.testing.assert_allclose(back["score"], frame["score"])


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    content = csv_of(["a"], [{"a": number} for number in [*NUMBERS, -0.25, None]]).decode()
    assert content.splitlines() == ["a", *NUMBERS, "-0.25", '""']


def test_a_table_written_read_and_written_again_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    once = csv_of_frame(pd.DataFrame({"id": FORMULAS}))
    path.write_bytes(once)
    assert csv_of_frame(read_table(path, {""})) == once
