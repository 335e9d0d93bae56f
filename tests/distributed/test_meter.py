"""What a meter counts, on real and on fake tensors."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mega_scale import MegaConfig, MegaForCausalLM, MegalodonConfig, MegalodonForCausalLM
from mega_scale.parallel import ParallelConfig
from mega_scale.parallel.activation_checkpoint import checkpoint_activations
from mega_scale.parallel.meter import GATHERED, Meter
from mega_scale.parallel.shard import RowSlice

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "chunk_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "nffn_hidden_size": 40, "shared_representation_size": 16, "ema_projection_size": 4,
}  # fmt: skip
MODELS = {
    "mega": (MegaForCausalLM, MegaConfig, {"is_decoder": True, "bidirectional": False, "use_chunking": True}),
    "megalodon": (MegalodonForCausalLM, MegalodonConfig, {"num_attention_heads": 2, "timestep_norm_groups": 4}),
}


@pytest.fixture
def plain_forms(monkeypatch):
    """Without C++ and oneDNN, which fake tensors cannot take."""
    for name in ("ema.native.has_library", "timestep_norm._has_library"):
        monkeypatch.setattr(f"mega_scale.ops.{name}", lambda: False)
    monkeypatch.setattr("mega_scale.ops.linear._onednn_is_faster", lambda: False)


def metered_step(family, recomputed, fake):
    """Two steps of AdamW on 128 tokens; a meter of the second, and what it kept for the backward pass."""
    kind, config, more = MODELS[family]
    with torch.device("meta"):
        model = kind(config(**SIZES, **more))
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        model.to_empty(device="cpu").train()
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.01)
        if recomputed:
            checkpoint_activations(model, ParallelConfig(activation_checkpoint=recomputed), RowSlice())
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tokens = torch.full((2, 64), 7)
        with Meter(model) as meter:
            meter.label(model.parameters(), "parameters")
            for _ in range(2):
                meter.restart()
                loss = model(input_ids=tokens, labels=tokens, skip_logits=True, use_cache=False).loss
                kept = meter.kept()
                loss.backward()
                del loss
                with meter.during("optimizer"):
                    optimizer.step()
                    optimizer.zero_grad()
    return meter, kept


@pytest.mark.parametrize(("family", "recomputed"), [("mega", 0), ("megalodon", 1)])
def test_fake_tensors_have_the_peak_of_real_ones(plain_forms, family, recomputed):
    (real, kept), (fake, also_kept) = (metered_step(family, recomputed, fake) for fake in (False, True))
    assert fake.peak == real.peak and fake.by_kind() == real.by_kind() and also_kept == kept
    assert fake.at_peak == real.at_peak and sum(fake.at_peak.values()) == fake.peak
    parameters = fake.by_kind()["parameters"]
    assert parameters <= sum(fake.by_kind().values()) and fake.by_kind()["optimizer"] >= 2 * parameters - 512
    products = [[e[1:8] for e in meter.events if e.flops] for meter in (real, fake)]
    assert products[0] == products[1] and products[0]
    phases = {event.phase for event in fake.events}
    assert phases == {"forward", "backward", "optimizer", *(["recompute"] if recomputed else [])}
    # Every module that multiplies forward does so backward, twice as much.
    work = {phase: {} for phase in phases}
    for event in fake.events:
        own = work[event.phase]
        own[event.module] = own.get(event.module, 0) + event.flops
    for module, flops in work["forward"].items():
        if flops and "layers" in module:
            assert work["backward"][module] >= 1.9 * flops or "ema" in module or "norm" in module, module
    if recomputed:  # but for what comes last in a block
        assert sum(work["recompute"].values()) >= 0.5 * sum(f for m, f in work["forward"].items() if "layers" in m)
    assert (sum(also_kept.values()) < 100_000) == bool(recomputed)


def test_storages_are_rounded_followed_and_forgotten():
    with Meter() as meter:
        x = torch.empty(129)  # 516 bytes
        y = x[:5].view(-1)
        assert meter.total == meter.peak == 1024
        x.untyped_storage().resize_(0)
        assert meter.total == 0
        x.untyped_storage().resize_(4 * 129)
        assert meter.live[GATHERED, ""] == 1024
        with meter.during("loss"):
            z = torch.zeros(3)
        assert meter.by_kind() == {GATHERED: 1024, "loss": 512}
        del x, y
        assert (meter.total, meter.peak) == (512, 1536)
        meter.restart()
        assert meter.peak == 512 and meter.by_kind() == {"loss": 512}
        meter.label([z], "moments")
        assert +meter.live == {("moments", ""): 512}


def test_operators_say_bytes_and_operations():
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    places, table = torch.zeros(3, dtype=torch.int64), torch.ones(1000, 4)
    with Meter() as meter:
        c = a @ b
        c.t()[1:]  # views
        c.add_(1)
        torch.ones(4).expand(8, 4) * c
        c.copy_(c.clone())
        torch.zeros(4)
        nn.functional.embedding(places, table)
    found = [(e.name.removeprefix("aten::"), e.read, e.written, e.flops) for e in meter.events]
    assert found == [
        ("mm", 4 * (128 + 64), 128, 2 * 8 * 16 * 4),
        ("add_", 128, 128, 0),
        ("ones", 0, 16, 0),
        ("mul", 16 + 128, 128, 0),
        ("clone", 128, 128, 0),
        ("copy_", 128, 128, 0),
        ("zeros", 0, 16, 0),
        ("embedding", 24 + 48, 48, 0),
    ]
    assert all(event.kernels == 1 and event.dtype in ("float32", "int64") for event in meter.events)
    # Numbers of storages: the sum reads what the product wrote.
    assert meter.events[1].inputs[0][0] == meter.events[0].outputs[0][0]


def test_each_kept_storage_counts_once_and_parameters_do_not():
    model = nn.Linear(10, 10, bias=False)
    x = torch.randn(700, 10, requires_grad=True)
    with Meter(model) as meter:
        y = model(x)  # saves x, which was there before, and the weight
        z = y.view(-1)[:500] * y.view(-1)[500:1000]  # saves two views of y
        loss = z.sum()
    del y, z
    assert sum(meter.kept().values()) == 28160 + 512  # y, and the loss itself
    loss.backward()
    del loss
    assert x.grad is not None
    assert not meter.kept()  # x.grad was not made within the statement


def test_what_is_kept_within_other_hooks_counts():
    x = torch.randn(1024, requires_grad=True)
    with Meter() as meter, torch.autograd.graph.saved_tensors_hooks(torch.neg, torch.neg):
        loss = (x * 2).sigmoid().sum()
    assert sum(meter.kept().values()) == 4096 + 512  # the negative of the result, and the loss
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * torch.sigmoid(2 * x) * (1 - torch.sigmoid(2 * x)))
