"""Gates as compiled C++: awkward sizes and layouts against the plain ones in fp64, and where they are not taken."""

import pytest
import torch

from mega_scale.ops.gates import LEAN, PLAIN
from mega_scale.ops.native import gates as module

# Rows and coefficients of columns that a function takes.
FUNCTIONS = {"silu": (1, ()), "queries_and_keys": (1, (2, 2)), "gate": (2, ()), "update": (3, ()), "average": (2, (0,))}


@pytest.fixture
def always(monkeypatch):
    """However small tensors are."""
    monkeypatch.setattr(module, "_LEAST", 0)


class Calls:
    """Counts calls of the compiled functions, by name."""

    def __init__(self, monkeypatch):
        self.names = []
        call = module._call

        def counted(name, *others):
            self.names.append(name)
            return call(name, *others)

        monkeypatch.setattr(module, "_call", counted)


def run(gates, name, shape, dtype, spread=4.0):
    """Results and gradients of a function whose rows are slices of a wider tensor, as in a block."""
    rows, columns = FUNCTIONS[name]
    width = shape[-1]
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(*shape[:-1], width * rows + 3, generator=generator) * spread
    coefficients = [torch.randn(*([count] if count else []), width, generator=generator) for count in columns]
    wide, *coefficients = (tensor.to(dtype).requires_grad_() for tensor in (wide, *coefficients))
    found = getattr(gates, name)(*(wide[..., i * width : (i + 1) * width] for i in range(rows)), *coefficients)
    found = found if isinstance(found, tuple) else (found,)
    probes = [torch.randn(t.shape, generator=generator).to(dtype) for t in found]
    return [*found, *torch.autograd.grad(found, [wide, *coefficients], probes)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 15), (70, 16), (3, 65, 37), (2, 2, 5, 128), (1, 300, 130)])
@pytest.mark.parametrize("threads", [1, 3])
def test_awkward_sizes_match_fp64(name, shape, threads, always, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(module, "_OF_A_THREAD", 1)
    calls = Calls(monkeypatch)
    found, want = run(LEAN, name, shape, torch.float32), run(PLAIN, name, shape, torch.float64)
    assert calls.names == [name, f"{name}_backward"]
    for got, truth in zip(found, want, strict=True):
        assert got.dtype == torch.float32 and got.shape == truth.shape
        torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=2e-6 * float(truth.detach().abs().max()))


def test_bits_do_not_depend_on_threads(always, monkeypatch):
    monkeypatch.setattr(module, "_OF_A_THREAD", 1)
    for name in FUNCTIONS:
        results = []
        for threads in (1, 2, 5, 64):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append(run(LEAN, name, (2, 90, 100), torch.float32))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)), name


def test_the_whole_range_of_numbers(always):
    x = torch.cat([torch.linspace(-80, 80, 100_001), torch.tensor([1e-38, -1e-38, 0.0, -0.0, 3e38, 1e4, 88.5, 100.0])])
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    found, want = LEAN.silu(leaf), torch.nn.functional.silu(wide)
    torch.testing.assert_close(found.double(), want, rtol=5e-7, atol=1e-37)
    found.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    # where silu is next to nothing, so are these; what is not a number stays so, and infinity is never hidden
    odd = torch.tensor([-90.0, -1e4, float("nan"), float("inf"), -float("inf")], requires_grad=True)
    out = LEAN.silu(odd)
    assert out[:2].abs().max() < 1e-33 and out[2].isnan() and out[3] == float("inf") and not out[4].isfinite()
    out[:3].sum().backward()
    assert odd.grad[:2].abs().max() < 1e-33 and odd.grad[2].isnan()


def test_sums_over_many_rows_are_not_rounded(always):
    """A sum of 200,000 equal numbers, one after the other, would be off by two thousandths in fp32."""
    y, x = torch.full((200_000, 3), 20.0), torch.full((200_000, 3), 0.1)
    omega = torch.zeros(3, requires_grad=True)
    LEAN.average(y, x, omega).sum().backward()
    torch.testing.assert_close(omega.grad, torch.full((3,), 20_000.0), rtol=1e-4, atol=0)


def test_layouts_do_not_matter(always):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 2, 40, 24, generator=generator)
    want = LEAN.gate(x, y)
    assert torch.equal(LEAN.gate(x.mT.contiguous().mT, y), want)
    assert torch.equal(LEAN.gate(x, torch.cat([y, y], -1)[..., :24]), want)
    leaf = x.clone().requires_grad_()
    LEAN.gate(leaf, y).sum().backward()  # a gradient that is one number, spread
    torch.testing.assert_close(leaf.grad, torch.nn.functional.silu(y))


def test_they_keep_their_inputs_alone(always):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    for name, (rows, columns) in FUNCTIONS.items():
        kept.clear()
        inputs = [torch.randn(50, 6, requires_grad=True) for _ in range(rows)]
        coefficients = [torch.randn(*([count] if count else []), 6) for count in columns]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            getattr(LEAN, name)(*inputs, *coefficients)
        assert sum(kept.values()) == rows * 300 + sum(max(count, 1) * 6 for count in columns), name


def test_other_tensors_take_other_forms(monkeypatch):
    calls = Calls(monkeypatch)
    x = torch.randn(2, 200, 128)
    for given in (x.double(), x.bfloat16(), x[:1, :100]):
        LEAN.silu(given)
    with torch.device("meta"):
        LEAN.gate(torch.empty(2, 200, 128), torch.empty(2, 200, 128))
    LEAN.gate(x, x.double())
    with torch.no_grad():
        assert torch.equal(LEAN.gate(x, x[:1]), PLAIN.gate(x, x[:1]))  # one row is spread over the batch
    torch.compile(lambda x: LEAN.gate(x, x), backend="eager", fullgraph=True)(x)
    assert calls.names == []
    LEAN.silu(x)
    assert calls.names == ["silu"]
