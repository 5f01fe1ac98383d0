"""A mode in which reading a tensor on the host is an error, as it would stall an accelerator."""

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "is_nonzero", "masked_select", "nonzero", "unique", "_unique2")


class NoHostReads(TorchDispatchMode):
    """Refuses every operation that makes the host wait for a tensor's values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in READS, f"{name} reads a tensor on the host"
        return function(*args, **(kwargs or {}))
