"""Tables as users have them: any separator, any usual encoding, Parquet, Excel. Every cell is text, as the user spelt it.

All tables that come from outside are read here and nowhere else. Those that are written, by `csv_of` and `csv_of_frame`, are
plain CSV: UTF-8, comma, point. A text that a spreadsheet would take for a formula gets an apostrophe in front, which reading
takes away.
"""

import codecs
import csv
import datetime
import difflib
import io
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LongslideError, is_printable

if TYPE_CHECKING:
    import pandas as pd

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".xlsx")
"""Files that are taken for tables, whatever the case of the suffix."""

_NOTHING = ["NA", "na", "N/A", "n/a", "#N/A", "NaN", "nan", "null", "NULL", "None", "<NA>", "NaT", ".", "--"]
_NOTHING_OF_TCGA = ("[Not Available]", "[Not Applicable]", "[Not Evaluated]", "[Unknown]", "[Discrepancy]")

MISSING = frozenset(("", *_NOTHING, *_NOTHING_OF_TCGA))
"""Cells that say that there is nothing here, also in the words of SAS and Stata (`.`), the GDC (`--`) and TCGA's files (in
brackets). In columns that name slides only an empty cell does: an id may be `NA`."""

SLIDE_COLUMNS = ("slide", "slide_path")
"""Columns with the path of the slide file, relative to the table."""

ID_COLUMNS = ("slide_id",)
"""Columns with the id of the slide: the name of its feature file. Without one it is the name of the slide file."""

_TRUTH = {"True": True, "False": False, "TRUE": True, "FALSE": False}
_SEPARATORS = ",;\t"
_SNIFFED = 100  # records that a separator is found by
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # with apostrophes too: each writing adds one, each reading takes one away
_ESCAPED = re.compile(r"'+[=+\-@\t\r]")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")  # or a decimal comma: 1,234 may be either

logger = logging.getLogger(__name__)


def is_table(path: Path) -> bool:
    """Whether a file is taken for a table, by its suffix."""
    return path.suffix.lower() in TABLE_SUFFIXES


def read_table(path: Path, missing: Collection[str] = MISSING) -> "pd.DataFrame":
    """Read a table with every cell as text.

    Args:
        path: `.csv` or `.tsv` (commas, semicolons or tabs; UTF-8 with or without a byte order mark, UTF-16, or
            Windows-1252), `.parquet`, or `.xlsx` (the first sheet that is not empty).
        missing: Words that say that a cell is empty; see `MISSING`.

    Returns:
        One column each as in the header, without blanks around names and values; text, or NA where a cell is empty. Columns
        without a name, such as the index that pandas writes, are left out.

    Raises:
        LongslideError: It is not there, cannot be read, has two columns of one name or no rows, or names a slide by a text
            with control characters.
    """
    import pandas as pd

    header, rows = read_records(path)
    if not rows:
        raise LongslideError(f"{path}: the table has no rows")
    columns = {}
    for number, name in enumerate(header):
        if not name or name.startswith("Unnamed: "):
            continue
        if plain_name(name) in (*SLIDE_COLUMNS, *ID_COLUMNS):
            require_printable(path, name, (row[number] for row in rows))
        nothing = {""} if plain_name(name) in (*SLIDE_COLUMNS, *ID_COLUMNS) else missing
        columns[name] = pd.Series([pd.NA if row[number] in nothing else row[number] for row in rows], dtype=object)
    return pd.DataFrame(columns)


def read_records(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table, all of one length, as text without blanks around it.

    Raises:
        LongslideError: It is not there, cannot be read, or has two columns of one name.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise LongslideError(f"{path}: no such table")
    if suffix in (".xls", ".xlsm", ".ods"):
        raise LongslideError(f"{path}: cannot be read as a table; save it as .xlsx or .csv")
    try:
        if suffix == ".parquet":
            records = _parquet(path)
        elif suffix == ".xlsx":
            records = _xlsx(path)
        else:
            records = _delimited(_decoded(path.read_bytes()))
    except LongslideError:
        raise
    except Exception as error:  # csv.Error, UnicodeDecodeError, pyarrow's, and whatever openpyxl's zip and XML raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LongslideError(f"{path}: cannot be read as a table: {reason}") from error
    if suffix not in (".parquet", ".xlsx"):
        records = [[cell[1:] if _ESCAPED.match(cell) else cell for cell in record] for record in records]
    records = [[cell.strip() for cell in record] for record in records]
    if not records or not any(records[0]):
        raise LongslideError(f"{path}: cannot be read as a table: no header in its first line")
    header, *rows = records
    names = [name for name in header if name]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise LongslideError(f"{path}: two columns are called {twice[0]!r}; rename one of them")
    rows = [row for row in rows if any(row)]
    for row in rows:
        if any(row[len(header) :]):
            raise LongslideError(
                f"{path}: the row that begins with {row[0]!r} has {len(row)} cells, the header {len(header)}; a text with "
                "the separator in it needs quotes"
            )
    return header, [(row + [""] * len(header))[: len(header)] for row in rows]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table as they are, by the names of the columns; none if there is no such file.

    Raises:
        LongslideError: It cannot be read.
    """
    if not path.is_file() or not path.stat().st_size:
        return []
    header, rows = read_records(path)
    return [dict(zip(header, row, strict=True)) for row in rows]


def csv_of(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A table as CSV.

    Args:
        columns: The columns.
        rows: Cells by column; those of other columns are left out, missing ones empty.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(_no_formula, columns))
    writer.writerows([_no_formula(row.get(name, "")) for name in columns] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def csv_of_frame(frame: "pd.DataFrame") -> bytes:
    """A table as CSV, without its index."""
    safe = frame.copy(deep=False)
    for number, kind in enumerate(frame.dtypes):
        if kind.kind == "O" or str(kind) in ("str", "string", "category"):
            safe.isetitem(number, frame.iloc[:, number].astype(object).map(_no_formula).to_numpy())
    safe.columns = [_no_formula(str(name)) for name in frame.columns]
    return safe.to_csv(index=False).encode("utf-8", "backslashreplace")


def _no_formula(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula; numbers, also as text, stay as they are."""
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def require_columns(path: Path, frame: "pd.DataFrame", names: Iterable[str]) -> None:
    """Refuse a table that lacks a column, naming those that look alike.

    Raises:
        LongslideError: A column is not there.
    """
    for name in names:
        if name in frame.columns:
            continue
        lower = {column.lower(): column for column in frame.columns}
        near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(lower[match]) for match in near)}?" if near else ""
        if not near:
            hint = f"it has {listed(list(frame.columns), 12)}"
        raise LongslideError(f"{path}: no column {name!r}; {hint}")


def require_printable(path: Path, column: str, cells: Iterable[Any]) -> None:
    """Refuse ids with line breaks, escape sequences of terminals and the like: they name files, and are printed.

    Raises:
        LongslideError: There is one; names the column and the cell.
    """
    for cell in cells:
        if isinstance(cell, str) and not is_printable(cell):
            raise LongslideError(
                f"{path}: column {column!r} has {cell!r}, with a line break or control character; correct the cell"
            )


def find_column(frame: "pd.DataFrame", names: Sequence[str]) -> str | None:
    """The first of these columns that a table has, as it is spelt there: case does not count, nor do blanks or dashes."""
    spelt = {plain_name(column): column for column in reversed(list(frame.columns))}
    return next((spelt[name] for name in names if name in spelt), None)


def plain_name(column: str) -> str:
    """A column's name in lower case with underscores: `Slide ID` is `slide_id`."""
    return re.sub(r"[\s.-]+", "_", column.strip().lower())


def decimal_points(cells: "pd.Series[Any]") -> "pd.Series[Any]":
    """A column of numbers with decimal commas as one with points; any other column as it is.

    A comma that may as well part thousands (all of the column's are like `1,234`) stays, and so does one beside points.
    """
    text = cells.dropna().astype(str)
    with_comma = text[text.str.contains(",", regex=False)]
    if not len(with_comma) or not with_comma.map(lambda cell: bool(_DECIMAL_COMMA.fullmatch(cell))).all():
        return cells
    whole = text.drop(with_comma.index)
    if with_comma.map(lambda cell: bool(_THOUSANDS.fullmatch(cell))).all() or not whole.map(_is_whole).all():
        return cells
    return cells.map(lambda cell: decimal_point(str(cell)), na_action="ignore")


def decimal_point(cell: str) -> str:
    """A number with a decimal comma as one with a point; any other text as it is."""
    return cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell) else cell


def typed(frame: "pd.DataFrame", text: Collection[str] = ()) -> "pd.DataFrame":
    """A table of text with its columns of numbers as numbers.

    Args:
        frame: As `read_table` gives it.
        text: Columns that stay text.

    Returns:
        A copy. Columns of whole numbers without gaps are int64, other columns of numbers float64, those of True and False
        without gaps bool, others `str`.
    """
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in map(str, frame):
        cells = frame[name]
        columns[name] = cells.astype("str")
        if name in text:
            continue
        if set(cells.dropna()) <= _TRUTH.keys() and cells.notna().any():
            columns[name] = cells.map(_TRUTH) if cells.notna().all() else columns[name]
            continue
        try:
            numbers = decimal_points(cells).map(float, na_action="ignore").fillna(math.nan).astype("float64")
        except ValueError:
            continue
        whole = cells.notna().all() and cells.map(_is_whole).all()
        columns[name] = numbers.astype("int64") if whole else numbers
    return pd.DataFrame(columns, index=frame.index)


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names and how many more there are, for messages."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def as_text(value: Any) -> str:
    """A value as a user would spell it: 1.0 is `1`, a date without a time is `2026-01-31`, nothing is empty."""
    if value is None or value != value:  # NaN and NaT
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return str(value).strip()


def _is_whole(cell: object) -> bool:
    return bool(re.fullmatch(r"[+-]?\d{1,15}", str(cell)))


def _decoded(content: bytes) -> str:
    """Text in the encodings of spreadsheets and statistics programs."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    start = content[:1000]
    if b"\0" in start:  # no text has it; as every other byte it is UTF-16 of plain letters
        even, odd = start[::2].count(0), start[1::2].count(0)
        if max(even, odd) < 0.4 * len(start) or min(even, odd):
            raise ValueError("not text")
        return content.decode("utf-16-be" if even else "utf-16-le")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def _delimited(text: str) -> list[list[str]]:
    """The records of a text, parted by the separator that parts them most alike."""
    said = re.match(r'"?sep=(.)"?\r?\n', text)  # the line by which Excel learns the separator
    if said:
        return _records(text[said.end() :], said[1])
    beginning = "".join(text.splitlines(keepends=True)[:_SNIFFED])

    def alike(separator: str) -> tuple[float, int]:
        records = [row for row in _reader(beginning, separator) if any(row)]
        cells = len(records[0]) if records else 0
        return (sum(len(row) == cells for row in records) / len(records) if cells > 1 else 0.0), cells

    return _records(text, max(_SEPARATORS, key=alike))


def _records(text: str, separator: str) -> list[list[str]]:
    *records, last = _reader(text + "\nlast", separator)
    if last != ["last"]:
        raise ValueError(f"a quote is not closed in the row that begins with {last[0]!r}")
    return records


def _reader(text: str, separator: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t")


def _parquet(path: Path) -> list[list[str]]:
    import pandas as pd

    frame = pd.read_parquet(path)
    cells = [[as_text(None if value is pd.NA else value) for value in frame[name]] for name in frame]
    return [list(map(str, frame)), *map(list, zip(*cells, strict=True))]


def _xlsx(path: Path) -> list[list[str]]:
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        sheets = {}
        for sheet in book.worksheets:
            rows = [[_excel_cell(path, cell) for cell in row] for row in sheet.iter_rows()]
            rows = [row for row in rows if any(row)]
            if rows:
                sheets[sheet.title] = rows
    finally:
        book.close()
    if not sheets:
        raise LongslideError(f"{path}: the table has no rows")
    first, *others = sheets
    if others:
        logger.warning("%s: the sheet %r is read; the others are not: %s", path, first, listed(others))
    return sheets[first]


def _excel_cell(path: Path, cell: Any) -> str:
    """A cell as it is shown: a number 7 in the format `000` is 007."""
    value = cell.value
    if getattr(cell, "data_type", "") == "e" and value not in MISSING:
        raise LongslideError(f"{path}: cell {cell.coordinate} holds the error {value}; correct it in the spreadsheet")
    zeros = re.fullmatch(r"0{2,}", getattr(cell, "number_format", "") or "")
    if zeros and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:0{len(zeros[0])}.0f}"
    return as_text(value)
