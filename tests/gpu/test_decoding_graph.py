"""Decoding on a GPU: a CUDA graph, captured once, gives the tokens that steps one by one do."""

import pytest
import torch
import torch._dynamo
from builders import make_ids, make_model

from mega_scale import DecodingGraph, MegaStaticCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FAMILIES = pytest.mark.parametrize("kind", ["MegaForCausalLM", "MegalodonForCausalLM"])


@FAMILIES
@torch.inference_mode()
def test_one_graph_for_every_token_and_prompt(kind):
    model, ids = make_model(kind=kind).cuda(), make_ids(2, 40).cuda()
    cache, graph = MegaStaticCache(model.config), None
    for prompt in (5, 19):
        cache.reset()
        want = model(ids, use_cache=False).logits
        model(ids[:, :prompt], past_key_values=cache)
        graph = graph or DecodingGraph(model, cache)
        for i in range(prompt, 40):
            torch.testing.assert_close(graph(ids[:, i : i + 1])[:, 0], want[:, i], atol=1e-3, rtol=1e-3)
    cache.batch_select_indices(torch.tensor([0], device="cuda"))
    with pytest.raises(ValueError, match="anew"):
        graph(ids[:1, :1])


@FAMILIES
def test_generate_compiles_into_a_cuda_graph(kind):
    model, ids = make_model(kind=kind, seed=2).cuda(), make_ids(2, 9).cuda()
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)
    want = model.generate(ids, **settings)
    torch._dynamo.utils.counters.clear()
    got = model.generate(ids, cache_implementation="static", **settings)
    assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
