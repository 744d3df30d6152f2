"""Numbers as people write them."""

import pytest
from longslide.pipeline.predict.prediction import Prediction
from longslide.pipeline.report.wording import number, significant


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (12345.6, 3, "12,346"),
        (-12345.6, 4, "-12,346"),
        (999.6, 3, "1,000"),
        (123.4, 3, "123"),
        (12.34, 3, "12.3"),
        (0.01234, 3, "0.0123"),
        (0.0, 3, "0"),
    ],
)
def test_no_digit_before_the_point_is_lost(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text


def test_a_predicted_value_and_a_metric_are_written_out() -> None:
    predicted = Prediction("slide", "a", value=48211.3, spread={"value": 312.4}, classifiers=3)
    assert predicted.text == "48,211 ± 312"
    assert (number(0.8214), number(123.4), number(20512.3)) == ("0.821", "123.4", "20,512")
