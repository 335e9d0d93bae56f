"""The EMA as C++ on CPUs: against the recurrence in fp64, what it saves, and how its library comes to be."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mega_scale import ops
from mega_scale.ops.ema import EmaCoefficients, damped_ema, native


def make_case(batch, length, channels, averages, seed=0):
    """x (B, L, D), coefficients (D, N), state (B, D, N) and resets (B, L) that begin some documents."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    log_decay = -torch.rand(channels, averages, generator=generator)
    tensors = [normal(batch, length, channels), log_decay, normal(channels, averages), normal(channels, averages)]
    resets = torch.rand(batch, length, generator=generator) < 0.05
    resets[0, 0] = True
    return [*tensors, normal(batch, channels, averages)], resets


def run(tensors, resets, impl, dtype=torch.float32):
    """y, the end state and the gradients of a random function of both."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    x, log_decay, gain, projection, state = leaves
    y, end = damped_ema(x, EmaCoefficients(log_decay, gain, projection), state, resets, impl=impl)
    generator = torch.Generator().manual_seed(1)
    probes = [torch.randn(t.shape, generator=generator).to(dtype) for t in (y, end)]
    return [y, end, *torch.autograd.grad([y, end], leaves, probes)]


@pytest.mark.parametrize(
    "batch,length,channels,averages",
    [(1, 1, 1, 1), (3, 31, 15, 7), (2, 32, 16, 8), (2, 33, 17, 9), (1, 97, 37, 16), (2, 64, 129, 33)],
)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_awkward_sizes_match_the_recurrence_in_fp64(batch, length, channels, averages, documents, threads, monkeypatch):
    monkeypatch.setattr("mega_scale.ops._OF_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors, resets = make_case(batch, length, channels, averages)
    resets = resets if documents else None
    truth = run(tensors, resets, "recurrent", torch.float64)
    for found, want in zip(run(tensors, resets, "native"), truth, strict=True):
        assert found.dtype == torch.float32 and found.shape == want.shape
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max()))


def test_bits_do_not_depend_on_threads(monkeypatch):
    tensors, resets = make_case(2, 100, 80, 16)
    monkeypatch.setattr("mega_scale.ops._OF_A_THREAD", 1)
    results = []
    for threads in (1, 2, 5, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(run(tensors, resets, "native"))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("slowest", [1e-3, 1e-5, 1e-7])
def test_slow_averages_are_not_rounded(slowest):
    """A decay of 1 - 1e-8 a token is 1 in fp32, and a step of the recurrence rounds the sum of thousands of tokens."""
    (x, log_decay, *others), _ = make_case(1, 8192, 16, 8)
    tensors = [x, log_decay * slowest, *others]
    with torch.no_grad():
        truth = run_forward(tensors, "recurrent", torch.float64)
        errors = {
            impl: max(
                float((a - b).abs().max() / b.abs().max())
                for a, b in zip(run_forward(tensors, impl), truth, strict=True)
            )
            for impl in ("native", "recurrent")
        }
    assert errors["native"] < 1e-5 < errors["recurrent"]


def run_forward(tensors, impl, dtype=torch.float32):
    x, log_decay, gain, projection, state = (tensor.to(dtype) for tensor in tensors)
    return damped_ema(x, EmaCoefficients(log_decay, gain, projection), state, impl=impl)


def test_auto_takes_it_on_a_cpu_but_not_in_fp64():
    tensors, resets = make_case(2, 50, 20, 16)
    forms = {impl: run(tensors, resets, impl)[0] for impl in ("auto", "native", "blocked")}
    assert torch.equal(forms["auto"], forms["native"]) and not torch.equal(forms["auto"], forms["blocked"])
    wide = {impl: run(tensors, resets, impl, torch.float64)[0] for impl in ("auto", "blocked")}
    assert torch.equal(wide["auto"], wide["blocked"])


def test_layouts_of_its_inputs_do_not_matter():
    (x, *others), resets = make_case(2, 50, 20, 16)
    wide = torch.cat([x, x], -1)
    want = run([x, *others], resets, "native")
    got = run([wide[..., :20], *others], resets.t().contiguous().t(), "native")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # a gradient that is one number, spread
    leaf = x.detach().clone().requires_grad_()
    y, _ = damped_ema(leaf, EmaCoefficients(*others[:3]), impl="native")
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    damped_ema(other, EmaCoefficients(*others[:3]), impl="recurrent")[0].sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, atol=1e-4, rtol=1e-5)


def test_it_keeps_its_input_and_a_state_a_block():
    tensors, _ = make_case(2, 32 * 64, 32, 16)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        damped_ema(leaves[0], EmaCoefficients(*leaves[1:4]), impl="native")
    assert sorted(kept.values())[-2:] == [2 * 64 * 32 * 16, 2 * 32 * 64 * 32]
    kept.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        damped_ema(leaves[0], EmaCoefficients(*leaves[1:4]), impl="native")
    assert not kept


def test_what_it_does_not_take_is_refused():
    (x, *others), _ = make_case(1, 5, 3, 2)
    coefficients = EmaCoefficients(*others[:3])
    with pytest.raises(ValueError, match="truncated"):
        damped_ema(x, coefficients, truncation=3, impl="native")
    with pytest.raises(ValueError, match=r"fp32 on a CPU.*blocked"):
        damped_ema(x.double(), EmaCoefficients(*(c.double() for c in coefficients)), impl="native")


SOURCE = Path(native.__file__).with_name("native.cpp")


def test_many_processes_may_compile_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: ops.load(SOURCE, tmp_path), range(4)))
    assert {library.mega_ema_tokens() for library in libraries} == {32}
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    ops.load(SOURCE, tmp_path)
    assert file.stat().st_mtime_ns == before


def test_a_change_of_the_source_makes_another_library(tmp_path):
    source = tmp_path / "own.cpp"
    for number in (1, 2):
        source.write_text(f'extern "C" int number() {{ return {number}; }}\n')
        assert ops.load(source, tmp_path / "kept").number() == number


@pytest.fixture
def without_compiler(tmp_path, monkeypatch):
    load = ops.load
    monkeypatch.setattr(ops, "load", lambda source: load(source, tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_without_a_compiler_it_warns_once_and_takes_the_blocked_form(without_compiler):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 20, generator=generator)
    coefficients = EmaCoefficients(-torch.rand(20, 16, generator=generator), torch.ones(20, 16), torch.ones(20, 16))
    with pytest.warns(RuntimeWarning, match=r"slower: there is no C\+\+ compiler '/no/such/compiler'.*CXX") as warned:
        first, second = (damped_ema(x, coefficients)[0] for _ in range(2))
    assert len(warned) == 1 and torch.equal(first, second)
    assert torch.equal(first, damped_ema(x, coefficients, impl="blocked")[0])
    with pytest.raises(ValueError, match="could not be compiled"):
        damped_ema(x, coefficients, impl="native")


def test_what_a_compiler_says_is_told(tmp_path):
    (tmp_path / "broken.cpp").write_text("int main( {\n")
    with pytest.raises(ValueError, match=r"ended with 1: .*broken.cpp"):
        ops.load(tmp_path / "broken.cpp", tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())
