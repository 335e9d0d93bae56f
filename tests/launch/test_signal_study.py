"""The study of signals at random moments, small."""

import pytest
from signal_study import study

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.alone]


def test_signals_at_random_moments_end_in_checkpoints(tmp_path, text_file):
    """Both engines: one at the start, one in its steps."""
    found = study([0, 3], tmp_path, text_file, seed=1)
    assert all(one["good"] for one in found), found
