"""Recipes: what they scale by, what they refuse, and delayed scaling's state."""

import io
import socket
from contextlib import closing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flash8
from flash8 import fp8
from flash8.tensors.float8 import E4M3, E5M2
from tolerances import FP8_UNQUANTISED, rel_l2


def draw(scale=1.0):
    q, k, v, dout = (torch.randn(2, 140, 2, 32) * scale for _ in range(4))
    return q, k, v * 2, dout * 3


def train_step(recipe, q, k, v, dout):
    xs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fp8.fp8_attention(*xs, recipe, causal=True)
    out.backward(dout)
    return out.detach(), [x.grad for x in xs]


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        (fp8.CurrentScaling(), (2, 2)),
        (fp8.CurrentScaling(granularity="tensor"), ()),
        (fp8.BlockScaling(), (2, 2, 2)),
    ],
)
def test_current_scales_come_from_the_tensor_itself(recipe, shape):
    q = draw()[0]
    scaled = recipe.quantize("q", q, None)
    assert tuple(scaled.descale.shape) == shape
    assert scaled.descale.max().item() == pytest.approx(q.abs().max().item() / 448)
    assert scaled.data.dtype == E4M3 and scaled.mean is None


def test_smoothing_is_of_k_and_v_only():
    recipe = fp8.CurrentScaling(smooth_k=True)
    q, k, v, _ = draw()
    means = [
        recipe.quantize(name, x, None).mean is None
        for name, x in zip("qkv", (q, k, v), strict=True)
    ]
    assert means == [True, False, True]


def test_recipes_are_values():
    assert fp8.BlockScaling(hadamard=3) == fp8.BlockScaling(hadamard=3)
    assert hash(fp8.CurrentScaling()) == hash(fp8.CurrentScaling())
    with pytest.raises(AttributeError):
        fp8.CurrentScaling().smooth_k = True


# ----------------------------------------------------------------------------- delayed scaling


def test_history_margin_and_the_first_step():
    recipe = fp8.DelayedScaling(history=2, margin=1, backward="fp8_scores")
    q, k, v, dout = draw()
    assert (recipe.descale == 1.0).all()
    train_step(recipe, q, k, v, dout)
    expected = torch.tensor([x.abs().max() for x in (q, k, v, dout)])
    torch.testing.assert_close(recipe.amax, expected)
    assert (recipe.descale == 1.0).all()  # nothing changes before step()
    recipe.step()
    limits = torch.tensor([448.0, 448.0, 448.0, 57344.0])
    torch.testing.assert_close(recipe.descale, 2 * expected / limits)
    assert (recipe.amax == 0.0).all()
    train_step(recipe, q / 10, k / 10, v / 10, dout / 10)
    recipe.step()
    torch.testing.assert_close(recipe.descale, 2 * expected / limits)  # the maximum of two
    train_step(recipe, q / 10, k / 10, v / 10, dout / 10)
    recipe.step()
    torch.testing.assert_close(recipe.descale, 2 * expected / 10 / limits)  # it left the history


def test_a_refused_call_gathers_nothing():
    recipe = fp8.DelayedScaling()
    x = torch.randn(5, 2, 32)
    ends, wrong = torch.tensor([0, 2, 5]), torch.tensor([0, 5, 4])
    with pytest.raises(ValueError, match=r"^cu_seqlens_k must never decrease"):
        fp8.fp8_attention(
            x, x, x, recipe, cu_seqlens_q=ends, cu_seqlens_k=wrong, max_seqlen_q=5, max_seqlen_k=5
        )
    assert not recipe.amax.any()


def test_most_recent():
    recipe = fp8.DelayedScaling(history=4, amax_compute="most_recent")
    q, k, v, dout = draw()
    for scale in (1.0, 0.25):
        train_step(recipe, q * scale, k, v, dout)
        recipe.step()
    assert recipe.descale[0].item() == pytest.approx(0.25 * q.abs().max().item() / 448)


def test_a_delayed_scale_saturates_and_recovers():
    recipe = fp8.DelayedScaling()
    q, k, v, dout = draw()
    train_step(recipe, q, k, v, dout)
    recipe.step()
    loud = recipe.quantize("v", v * 100, None)
    assert loud.data.float().abs().max() == 448.0
    assert fp8.dequantize(loud).abs().max() < 1.01 * v.abs().max()
    recipe.step()
    assert fp8.dequantize(recipe.quantize("v", v * 100, None)).abs().max() > 90 * v.abs().max()


def test_amax_ignores_what_is_not_finite_and_follows_smoothing():
    recipe = fp8.DelayedScaling(smooth_k=True)
    _, k, _, _ = draw()
    k += 100.0
    k[0, 0, 0, 0] = float("inf")
    recipe.quantize("k", k, None)
    assert 0.0 < recipe.amax[1] < 10.0


def test_eval_mode_gathers_nothing():
    recipe = fp8.DelayedScaling(backward="fp8").eval()
    train_step(recipe, *draw())
    assert (recipe.amax == 0.0).all()


def test_a_step_between_forward_and_backward_changes_nothing():
    q, k, v, dout = draw()
    gradients = []
    for late in (False, True):
        recipe = fp8.DelayedScaling(backward="fp8")
        xs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fp8.fp8_attention(*xs, recipe)
        if late:
            recipe.step()
        out.backward(dout)
        gradients.append([x.grad for x in xs])
    assert all(map(torch.equal, *gradients))


def test_delayed_scales_are_as_good_once_warm():
    recipe, problem = fp8.DelayedScaling(backward="fp8"), draw()
    for _ in range(2):
        out, _ = train_step(recipe, *problem)
        recipe.step()
    exact = flash8.flash_attn_func(*problem[:3], causal=True)
    FP8_UNQUANTISED.check("O", rel_l2(out, exact))


@pytest.mark.parametrize("backward", ["16bit", "fp8"])
def test_state_dict_round_trip(backward):
    torch.manual_seed(1)
    recipe = fp8.DelayedScaling(history=3, backward=backward)
    for scale in (1.0, 3.0, 0.5):
        train_step(recipe, *draw(scale))
        recipe.step()
    problem = draw()
    train_step(recipe, *problem)  # state in the middle of a step
    buffer = io.BytesIO()
    torch.save(recipe.state_dict(), buffer)
    buffer.seek(0)
    other = fp8.DelayedScaling(history=3, backward=backward)
    other.load_state_dict(torch.load(buffer))
    assert set(recipe.state_dict()) == {"amax_history", "amax", "descale"}
    for _ in range(3):
        a, b = train_step(recipe, *problem), train_step(other, *problem)
        assert torch.equal(a[0], b[0]) and all(map(torch.equal, a[1], b[1]))
        recipe.step()
        other.step()
        assert all(map(torch.equal, recipe.buffers(), other.buffers()))


def test_a_recipe_is_part_of_its_model():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.recipe = fp8.DelayedScaling(history=2)

    assert "recipe.amax_history" in Layer().state_dict()
    with pytest.raises(RuntimeError, match="amax_history"):
        fp8.DelayedScaling(history=3).load_state_dict(fp8.DelayedScaling(history=2).state_dict())


def _free_port():
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _replica(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    recipe = fp8.DelayedScaling(backward="fp8", process_group=dist.group.WORLD)
    alone = fp8.DelayedScaling(backward="fp8")
    torch.manual_seed(0)
    problem = draw()
    mine = [x * (rank + 1) for x in problem[:1]] + [x / (rank + 1) for x in problem[1:]]
    for r in (recipe, alone):
        train_step(r, *mine)
        r.step()
    torch.save((recipe.descale.tolist(), alone.descale.tolist()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_replicas_share_their_scales(tmp_path):
    # Forked: two more imports of torch would take longer than everything else here.
    arguments = (_free_port(), str(tmp_path))
    mp.start_processes(_replica, arguments, nprocs=2, start_method="fork")
    shared, alone = torch.load(tmp_path / "0.pt")
    other_shared, other_alone = torch.load(tmp_path / "1.pt")
    assert shared == other_shared and alone != other_alone
    assert shared == [max(pair) for pair in zip(alone, other_alone, strict=True)]


# ------------------------------------------------------------------------------------ refusals

REFUSED = [
    (fp8.CurrentScaling, dict(granularity="block"), ValueError, "granularity.*BlockScaling.*block"),
    (fp8.CurrentScaling, dict(granularity="token"), ValueError, "granularity.*'token'"),
    (fp8.CurrentScaling, dict(backward="unquantized"), ValueError, "rows of P no longer sum to 1"),
    (fp8.BlockScaling, dict(backward="8bit"), ValueError, "backward must be one of.*'8bit'"),
    (fp8.BlockScaling, dict(hadamard=-2), ValueError, "hadamard.*-2"),
    (fp8.BlockScaling, dict(hadamard="on"), TypeError, "hadamard.*'on'"),
    (fp8.BlockScaling, dict(smooth_k=1), TypeError, "smooth_k must be a bool"),
    (fp8.BlockScaling, dict(gradient_dtype=torch.float16), TypeError, "gradient_dtype.*float16"),
    (fp8.DelayedScaling, dict(gradient_dtype=E4M3), ValueError, "gradient_dtype.*e5m2.*range"),
    (fp8.DelayedScaling, dict(history=0), ValueError, "history.*at least 1.*0"),
    (fp8.DelayedScaling, dict(margin=-1), ValueError, "margin.*-1"),
    (fp8.DelayedScaling, dict(amax_compute="mean"), ValueError, "amax_compute.*'mean'"),
    (fp8.DelayedScaling, dict(backward="original"), ValueError, "rows of P"),
]


@pytest.mark.parametrize(("recipe", "options", "error", "message"), REFUSED)
def test_what_recipes_refuse(recipe, options, error, message):
    with pytest.raises(error, match=message):
        recipe(**options)


def test_gradients_are_e5m2_under_delayed_scaling_and_e4m3_otherwise():
    assert fp8.DelayedScaling().gradient_dtype == E5M2
    assert fp8.CurrentScaling().gradient_dtype == fp8.BlockScaling().gradient_dtype == E4M3
