"""A third party's training script: Accelerator with DeepSpeed and a Mega from a folder; nothing of ours but the model.

accelerate launch ... accelerate_study.py MODEL_FOLDER OUTPUT_FOLDER ZERO_STAGE
"""

import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import mega_scale  # noqa: F401  (registers the model)

EPOCHS, MICRO_BATCH, ACCUMULATION, RATE, CLIP = 3, 2, 2, 3e-3, 1.0


def rows() -> list[torch.Tensor]:
    """Sixteen rows of token ids, the same on every rank."""
    return list(torch.randint(3, 61, (16, 20), generator=torch.Generator().manual_seed(0)))


def plugin(stage: int) -> DeepSpeedPlugin:
    """DeepSpeed as its users configure it: a dictionary of its own keys."""
    return DeepSpeedPlugin(
        hf_ds_config={
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,
            "gradient_accumulation_steps": ACCUMULATION,
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_clipping": CLIP,
        }
    )


def main(model_folder: str, output_folder: str, stage: int) -> None:
    """Train a few steps; the first rank writes the losses, and the weights in Hugging Face's form."""
    # Its all-reduce for inference, which training does not call, would be compiled for a minute.
    vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    accelerator = Accelerator(deepspeed_plugin=plugin(stage))
    # Built while ZeRO-3 is configured, from_pretrained shards as it loads.
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    # Without accelerators, Accelerate counts one process where DeepSpeed has more, so the rows are shared out here.
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    loader = DataLoader(rows()[rank::ranks], batch_size=MICRO_BATCH, shuffle=False)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(EPOCHS):
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    everyone = [None] * ranks
    torch.distributed.all_gather_object(everyone, losses)
    state = accelerator.get_state_dict(model)
    if rank == 0:
        accelerator.unwrap_model(model).save_pretrained(output_folder, state_dict=state)
        report = {
            "losses": everyone,
            "kind": accelerator.distributed_type.value,
            "stage": accelerator.deepspeed_plugin.zero_stage,
            "sharded": [name for name, p in model.named_parameters() if hasattr(p, "ds_id")],
        }
        (Path(output_folder) / "report.json").write_text(json.dumps(report))
    accelerator.wait_for_everyone()
    # gloo's threads drop the tensors of their last collective by the interpreter's lock, and abort a process that ends
    # meanwhile, whatever it computed: one of some thirty ends of PyTorch alone under load.
    time.sleep(0.1)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
