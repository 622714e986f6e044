"""What a stage of a model weighs: pure arithmetic on what the model store says of the model."""

from dataclasses import dataclass

from eldric.engine.shard import LayerRange, MemoryEstimate, ModelCosts, memory_estimate
from eldric.errors import InvalidRequest

DEFAULT_CONTEXT = 4096
DEFAULT_SLOTS = 4
DEFAULT_CHUNK = 64
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
    exact: bool | None = None  # None: each stage decides by what it costs there
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
    """What planning needs of a model."""

    name: str
    costs: ModelCosts
    context: int  # tokens that it was trained for

    @property
    def layers(self) -> int:
        return len(self.costs.layer_bytes)

    def memory(self, start: int, end: int, options: Options) -> MemoryEstimate:
        """What a stage of layers [start, end) takes, in bytes."""
        return memory_estimate(
            self.costs,
            LayerRange(start, end),
            context=options.context,
            slots=options.slots,
            chunk=options.chunk,
            kv_value_bytes=KV_TYPE_BYTES[options.kv_type],
        )

    def besides(self, *, is_head: bool, is_tail: bool) -> int:
        """Bytes of weights that a stage holds besides its layers."""
        costs = self.costs
        total = costs.every_bytes + costs.head_bytes * is_head + costs.tail_bytes * is_tail
        return total - costs.shared_bytes * (is_head and is_tail)


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
