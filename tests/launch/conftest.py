"""Fixtures of the launcher tests."""

import launching
import pytest


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Real text, small: sources of Python's standard library as one jsonl file."""
    return launching.write_sources(tmp_path_factory.mktemp("text") / "text.jsonl", 40)
