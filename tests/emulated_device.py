"""An accelerator without hardware: tensors that say they lie on it, refuse what CUDA refuses, and compute on the CPU.

`register()` makes it known to torch under the name "emulated", for good: use it in a process of its own. Within
`Emulator()` tensors can be moved there. Their values lie on the CPU (`OnDevice.host`), so control flow, files and
results are real, and everything that happens is counted by kind, name and line of ddrepro:

    launch      an operator that a GPU would run kernels for
    view        one that only looks at a tensor in another way
    allocate    memory that is asked for and not filled
    to device   a copy from the CPU, from_device one back
    read        a value that the CPU waits for: item, a mask's count, unique, …
"""
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "emulated"
WAITS = ("to device", "from device", "read")

COPIES = {"_to_copy", "copy_"}
VIEWS = {"detach", "_unsafe_view", "lift_fresh", "alias", "_reshape_alias"}
EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted"}
READS = {"_local_scalar_dense": "item", "is_nonzero": "bool", "equal": "equal", "nonzero": "nonzero",
         "masked_select": "masked_select", "_unique2": "unique", "repeat_interleave": "repeat_interleave"}
BY_A_NUMBER = {"masked_fill", "masked_fill_", "fill_"}      # which may lie on the CPU, as in sums and products
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}

# Under autocast CUDA computes these in the lower precision, and those in float32: what ddrepro's networks are made of
LOWERED = ("conv1d", "conv2d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
RAISED = ("group_norm", "layer_norm", "softmax.int", "log_softmax.int", "cross_entropy_loss", "nll_loss", "norm.Scalar")


class MixedDevices(RuntimeError):
    "Tensors of the CPU and of the device met in one operator, which CUDA refuses"


# Registration

class Backend(_DummyBackendModule):
    "What torch asks `torch.emulated`"
    def get_device_name(self, device=None): return NAME
    def is_bf16_supported(self, including_emulation=True): return True
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]
    def get_rng_state(self, device=0): return torch.zeros(16, dtype=torch.uint8)
    def set_rng_state(self, state, device=0): return None
    def device(self, index): return nullcontext()
    def synchronize(self, device=None): return None


def under_autocast(operator, dtype):
    "A kernel that casts floating tensors of the device, and leaves the rest to the operator"
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(x):
        is_cast = isinstance(x, torch.Tensor) and x.is_floating_point() and x.device.type == NAME
        return x.to(dtype or torch.get_autocast_dtype(NAME)) if is_cast and x.dtype != torch.float64 else x

    def kernel(*args, **options):
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(*_pytree.tree_map(cast, args), **_pytree.tree_map(cast, options))
    return kernel


_libraries = []   # kernels live as long as their library


def register():
    "Make the device known to this process"
    if _libraries: return
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((library, fallback))
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, dtype in ((LOWERED, None), (RAISED, torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(aten, packet), overload or "default")
            library.impl(name, under_autocast(operator, dtype), "AutocastPrivateUse1")


# Tensors

class OnDevice(torch.Tensor):
    "A tensor of the device"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        layout = dict(strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, host.shape, device=torch.device(NAME, 0), **layout)
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if Emulator.current is None: raise RuntimeError(f"{operator} on the emulated device outside of `Emulator()`")
        return Emulator.current.run(operator, args, kwargs or {})

    @property
    def is_cuda(self): return True                    # code that asks goes the way of a GPU

    def backward(self):
        "As torch's, which would ask a Python backend for streams that it cannot have"
        leaves = leaves_below(self)
        for leaf, gradient in zip(leaves, torch.autograd.grad(self, leaves)):
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient

    def tolist(self): return self.cpu().tolist()      # torch's own is not for subclasses

    def __repr__(self, *, tensor_contents=None): return f"OnDevice({self.host!r})"


def leaves_below(result) -> list:
    "The leaves that a result was computed from"
    leaves, seen, waiting = [], set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen: continue
        seen.add(node)
        if hasattr(node, "variable"): leaves.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves


def is_tensor(x) -> bool: return isinstance(x, torch.Tensor)


def is_here(x) -> bool: return isinstance(x, OnDevice)


def on_host(x): return x.host if is_here(x) else x


def is_view(operator, name) -> bool:
    "Whether an operator gives another look at its input, and launches nothing"
    if name in VIEWS: return True
    returned = [r.alias_info for r in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned) and not name.startswith("unsafe_")


def line_of() -> str:
    "The innermost line of ddrepro that is being carried out"
    frame = sys._getframe(1)
    while frame:
        _, found, path = frame.f_code.co_filename.rpartition("/ddrepro/")
        if found: return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


# The device

class Emulator(TorchDispatchMode):
    "The device while it is switched on"
    current = None

    def __init__(self):
        super().__init__()
        register()
        self.counts = Counter()     # (kind, name, line) → how often
        self.bytes = Counter()      # kind of copy → bytes

    def __enter__(self):
        self.before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)    # net.to(device) makes new parameters
        torch._C._set_only_lift_cpu_tensors(True)                           # torch.tensor(…, device=…) is a copy
        self.threads = torch.autograd.set_multithreading_enabled(False)     # backward stays in this thread
        self.threads.__enter__()
        Emulator.current = self
        return super().__enter__()

    def __exit__(self, *error):
        ended = super().__exit__(*error)
        Emulator.current = None
        self.threads.__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(self.before)
        return ended

    def count(self, kind: str, name: str):
        self.counts[kind, name, line_of()] += 1

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None): return self.run(operator, args, kwargs or {})

    def run(self, operator, args, kwargs):
        "Carry out an operator as the device would"
        leaves = _pytree.tree_leaves((args, kwargs))
        here = [x for x in leaves if is_here(x)]
        target = kwargs.get("device")
        to_here = target is not None and torch.device(target).type == NAME
        if not here and not to_here: return operator(*args, **kwargs)

        name = operator._schema.name.removeprefix("aten::")
        if name == "_to_copy": return self.copied(args[0], kwargs, to_here or target is None)
        if name == "copy_" and not (is_here(args[0]) and is_here(args[1])): return self.filled(*args)
        if here: self.refuse_mixed(operator, name, args, kwargs, leaves)
        self.note(operator, name, args)
        kwargs = {**kwargs, "device": "cpu"} if to_here else kwargs
        host_args, host_kwargs = _pytree.tree_map(on_host, (args, kwargs))
        result = operator(*host_args, **host_kwargs)
        if not to_here and target is not None: return result      # new_zeros(…, device="cpu")
        if operator._schema.is_mutable:
            for x in here: assert x.shape == x.host.shape, f"{name} changes a tensor's shape in place: not emulated"
        known = {id(x.host): x for x in here}                     # what was changed in place comes back as it was

        def back(x):
            if not is_tensor(x): return x
            return known[id(x)] if id(x) in known else OnDevice(x)
        return _pytree.tree_map(back, result)

    def copied(self, x, kwargs, to_here: bool):
        "A copy of a tensor: of its dtype, to the device, from it"
        values = aten._to_copy.default(on_host(x), **kwargs | {"device": "cpu"})
        assert values.data_ptr() != on_host(x).data_ptr() or not x.numel()
        if not is_here(x): self.moved("to device", x)
        elif to_here: self.count("launch", "_to_copy")
        else: self.moved("from device", x)
        return OnDevice(values) if to_here else values

    def filled(self, x, source, *options):
        "x.copy_(source) between CPU and device"
        on_host(x).copy_(on_host(source))
        self.moved("to device" if is_here(x) else "from device", source)
        return x

    def moved(self, kind: str, x):
        self.count(kind, "copy")
        self.bytes[kind] += on_host(x).nbytes

    def note(self, operator, name: str, args):
        "Count an operator that runs on the device"
        if name in READS and not (name == "repeat_interleave" and is_sized(operator, args)):
            self.count("read", READS[name])
            if name == "_local_scalar_dense": return
        if name in INDEXED: self.note_indices(name, args)
        if is_view(operator, name): self.count("view", name)
        elif name in EMPTY: self.count("allocate", name)
        else: self.count("launch", name)

    def note_indices(self, name: str, args):
        "Indices from the CPU are copied; the length of what a mask chooses is waited for"
        indices = [i for i in args[1] if i is not None]
        for i in indices:
            if not is_here(i): self.moved("to device", i)
        masks = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        is_fill = name != "index" and args[2].numel() == 1
        if masks and not is_fill: self.count("read", "a mask's count")

    def refuse_mixed(self, operator, name: str, args, kwargs, leaves):
        "Raise MixedDevices where tensors meet that CUDA would not let meet; numbers of the CPU may, element by element"
        others = [x for x in leaves if is_tensor(x) and not is_here(x)]
        if not others: return
        if name in INDEXED and is_here(args[0]) and all(is_here(x) for x in args[2:3]): return
        numbers = all(x.dim() == 0 for x in others) and (torch.Tag.pointwise in operator.tags or name in BY_A_NUMBER)
        if numbers and not (operator._schema.is_mutable and not is_here(args[0])): return
        shapes = ", ".join(f"{x.device.type}{tuple(x.shape)}" for x in leaves if is_tensor(x))
        raise MixedDevices(f"{name} at {line_of()}: {shapes}")

    # What was counted

    def totals(self) -> dict:
        "Kind → how often"
        totals = dict.fromkeys(("launch", "view", *WAITS), 0)
        for (kind, _, _), n in self.counts.items():
            if kind in totals: totals[kind] += n
        return totals

    @contextmanager
    def counting(self):
        "A Counter that holds, after the body, what the body added"
        before, added = self.counts.copy(), Counter()
        yield added
        added.update(self.counts - before)


def is_sized(operator, args) -> bool:
    "Whether repeat_interleave knows the length of its result: by a number of repeats"
    return operator._overloadname == "self_int"
