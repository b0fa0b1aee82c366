"""The conditional denoiser Φ: MONAI's 3D diffusion U-Net with the condition concatenated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from sgcd_core.config import SgcdConfig
from sgcd_core.diffusion.look_filter import LookFilter
from sgcd_core.diffusion.monai_import import diffusion_unet
from sgcd_core.diffusion.schedule import Schedule
from sgcd_core.style.look import DETAIL_SIZE, LEVELS, details


def condition_channels(config: SgcdConfig) -> int:
    """How many channels the condition has."""
    return int(config.condition.gradient_channel) + int(config.condition.content_channel)


class LookEmbedding(nn.Module):
    """Class embedding of the U-Net: the sequence, the look that is wanted, and of the scan what
    matching leaves as it is.

    Args:
        sequences: How many.
        size: Length of the embedding.
        reads_look: False takes every look for the same, so that the sequence alone counts.
    """

    #: Every so many-th of the look's quantiles is read.
    STRIDE = 8
    #: Quantiles read of a look.
    COUNT = len(LEVELS[::STRIDE])

    def __init__(self, sequences: int, size: int, reads_look: bool = True) -> None:
        super().__init__()
        self.reads_look = reads_look
        self.sequence = nn.Embedding(sequences, size)
        last = nn.Linear(128, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.look = nn.Sequential(nn.Linear(self.COUNT + 2 * DETAIL_SIZE, 128), nn.SiLU(), last)
        # what details are like, so that the network sees how one differs; fitted with the box
        self.detail_mean: Tensor
        self.detail_std: Tensor
        self.register_buffer("detail_mean", torch.zeros(DETAIL_SIZE))
        self.register_buffer("detail_std", torch.ones(DETAIL_SIZE))

    def forward(self, labels: Tensor) -> Tensor:
        """(B, size) of labels as `labels_of` makes them."""
        embedded: Tensor = self.sequence(labels[:, 0].long())
        looked: Tensor = self.look(self.looks(labels))
        return embedded + looked

    def looks(self, labels: Tensor) -> Tensor:
        """What is known of the two looks, each number of the size of 1: (B, COUNT + details)."""
        if not self.reads_look:
            labels = torch.zeros_like(labels)
        quantiles, found = labels[:, 1 : 1 + self.COUNT], labels[:, 1 + self.COUNT : -1]
        known = (found.reshape(-1, 2, DETAIL_SIZE) - self.detail_mean) / self.detail_std
        return torch.cat([quantiles, known.clamp(-4, 4).flatten(1)], 1)

    def features(self, labels: Tensor) -> Tensor:
        """The same and which sequence it is, (B, sequences + COUNT + details)."""
        one = nn.functional.one_hot(labels[:, 0].long(), self.sequence.num_embeddings)
        return torch.cat([one.to(labels.dtype), self.looks(labels)], 1)

    @classmethod
    def labels_of(
        cls, sequence: Tensor, look: Tensor, source: Tensor, strength: Tensor | None = None
    ) -> Tensor:
        """Sequence (B,), look wanted and look of the scan (B, LOOK_SIZE), and how much of the look
        filter is wanted (B,), all of it unless told, as one float32 tensor.
        """
        quantiles = 2 * look[:, : len(LEVELS) : cls.STRIDE] - 1
        strength = torch.ones(len(look)) if strength is None else strength
        parts = [quantiles, details(look), details(source), strength[:, None]]
        return torch.cat([sequence[:, None].float(), *(p.to(sequence.device) for p in parts)], 1)


#: A filter's weights are of the size of 0.1: they start at 0, and Adam takes small steps.
FILTER_GAIN = 3.0


class CellNetwork(nn.Module):
    """MONAI's U-Net on a grid of cells of patch³ voxels, every voxel of a cell a channel.

    A convolution at full resolution with few channels is what costs most on a CPU. The output of a
    cell is the detail of its voxels and, each interpolated between cells:

    - with `knots`, a curve over intensity, read at each voxel's content (a bilateral grid; Chen
      2007, ACM TOG 26:103; Gharbi 2017, ACM TOG 36:118): tissues of one place are moved apart from
      each other without touching the detail in them;
    - with `radius`, a filter that acts on the content around each voxel (kernel prediction; Bako
      2017, ACM TOG 36:97): noise is averaged along edges and blur is undone across them, which
      few channels learn far sooner than to carry every voxel's detail through the network.

    With a `look_filter` the content is first brought to the resolution of the look that is wanted;
    all of the above is of that content.

    Args:
        network: U-Net with patch³ times the input's channels.
        patch: Voxels along each side of a cell.
        knots: Of the curve; 0 for none.
        radius: Half-width of the filter, voxels; 0 for none.
        content_index: Channel of the input that holds the content, in [-1, 1].
        look_filter: Or None.
    """

    def __init__(
        self, network: nn.Module, patch: int, knots: int, radius: int, content_index: int,
        look_filter: LookFilter | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.patch, self.knots, self.radius = network, patch, knots, radius
        self.content_index = content_index
        self.look_filter = look_filter

    @property
    def embedding(self) -> LookEmbedding:
        """What reads the labels."""
        found = self.network.class_embedding
        assert isinstance(found, LookEmbedding)
        return found

    @torch.no_grad()
    def silence(self) -> None:
        """Let the U-Net add nothing: its output layer becomes 0, as in a fresh network."""
        for values in self.get_submodule("network.out.2").parameters():
            values.zero_()

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) of (B, C, X, Y, Z)."""
        if self.look_filter is None:
            return self._corrected(x, timesteps, class_labels)
        at = self.content_index
        given = x[:, at, None].float()
        content: Tensor = self.look_filter(given, self.embedding.features(class_labels))
        content = torch.lerp(given, content, class_labels[:, -1].view(-1, 1, 1, 1, 1).float())
        x = torch.cat([x[:, :at], content.to(x.dtype), x[:, at + 1 :]], 1)
        return self._corrected(x, timesteps, class_labels) + (content - given)

    def _corrected(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        cells = to_cells(x, self.patch).contiguous(memory_format=torch.channels_last_3d)
        out = self.network(cells, timesteps, class_labels=class_labels).float()
        taps = filter_taps(self.radius)
        voxels = from_cells(out[:, self.knots + taps :], self.patch)
        if not self.knots and not taps:
            return voxels
        content = x[:, self.content_index, None].float()
        # a channel at a time: all of them at full resolution are more than a cache holds
        coarse = out[:, : self.knots + taps].contiguous(memory_format=torch.contiguous_format)
        smooth = map(self._upsampled, coarse.split(1, 1))
        at = (content + 1) / 2 * (self.knots - 1)
        for knot, value in zip(range(self.knots), smooth, strict=False):
            voxels = torch.addcmul(voxels, (1 - (at - knot).abs()).clamp_(min=0), value)
        if taps:
            voxels = voxels + FILTER_GAIN * filtered(content, smooth, self.radius)
        return voxels

    def _upsampled(self, x: Tensor) -> Tensor:
        if self.patch == 1:
            return x
        return nn.functional.interpolate(
            x, scale_factor=self.patch, mode="trilinear", align_corners=False
        )


def filter_taps(radius: int) -> int:
    """Weights of a filter: all voxels of its cube but the middle one."""
    return int((2 * radius + 1) ** 3 - 1)


def filtered(content: Tensor, weights: Iterable[Tensor], radius: int) -> Tensor:
    """What a filter of each voxel changes: Σ w_k (content at k - content), (B, 1, X, Y, Z).

    Written with differences, a filter leaves flat tissue as it is whatever its weights. Neighbours
    outside the brain (content -1) count for nothing.

    Args:
        content: (B, 1, X, Y, Z) in [-1, 1].
        weights: (B, 1, X, Y, Z) for each tap, in the order of offsets with x slowest.
        radius: Half-width of the cube.
    """
    around = nn.functional.pad(content, [radius] * 6, value=-1.0)
    x, y, z = content.shape[2:]
    span = range(2 * radius + 1)
    offsets = [(i, j, k) for i in span for j in span for k in span
               if (i, j, k) != (radius, radius, radius)]  # fmt: skip
    total = torch.zeros_like(content)
    for (i, j, k), weight in zip(offsets, weights, strict=True):
        other = around[:, :, i : i + x, j : j + y, k : k + z]
        step = torch.where(other > -1, other - content, 0)
        total = torch.addcmul(total, weight, step)
    return total


def to_cells(x: Tensor, patch: int) -> Tensor:
    """(B, C, X, Y, Z) → (B, C·p³, X/p, Y/p, Z/p)."""
    b, c, *sides = x.shape
    i, j, k = (side // patch for side in sides)
    x = x.reshape(b, c, i, patch, j, patch, k, patch).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, c * patch**3, i, j, k)


def from_cells(x: Tensor, patch: int) -> Tensor:
    """Inverse of `to_cells`."""
    b, c, i, j, k = x.shape
    x = x.reshape(b, c // patch**3, patch, patch, patch, i, j, k).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // patch**3, i * patch, j * patch, k * patch)


def build_network(config: SgcdConfig) -> CellNetwork:
    """The U-Net of the settings, with fresh weights, channels-last.

    Input (B, 1 + C, X, Y, Z): noisy image, then the C condition channels, the content last; output
    (B, 1, X, Y, Z). Sequence and look enter as the class embedding.
    """
    net = config.network
    inputs, cell = 1 + condition_channels(config), net.patch**3
    network = diffusion_unet()(
        spatial_dims=3,
        in_channels=inputs * cell,
        out_channels=cell + net.curve_knots + filter_taps(net.filter_radius),
        num_res_blocks=net.res_blocks,
        channels=net.channels,
        attention_levels=net.attention_levels,
        num_head_channels=net.head_channels,
        norm_num_groups=net.norm_groups,
        num_class_embeds=len(config.sequences),
        use_flash_attention=True,
    )
    size = network.class_embedding.weight.shape[1]
    network.class_embedding = LookEmbedding(
        len(config.sequences), int(size), config.condition.look_label
    )
    if net.prediction == "residual":
        # x_t says nothing at the noisy end: the network need not first learn to ignore it
        with torch.no_grad():
            network.conv_in.conv.weight[:, :cell] = 0
    network = network.to(memory_format=torch.channels_last_3d)
    look_filter = None
    if net.look_filter_radius and net.prediction == "residual":
        inputs_of_it = len(config.sequences) + LookEmbedding.COUNT + 2 * DETAIL_SIZE
        look_filter = LookFilter(inputs_of_it, net.look_filter_radius)
    return CellNetwork(
        network, net.patch, net.curve_knots, net.filter_radius, inputs - 1, look_filter
    )


@contextlib.contextmanager
def precision(name: str, device: torch.device | str) -> Iterator[None]:
    """Run the network in bfloat16 (`bf16`), float32 (`fp32`), or what suits the device (`auto`)."""
    kind = torch.device(device).type
    half = name == "bf16" or (name == "auto" and fast_bfloat16(kind))
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=half):
        yield


@cache
def fast_bfloat16(kind: str) -> bool:
    """Whether bfloat16 is faster than float32 on a device of this kind (`cpu`, `cuda`).

    A processor without AVX-512 emulates it: a step of preset `tiny` took 35 s instead of 1.4 s.
    """
    if kind == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return kind == "cuda" and torch.cuda.is_bf16_supported()


class ConditionalDenoiser:
    """A network, its schedule and one condition: a function `(x_t, t) -> (x̂0, ε̂)`.

    Args:
        network: The U-Net (or a DDP wrapper).
        schedule: Noise schedule.
        config: Settings; the prediction kind is read from them.
        condition: (B, C, X, Y, Z) float32 in [-1, 1].
        content: (B, 1, X, Y, Z) in [-1, 1], the base of prediction `residual`, or None.
        labels: Sequence and look, from `LookEmbedding.labels_of`.
        precision_name: `bf16` or `fp32`.
        clip: Clip x̂0 to [-1, 1] and recompute ε̂ from it; for sampling, not for training losses.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        config: SgcdConfig,
        condition: Tensor,
        content: Tensor | None,
        labels: Tensor,
        precision_name: str = "fp32",
        clip: bool = False,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.prediction = config.network.prediction
        self.condition = condition
        self.content = content
        self.labels = labels
        self.precision_name = precision_name
        self.clip = clip

    def output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Raw network output (B, 1, X, Y, Z) float32."""
        x = torch.cat([x_t, self.condition], dim=1)
        with precision(self.precision_name, x.device):
            out = self.network(x, t, class_labels=self.labels)
        return out.float()  # type: ignore[no-any-return]

    def __call__(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates (x̂0, ε̂) at `t`."""
        return self.split(self.output(x_t, t), x_t, t)

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂0, ε̂) that `output` stands for."""
        x0, eps = self.schedule.clean_and_noise(self.prediction, output, x_t, t, self.content)
        if self.clip:
            x0 = x0.clamp(-1, 1)
            bar = self.schedule.alpha_bar(t)
            eps = (x_t - bar.sqrt() * x0) / (1 - bar).sqrt()
        return x0, eps
