"""The linear layer by oneDNN: awkward sizes and layouts against fp64, and where it is not taken."""

import pytest
import torch
import torch.nn.functional as F

from mega_scale.ops import linear as module
from mega_scale.ops.linear import linear, linears, packed_linear, times_transposed

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts oneDNN's products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.mkldnn._linear_pointwise.default
        return function(*args, **(kwargs or {}))


@pytest.fixture
def chosen(monkeypatch):
    """As on a processor for which oneDNN is the faster one."""
    monkeypatch.setattr(module, "_onednn_is_faster", lambda: True)


def run(function, x, weight, bias, dtype=torch.float32):
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    return [out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], probe)]


@pytest.mark.parametrize("shape,width", [((1, 32, 1), 1), ((2, 37, 13), 31), ((3, 1, 45, 128), 65), ((70, 24), 257)])
@pytest.mark.parametrize("bias", [False, True])
def test_awkward_sizes_match_fp64(shape, width, bias, chosen):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(width, shape[-1], generator=generator)
    own = torch.randn(width, generator=generator) if bias else None
    with Kernels() as kernels:
        found = run(linear, x, weight, own)
    assert kernels.count == 2  # the product, and the gradient of x
    for got, want in zip(found, run(F.linear, x, weight, own, torch.float64), strict=True):
        assert got.dtype == torch.float32 and got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max()))


def test_layouts_do_not_matter(chosen):
    generator = torch.Generator().manual_seed(1)
    wide, weight = torch.randn(2, 40, 50, generator=generator), torch.randn(20, 36, generator=generator)
    x = wide[..., 7:27]
    for given in (weight.t(), weight.t().contiguous()):
        assert torch.allclose(linear(x, given), x @ given.t(), atol=1e-5)
        assert torch.allclose(times_transposed(x[0], given), x[0] @ given.t(), atol=1e-5)
    leaf = x.clone().requires_grad_()
    linear(leaf, weight.t()).sum().backward()  # a gradient that is one number, spread
    torch.testing.assert_close(leaf.grad, weight.sum(1).expand_as(leaf), atol=1e-4, rtol=1e-5)


def test_only_wanted_gradients_are_computed(chosen):
    x, weight = torch.randn(40, 8), torch.randn(16, 8, requires_grad=True)
    with Kernels() as kernels:
        linear(x, weight).sum().backward()
    assert kernels.count == 1 and x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand_as(weight), atol=1e-4, rtol=1e-5)


def test_what_it_does_not_suit_goes_to_pytorch(chosen, monkeypatch):
    x, weight = torch.randn(40, 8), torch.randn(16, 8)
    with Kernels() as kernels:
        for given in ((x[:5], weight), (x.double(), weight.double()), (x.bfloat16(), weight.bfloat16())):
            assert torch.equal(linear(*given), F.linear(*given))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear(x, weight), F.linear(x, weight))
        monkeypatch.setattr(module, "_onednn_is_faster", lambda: False)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert kernels.count == 0


@pytest.mark.parametrize(
    "capability,text,faster",
    [
        ("AVX512", "vendor_id\t: AuthenticAMD\n", True),
        ("AVX512", "vendor_id\t: GenuineIntel\n", False),
        ("AVX512", "processor\t: 0\n", False),
        ("AVX2", "vendor_id\t: AuthenticAMD\n", False),
        ("AVX512", None, False),
    ],
)
def test_it_is_taken_on_other_processors_with_wide_registers(capability, text, faster, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(module, "_PROCESSOR", file)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert module._onednn_is_faster.__wrapped__() is faster


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.partition(".")[0] in ("mm", "addmm", "addmm_", "_linear_pointwise")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [(2, 20), (3,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2, 3), (4, 5, 6)])
@pytest.mark.parametrize("function", [packed_linear, linears])
def test_layers_of_one_input_equal_each_alone(function, tokens, dtype, frozen):
    """Packed ones are one product."""
    generator = torch.Generator().manual_seed(len(tokens))
    sizes = [(*tokens, 5), (3, 5), (4, 5), (1, 5), (3,), (4,), (1,)]
    leaves = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    leaves = [leaf.requires_grad_(number not in frozen) for number, leaf in enumerate(leaves)]
    x, weights, biases = leaves[0], leaves[1:4], leaves[4:]
    wanted = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    slopes = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype) for out in wanted]
    with Products() as seen:
        found = function(x, weights, biases)
        assert seen.count == (1 if function is packed_linear else 3)
        torch.autograd.backward(found, slopes)
    # Of tokens and of weights one each, and the biases' sum.
    if function is packed_linear:
        assert seen.count == 1 + x.requires_grad + weights[0].requires_grad + biases[0].requires_grad
    learned = [leaf for leaf in leaves if leaf.requires_grad]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)
    for leaf, want in zip(learned, torch.autograd.grad(wanted, learned, slopes), strict=True):
        torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("function", [packed_linear, linears])
def test_layers_of_one_input_keep_no_rounded_copy_of_what_they_read(function):
    x, weights, biases = torch.randn(9, 5), [torch.randn(3, 5), torch.randn(4, 5)], [torch.randn(3), torch.randn(4)]
    leaves = [leaf.requires_grad_() for leaf in (*weights, *biases)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            found = function(x, weights, biases)
        assert {out.dtype for out in found} == {torch.bfloat16}
    memory = {leaf.data_ptr() for leaf in weights}
    assert {t.data_ptr() for t in kept if t.shape[-1] == 5 and len(t) != len(x)} == memory
    with torch.autocast("cpu", torch.bfloat16):
        wanted = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    slopes = [torch.randn(out.shape).bfloat16() for out in wanted]
    for got, want in zip(
        torch.autograd.grad(found, leaves, slopes), torch.autograd.grad(wanted, leaves, slopes), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_layers_of_one_input_sum_its_gradients_in_their_products():
    x, weights = torch.randn(2, 9, 5, requires_grad=True), [torch.randn(3, 5), torch.randn(4, 5), torch.randn(1, 5)]
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name().partition(".")[0])
            return function(*args, **(kwargs or {}))

    found = linears(x, weights, [None] * 3)
    slopes = [torch.randn(out.shape) for out in found]
    with Names():
        torch.autograd.backward(found, slopes)
    assert names.count("mega_scale::sum_products") == 1 and not {"aten::add", "aten::add_", "aten::mm"} & {*names}
    left, right = [torch.randn(4, 3), torch.randn(4, 2)], [torch.randn(3, 5), torch.randn(2, 5)]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mega_scale.sum_products.default, (left, right), test_utils=checks)
