"""What a stage of a model weighs: pure arithmetic on what the model store says of the model."""

from dataclasses import dataclass

from eldric.errors import InvalidRequest

#: The KV cache is read in blocks of so many cells, so a slot holds a multiple of it.
KV_BLOCK_CELLS = 256
DEFAULT_CONTEXT = 4096
DEFAULT_SLOTS = 4
DEFAULT_CHUNK = 128
MAX_CHUNK = 4096
MAX_CONTEXT = 1 << 24
MAX_SLOTS = 1024
KV_TYPE_BYTES = {"f16": 2, "f32": 4}
WEIGHT_LAYOUTS = ("auto", "mapped", "repacked")


@dataclass(frozen=True, slots=True)
class Options:
    """How the stages of a pipeline compute, defaults filled in. Fields as in the message StageOptions."""

    context: int
    slots: int = DEFAULT_SLOTS
    chunk: int = DEFAULT_CHUNK
    lanes: int = 0  # 0: one for each stage
    threads: int = 0  # 0: each worker's own setting
    exact: bool = True
    weights: str = "auto"
    trace: bool = False
    kv_type: str = "f16"

    def __post_init__(self) -> None:
        for name, value, most in (
            ("context", self.context, MAX_CONTEXT),
            ("slots", self.slots, MAX_SLOTS),
            ("chunk", self.chunk, MAX_CHUNK),
        ):
            if not 1 <= value <= most:
                raise InvalidRequest(f"{name} is {value}: it must be between 1 and {most}")
        if self.kv_type not in KV_TYPE_BYTES:
            raise InvalidRequest(f"kv_type is {self.kv_type!r}: it must be one of {', '.join(KV_TYPE_BYTES)}")
        if self.weights not in WEIGHT_LAYOUTS:
            raise InvalidRequest(f"weights is {self.weights!r}: it must be one of {', '.join(WEIGHT_LAYOUTS)}")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a model that planning needs. Bytes are those of weights as they lie in the file."""

    name: str
    layer_bytes: tuple[int, ...]  # of each layer
    head_bytes: int  # what the head needs besides: the token embedding
    tail_bytes: int  # what the tail needs besides: output norm and output matrix (a tied embedding too)
    shared_bytes: int  # of both, what a stage that is head and tail holds once
    every_bytes: int  # what every stage needs besides
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int  # tokens that the model was trained for

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    def weights(self, start: int, end: int) -> int:
        """Bytes of the weights of layers [start, end), with what head and tail need besides."""
        return sum(self.layer_bytes[start:end]) + self.besides(is_head=start == 0, is_tail=end == self.layers)

    def besides(self, *, is_head: bool, is_tail: bool) -> int:
        """Bytes of weights that a stage holds besides its layers."""
        total = self.every_bytes
        total += self.head_bytes if is_head else 0
        total += self.tail_bytes if is_tail else 0
        return total - (self.shared_bytes if is_head and is_tail else 0)

    def kv_per_layer(self, options: Options) -> int:
        """Bytes of one layer's KV cache: keys and values of every cell of every slot."""
        cells = -(-options.context // KV_BLOCK_CELLS) * KV_BLOCK_CELLS * options.slots
        return 2 * cells * self.kv_heads * self.head_dim * KV_TYPE_BYTES[options.kv_type]

    def compute(self, options: Options, *, is_tail: bool) -> int:
        """Bytes of the buffers of one step, the largest that may come: a chunk of prompt at the context's end."""
        rows = max(options.chunk, options.slots)
        attention = (self.heads + 2 * self.kv_heads) * self.head_dim
        values = rows * (4 * self.hidden_size + 2 * attention + 3 * self.ffn_size)
        if is_tail:
            values += rows * self.vocab_size
        mask = rows * options.context * 2
        return 4 * values + mask


def readable(size_bytes: int) -> str:
    """A size for people, with the exact number beside it where it is rounded."""
    if size_bytes < 1024:
        return f"{size_bytes} bytes"
    size, unit = float(size_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit} ({size_bytes} bytes)"
