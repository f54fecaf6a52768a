"""ParallelMHA in two processes against MHA in one."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from flash8.compat.flash_attn.modules.mha import MHA, ParallelMHA

EMBED, HEADS, DIM = 48, 6, 8

def own(whole, heads_kv, rank):
    "The rows of Wqkv that a process has: of its heads of q, then of k, then of v."
    q, k, v = whole.split((EMBED, heads_kv * DIM, heads_kv * DIM))
    return torch.cat([part.chunk(2)[rank] for part in (q, k, v)])

def check(rank, heads_kv, sequence_parallel, **options):
    torch.manual_seed(0)
    whole = MHA(EMBED, HEADS, heads_kv, causal=True, use_flash_attn=True, **options)
    mine = ParallelMHA(
        EMBED, HEADS, dist.group.WORLD, heads_kv, causal=True, use_flash_attn=True,
        sequence_parallel=sequence_parallel, **options,
    )
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(mine.Wqkv, name).copy_(own(getattr(whole.Wqkv, name), heads_kv, rank))
        mine.out_proj.weight.copy_(whole.out_proj.weight.chunk(2, 1)[rank])
        assert (mine.out_proj.bias is None) == (rank > 0)
        if rank == 0:
            mine.out_proj.bias.copy_(whole.out_proj.bias)
    torch.manual_seed(1)  # only the first process has made a bias
    x = torch.randn(2, 10, EMBED, requires_grad=True)
    upstream = torch.randn(2, 10, EMBED)
    want = whole(x)
    gradient, weight_gradient = torch.autograd.grad(want, (x, whole.Wqkv.weight), upstream)
    def piece(tensor):
        flat = tensor.detach().flatten(0, 1)
        return flat.chunk(2)[rank] if sequence_parallel else flat
    local = piece(x).requires_grad_()
    out = mine(local, seqlen=10)
    got = torch.autograd.grad(out, (local, mine.Wqkv.weight), piece(upstream))
    torch.testing.assert_close(out, piece(want), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[0], piece(gradient), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], own(weight_gradient, heads_kv, rank), rtol=1e-4, atol=1e-4)

def work(rank, path):
    torch.set_num_threads(1)
    store = dist.FileStore(path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for sequence_parallel in (True, False):
        check(rank, 6, sequence_parallel, use_alibi=True)
        check(rank, 2, sequence_parallel, rotary_emb_dim=8)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), 2, start_method="fork")
"""


@pytest.mark.timeout(240)
def test_two_processes_are_one(tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(CODE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(script), str(tmp_path / "store")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
