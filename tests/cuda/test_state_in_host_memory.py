"""The state of a GPU in pinned memory and back, hashed on either side."""

from pathlib import Path

import torch

from tests.rig import Rig, same_bits, tiny_config
from tolaria.compare import tensor_hashes
from tolaria.dist import World
from tolaria.recovery.sentinel import Sentinel
from tolaria.recovery.snapshots import SnapshotRing, copy_back
from tolaria.recovery.staging import Payload

RUN = "0123456789abcdef-run"


def ring_in(folder: Path) -> SnapshotRing:
    return SnapshotRing(
        run_id=RUN, generation="1", rank=0, run_dir=folder, slots=2, limit_bytes=2**30, directory=folder, pinned=True
    )


def test_a_snapshot_holds_the_state_of_its_moment_although_the_device_goes_on(gpu: World, tmp_path: Path) -> None:
    ring = ring_in(tmp_path)
    live = {f"t{at}": torch.randn(500_000, device=gpu.device) for at in range(8)}
    live |= {"odd": torch.randn(7, device=gpu.device, dtype=torch.bfloat16), "host": torch.arange(5)}
    live["last"] = torch.randn(8, 4, 3, 3, device=gpu.device).to(memory_format=torch.channels_last)
    before = {name: tensor.cpu().clone() for name, tensor in live.items()}
    taken = ring.take(Payload(step=1, tensors=live, meta={}, local_tensors={}, local_meta={}))
    assert taken is not None
    ring.confirm(taken.info.seq)
    for tensor in live.values():
        tensor.zero_()
    held = ring.get(taken.info.seq).tensors
    assert held["t0"].is_pinned()
    assert all(same_bits(held[name], before[name].contiguous()) for name in live)
    assert copy_back(held, live, lambda: False)
    assert all(same_bits(live[name].contiguous(), before[name].contiguous()) for name in live)
    assert ring.live_digest(live, {}) == taken.info.digest
    ring.close(remove=True)


def test_hashes_are_the_same_on_the_device_and_on_the_host(gpu: World) -> None:
    sizes = (0, 1, 8192, 8193, 65536, 65537, 5_000_000)
    tensors = {str(size): torch.randn(size) for size in sizes}
    tensors |= {"bf16": torch.randn(99_999).bfloat16(), "f64": torch.randn(70_000).double(), "flag": torch.ones(3) > 0}
    on_device = {name: tensor.to(gpu.device) for name, tensor in tensors.items()}
    assert tensor_hashes(on_device) == tensor_hashes(tensors)
    assert tensor_hashes(on_device | {"host": torch.ones(3)})["host"] == tensor_hashes({"": torch.ones(3)})[""]


def test_a_flipped_bit_on_the_device_is_noticed_and_ranks_that_are_equal_are(gpu: World, tmp_path: Path) -> None:
    with Rig.build(tmp_path, world=gpu, config=tiny_config()) as rig:
        rig.train(2)
        sentinel = Sentinel(rig.state, gpu.peers, slice_bytes=2**24)
        assert sentinel.check(0) is None
        for name, tensor in rig.state.tensors().items():
            before = tensor_hashes({name: tensor})
            tensor.view(-1).view(torch.uint8)[-1] ^= 1
            assert tensor_hashes({name: tensor}) != before, name
            tensor.view(-1).view(torch.uint8)[-1] ^= 1
            assert tensor_hashes({name: tensor}) == before, name
