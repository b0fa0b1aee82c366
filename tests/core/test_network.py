"""The network around the U-Net: filters, labels, precision."""

import itertools
import subprocess
import sys

import pytest
import torch

from sgcd_core.config import load_config
from sgcd_core.diffusion.network import (
    LookEmbedding,
    build_network,
    fast_bfloat16,
    filter_taps,
    filtered,
    precision,
)
from sgcd_core.style.look import DETAIL_SIZE, LOOK_SIZE
from sgcd_core.style.rim import RIM_SIZE

SIDE = 8


def content(seed=0):
    return torch.rand((1, 1, SIDE, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)) - 0.5


def weights(**offsets):
    """Filter weights that are 0 but for offsets named like `x1y0z0`, everywhere alike."""
    names = [
        f"x{i}y{j}z{k}"
        for i, j, k in itertools.product((-1, 0, 1), repeat=3)
        if (i, j, k) != (0, 0, 0)
    ]
    row = torch.tensor([offsets.get(name, 0.0) for name in names])
    return row.view(1, -1, 1, 1, 1).expand(1, len(names), SIDE, SIDE, SIDE).split(1, 1)


def test_a_filter_reads_the_neighbour_its_weight_stands_for():
    x = content()
    moved = x + filtered(x, weights(x1y0z0=1.0), 1)
    torch.testing.assert_close(moved[:, :, :-1], x[:, :, 1:])
    halfway = x + filtered(x, weights(**{"x0y0z-1": 0.5}), 1)
    torch.testing.assert_close(halfway[..., 1:], (x[..., 1:] + x[..., :-1]) / 2)


def test_a_filter_leaves_flat_tissue_and_the_brain_s_edge_alone():
    x = torch.full((1, 1, SIDE, SIDE, SIDE), 0.3)
    x[:, :, :3] = -1  # not brain
    w = torch.randn(
        (1, filter_taps(1), SIDE, SIDE, SIDE), generator=torch.Generator().manual_seed(1)
    )
    assert filtered(x, w.split(1, 1), 1)[:, :, 3:].abs().max() == 0


def test_a_fresh_network_s_filter_is_none_and_each_weight_has_a_gradient():
    config = load_config("tiny", settings=["prepare.shape=[16, 16, 16]"])
    network = build_network(config)
    x = 2 * torch.rand((1, 3, 16, 16, 16), generator=torch.Generator().manual_seed(2)) - 1
    labels = LookEmbedding.labels_of(torch.tensor([0]), *torch.zeros(2, 1, LOOK_SIZE))
    out = network(x, torch.tensor([999]), labels)
    assert out.abs().max() == 0
    (out * torch.rand_like(out)).sum().backward()
    last = network.network.out[2].conv.bias.grad
    assert (last.abs() > 0).all()


@pytest.mark.parametrize("part", [slice(-RIM_SIZE, None), slice(-DETAIL_SIZE, -RIM_SIZE)])
@pytest.mark.parametrize("which", ["wanted", "scan"])
def test_labels_hold_texture_and_rim_of_the_look_wanted_and_of_the_scan(which, part):
    embedding = LookEmbedding(2, 16)
    torch.nn.init.normal_(embedding.look[-1].weight)
    look, source = torch.zeros(2, 1, LOOK_SIZE)
    before = embedding(LookEmbedding.labels_of(torch.tensor([1]), look, source))
    (look if which == "wanted" else source)[:, part] = 1.0
    after = embedding(LookEmbedding.labels_of(torch.tensor([1]), look, source))
    assert (before - after).abs().max() > 0.01


def test_bfloat16_is_used_where_it_was_asked_for_or_is_fast():
    a = torch.ones(4, 4)
    kinds = {}
    for name in ("fp32", "bf16", "auto"):
        with precision(name, "cpu"):
            kinds[name] = (a @ a).dtype
    assert kinds["fp32"] == torch.float32
    assert kinds["bf16"] == torch.bfloat16
    assert kinds["auto"] == (torch.bfloat16 if fast_bfloat16("cpu") else torch.float32)


def test_the_network_is_built_without_what_monai_merely_may_use():
    code = """
import sys
from sgcd_core.config import load_config
from sgcd_core.diffusion.network import build_network
build_network(load_config("tiny"))
print(*sorted({"mlflow", "torchvision", "pandas", "torch._dynamo"} & set(sys.modules)))
import pandas, mlflow  # hidden from MONAI alone
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
