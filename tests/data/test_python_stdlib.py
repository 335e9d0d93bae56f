"""The default corpus is all of the standard library, the same in every process."""

import os
import re
import subprocess
import sys
import textwrap
import tokenize

from mega_scale.data.config import DataConfig
from mega_scale.data.sources import load_corpus, stdlib_documents

DIGEST = """
import hashlib
from mega_scale.data.sources import stdlib_documents
print(hashlib.sha256("\\0".join(stdlib_documents()).encode()).hexdigest())
"""


def test_sources_and_built_in_documentation_are_there():
    documents = list(stdlib_documents())
    assert sum(len(text.encode()) for text in documents) > 5e6
    with tokenize.open(textwrap.__file__) as file:
        assert file.read() in documents
    documented = "\n".join(text for text in documents if text.startswith(("math\n", "itertools\n")))
    assert "math.hypot" in documented and "itertools.chain" in documented
    assert not any("site-packages" in text[:200] for text in documents)


def test_every_process_sees_the_same():
    command = [sys.executable, "-c", DIGEST]
    found = [
        subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE)
        for seed in ("1", "2")
    ]
    one, other = (process.communicate()[0] for process in found)
    assert one == other and len(one) == 65


def test_documentation_shows_no_addresses():
    documented = [text for text in stdlib_documents() if re.match(r"\w+\n", text)]
    assert documented
    assert not any(re.search(r" at 0x[0-9a-f]{6,}>", text) for text in documented)


def test_split_is_disjoint():
    corpus = load_corpus(DataConfig())
    train, validation = set(corpus.train), set(corpus.validation or [])
    assert len(validation) > 10 and not train & validation
    assert train | validation == {text for text in stdlib_documents() if text}
