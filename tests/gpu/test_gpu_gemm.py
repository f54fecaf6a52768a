"""Scaled products on CUDA tensors against fp64 on the CPU. Needs a GPU: `pytest -m gpu`.

With FLASH8_KERNELS=off the portable code serves them, with on the kernels; with auto the kernels do
where they pass their check.
"""

import os

import pytest
import torch

import flash8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

M, N, K = 300, 264, 1168
BLOCKS = -(-K // 128)
SHAPES = {
    "tensor": ((1, 1), (1, 1)),
    "row": ((M, 1), (1, N)),
    "1x128": ((M, BLOCKS), (BLOCKS, 3)),
    "128x128": ((3, BLOCKS), (BLOCKS, 3)),
}


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def widened(scale, rows, columns):
    """A scale for every element of its matrix."""
    for dim, size in enumerate((rows, columns)):
        repeats = 128 if 1 < scale.shape[dim] < size else size // scale.shape[dim]
        scale = scale.repeat_interleave(repeats, dim).narrow(dim, 0, size)
    return scale.double()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("granularity", SHAPES)
def test_against_fp64(granularity, fast):
    if fast and "128" in granularity:
        pytest.skip("scales of blocks need sums in fp32")
    a, b = (draw(n, K, seed=n).mul(4.0).to(torch.float8_e4m3fn) for n in (M, N))
    scales = [torch.exp2(draw(*shape, seed=sum(shape))) for shape in SHAPES[granularity]]
    bias = draw(N, seed=5).bfloat16()
    want = (a.double() * widened(scales[0], M, K)) @ (b.t().double() * widened(scales[1], K, N))
    want = want + bias.double()
    for dtype, limit in ((torch.float32, 2e-3), (torch.bfloat16, 4e-3)):
        found = flash8.gemm.scaled_mm(
            a.cuda(),
            b.cuda().t(),
            *(scale.cuda() for scale in scales),
            bias=bias.cuda(),
            out_dtype=dtype,
            use_fast_accum=fast,
        )
        error = (found.cpu().double() - want).norm() / want.norm()
        assert error < limit
    scale = 448.0 / want.abs().max()
    narrow = flash8.gemm.scaled_mm(
        a.cuda(),
        b.cuda().t(),
        *(scale.cuda() for scale in scales),
        bias=bias.cuda(),
        scale_result=scale.float().cuda(),
        out_dtype=torch.float8_e4m3fn,
        use_fast_accum=fast,
    )
    error = (narrow.cpu().double() / scale - want).norm() / want.norm()
    assert error < 0.04


@pytest.mark.parametrize("splits", [1, 2, 4, 8, 0])
@pytest.mark.parametrize("m", [9, 40])
def test_few_rows_against_fp64(m, splits):
    """Of e4m3, and of bf16, which the product quantizes; K split or not, and always alike."""
    x, w = draw(m, K, seed=1), draw(N, K, seed=2)
    x8, scale_x = flash8.gemm.quantize(x.bfloat16(), "1x128")
    w8, scale_w = flash8.gemm.quantize(w, "128x128")
    a = x8.double() * widened(scale_x, m, K)
    want = a @ (w8.double() * widened(scale_w, N, K)).t()
    b, scale_b = w8.cuda().t(), scale_w.cuda().t()
    given = x8.cuda(), b, scale_x.cuda(), scale_b
    of_e4m3 = flash8.gemm.scaled_mm(*given, split_k=splits)
    for _ in range(20):
        assert torch.equal(flash8.gemm.scaled_mm(*given, split_k=splits), of_e4m3)
    of_bf16 = flash8.gemm.scaled_mm(x.bfloat16().cuda(), b, scale_b=scale_b, split_k=splits)
    for found in (of_e4m3, of_bf16):
        assert (found.cpu().double() - want).norm() / want.norm() < 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_attention_into_a_projection(dtype):
    """Causal, ragged, with two query heads for one of k: beside fp64 of everything."""
    sizes = {"q": (2, 200, 8, 128), "k": (2, 333, 4, 128), "v": (2, 333, 4, 128)}
    q, k, v = (draw(*size, seed=i).to(dtype) for i, size in enumerate(sizes.values()))
    used = torch.tensor([333, 290], dtype=torch.int32)
    given = {"causal": True, "seqused_k": used}
    exact = flash8.flash_attn_varlen_func(
        *(x.double() for x in (q, k, v)), None, None, None, None, **given
    )
    w8, scale_w = flash8.gemm.quantize(draw(264, 1024, seed=5) / 32.0, "128x128")
    o8, scale_o = flash8.gemm.quantize_attention(
        *(x.cuda() for x in (q, k, v)), causal=True, seqused_k=used.cuda()
    )
    y = flash8.gemm.scaled_mm(o8, w8.cuda().t(), scale_o, scale_w.cuda().t())
    want = exact.reshape(400, 1024) @ (w8.double() * widened(scale_w, 264, 1024)).t()
    assert (y.cpu().double() - want).norm() / want.norm() < 0.05


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("granularity", ["row", "block"])
def test_groups_against_their_products(granularity, apart):
    """Counts that the host does not know; with kernels a graph that is replayed with others."""
    sizes, others = [0, 133, 1, 40], [50, 0, 70, 54]
    a = draw(4, 174, K, seed=1).mul(4.0) if apart else draw(174, K, seed=1).mul(4.0)
    a = a.to(torch.float8_e4m3fn).cuda()
    b = draw(4, N, K, seed=2).mul(4.0).to(torch.float8_e4m3fn).cuda().mT
    of_a = (BLOCKS,) if granularity == "block" else (1,)
    of_b = (4, BLOCKS, 3) if granularity == "block" else (4, N)
    scale_a = torch.exp2(draw(*a.shape[:-1], *of_a, seed=3)).cuda()
    scale_b = torch.exp2(draw(*of_b, seed=4)).cuda()
    index = torch.zeros(4, dtype=torch.int32, device="cuda")
    name = {"masked_m" if apart else "offs": index}
    out = torch.zeros(*a.shape[:-1], N, device="cuda")

    def call():
        flash8.gemm.grouped_scaled_mm(a, b, scale_a, scale_b, out=out, **name)

    call()
    run = call
    if os.environ.get("FLASH8_KERNELS") != "off":  # without them the counts are read
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run = graph.replay
    for counts in (sizes, others):
        given = torch.tensor(counts)
        index.copy_(given if apart else given.cumsum(0))
        run()
        begin = 0
        for group, count in enumerate(counts):
            rows = slice(0, count) if apart else slice(begin, begin + count)
            begin += count
            if count:
                part = (group, rows) if apart else (rows,)
                of_group = scale_b[group] if granularity == "block" else scale_b[group][None]
                want = flash8.gemm.scaled_mm(
                    a[part], b[group], scale_a[part], of_group, out_dtype=torch.float32
                )
                assert (out[part] - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_groups_along_k_against_their_products(granularity):
    """Groups that end anywhere, beside NaN; the first of them begins with a block."""
    ends, m, n, k = [140, 140, 1003, 2000], 200, 136, 2048
    a, b = (draw(rows, k, seed=rows).mul(4.0).to(torch.float8_e4m3fn) for rows in (m, n))
    for x in (a, b):
        x.view(torch.uint8)[:, 140:1003] = 0x7F
    a, b = a.cuda(), b.cuda().t()
    of_a, of_b = ((m, k // 128), (k // 128, 2)) if granularity == "block" else ((4 * m,), (4 * n,))
    scale_a, scale_b = (torch.exp2(draw(*shape, seed=len(shape))).cuda() for shape in (of_a, of_b))
    offs = torch.tensor(ends, dtype=torch.int32, device="cuda")
    out_dtype = torch.float32
    found = flash8.gemm.grouped_scaled_mm(a, b, scale_a, scale_b, offs, out_dtype=out_dtype)
    assert not found[1].any() and found[2].isnan().all()
    for group, begin, end in ((0, 0, 140), (3, 1003, 2000)):
        wide_a, wide_b = a[:, begin:end].double(), b[begin:end].double()
        if granularity == "block":
            of_k = torch.arange(begin, end) // 128
            wide_a = wide_a * scale_a.double()[:, of_k]
            wide_b = wide_b * scale_b.double()[of_k].repeat_interleave(128, 1)[:, :n]
        else:
            wide_a = wide_a * scale_a.double()[group * m :][:m, None]
            wide_b = wide_b * scale_b.double()[group * n :][:n]
        want = wide_a @ wide_b
        assert (found[group].double() - want).norm() <= 4e-3 * want.norm()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_a_projection_is_its_parts(granularity, interleaved):
    """Packed sequences. With kernels a graph that is replayed with other lengths."""
    tokens, columns = 300, 6 * 128
    x, weight = draw(tokens, K, seed=1), draw(columns, K, seed=2)
    a, scale_a = flash8.gemm.quantize(x.cuda(), granularity)
    of_b = "128x128" if granularity == "1x128" else "row"
    b, scale_b = flash8.gemm.quantize(weight.cuda(), of_b)
    angles = draw(tokens, 64, seed=3).cuda()
    cos, sin = angles.cos(), angles.sin()
    index = torch.tensor([0, 0, 130, 300], dtype=torch.int32, device="cuda")
    heads = {"heads_q": 4, "heads_kv": 1, "rotary_interleaved": interleaved}

    def call():
        return flash8.gemm.qkv_projection(
            *(a, b.t(), scale_a, scale_b.t()),
            **heads,
            rotary_cos=cos,
            rotary_sin=sin,
            cu_seqlens=index,
        )

    found, run = call(), lambda: None
    if os.environ.get("FLASH8_KERNELS") != "off":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        run = graph.replay
        index.copy_(torch.tensor([0, 200, 201, 300]))
    run()
    y = flash8.gemm.scaled_mm(a, b.t(), scale_a, scale_b.t(), out_dtype=torch.float32)
    y = y.view(tokens, 6, 128)
    rope = (cos, sin, None, interleaved)
    want = [
        flash8.fp8.quantize(part, "block", rope=rope, cu_seqlens=index)
        for part in (y[:, :4], y[:, 4:5])
    ]
    want.append(flash8.fp8.quantize(y[:, 5:], "block", cu_seqlens=index, v_colmajor=True))
    for have, expected in zip(found, want, strict=True):
        torch.testing.assert_close(have.descale, expected.descale, rtol=1e-5, atol=0.0)
        x, y = (flash8.fp8.dequantize(tensor) for tensor in (have, expected))
        assert (x - y).norm() <= 1e-3 * y.norm()
