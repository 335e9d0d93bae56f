"""Fixtures of the launcher tests."""

import json
import os
import pathlib

import pytest


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Real text, small: sources of Python's standard library as one jsonl file."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    sources = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:40]
    with path.open("w") as file:
        for source in sources:
            file.write(json.dumps({"text": source.read_text(encoding="utf-8")}) + "\n")
    return path
