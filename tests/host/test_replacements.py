"""Nodes that replace others: told to hosts that know such a thing, and no harm to those that do not."""

from typing import Any

import pytest
from harness import found_inside


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return found_inside("replacements.py")


def test_a_host_that_knows_replacements_is_told_of_ours(found: dict[str, Any]) -> None:
    assert found["with"] == [found["ours"]]


def test_this_host_is_told_in_its_own_words(found: dict[str, Any]) -> None:
    if found["here"] is None:
        pytest.skip("this host knows no replacements")
    assert found["here"] == [found["ours"]]


@pytest.mark.parametrize("lacking", ["without_interface", "without_kind"])
def test_a_host_that_knows_none_is_told_nothing(found: dict[str, Any], lacking: str) -> None:
    assert found[lacking] == []


def test_a_replacement_that_the_host_refuses_costs_neither_the_others_nor_the_nodes(found: dict[str, Any]) -> None:
    assert found["refused"] == []
    assert found["word_unknown"] == [found["ours"]]
    assert found["nodes"] == len(found["ids"])


def test_what_replaces_is_a_node_of_ours_and_what_is_replaced_is_not(found: dict[str, Any]) -> None:
    for replacement in found["declared"]:
        assert replacement["new_node_id"] in found["ids"]
        assert replacement["old_node_id"] not in found["ids"]
        assert replacement["input_mapping"]
