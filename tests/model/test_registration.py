"""After `import mega_scale` alone, transformers knows the family, and no module of models has been imported yet."""

import subprocess
import sys

PROGRAM = """
import sys
import mega_scale
heavy = [name for name in sys.modules if name.startswith(("transformers.modeling_utils", "mega_scale.model.modeling"))]
assert not heavy, heavy
import transformers
config = mega_scale.MegaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1)
assert type(transformers.AutoConfig.for_model("mega")) is mega_scale.MegaConfig
expected = {
    "AutoModel": "MegaModel",
    "AutoModelForPreTraining": "MegaForMaskedLM",
    "AutoModelForCausalLM": "MegaForCausalLM",
    "AutoModelForMaskedLM": "MegaForMaskedLM",
    "AutoModelForSequenceClassification": "MegaForSequenceClassification",
    "AutoModelForMultipleChoice": "MegaForMultipleChoice",
    "AutoModelForTokenClassification": "MegaForTokenClassification",
    "AutoModelForQuestionAnswering": "MegaForQuestionAnswering",
}
for auto, kind in expected.items():
    assert type(getattr(transformers, auto).from_config(config)) is getattr(mega_scale, kind), auto
for name in mega_scale.__all__:
    assert getattr(mega_scale, name) is getattr(mega_scale.model, name)
assert not hasattr(mega_scale, "MegaForNothing")
"""


def test_classes_are_imported_when_they_are_asked_for():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
