"""Names that become paths stay where they are put."""

import pytest

from jaxreg.data.names import check_file_name

PATHS = ["", ".", "..", "../a", "a/b", "/a", "a/", "a/..", "a\\b", "\\a", "C:a", "C:\\a", "a\0b", None, 1, b"a"]


@pytest.mark.parametrize("name", PATHS)
def test_path_parts_are_refused(name):
  with pytest.raises(ValueError, match="split must be the name of a file or folder"):
    check_file_name("split", name)


@pytest.mark.parametrize("name", ["a", "a.b", "..a", "a b", "learning rate=0.1", "train", "ä"])
def test_names_pass(name):
  check_file_name("split", name)


EXEMPT = {"check_file_name": "checks text"}
