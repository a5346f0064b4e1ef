"""docs/bad_data.md says what the code says."""

from tests.data import bad_data


def test_the_page_is_up_to_date():
    assert bad_data.PAGE.read_text(encoding="utf-8") == bad_data.page(), "run `python -m tests.data.bad_data`"
