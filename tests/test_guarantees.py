"""The page of guarantees is made of the markers of the tests, and each guarantee has a test."""

import guarantees


def test_the_page_is_generated_from_the_markers():
    assert guarantees.PAGE.read_text() == guarantees.page(), "run tests/helpers/guarantees.py"


def test_each_guarantee_has_a_test_and_each_marker_a_guarantee():
    assert {one.key for one in guarantees.shown()} == set(guarantees.PROMISES)
