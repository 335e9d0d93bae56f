"""The timestep norm: the recurrence against the definition, every other form against the recurrence."""

import itertools

import pytest
import torch
from parts import carry_moments, run_parts

from mega_scale import ops
from mega_scale.ops import load
from mega_scale.ops import timestep_norm as module
from mega_scale.ops.timestep_norm import Moments, timestep_norm, timestep_norm_and_residuals

GROUPS, WIDTH = 3, 4
EPS = 1e-5


def make_case(length, batch=3, offset=0.0, state=True, seed=0):
    """Leaves x (B, L, D), weight, bias, mean, var, and what is not differentiated: counts, resets, valid."""
    generator = torch.Generator().manual_seed(seed + length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(batch, length, GROUPS * WIDTH) + offset + normal(batch, 1, GROUPS).repeat_interleave(WIDTH, 2)
    leaves = {"x": x, "weight": normal(GROUPS * WIDTH), "bias": normal(GROUPS * WIDTH)}
    if state:
        leaves |= {"mean": normal(batch, GROUPS) + offset, "var": normal(batch, GROUPS).square() + 0.1}
    resets = torch.rand(batch, length, generator=generator) < 0.04
    valid = torch.rand(batch, length, generator=generator) < 0.8
    resets[0], valid[-1, : length // 2] = False, False
    return leaves, torch.tensor([5, 0, 1000])[:batch], resets, valid


def run(leaves, count, resets=None, valid=None, *, residuals=0, **options):
    """y, the end state, and the gradients of a random function of all three, and of `residuals` that come out."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    state = Moments(count, leaves["mean"], leaves["var"]) if "mean" in leaves else None
    x, weight, bias = (leaves[name] for name in ("x", "weight", "bias"))
    y, streams, end = timestep_norm_and_residuals(x, weight, bias, GROUPS, EPS, state, resets, valid, **options)
    generator = torch.Generator().manual_seed(7)
    found = {"y": y, "mean": end.mean, "var": end.var} | dict(enumerate(streams[:residuals]))
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in found.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return {**found, "count": end.count, **{"d" + name: g for name, g in zip(leaves, gradients, strict=True)}}


def by_definition(leaves, count, resets=None, valid=None):
    """y and the end state, every token's statistics summed anew over its document."""
    x = leaves["x"].unflatten(2, (GROUPS, WIDTH))
    batch, length = x.shape[:2]
    y, ends = torch.zeros_like(x), []
    for b in range(batch):
        begin, n = 0, int(count[b]) if "mean" in leaves else 0
        known = [leaves["mean"][b], leaves["var"][b]] if n else [torch.zeros(GROUPS).double()] * 2
        end = (n, *known) if n else (0, torch.zeros(GROUPS).double(), torch.ones(GROUPS).double())
        for t in range(length):
            if resets is not None and resets[b, t]:
                begin, n = t, 0
                end = (0, torch.zeros(GROUPS).double(), torch.ones(GROUPS).double())
            if valid is not None and not valid[b, t]:
                continue
            seen = x[b, begin : t + 1] if valid is None else x[b, begin : t + 1][valid[b, begin : t + 1]]
            total = n + len(seen)
            mean = (seen.sum((0, 2)) / WIDTH + n * known[0]) / total
            squares = (seen - mean[:, None]).square().sum((0, 2)) / WIDTH
            var = (squares + n * (known[1] + (known[0] - mean).square())) / total
            y[b, t] = (x[b, t] - mean[:, None]) / (var[:, None] + EPS).sqrt()
            end = (total, mean, var)
        ends.append(end)
    y = y.flatten(2) * (leaves["weight"] + 1) + leaves["bias"]
    count, mean, var = zip(*ends, strict=True)
    return {
        "y": y if valid is None else y * valid[..., None],
        "count": torch.tensor(count), "mean": torch.stack(mean), "var": torch.stack(var),
    }  # fmt: skip


def assert_same(got, want, tolerance=1e-10):
    for name in want:
        difference = (got[name].double() - want[name]).abs().max()
        assert difference <= tolerance * want[name].abs().max().clamp(min=1), f"{name} differs by {difference}"


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_the_recurrence_is_the_definition(state, documents, padding):
    leaves, count, resets, valid = make_case(40, state=state, offset=3.0)
    given = resets if documents else None, valid if padding else None
    found = run(leaves, count, *given, impl="recurrent")
    assert_same(found, by_definition(leaves, count, *given), 1e-12)
    assert found["count"].dtype == torch.int64
    if padding:
        assert not found["y"][~valid].any() and not found["dx"][~valid].any()


FORMS = ("blocked", "native")


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_forms_match_the_recurrence(length):
    for state, documents, padding in itertools.product([False, True], repeat=3):
        leaves, count, resets, valid = make_case(length, state=state, offset=3.0)
        given = resets if documents else None, valid if padding else None
        want = run(leaves, count, *given, impl="recurrent")
        for impl in FORMS:
            assert_same(run(leaves, count, *given, impl=impl), want)


@pytest.mark.slow
@pytest.mark.parametrize("length, flagged", [(500, False), (4096, True)])
def test_forms_match_the_recurrence_over_long_rows(length, flagged):
    leaves, count, *flags = make_case(length, offset=3.0)
    given = flags if flagged else ()
    want = run(leaves, count, *given, impl="recurrent")
    for impl in FORMS:
        assert_same(run(leaves, count, *given, impl=impl), want)


@pytest.mark.parametrize("impl", FORMS)
def test_65536_tokens_about_100_stay_exact_in_fp32(impl):
    x = torch.randn(1, 65536, 8, generator=torch.Generator().manual_seed(5)) + 100
    weight = torch.zeros(8)
    y, end = timestep_norm(x, weight, weight, 2, impl=impl)
    want, exact = timestep_norm(x.double(), weight.double(), weight.double(), 2, impl="blocked")
    assert (y - want).abs().max() <= 2e-6  # running sums are 4e-3 off, Welford's update 4e-4
    assert y.dtype == end.mean.dtype == torch.float32
    torch.testing.assert_close(end.mean.double(), exact.mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(end.var.double(), exact.var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["recurrent", *FORMS])
def test_neither_the_future_nor_another_document_nor_padding_is_read(impl):
    leaves, count, _, valid = make_case(150, offset=1.0)
    resets = torch.zeros_like(valid)
    resets[:, [70, 110]] = True

    def normalise(x):
        x, weight, bias = (t.float() for t in (x, leaves["weight"], leaves["bias"]))
        state = Moments(count, leaves["mean"].float(), leaves["var"].float())
        return timestep_norm(x, weight, bias, GROUPS, EPS, state, resets, valid, impl=impl)[0]

    clean = normalise(leaves["x"])
    for poison in (1e30, float("inf"), float("nan")):
        dirty = leaves["x"].clone()
        dirty[:, 60:70] = dirty[:, 105:110] = poison
        dirty[~valid] = poison
        y = normalise(dirty)
        for kept in (slice(0, 60), slice(70, 105), slice(110, None)):
            assert torch.equal(y[:, kept], clean[:, kept])


@pytest.mark.parametrize("impl", ["recurrent", *FORMS])
def test_an_empty_state_is_not_read_and_padding_leaves_it_empty(impl):
    leaves, _, _, valid = make_case(30)
    empty = torch.zeros(3, dtype=torch.int64)
    valid[0] = False
    want = run({name: leaves[name] for name in ("x", "weight", "bias")}, empty, None, valid, impl="recurrent")
    leaves["mean"][:], leaves["var"][:] = float("nan"), float("inf")
    got = run(leaves, empty, None, valid, impl=impl)
    assert_same(got, want)
    assert not got["dmean"].any() and not got["dvar"].any()
    assert got["count"][0] == 0 and not got["mean"][0].any() and (got["var"][0] == 1).all()


@pytest.mark.parametrize("impl", ["recurrent", *FORMS])
def test_state_carries_a_row_cut_anywhere(impl):
    leaves, count, resets, valid = make_case(140, offset=50.0)
    x, weight, bias = (leaves[name] for name in ("x", "weight", "bias"))
    state = Moments(count, leaves["mean"], leaves["var"])
    whole, end = timestep_norm(x, weight, bias, GROUPS, EPS, state, resets, valid, impl=impl)
    pieces, cuts = [], [1, 63, 64, 2, 10]
    for piece, *flags in zip(*(t.split(cuts, 1) for t in (x, resets, valid)), strict=True):
        y, state = timestep_norm(piece, weight, bias, GROUPS, EPS, state, *flags, impl=impl)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-10, rtol=0)
    assert torch.equal(state.count, end.count)
    torch.testing.assert_close(state.mean, end.mean, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("impl", ["recurrent", *FORMS])
def test_bf16_tokens_have_fp32_statistics_and_a_state_keeps_its_dtype(impl):
    leaves = make_case(80, offset=30.0, state=False)[0]
    x, weight, bias = (leaves[name].bfloat16() for name in ("x", "weight", "bias"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, end = timestep_norm(x, weight, bias, GROUPS, EPS, impl=impl)
    want, exact = timestep_norm(*(t.double() for t in (x, weight, bias)), GROUPS, EPS, impl="recurrent")
    assert y.dtype == torch.bfloat16 and end.mean.dtype == end.var.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(end.mean.double(), exact.mean, rtol=1e-5, atol=0)
    wide = Moments(end.count, end.mean.double(), end.var.double())
    assert timestep_norm(x, weight, bias, GROUPS, EPS, wide, impl=impl)[1].mean.dtype == torch.float64


@pytest.mark.parametrize("impl", FORMS)
def test_it_keeps_its_input_and_two_numbers_a_token_and_group(impl):
    leaves, kept = make_case(256, batch=2, state=False)[0], {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    inputs = [leaf.clone().requires_grad_() for leaf in leaves.values()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        timestep_norm(*inputs, GROUPS, impl=impl)
    a_group = 2 * 256 * GROUPS
    assert sorted(kept.values())[-3:] == [a_group, a_group, a_group * WIDTH]
    assert sum(kept.values()) <= a_group * (WIDTH + 2) + 100


def test_bits_do_not_depend_on_threads_or_layouts(monkeypatch):
    monkeypatch.setattr("mega_scale.ops._OF_A_THREAD", 1)
    leaves, count, resets, valid = make_case(100)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(run(leaves, count, resets, valid, impl="native"))
    leaves["x"] = torch.cat([leaves["x"]] * 2, -1)[..., : GROUPS * WIDTH]
    found.append(run(leaves, count, resets.t().contiguous().t(), valid, impl="native"))
    assert all(torch.equal(other[name], found[0][name]) for other in found[1:] for name in found[0])


def test_auto_is_native_on_a_cpu_and_blocked_without_a_compiler(monkeypatch, tmp_path):
    leaves, count, resets, valid = make_case(70)
    forms = {impl: run(leaves, count, resets, valid, impl=impl)["y"] for impl in ("auto", "native", "blocked")}
    assert torch.equal(forms["auto"], forms["native"])
    monkeypatch.setattr(ops, "load", lambda source: load(source, tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    module.library.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"timestep norm.*no C\+\+ compiler '/no/such/compiler'") as warned:
        assert torch.equal(run(leaves, count, resets, valid)["y"], forms["blocked"])
        run(leaves, count, resets, valid)
    with pytest.raises(ValueError, match="could not be compiled"):
        run(leaves, count, impl="native")
    module.library.cache_clear()
    assert len(warned) == 1


def test_compilers_give_the_same_and_transforms_take_the_blocked_form():
    leaves, count, resets, valid = make_case(70)
    state = Moments(count, leaves["mean"], leaves["var"])

    def total(x):
        y, end = timestep_norm(x, leaves["weight"], leaves["bias"], GROUPS, EPS, state, resets, valid)
        return y.sin().sum() + end.var.sum()

    want = torch.autograd.grad(total(leaf := leaves["x"].clone().requires_grad_()), leaf)[0]
    found = torch.func.grad(total)(leaves["x"])
    torch.testing.assert_close(found, want, atol=1e-10, rtol=0)
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(torch.autograd.grad(total(leaf), leaf, create_graph=True)[0].sum(), leaf)


class Normed(torch.nn.Module):
    def forward(self, x, weight, bias, count, mean, var, resets, valid):
        return timestep_norm(x, weight, bias, GROUPS, EPS, Moments(count, mean, var), resets, valid)


@pytest.mark.slow
def test_an_exported_program_takes_every_length():
    def inputs(length):
        leaves, count, resets, valid = make_case(length)
        return leaves["x"], leaves["weight"], leaves["bias"], count, leaves["mean"], leaves["var"], resets, valid

    length = torch.export.Dim("length", min=2, max=10000)
    shapes = ({1: length}, *[None] * 5, {1: length}, {1: length})
    program = torch.export.export(Normed(), inputs(70), dynamic_shapes=shapes, strict=False).module()
    for tokens in (2, 64, 65, 700):
        for got, want in zip(*(f(*inputs(tokens)) for f in (program, Normed())), strict=True):
            for a, b in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def run_in_parts(parts, leaves, count, resets, valid, *, residuals=0, **options):
    """As `run`, of parts of rows that `part_borders` and `later_gradients` tie together; count is not used."""
    length, generator = leaves["x"].shape[1], torch.Generator().manual_seed(7)
    probes = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (leaves["x"].shape, *[(len(count), GROUPS)] * 2, *[leaves["x"].shape] * residuals)
    ]

    def act(carry, part):
        cut = slice(part * length // parts, (part + 1) * length // parts)
        own = {name: (t[:, cut] if name == "x" else t).detach().clone().requires_grad_() for name, t in leaves.items()}
        flags = [None if t is None else t[:, cut] for t in (resets, valid)]
        y, streams, end = timestep_norm_and_residuals(*own.values(), GROUPS, EPS, None, *flags, carry=carry, **options)
        loss = (y * probes[0][:, cut]).sum()
        loss = loss + sum((x * probe[:, cut]).sum() for x, probe in zip(streams, probes[3:], strict=False))
        if part == parts - 1:
            loss = loss + (end.mean * probes[1]).sum() + (end.var * probes[2]).sum()
        return y.detach(), end, torch.autograd.grad(loss, list(own.values()))

    found = run_parts(parts, act, carry_moments)
    gradients = list(zip(*(part[2] for part in found), strict=True))
    end = found[-1][1]
    return {
        "y": torch.cat([part[0] for part in found], 1), "mean": end.mean, "var": end.var, "count": end.count,
        "dx": torch.cat(gradients[0], 1), "dweight": sum(gradients[1]), "dbias": sum(gradients[2]),
    }  # fmt: skip


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_parts_of_a_row_equal_the_whole(parts, impl):
    leaves, count, resets, valid = make_case(9 * parts, state=False, offset=3.0)
    resets[1, 9 * (parts - 1)] = resets[1, 8] = resets[2, 0] = True
    valid[0, : 9 * (parts - 1) + 2] = False  # the first parts of a row are padding
    for given in itertools.product([None, resets], [None, valid]):
        got = run_in_parts(parts, leaves, count, *given, impl=impl)
        assert_same(got, run(leaves, count, *given, impl="recurrent"), 1e-12)


def test_refusals_name_what_is_wrong():
    x, weight = torch.zeros(2, 5, 6), torch.zeros(6)
    state = Moments(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3), torch.ones(2, 3))
    for arguments, words in (
        ({"groups": 6}, "groups=6.*one channel"),
        ({"groups": 4}, "groups=4"),
        ({"groups": 0}, "groups=0"),
        ({"impl": "magic"}, "magic"),
        ({"x": x[:, :0]}, "length of at least 1"),
        ({"x": x.long()}, "floating"),
        ({"bias": torch.zeros(5)}, "bias has shape"),
        ({"resets": torch.zeros(2, 5)}, "resets is torch.float32"),
        ({"valid": torch.zeros(2, 4, dtype=torch.bool)}, "valid is"),
        ({"state": state._replace(count=torch.zeros(2))}, "state.count is torch.float32"),
        ({"state": state._replace(var=torch.ones(2, 2))}, "state.var is"),
        ({"state": state, "carry": lambda *_: None}, "carry brings"),
    ):
        with pytest.raises(ValueError, match=words):
            timestep_norm(**({"x": x, "weight": weight, "bias": weight, "groups": 3} | arguments))
