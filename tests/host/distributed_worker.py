"""Two gloo processes: forward, gradients and extraction under DDP and FSDP2 against one process.  Run by torchrun."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.host import kit


def gradients(host) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    whole = {}
    for name, parameter in host.parameters("a").items():
        gradient = parameter.grad
        assert gradient is not None, name
        whole[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
    return whole


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world,))
    for family in sys.argv[1].split(","):
        for method in sys.argv[2].split(","):
            model, inputs, host = kit.woven(family, method)
            options = {} if family == "bert" else {"use_cache": False}
            with host.using("a"):
                alone = kit.answer(model(**inputs, **options))
            alone.pow(2).mean().backward()
            wanted, stored = gradients(host), host.extract("a")
            mine = {k: v[rank : rank + 1] for k, v in inputs.items()}
            for way in ("ddp", "fsdp2"):
                model, _, host = kit.woven(family, method)
                host.trainable("a")
                if way == "ddp":
                    wrapped = DistributedDataParallel(model)
                else:
                    for block in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
                        fully_shard(block, mesh=mesh)
                    wrapped = fully_shard(model, mesh=mesh)
                with host.using("a"):
                    output = kit.answer(wrapped(**mine, **options))
                output.pow(2).mean().backward()
                assert torch.allclose(output, alone[rank : rank + 1], atol=1e-5), f"{family} {method} {way}: outputs"
                for name, gradient in gradients(host).items():
                    assert torch.allclose(gradient, wanted[name], atol=1e-6, rtol=1e-4), f"{family} {method} {way}: {name}"
                assert host.extract("a").digest == stored.digest, f"{family} {method} {way}: extracted module"
                dist.barrier()
            if rank == 0:
                print(f"ok {family} {method}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
