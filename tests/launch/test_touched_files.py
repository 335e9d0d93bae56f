"""How much of the project a reader has to open to follow a start, a step and a save."""

import pytest
from launching import ROOT, study


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_start_a_step_and_a_save_go_through_few_files(engine):
    code, output = study(ROOT / "tests/campaigns/touched_files.py", [f"parallel.engine={engine}"], timeout=300)
    assert code == 0, output[-2000:]
    assert [line.split(":")[0] for line in output.splitlines() if "(at most" in line] == ["start-up", "step", "save"]
