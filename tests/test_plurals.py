"""One thing is not said in the plural."""

from longslide.plurals import count


def test_one_is_singular_and_all_other_numbers_are_plural() -> None:
    said = [count(n, "slide") for n in (0, 1, 2, 12_345)]
    assert said == ["0 slides", "1 slide", "2 slides", "12,345 slides"]
    assert [count(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]
    assert [count(n, "patient has", "patients have") for n in (1, 2)] == ["1 patient has", "2 patients have"]
