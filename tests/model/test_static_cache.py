"""A static cache decodes what a growing one does, by one graph, without a number that a host would wait for."""

import pytest
import torch
import torch._dynamo
from builders import make_ids, make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.generation import CompileConfig

from mega_scale import DecodingGraph, MegaStaticCache
from mega_scale.ops import as_if

MEGALODON = {"kind": "MegalodonForCausalLM"}
CASES = [
    {}, {"attention_activation": "laplace", "use_chunking": False}, {"attention_activation": "relu2"},
    {"relative_positional_bias": "simple", "use_chunking": False}, MEGALODON,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def left_padded(*lengths):
    width = max(lengths)
    ids, mask = torch.ones(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        ids[i, width - length :], mask[i, width - length :] = make_ids(1, length, seed=length)[0], 1
    return ids, mask


def steps(call, cache, ids, begin, **per_token):
    """Logits of the tokens from `begin` on, one a call."""
    found = []
    for i in range(begin, ids.shape[1]):
        # Of strides that do not depend on the width, which compilers note.
        more = {name: value[:, i : i + 1].contiguous() for name, value in per_token.items()}
        found.append(call(ids[:, i : i + 1].contiguous(), past_key_values=cache, **more).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("changes", CASES, ids=str)
@torch.no_grad()
def test_rows_of_any_length_go_on_over_borders_of_chunks(changes):
    model, (ids, mask) = make_model(**changes), left_padded(30, 22, 17, 2)
    mask[0, 9:12] = 0  # padding inside a row
    want = model(ids, attention_mask=mask, use_cache=False).logits
    for cut in (1, 16, 23):  # some rows are padding until then; where a chunk begins; inside one
        cache = MegaStaticCache(model.config, 44)
        model(ids[:, :cut], attention_mask=mask[:, :cut], past_key_values=cache)
        got = steps(model, cache, ids, cut, attention_mask=mask)
        assert torch.isfinite(got).all() and cache.get_seq_length() == 30
        valid = mask[:, cut:].bool()
        torch.testing.assert_close(got[valid], want[:, cut:][valid], atol=2e-5, rtol=1e-5)
    more = make_ids(4, 11, seed=9)  # several tokens at once, after the last of the steps
    masks = torch.cat([mask, torch.ones_like(more)], 1)
    want = model(torch.cat([ids, more], 1), attention_mask=masks, use_cache=False).logits[:, 30:]
    got = model(more, attention_mask=masks, past_key_values=cache).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, MEGALODON], ids=str)
@torch.inference_mode()
def test_a_thousand_tokens_are_those_of_a_growing_cache(changes):
    model = make_model(num_hidden_layers=1, chunk_size=64, **changes)
    ids = make_ids(2, 7)
    growing, static = model(ids, use_cache=True).past_key_values, MegaStaticCache(model.config)
    logits, nbytes = model(ids, past_key_values=static).logits, static.nbytes
    assert nbytes == growing.nbytes
    for _ in range(1000):
        token = logits[:, -1:].argmax(-1)
        want, logits = (model(token, past_key_values=cache).logits for cache in (growing, static))
        torch.testing.assert_close(logits, want, atol=2e-5, rtol=1e-5)
    assert static.nbytes == nbytes and growing.get_seq_length() == static.get_seq_length() == 1007


@pytest.mark.parametrize("changes", [{}, MEGALODON], ids=str)
@torch.inference_mode()
def test_one_graph_serves_every_place_and_later_prompts(changes):
    model = make_model(num_hidden_layers=1, **changes)
    compiled, cache = torch.compile(model, fullgraph=True, backend="eager"), MegaStaticCache(model.config)
    for lengths in ((30, 11), (5, 28)):
        cache.reset()
        ids, mask = left_padded(*lengths)
        want = model(ids, attention_mask=mask, use_cache=False).logits
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        got, valid = steps(compiled, cache, ids, 6, attention_mask=mask), mask[:, 6:].bool()
        torch.testing.assert_close(got[valid], want[:, 6:][valid], atol=2e-5, rtol=1e-5)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"use_chunking": False}, MEGALODON], ids=str)
def test_generate_compiles_one_step_and_gives_the_same_tokens(changes):
    model, (ids, mask) = make_model(num_hidden_layers=1, seed=2, **changes), left_padded(11, 6)
    settings = {"max_new_tokens": 20, "attention_mask": mask, "eos_token_id": None, "pad_token_id": 0}
    compile_config = CompileConfig(fullgraph=True, mode=None, backend="eager")
    compile_config._compile_all_devices = True  # a CPU, too
    static = {"cache_implementation": "static", "compile_config": compile_config, "max_cache_len": 40}
    want = model.generate(ids, do_sample=False, **settings)
    for _ in range(2):
        assert torch.equal(model.generate(ids, do_sample=False, **static, **settings), want)
    assert graphs() == 1
    drawn = []
    static = {"cache_implementation": "static", "max_cache_len": 40}
    for options in (static, {}):
        torch.manual_seed(0)
        drawn.append(model.generate(ids, do_sample=True, num_return_sequences=2, **options, **settings))
        drawn.append(model.generate(ids, do_sample=False, num_beams=3, **options, **settings))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])


@pytest.mark.parametrize("changes", CASES, ids=str)
@torch.no_grad()
def test_documents_go_on_and_begin(changes):
    model, ids = make_model(**changes), make_ids(2, 41)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[0, [0, 3, 12, 17, 32]], starts[1, [10, 24]] = True, True
    want = model(ids, document_starts=starts, use_cache=False).logits
    cache = MegaStaticCache(model.config, 64)
    model(ids[:, :13], document_starts=starts[:, :13], past_key_values=cache)
    got = steps(model, cache, ids[:, :28], 13, document_starts=starts)
    torch.testing.assert_close(got, want[:, 13:28], atol=2e-5, rtol=1e-5)
    rest = model(ids[:, 28:], document_starts=starts[:, 28:], past_key_values=cache).logits
    torch.testing.assert_close(rest, want[:, 28:], atol=2e-5, rtol=1e-5)
    positions = torch.tensor([[0], [13]])
    want = model(ids[:, :1], document_starts=positions == 0, past_key_values=cache).logits
    cache = MegaStaticCache(model.config, 64)
    model(ids, document_starts=starts, past_key_values=cache)
    got = model(ids[:, :1], position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_are_reordered_selected_and_repeated():
    model, (ids, mask), after = make_model(**MEGALODON), left_padded(14, 9, 11), make_ids(3, 5, seed=5)
    for change, order in (
        ("reorder_cache", [2, 0, 0]), ("batch_select_indices", [1, 2]), ("batch_repeat_interleave", [0, 0, 1, 1, 2, 2]),
    ):  # fmt: skip
        caches = model(ids, attention_mask=mask, use_cache=True).past_key_values, MegaStaticCache(model.config)
        model(ids, attention_mask=mask, past_key_values=caches[1])
        for cache in caches:
            getattr(cache, change)(2 if change == "batch_repeat_interleave" else torch.tensor(order))
        want, got = (steps(model, cache, after[order], 0) for cache in caches)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_what_an_encoder_said_stays():
    model, ids, encoder = make_model(add_cross_attention=True), make_ids(2, 21), torch.randn(2, 5, 24)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    source = {"encoder_hidden_states": encoder, "encoder_attention_mask": mask}
    want, cache = model(ids, use_cache=False, **source).logits, MegaStaticCache(model.config)
    model(ids[:, :6], past_key_values=cache, **source)
    torch.testing.assert_close(steps(model, cache, ids, 6), want[:, 6:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, MEGALODON], ids=str)
def test_no_host_waits_for_a_step_on_a_gpu(changes):
    """Fake tensors raise where a number is read; a mask and documents are given."""
    model = make_model(**changes).to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), as_if("cuda", (9, 0)), torch.no_grad():
        cache = MegaStaticCache(model.config)
        model(torch.zeros(2, 20, dtype=torch.long), past_key_values=cache)
        token = torch.zeros(2, 1, dtype=torch.long)
        rest = {"attention_mask": token + 1, "document_starts": token > 0}
        assert model(token, past_key_values=cache, **rest).logits.shape == (2, 1, 61)


def test_refusals():
    model, ids = make_model(), make_ids(2, 9)
    cache = MegaStaticCache(model.config)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="max_cache_len=None"):
        MegaStaticCache(make_model(use_chunking=False).config)
    with torch.no_grad():
        with pytest.raises(ValueError, match="is empty"):
            DecodingGraph(model, cache)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 rows, the input 3"):
            model(make_ids(3, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="output_attentions"):
            model(ids[:, :1], past_key_values=cache, output_attentions=True)
        with pytest.raises(ValueError, match="document_starts instead"):
            model(ids[:, :1], past_key_values=cache, seq_idx=ids[:, :1])
        with pytest.raises(ValueError, match="no CUDA graphs"):
            DecodingGraph(model, cache)
        wide = make_model(use_chunking=False)
        with pytest.raises(ValueError, match="max_cache_len=8"):
            wide(ids, past_key_values=MegaStaticCache(wide.config, 8))


def test_it_goes_on_in_and_outside_of_inference_mode():
    model, ids = make_model(**MEGALODON), make_ids(2, 20)
    cache = MegaStaticCache(model.config)
    want = model(ids, use_cache=False).logits.detach()
    with torch.inference_mode():
        model(ids[:, :9], past_key_values=cache)
        first = steps(model, cache, ids[:, :14], 9)
    with torch.no_grad():
        rest = steps(model, cache, ids, 14)
    torch.testing.assert_close(torch.cat([first, rest], 1), want[:, 9:], atol=2e-5, rtol=1e-5)
