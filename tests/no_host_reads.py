"""A mode in which waiting for a tensor is an error, as the host would stall an accelerator."""

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "is_nonzero", "masked_select", "nonzero", "unique", "_unique2")


class NoHostReads(TorchDispatchMode):
    """Refuses every operation that makes the host wait for a tensor's values or for a copy."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in READS, f"{name} reads a tensor on the host"
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            stays = args[0].device.type == kwargs["device"].type
            assert stays or kwargs.get("non_blocking"), "a copy between devices stalls the host"
        return function(*args, **(kwargs or {}))
