"""Whose slide is it: a question that is never answered by silence."""

from pathlib import Path

import pandas as pd
import pytest
from longslide.data.patients import patient_column, probable_twins
from longslide.errors import LongslideError


def column(*names: str, chosen: str | None = None, others: tuple[str, ...] = ()) -> str | None:
    frame = pd.DataFrame([["x"] * len(names)], columns=list(names))
    return patient_column(Path("cohort.csv"), frame, chosen, option="--data.patient-column", others=others)


@pytest.mark.parametrize("name", ["patient_id", "pat_id", "case_id", "Patient_ID", "PATIENT ID", "Case-ID"])
def test_the_usual_names_are_taken_in_any_case(name: str) -> None:
    assert column("slide_id", name, "label") == name


@pytest.mark.parametrize("name", ["patient", "Subject", "SUBJECT_ID", "case", "submitter_id", "Donor ID", "patientNr"])
def test_a_column_that_looks_like_the_patient_is_a_question(name: str) -> None:
    with pytest.raises(LongslideError, match=f"is the column {name} the patient.*patient-column {name}.*none if each"):
        column("slide_id", name, "label")
    assert column("slide_id", name, chosen=name) == name
    assert column("slide_id", name, chosen="none") is None
    assert column("slide_id", name, others=(name,)) is None, "a label is no patient"


def test_two_that_may_be_the_patient_are_a_question_unless_one_is_patient_id() -> None:
    with pytest.raises(LongslideError, match="is one of the columns case_id, patient the patient"):
        column("slide_id", "case_id", "patient")
    assert column("slide_id", "case_id", "submitter_id", "patient_id") == "patient_id"


def test_no_such_column_is_no_patient_and_a_chosen_one_must_be_there() -> None:
    assert column("slide_id", "label", "patient_age", "uppercase") is None
    with pytest.raises(LongslideError, match="no column 'patiens'; did you mean 'patients'"):
        column("slide_id", "patients", chosen="patiens")


@pytest.mark.parametrize(
    "twins", [("P1", "p1"), ("1", "1.0"), ("P1", "P01"), ("P-1", "P_1"), ("TCGA-02-0001", "tcga-2-0001")]
)
def test_patients_that_differ_in_spelling_alone_are_probable_twins(twins: tuple[str, str]) -> None:
    assert probable_twins(["Q7", twins[0], "Q8", twins[1], twins[0]]) == [twins]


@pytest.mark.parametrize(
    "others", [("P1", "P10"), ("1", "10"), ("1.0", "1.1"), ("1-11", "11-1"), ("A1", "B1"), ("0", "00a")]
)
def test_other_patients_are_not(others: tuple[str, str]) -> None:
    assert probable_twins(others) == []
