"""A CUDA graph that the device repeats for as long as a flag holds: a conditional node of type while.

CUDA 12.4 and later. Torch captures the graph that is repeated; the node around it is made through
cuda-bindings, which comes with torch's CUDA wheels.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from driftmax.errors import BackendUnavailable

__all__ = ["WhileGraph"]

# One thread hands the flag to the node. The function it calls is the driver's, which links it on loading.
_KERNEL = b"""
.version 8.3
.target sm_70
.address_size 64
.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);
.visible .entry go_on(.param .u64 handle, .param .u64 flag)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [handle];
    ld.param.u64 %rd2, [flag];
    cvta.to.global.u64 %rd3, %rd2;
    ld.global.u8 %r1, [%rd3];
    {
        .param .b64 first;
        st.param.b64 [first+0], %rd1;
        .param .b32 second;
        st.param.b32 [second+0], %r1;
        call.uni cudaGraphSetConditional, (first, second);
    }
    ret;
}
\0"""


def _driver() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ImportError:
        raise BackendUnavailable(
            "a loop in a CUDA graph needs cuda-bindings, which torch's CUDA wheels bring along: "
            "pip install cuda-bindings"
        ) from None


def _checked(results: tuple[Any, ...]) -> Any:
    """What a driver call returns besides its code, if anything."""
    if int(results[0]) != 0:
        raise RuntimeError(f"CUDA: {results[0].name}")
    return results[1] if len(results) > 1 else None


def _captured(body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`body` as a graph of torch's that has not been made executable."""
    try:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:
        raise BackendUnavailable("a loop in a CUDA graph needs torch 2.8 or later") from None
    with torch.cuda.graph(graph):
        body()
    return graph


def _release(driver: Any, executable: Any, module: Any) -> None:
    driver.cuGraphExecDestroy(executable)
    driver.cuModuleUnload(module)


class WhileGraph:
    """``while flag: body()`` on the device, started by one launch.

    `body` runs twice before the capture, so that what it compiles is compiled; it must read nothing on the
    host. `flag` is a bool tensor of one element that it writes.
    """

    def __init__(self, body: Callable[[], None], flag: Tensor) -> None:
        self._driver = driver = _driver()
        self._flag = flag
        self._device = flag.device
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch annotates its instances only
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                body()
                body()
            torch.cuda.current_stream().wait_stream(side)
            self._body = _captured(body)  # keeps the memory that the graph uses
            self._module = _checked(driver.cuModuleLoadData(_KERNEL))
            whole = _checked(driver.cuGraphCreate(0))
            try:
                self._executable = self._instantiated(whole)
            finally:
                driver.cuGraphDestroy(whole)
        weakref.finalize(self, _release, driver, self._executable, self._module)

    def _instantiated(self, whole: Any) -> Any:
        driver = self._driver
        context = _checked(driver.cuCtxGetCurrent())
        handle = _checked(driver.cuGraphConditionalHandleCreate(whole, context, 0, 1))
        before = self._hand_over(whole, handle, [])
        node = driver.CUgraphNodeParams()
        node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle = handle
        node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        node.conditional.size = 1
        node.conditional.ctx = context
        add = getattr(driver, "cuGraphAddNode_v2", driver.cuGraphAddNode)  # cuda-bindings 12 has both
        _checked(add(whole, [before], None, 1, node))
        turn = node.conditional.phGraph_out[0]
        body = driver.CUgraph(self._body.raw_cuda_graph())
        child = _checked(driver.cuGraphAddChildGraphNode(turn, None, 0, body))
        self._hand_over(turn, handle, [child])
        return _checked(driver.cuGraphInstantiate(whole, 0))

    def _hand_over(self, graph: Any, handle: Any, after: list[Any]) -> Any:
        """A node of `graph` that gives the node behind `handle` the flag."""
        node = self._driver.CUDA_KERNEL_NODE_PARAMS()
        node.func = _checked(self._driver.cuModuleGetFunction(self._module, b"go_on"))
        node.gridDimX = node.gridDimY = node.gridDimZ = 1
        node.blockDimX = node.blockDimY = node.blockDimZ = 1
        node.sharedMemBytes = 0
        node.kernelParams = (
            (int(handle), self._flag.data_ptr()),
            (ctypes.c_uint64, ctypes.c_void_p),
        )
        return _checked(self._driver.cuGraphAddKernelNode(graph, after, len(after), node))

    def launch(self) -> None:
        """Start it on the current stream; the host does not wait."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            _checked(self._driver.cuGraphLaunch(self._executable, stream))
