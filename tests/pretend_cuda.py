"""A pretended GPU. Its tensors say that they are on CUDA and compute on the CPU.

They refuse what a GPU refuses: operations on tensors of both devices, generators of the CPU, `numpy()`, and
waiting while a graph is recorded."""
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from cse.fast.graphs import Graph

aten = torch.ops.aten
GPU, CPU = torch.device('cuda', 0), torch.device('cpu')
PLACES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
MIXED = PLACES | {aten.copy_.default, aten._to_copy.default}  # may take tensors of the CPU
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
# on CUDA their result depends on the order of threads, says `torch.use_deterministic_algorithms`
UNORDERED = {
    'upsample_linear1d_backward', 'upsample_bilinear2d_backward', 'upsample_bicubic2d_backward',
    'avg_pool3d_backward', '_adaptive_avg_pool2d_backward', 'adaptive_max_pool2d_backward',
    'reflection_pad1d_backward', 'reflection_pad2d_backward', 'grid_sampler_2d_backward',
    'nll_loss_forward', 'nll_loss2d_forward', 'histc', 'put_'}
CALLED = set()  # names of the operations on the pretended GPU
_recording = []  # graphs that are being recorded


class OnGPU(torch.Tensor):
    "A tensor of the pretended GPU."
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, own):
        layout = dict(strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype)
        made = torch.Tensor._make_wrapper_subclass(cls, own.size(), device='cpu', **layout)
        made.own = own
        return made

    def tolist(self): return self.own.tolist()

    def numpy(self): raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo):
        made = memo[id(self)] = OnGPU(self.own.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, '_is_param', False): made._is_param = True
        return made

    def __reduce_ex__(self, protocol): return OnGPU, (self.own.detach(),)

    def __repr__(self): return f'OnGPU({self.own})'

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cpu: return _moved(args[0], CPU)
        if function is torch.Tensor.to:
            device, dtype, layout = _wanted(args[1:], kwargs)
            moved = args[0] if device is None else _moved(args[0], device)
            if dtype in (None, moved.dtype) and layout is None: return moved
            args, kwargs = (moved, dtype or moved.dtype), {} if layout is None else dict(memory_format=layout)
        with torch._C.DisableTorchFunctionSubclass(): return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


def _wanted(args, kwargs):
    "Device, dtype and memory format that arguments of `to` name; None where they name none."
    given = [*args, *kwargs.values()]
    given += [x for t in given if isinstance(t, torch.Tensor) for x in (t.device, t.dtype)]
    def first(*kinds): return next((a for a in given if isinstance(a, kinds)), None)
    device = first(str, torch.device)
    return device and torch.device(device), first(torch.dtype), first(torch.memory_format)


def _moved(tensor, device):
    "A tensor on the pretended GPU or on the CPU; gradients pass."
    if tensor.device.type == device.type: return tensor
    return aten._to_copy.default(tensor, device=device)


def _refuse(function, args, kwargs, ours, on_gpu):
    "Raise for what CUDA refuses."
    leaves = tree_leaves((args, kwargs))
    strangers = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, OnGPU) and t.dim()]
    if ours and strangers and function not in MIXED:
        raise RuntimeError(f'{function}: expected all tensors on one device, found cuda:0 and cpu')
    if ours and function in PLACES and not isinstance(args[0], OnGPU):
        raise RuntimeError(f'{function}: places on cuda:0 for a tensor on the CPU')
    if on_gpu and any(isinstance(a, torch.Generator) for a in leaves):
        raise RuntimeError("expected a 'cuda' device type for generator but found 'cpu'")
    moved = function is aten._to_copy.default and ours != on_gpu
    copied = function is aten.copy_.default and ours and strangers
    if _recording and (function in WAITING or moved or copied):
        raise RuntimeError(f'{function}: operation not permitted when stream is capturing')


def _call(function, args, kwargs):
    "An operation; its result is where CUDA would leave it."
    ours, device = any(isinstance(a, OnGPU) for a in tree_leaves((args, kwargs))), kwargs.get('device')
    on_gpu = ours if device is None else torch.device(device).type == 'cuda'
    _refuse(function, args, kwargs, ours, on_gpu)
    if on_gpu: CALLED.add(function.name().split('::')[1].split('.')[0])
    def plain(a): return a.own if isinstance(a, OnGPU) else a
    def wrapped(a): return OnGPU(a) if isinstance(a, torch.Tensor) and not isinstance(a, OnGPU) else a
    named = tree_map(plain, kwargs) | ({} if device is None else dict(device=CPU))
    found = function(*tree_map(plain, args), **named)
    if not on_gpu: return found
    found = tree_map(wrapped, found)
    return return_and_correct_aliasing(function, args, kwargs, found) if ours else found


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


def _record(graph, pool):
    "As `Graph._record`, without a graph."
    _recording.append(graph)
    try: return [t.clone() for t in graph.function(*graph.inputs)]
    finally: _recording.pop()


_swap = torch.utils.swap_tensors


def _swap_if_needed(old, new):
    "As `swap_tensors`, which a module's `to` calls even where a parameter stays as it is."
    try: _swap(old, new)
    except RuntimeError: # something else holds the parameter
        if (old.device, old.dtype) != (new.device, new.dtype): raise


SILENT = (
    'get_rng_state', 'set_rng_state', 'manual_seed_all', 'graph_pool_handle', 'set_device', 'synchronize',
    'empty_cache', 'reset_peak_memory_stats', '_lazy_init')
CUDA = {name: lambda *ignored: None for name in SILENT} | dict(  # functions of `torch.cuda`
    is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
    get_device_properties=lambda *a: SimpleNamespace(uuid='pretended'),
    get_device_name=lambda *a: 'Pretended GPU', get_device_capability=lambda *a: (7, 0),
    max_memory_allocated=lambda *a: 0)


@contextmanager
def pretended_cuda(monkeypatch):
    "One GPU is there during a block. Gives the names of the operations on it."
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.serialization.add_safe_globals([OnGPU])
    for name, value in CUDA.items(): monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.utils, 'swap_tensors', _swap_if_needed)
    monkeypatch.setattr(Graph, '_record', _record)
    monkeypatch.setattr(torch, 'compile', lambda network, **how: network)
    CALLED.clear()
    try:
        with _Mode(): yield CALLED
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.use_deterministic_algorithms(False)
