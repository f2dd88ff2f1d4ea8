"""The table writer, its headings and its numbers."""

from __future__ import annotations

import pytest

from repmtl_ray.report.table import aligned, escape_latex, headings, latex, markdown, number

ROWS = [["EW", "+1.00"], ["Rep-MTL", "-12.50"]]


def test_a_heading_names_the_task_only_where_two_tasks_have_the_metric() -> None:
    dense = ["delta_p_task", "segmentation/miou", "depth/abs_error"]
    assert headings(dense) == ["delta_p %", "mIoU %", "abs. err."]
    office = ["amazon/accuracy", "dslr/accuracy"]
    assert headings(office) == ["amazon acc. %", "dslr acc. %"]
    assert headings(["points/chamfer"]) == ["chamfer"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("segmentation/miou", 45.678, "45.68"),
        ("depth/abs_error", 0.01234, "0.0123"),
        ("delta_p_task", 1.234, "+1.23"),
        ("delta_m", -1.234, "-1.23"),
        ("mean_rank", 1.5, "1.50"),
        ("points/chamfer", 0.000123456, "0.0001235"),
        ("learning_rate", 1e-4, "0.0001"),
    ],
)
def test_a_number_has_the_digits_of_its_column(name: str, value: float, text: str) -> None:
    assert number(name, value) == text


def test_a_difference_is_signed_and_a_deviation_is_not() -> None:
    assert number("segmentation/miou", 1.0, signed=True) == "+1.00"
    assert number("delta_p_task", 1.0, signed=False) == "1.00"


def test_aligned_columns_are_as_wide_as_their_longest_text() -> None:
    lines = aligned(["method", "delta_p %"], ROWS).splitlines()
    assert lines == [
        " method  delta_p %",
        "-------  ---------",
        "     EW      +1.00",
        "Rep-MTL     -12.50",
    ]
    assert len(aligned(["method"], []).splitlines()) == 2


def test_markdown_escapes_the_bars_between_its_cells() -> None:
    lines = markdown(["a|b"], [["c|d"]]).splitlines()
    assert lines == [r"| a\|b |", "| --- |", r"| c\|d |"]


def test_latex_has_a_column_per_heading_and_escapes_what_would_break_it() -> None:
    lines = latex(["method", "delta"], ROWS).splitlines()
    assert lines[0] == r"\begin{tabular}{lr}"
    assert lines[4] == r"EW & +1.00 \\"
    assert escape_latex("a_b & 5% ± 1") == r"a\_b \& 5\% $\pm$ 1"
