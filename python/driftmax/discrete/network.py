"""RADD: a bidirectional transformer from partly masked tokens to the laws of the clean ones, without time.

The architecture of Ou et al., "Your Absorbing Discrete Diffusion Secretly Models the Conditional
Distributions of Clean Data" (2024), written anew; parameters carry the published names, so that published
weights load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from driftmax.discrete._files import atomic

__all__ = ["RADD", "Head", "RADDConfig"]

ROTARY_BASE = 10_000.0
_FORMAT = "driftmax-radd-1"


@dataclass(frozen=True)
class RADDConfig:
    """Size of a `RADD` network.

    Parameters
    ----------
    vocab_size : int
        Number of real tokens V. The mask is one more input token, id V.
    hidden_size : int
        Width D.
    blocks : int
        Transformer blocks.
    heads : int
        Attention heads; D / heads must be even, for the rotary embedding.
    mlp_ratio : int, default 4
        Width of the hidden layer of each MLP in units of D.
    dropout : float, default 0.0
        Dropout after attention and after the MLP, while training.
    length : int, default 1024
        Sequence length of training. Longer sequences run, but nothing was learned about their positions.

    Raises
    ------
    ValueError
        On sizes that fit no network.

    Examples
    --------
    >>> from driftmax.discrete.network import RADDConfig
    >>> RADDConfig.small().mask_id
    50257
    """

    vocab_size: int
    hidden_size: int
    blocks: int
    heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    length: int = 1024

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "blocks", "heads", "mlp_ratio", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size / heads must be an even number, not {self.hidden_size} / {self.heads}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def mask_id(self) -> int:
        """Id of the mask: the one behind the last real token."""
        return self.vocab_size

    @classmethod
    def small(cls) -> RADDConfig:
        """RADD-small as published: 12 blocks of width 768, GPT-2's vocabulary, 1024 tokens (162 M).

        Examples
        --------
        >>> from driftmax.discrete.network import RADDConfig
        >>> RADDConfig.small().blocks
        12
        """
        return cls(50257, 768, 12, 12, dropout=0.02)

    @classmethod
    def medium(cls) -> RADDConfig:
        """RADD-medium as published: 24 blocks of width 1024, GPT-2's vocabulary, 1024 tokens (405 M).

        Examples
        --------
        >>> from driftmax.discrete.network import RADDConfig
        >>> RADDConfig.medium().heads
        16
        """
        return cls(50257, 1024, 24, 16, dropout=0.02)


class Head(NamedTuple):
    """The output layer: ``logits = features @ weight.T + bias``.

    Attributes
    ----------
    weight : Tensor
        ``[V, D]``.
    bias : Tensor or None
        ``[V]``.
    """

    weight: Tensor
    bias: Tensor | None


class _Embedding(nn.Module):
    """Token embedding; a module of its own so that the parameter is called ``vocab_embed.embedding``."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(tokens, width))
        bound = 1.0 / math.sqrt(width)
        nn.init.uniform_(self.embedding, -bound, bound)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.embedding)


def _rotary(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, width]`` of positions times frequencies, each frequency twice (halves)."""
    inverse = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (x_j, x_{j + w/2}) of the last dimension by their position's angles."""
    low, high = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-high, low), dim=-1) * sines


class _Block(nn.Module):
    """Pre-norm attention and MLP with residuals; no biases in the attention's projections."""

    def __init__(self, config: RADDConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.mlp_ratio * config.hidden_size
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1 = nn.LayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)
        )

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.attn_qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        cosines, sines = cosines.to(qkv.dtype), sines.to(qkv.dtype)
        query, key = _rotate(query, cosines, sines), _rotate(key, cosines, sines)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self._drop(self.attn_out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self._drop(self.mlp(self.norm2(x)))


class _Output(nn.Module):
    """Last norm and the output layer, which starts at zero: an untrained network predicts the uniform law."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width)
        self.linear = nn.Linear(width, tokens)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class RADD(nn.Module):
    """Time-independent denoiser: from partly masked tokens to logits of every position's clean token.

    Parameters
    ----------
    config : RADDConfig
        Sizes. Weights start as in the official code, from torch's default generator; the output layer at 0.

    Attributes
    ----------
    time_independent : bool
        True: samplers may cache the output and give every row a clock of its own.
    head : Head
        Weight ``[V, D]`` and bias ``[V]`` of the output layer, views of the parameters.

    Notes
    -----
    What the output means. ``softmax(logits[b, i])`` is the law of token i given the tokens that are not
    masked, p(x_i | x^UM), at every masked position; at others the output has no meaning. There is no factor
    of time: the concrete score is that law times e^{-σ̄(t)} / (1 - e^{-σ̄(t)}) (Ou et al. 2024, Theorem 1).
    The official network returns V + 1 columns, of which ``forward`` turns the first V into log-probabilities
    and leaves the last, the mask's, as it is (never trained and never drawn). Here the parameters keep all V
    + 1 rows, but the mask's column is not computed.

    Layout of the state dict, which is the published one (D = hidden_size, M = mlp_ratio * D, b = 0, 1, ...)::

        vocab_embed.embedding         [V + 1, D]   the last row is the mask
        blocks.b.norm1.weight, .bias  [D]
        blocks.b.attn_qkv.weight      [3 D, D]     rows: queries, keys, values; within each: head by head
        blocks.b.attn_out.weight      [D, D]
        blocks.b.norm2.weight, .bias  [D]
        blocks.b.mlp.0.weight, .bias  [M, D], [M]  then GELU (tanh form)
        blocks.b.mlp.2.weight, .bias  [D, M], [D]
        output_layer.norm_final.weight, .bias  [D]
        output_layer.linear.weight, .bias      [V + 1, D], [V + 1]

    and, in official files only, the constant ``rotary_emb.inv_freq`` [D / heads / 2]. The rotary embedding
    turns the two halves of each head's queries and keys (pairs j and j + w/2) with base 10000.

    Cost: one call takes about 2 B L P floating-point operations, P the number of parameters outside the
    embedding, and 4 B L² D for each block's attention (torch's scaled_dot_product_attention). bfloat16 works
    by ``net.to(torch.bfloat16)`` and by autocast.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.network import RADD, RADDConfig
    >>> net = RADD(RADDConfig(vocab_size=10, hidden_size=8, blocks=1, heads=2))
    >>> tokens = torch.full((2, 5), net.config.mask_id)
    >>> net(tokens).shape
    torch.Size([2, 5, 10])
    """

    time_independent = True

    def __init__(self, config: RADDConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed = _Embedding(config.vocab_size + 1, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.output_layer = _Output(config.hidden_size, config.vocab_size + 1)
        self._angles: tuple[Tensor, Tensor] | None = None

    @property
    def head(self) -> Head:
        """The output layer without the mask's row."""
        tokens, linear = self.config.vocab_size, self.output_layer.linear
        return Head(linear.weight[:tokens], linear.bias[:tokens])

    def features(self, tokens: Tensor) -> Tensor:
        """Normalised features ``[B, L, D]`` that the head turns into logits.

        Parameters
        ----------
        tokens : Tensor
            int64 ``[B, L]``, ids in [0, V], V the mask.

        Raises
        ------
        ValueError
            If `tokens` is not of that shape and dtype. Ids out of range fail in torch's embedding.

        Examples
        --------
        >>> import torch
        >>> from driftmax.discrete.network import RADD, RADDConfig
        >>> net = RADD(RADDConfig(vocab_size=10, hidden_size=8, blocks=1, heads=2))
        >>> tokens = torch.full((2, 5), net.config.mask_id)
        >>> weight, bias = net.head
        >>> bool(torch.equal(net.features(tokens) @ weight.T + bias, net(tokens)))
        True
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens must be int64 [B, L], not {tokens.dtype} {list(tokens.shape)}")
        x = self.vocab_embed(tokens)
        cosines, sines = self._turns(tokens.shape[1], x.device)
        for block in self.blocks:
            x = block(x, cosines, sines)
        features: Tensor = self.output_layer.norm_final(x)
        return features

    def forward(self, tokens: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Logits ``[B, L, V]`` of the clean token at every position; `t` is accepted and plays no role."""
        return functional.linear(self.features(tokens), *self.head)

    def _turns(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotary tables, made once per length and device."""
        angles = self._angles
        if angles is None or angles[0].shape[0] != length or angles[0].device != device:
            angles = _rotary(length, self.config.hidden_size // self.config.heads, device)
            self._angles = angles
        return angles

    def load_official(self, state: Mapping[str, Any], *, ema: bool = True) -> None:
        """Load weights of the official code, strictly: every name and shape of the layout, and nothing else.

        Parameters
        ----------
        state : mapping
            Either the network's state dict (as in the published files), or a whole training checkpoint of the
            official code: ``{"model": state dict, "ema": {"shadow_params": [...], ...}, ...}``, whose
            averages come as a bare list in the order of the parameters.
        ema : bool, default True
            Of a checkpoint take the averaged weights, as the official loader does; False takes the raw ones.
            A plain state dict holds one set, whichever was saved.

        Raises
        ------
        ValueError
            Naming what is missing, unexpected or of the wrong shape, or a rotary base that is not 10000. The
            network keeps the weights it had.

        Examples
        --------
        >>> import torch
        >>> from driftmax.discrete.network import RADD, RADDConfig
        >>> config = RADDConfig(vocab_size=10, hidden_size=8, blocks=1, heads=2)
        >>> state = {**RADD(config).state_dict(), "rotary_emb.inv_freq": torch.tensor([1.0, 0.01])}
        >>> RADD(config).load_official(state)
        """
        if isinstance(state.get("model"), Mapping):
            state = _averages(state, self) if ema else state["model"]
        frequencies = "rotary_emb.inv_freq"
        width = self.config.hidden_size // self.config.heads
        shapes = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        _check(state, {**shapes, frequencies: (width // 2,)})
        wanted = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        if not torch.allclose(state[frequencies].double().cpu(), wanted, rtol=1e-2):
            raise ValueError(f"{frequencies} is not that of base {ROTARY_BASE:.0f}")
        self.load_state_dict({name: state[name] for name in shapes})

    def save(
        self, path: str | Path, *, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write weights and configuration as safetensors; an old file is only ever replaced by a whole one.

        Parameters
        ----------
        path : str or Path
            Where to.
        dtype : torch.dtype, optional
            Store the weights as this type, for instance torch.float16; by default as they are.
        metadata : mapping of str, optional
            Notes to keep in the file's header.

        Examples
        --------
        >>> import tempfile, pathlib
        >>> from driftmax.discrete.network import RADD, RADDConfig
        >>> net = RADD(RADDConfig(vocab_size=10, hidden_size=8, blocks=1, heads=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     net.save(pathlib.Path(folder) / "net.safetensors")
        ...     RADD.load(pathlib.Path(folder) / "net.safetensors").config == net.config
        True
        """
        tensors = {
            name: value.detach().to("cpu", dtype).contiguous() for name, value in self.state_dict().items()
        }
        header = {**(metadata or {}), "format": _FORMAT, "config": json.dumps(asdict(self.config))}
        with atomic(Path(path)) as partial:
            save_file(tensors, partial, header)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> RADD:
        """Read a file that `save` wrote; the network is in evaluation mode.

        Parameters
        ----------
        path : str or Path
            The safetensors file.
        device : torch.device or str, default "cpu"
            Where the network goes.
        dtype : torch.dtype, default torch.float32
            Type of its parameters.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it was not written by `save`, or is damaged.

        Examples
        --------
        >>> from driftmax.discrete.network import RADD
        >>> RADD.load("nowhere.safetensors")
        Traceback (most recent call last):
            ...
        FileNotFoundError: nowhere.safetensors
        """
        if not Path(path).is_file():
            raise FileNotFoundError(str(path))
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        if header.get("format") != _FORMAT:
            raise ValueError(f"{path} was not written by RADD.save")
        net = cls(RADDConfig(**json.loads(header["config"])))
        _check(tensors, {name: tuple(value.shape) for name, value in net.state_dict().items()})
        net.load_state_dict(tensors)
        return net.to(device, dtype).eval()


def _averages(checkpoint: Mapping[str, Any], net: RADD) -> dict[str, Tensor]:
    """State dict of a checkpoint's averaged weights, which it keeps as a list in the order of parameters."""
    names = [name for name, _ in net.named_parameters()]
    shadows: Sequence[Tensor] = checkpoint.get("ema", {}).get("shadow_params", ())
    if len(shadows) != len(names):
        raise ValueError(f"the checkpoint holds {len(shadows)} averaged tensors, the network {len(names)}")
    return {**checkpoint["model"], **dict(zip(names, shadows, strict=True))}


def _check(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless `state` holds tensors of exactly these names and shapes."""
    faults = [f"missing {name}" for name in shapes if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in shapes]
    faults += [
        f"{name} is {list(state[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError("state dict of another layout: " + "; ".join(faults[:8]) + more)
