"""How the compiled C++ of CPUs comes to be, and what happens where it cannot."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mega_scale.ops.ema import EmaCoefficients, damped_ema
from mega_scale.ops.native import library as module


def test_many_processes_may_compile_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: module.load(module._FOLDER, tmp_path), range(4)))
    assert {library.mega_ema_padding() for library in libraries} == {8}
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    module.load(module._FOLDER, tmp_path)
    assert file.stat().st_mtime_ns == before


def test_a_change_of_any_file_makes_another_library(tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "own.h").write_text('extern "C" int number() { return 1; }\n')
    (sources / "own.cpp").write_text('#include "own.h"\n')
    assert module.load(sources, tmp_path / "kept").number() == 1
    (sources / "own.h").write_text('extern "C" int number() { return 2; }\n')
    assert module.load(sources, tmp_path / "kept").number() == 2


@pytest.fixture
def without_compiler(tmp_path, monkeypatch):
    load = module.load
    monkeypatch.setattr(module, "load", lambda sources: load(sources, tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    module.library.cache_clear()
    yield
    module.library.cache_clear()


def test_without_a_compiler_it_warns_once_and_takes_other_forms(without_compiler):
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
        module.load(tmp_path, tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())
