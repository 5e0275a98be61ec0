"""What a decoder is, without saying how it is computed: the description that every family's config reduces to."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021): pair i of a head is turned by position * frequencies[i].

    A head of more than twice as many dimensions is turned in its first ones only.
    """

    frequencies: tuple[float, ...]  # radians per position
    scale: float = 1.0  # of cosine and sine (YaRN, LongRoPE: Hugging Face's attention_factor)
    # LongRoPE: sequences of more than `long_after` positions use `long_frequencies`.
    long_frequencies: tuple[float, ...] | None = None
    long_after: int | None = None
    # M-RoPE (Wang et al. 2024, arXiv 2409.12191, section 2.1): how many pairs, one after the other, are turned by a
    # token's temporal, its vertical and its horizontal position; (): it has one, by which all are.
    sections: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture in the place of each layer's MLP: every token goes to the `per_token` experts the router likes best."""

    count: int
    per_token: int
    normalize: bool  # whether the chosen experts' weights are made to sum to 1
    score: str = "softmax"  # of all experts; "sigmoid", of each alone; or "sparsemixer" (routing.py), of two per token
    slack: float = 0.0  # of "sparsemixer": half of how far below the best, in parts of it, an expert still counts
    correction: bool = False  # a number per expert, without a gradient, added to the scores where experts are chosen
    correction_row: bool = False  # which is a matrix of one row
    groups: tuple[int, int] | None = None  # (n, m): experts are chosen of the best m of n groups alone
    group_score: str = "top2"  # a group is as good as its two best experts together; or "max", as its best
    scale: float = 1.0  # of the chosen experts' weights
    bias: bool = False  # of the router and of the experts
    shared: int | None = None  # intermediate size of an MLP beside them that every token goes through
    gate: str | None = None  # as DecoderSpec.gate, where the experts' kernels are laid out unlike those of other MLPs
    weigh_input: bool = False  # what goes into an expert is multiplied by the token's weight, not what comes out
    shared_gate: bool = False  # what it gives is multiplied by the sigmoid of a score of the token
    beside: bool = False  # that MLP and the experts have norms of their own, the router others (Gemma 4, beside.py)


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A second embedding of tokens, of a part for each layer, that is added after the MLP (Gemma 3n and 4)."""

    rows: int  # tokens that it has; a later one gets the part of token 0
    width: int  # of a layer's part


@dataclasses.dataclass(frozen=True)
class AltUp:
    """A residual stream of several of the model's width, of which a layer computes one (altup.py; Gemma 3n)."""

    streams: int
    active: int  # which of them layers compute
    scaled: bool  # whether what per-layer embeddings are added to is scaled before


@dataclasses.dataclass(frozen=True)
class Delta:
    """The gated delta rule (delta.py) in the place of attention; `value_heads` is a multiple of `key_heads`."""

    key_heads: int
    value_heads: int
    key_dim: int  # of a head
    value_dim: int
    taps: int  # tokens that the convolution before it sees
    fused: bool  # one kernel for queries, keys, values and gate, one for rates and decays; else four

    @property
    def channels(self) -> int:
        """Of queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def memory(self) -> tuple[int, int, int]:
        """The shape of a row's: of each head a matrix."""
        return self.value_heads, self.key_dim, self.value_dim


@dataclasses.dataclass(frozen=True)
class Mamba:
    """Mamba-2 (mamba.py) in the place of attention or beside it; `heads` is a multiple of `groups`."""

    heads: int
    head_dim: int
    state_dim: int  # numbers that each dimension of a head is kept in
    groups: int  # whose heads write and read alike, and have a norm together
    taps: int  # tokens that the convolution before it sees
    limits: tuple[float, float]  # of a token's step
    bias: bool  # of its first projection
    out_bias: bool  # and its last
    conv_bias: bool  # of its filters
    norm: str | None = "gated"  # a norm of what comes out, times the gate; "first": before that; or None
    beside: bool = False  # attention has the same input, and what both give is added

    @property
    def channels(self) -> int:
        """That go through the convolution: values, and what writes and reads them."""
        return self.heads * self.head_dim + 2 * self.groups * self.state_dim

    @property
    def memory(self) -> tuple[int, int, int]:
        """As of Delta."""
        return self.heads, self.state_dim, self.head_dim


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Fixed factors inside layers, with which settings found for a narrow model are those of a wide one (Yang et al.
    2022, arXiv 2203.03466; Falcon-H1).
    """

    attention_in: float = 1.0  # of what goes into attention
    attention_out: float = 1.0  # and comes out of it
    mamba_in: float = 1.0
    mamba_out: float = 1.0
    mamba: tuple[float, ...] = ()  # of what its first projection gives: the gate, x, b, c, steps
    gate: float = 1.0  # of an MLP's gate, before its activation
    down: float = 1.0  # of what comes out of the MLP


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A gated short convolution (delta.py) in the place of attention."""

    taps: int  # tokens that it sees
    bias: bool  # of its filters and of its projections


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1): the keys and values of all heads
    are made of one short vector per token, and queries may be.

    A head's queries and keys have `turned` dimensions that RoPE turns, after those that it leaves; a token's turned key
    is one for all heads.
    """

    kv_rank: int  # of the vector
    turned: int  # the others of the spec's head_dim are not
    value_dim: int  # of a head's values
    q_rank: int | None = None  # of the vector that queries are made of; None: of the hidden state itself


@dataclasses.dataclass(frozen=True)
class Vision:
    """What makes embeddings of images (tower.py): layers over patches, and a projector to the decoder's width.

    The patches of one image see each other. `merge` x `merge` neighbors become one token.
    """

    family: str  # the `model_type` of the whole model, e.g. "gemma3"
    image_token: int  # the id in whose place the embeddings stand
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch: int  # pixels a side
    merge: int
    hidden_act: str  # one of layers.ACTIVATIONS
    norm: str  # one of layers.NORMS
    norm_eps: float
    mean: tuple[float, ...]  # of each color, between 0 and 1; what goes in is (value / 255 - mean) / std
    std: tuple[float, ...]
    grid: int | None = None  # patches a side of every image, with an embedding of each place; None: images of any size
    rope_theta: float | None = None  # rows turn the first half of a head's pairs, and columns the others, by this base
    window: int | None = None  # layers but `full_layers` see windows of so many patches a side, from an image's corner
    full_layers: tuple[int, ...] = ()
    frames: int = 1  # what takes a patch in takes so many frames of it, here always the same one
    patch_bias: bool = False
    fused_qkv: bool = False  # one kernel for queries, keys and values, in this order
    gated: bool = False  # the MLPs
    # What follows the layers: "mean", a norm, the mean of the patches of a token, another norm and one product; or
    # "mlp", a norm, and an MLP of all patches of a token.
    projector: str = "mlp"
    two_way: bool = False  # in the decoder the tokens of an image see each other whichever comes first

    @property
    def tokens(self) -> int | None:
        """Of an image, where all have the same number."""
        return None if self.grid is None else (self.grid // self.merge) ** 2


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of layer in a decoder of unlike layers, as `DecoderSpec.layer_kinds` lists them.

    A kind is whatever makes parameters of other names or shapes, or another program: layers of one kind can be stacked
    and scanned. Numbers that a scan can carry (windows, ropes, scales) make no kind; they are tuples by layer.
    """

    name: str  # in the paths of parameters, and so in patterns that users write: a word, such as "dense"
    changes: tuple[tuple[str, Any], ...] = ()  # the fields of the DecoderSpec that are others in these layers


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """Sizes and switches of one decoder; field names are those of Hugging Face `config.json` files where it has them.

    The defaults are Llama's. It is hashable, so it can be a static argument of `jax.jit` and a field of a Linen module.
    """

    family: str  # the `model_type` of the Hugging Face config, e.g. "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the MLP, or of one expert
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    tie_word_embeddings: bool

    # positions
    ropes: tuple[Rope, ...]  # the different ones
    layer_ropes: tuple[int | None, ...]  # which of them each layer uses; None: no positions there
    rope_interleaved: bool = False  # pair i of a head is its dimensions 2i and 2i + 1, else i and i + pairs
    learned_positions: bool = False  # an embedding of the position, added to the token's

    # attention
    layer_windows: tuple[int | None, ...] = ()  # how many tokens back, itself included, each layer sees; None: all
    layer_chunks: tuple[int | None, ...] = ()  # each layer sees nothing before the last multiple of so many positions
    attention_scales: tuple[float, ...] = ()  # of queries times keys, per layer
    # (b, n, c): queries of position p times 1 + b log(1 + floor((p + c) / n))
    position_scale: tuple[float, int, int] | None = None
    attention_softcap: float | None = None  # scores s become cap * tanh(s / cap)
    attention_sinks: bool = False  # a learned score per head that takes part in the softmax and carries no value
    qkv_bias: bool = False
    o_bias: bool = False
    fused_qkv: bool = False  # one kernel for queries, keys and values, in this order
    latent: Latent | None = None
    qkv_clip: float | None = None  # queries, keys and values are cut to so much on either side of 0
    # A norm of queries and keys: "head" (each head alone), "heads" (LayerNorm with a scale for each, no bias), "bare"
    # (RMS of each head, nothing learned) or "projection" (all at once).
    qk_norm: str | None = None
    qk_norm_last: bool = False  # after RoPE (of heads)
    norm_or_scale: bool = False  # layers with RoPE have `qk_norm` alone, after it, those without `position_scale` alone
    attention_gate: bool = False  # what heads give is multiplied by the sigmoid of a gate, in the kernel of queries
    v_norm: bool = False  # values of each head under an RMS norm without a scale
    values_are_keys: bool = False  # no projection of values: they are what the keys are before norm and RoPE
    # These layers have no keys and values of their own: they use those of this layer, an earlier one of the decoder's.
    kv_layer: int | None = None
    # What there is instead of attention, at most one; of the fields above nothing counts then. Mamba may be beside it.
    delta: Delta | None = None
    convolution: Convolution | None = None
    mamba: Mamba | None = None

    # MLP
    hidden_act: str = "silu"  # one of layers.ACTIVATIONS
    mlp_bias: bool = False
    gate: str | None = "separate"  # a gated MLP's kernels: "separate", "halves" or "interleaved" in one; None: no gate
    gate_cutoff: float | None = None  # of the gate only what is so many deviations above its mean is used
    swiglu_clamp: tuple[float, float] | None = None  # (alpha, limit) of GPT-OSS's gate
    experts: Experts | None = None

    # norms, residual stream and head
    norm: str = "rms"  # one of layers.NORMS
    pre_norms: bool = True  # of what goes into attention and MLP
    post_norms: bool = False  # of what comes out of them
    only: str | None = None  # "mixer" or "mlp": layers have only attention (or what is in its place), or only an MLP
    parallel: bool = False  # attention and MLP have the same input, under one norm, and their sum is added to it
    embedding_scale: float = 1.0
    per_layer: PerLayer | None = None
    altup: AltUp | None = None
    laurel_rank: int | None = None  # of a second path around attention; the sum of both is divided by the root of 2
    residual_scale: float = 1.0
    multipliers: Multipliers = Multipliers()
    layer_scalar: bool = False  # what a layer gives is multiplied by a number of its own, which is not trained
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    vision: Vision | None = None  # None: it reads text alone, also where its checkpoint has a tower

    # unlike layers (groups.py), set by `with_kinds`
    layer_kinds: tuple[Kind, ...] = ()  # the kind of each layer; (): all are as the other fields say

    @property
    def mrope(self) -> bool:
        """Whether positions of tokens have three parts, see Rope."""
        return any(rope.sections for rope in self.ropes)

    @property
    def carries(self) -> bool:
        """Whether its layers, of one kind, carry a State (cache.py) along a row."""
        return any(other is not None for other in (self.delta, self.convolution, self.mamba))

    @property
    def attends(self) -> bool:
        """Whether its layers, of one kind, have attention, and so keys and values."""
        alone = not self.carries or (self.mamba is not None and self.mamba.beside)
        return alone and self.only != "mlp"

    @property
    def value_dim(self) -> int:
        """Of a head's values; `head_dim` is of its queries and keys."""
        return self.latent.value_dim if self.latent else self.head_dim

    def of_layers(self, layers: Sequence[int]) -> "DecoderSpec":
        """The decoder that has these layers alone; if they are of one kind, in the fields and not as a kind."""
        tuples = ("layer_ropes", "layer_windows", "layer_chunks", "attention_scales", "layer_kinds")
        own = {name: tuple(getattr(self, name)[layer] for layer in layers) for name in tuples if getattr(self, name)}
        kinds = own.pop("layer_kinds", ())
        return dataclasses.replace(self, num_hidden_layers=len(layers), layer_kinds=(), **own).with_kinds(kinds)

    def with_kinds(self, kinds: Sequence[Kind]) -> "DecoderSpec":
        """This decoder with a kind for each layer. Equal decoders are equal specs: a single kind becomes the fields."""
        if len(set(kinds)) == 1:
            return dataclasses.replace(self, layer_kinds=(), **dict(kinds[0].changes))
        return dataclasses.replace(self, layer_kinds=tuple(kinds))
