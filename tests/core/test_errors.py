import pytest

from mochi_core import errors


def test_message_has_value_rule_and_remedy():
    error = errors.ShapeError("frames is 2", "it must be 6k+1", "Use 1")
    assert str(error) == "frames is 2: it must be 6k+1. Use 1."
    assert (error.value, error.rule, error.remedy) == ("frames is 2", "it must be 6k+1", "Use 1")


@pytest.mark.parametrize("name", ("Config", "Shape", "Latents", "Schedule", "Conditioning", "Weights", "Kernel"))
def test_every_kind_is_a_mochi_error_and_a_value_error(name):
    kind = getattr(errors, f"{name}Error")
    assert issubclass(kind, errors.MochiError) and issubclass(kind, ValueError)
