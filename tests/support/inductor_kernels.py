"""The kernels that inductor makes for a GPU, found without one: its own scheduler decides what is fused.

Written for the internals of torch 2.13; nothing else depends on it.
"""

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import fx
from torch._dynamo import device_interface
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import ComputedBuffer
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

GPU = torch.device("cuda:0")
H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 * 10**9,
    L2_cache_size=50 * 2**20, shared_memory_per_block_optin=232448,
)  # fmt: skip


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """What inductor asks of a GPU is answered for an H100."""
    interface = device_interface.CudaInterface
    answers = {
        "get_device_properties": H100, "get_compute_capability": 90, "is_available": True, "current_device": 0,
    }  # fmt: skip
    with ExitStack() as stack:
        for owner, names in (
            (interface, answers),
            (interface.Worker, ("get_device_properties", "current_device")),
            (torch.cuda, ("get_device_properties", "is_available", "current_device")),
        ):
            for name in names:
                answer = staticmethod(lambda *_, found=answers[name]: found)
                stack.enter_context(patch.object(owner, name, answer))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(patch("torch._inductor.scheduler.has_triton", lambda: True))
        device_interface.register_interface_for_device("cuda", interface)
        device_interface.register_interface_for_device(GPU, interface)
        yield


def fused_bytes(graph: fx.GraphModule, inputs: list[object], backward: bool) -> list[int]:
    """Bytes that each Triton kernel of a graph of inductor's reads and writes, from fake tensors on a CPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def moved(x: FakeTensor) -> FakeTensor:
        return FakeTensor(mode, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), GPU)

    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(FakeTensor, moved, node.meta["val"])
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": GPU}
    inputs = tree_map_only(FakeTensor, moved, inputs)
    with pretended_gpu(), V.set_fake_mode(mode), tracing(TracingContext(mode)), torch.no_grad():
        compile_fx.view_to_reshape(graph)
        compile_fx._recursive_record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=inputs, is_backward=backward, is_inference=False)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            nodes = [node for node in lowering.scheduler.nodes if isinstance(node.get_nodes()[0].node, ComputedBuffer)]
            return [node.get_read_write_buffers_sizes() for node in nodes]
