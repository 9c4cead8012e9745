"""Every code has a page, and the pages show what is really printed."""

from __future__ import annotations

import pytest

from tests.core.problem_examples import example, example_plans
from torchweld.errors import InvalidArgument
from torchweld.pages import code_page, page_codes
from torchweld.problems import TITLES
from torchweld.resolving.explain import problem_text


def test_every_code_has_a_page_and_no_page_lacks_a_code() -> None:
    assert set(page_codes()) == {*TITLES, "TW6xx"}


@pytest.mark.parametrize("code", page_codes())
def test_page_has_title_example_and_advice(code: str) -> None:
    page = code_page(code)

    assert page.startswith(f"# {code}: {TITLES.get(code, 'a check of a plugin')}\n")
    assert f"```text\n{code.replace('xx', '')}" in page
    assert "\nWhat to do:\n\n- " in page


@pytest.mark.parametrize("code", sorted(example_plans()))
def test_example_of_a_page_is_what_the_plan_prints(code: str) -> None:
    assert problem_text(example(code)) in code_page(code)


def test_page_is_found_in_any_case_and_for_a_plugins_own_code() -> None:
    assert code_page("tw302") == code_page("TW302")
    assert code_page("TW617") == code_page("tw6xx")


def test_unknown_code_lists_the_codes() -> None:
    with pytest.raises(InvalidArgument, match=r"no code 'TW320'; the codes are .*TW302"):
        code_page("TW320")
