"""The native core. Addresses are those of memory that the caller keeps alive and has checked; see
`partita.device.kernels`."""

import enum
from typing import overload

from typing_extensions import Buffer

class DType(enum.Enum):
    f32 = 0
    f16 = 1
    bf16 = 2

class Span:
    """Contiguous elements at an address."""

    def __init__(self, address: int, numel: int, dtype: DType) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def numel(self) -> int: ...
    @property
    def dtype(self) -> DType: ...

class Stream:
    """A CUDA stream of a device; 0 is the device's default stream. Work on it is queued, not done, when a call
    returns."""

    def __init__(self, device: int, handle: int) -> None: ...

class Segments:
    """Rows of (offset, numel, optimizer group): the real elements of a flat buffer."""

    def __init__(self, segments: list[tuple[int, int, int]]) -> None: ...
    @property
    def numel(self) -> int: ...
    @property
    def end(self) -> int: ...

class NormPart:
    """A buffer, and which of its elements count."""

    def __init__(self, values: Span, segments: Segments) -> None: ...
    @property
    def blocks(self) -> int: ...

class AdamPart:
    """The buffers of a shard; memory that is used whenever it is updated."""

    def __init__(
        self,
        grads: Span,
        master: Span,
        remainder: int,
        exp_avg: Span,
        exp_avg_sq: Span,
        params: Span,
        segments: Segments,
    ) -> None: ...

def move_grads(parts: list[AdamPart], addresses: list[int], numels: list[int]) -> None:
    """The gradients of each part are elsewhere from now on; as many, of the same dtype."""

class AdamGroup:
    """Hyper-parameters of one optimizer group, and the steps that were taken without it."""

    def __init__(
        self,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        bias_correction: bool = True,
        waited: int = 0,
    ) -> None: ...

class LossScaleState:
    """The loss scale and its counters, as they lie in memory."""

    nbytes: int
    def __init__(
        self,
        scale: float,
        applied_steps: int,
        skipped_steps: int,
        good_steps: int,
        hysteresis: int,
        consecutive_skips: int,
        at_minimum: bool,
    ) -> None: ...
    @property
    def scale(self) -> float: ...
    @property
    def applied_steps(self) -> int: ...
    @property
    def skipped_steps(self) -> int: ...
    @property
    def good_steps(self) -> int: ...
    @property
    def hysteresis(self) -> int: ...
    @property
    def consecutive_skips(self) -> int: ...
    @property
    def at_minimum(self) -> bool: ...
    @staticmethod
    def read(address: int) -> LossScaleState: ...
    def write(self, address: int) -> None: ...

class StepControl:
    """What one update reads, as it lies in memory."""

    nbytes: int
    def __init__(self, grad_norm: float, grad_scale: float, skip: bool, step: int) -> None: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def grad_scale(self) -> float: ...
    @property
    def skip(self) -> bool: ...
    @property
    def step(self) -> int: ...
    @staticmethod
    def read(address: int) -> StepControl: ...
    def write(self, address: int) -> None: ...

class LossScaler:
    """The rules of the loss scale."""

    def __init__(
        self,
        dynamic: bool,
        initial_scale: float,
        minimum: float,
        window: int,
        hysteresis: int,
        consecutive_hysteresis: bool,
    ) -> None: ...
    @property
    def dynamic(self) -> bool: ...
    def initial(self) -> LossScaleState: ...
    def after_overflows(self, state: LossScaleState, overflows: int) -> LossScaleState: ...

class Bucketer:
    """Decides when a unit can be communicated; methods return ranges (begin, end) of units."""

    def __init__(self, unit_of: list[int], units: int) -> None: ...
    def begin_backward(self, overlap: bool) -> None: ...
    def mark_ready(self, parameter: int) -> tuple[int, int]: ...
    def is_complete(self, parameter: int) -> bool: ...
    def was_launched(self, parameter: int) -> bool: ...
    def finish(self) -> tuple[int, int]: ...
    @property
    def in_backward(self) -> bool: ...

# `where`: a number of threads for memory of the host, a stream for memory of its device.
def pack(
    destination: Span,
    sources: list[Span],
    offsets: list[int],
    scale: float,
    factor: int,
    accumulate: bool,
    where: int | Stream,
) -> None: ...
def cast(destination: Span, source: Span, scale: float, accumulate: bool, where: int | Stream) -> None: ...
def split_master(params: Span, remainder: int, master: Span, where: int | Stream) -> None: ...
def join_master(master: Span, params: Span, remainder: int, where: int | Stream) -> None: ...
@overload
def norm(sum_of_squares: int, parts: list[NormPart], threads: int) -> None: ...
@overload
def norm(sum_of_squares: int, parts: list[NormPart], scratch: int, stream: Stream) -> None: ...
def adam(parts: list[AdamPart], groups: list[AdamGroup], control: int, where: int | Stream) -> None: ...
def loss_scale_update(
    control: int,
    state: int,
    scaler: LossScaler,
    sum_of_squares: int,
    mean: float,
    clip: float,
    stream: Stream | None,
) -> None: ...
def cpu_level() -> str: ...
def built_with_cuda() -> bool: ...
def cuda_device_count() -> int: ...
def cuda_versions() -> tuple[int, int]: ...
def cuda_architectures() -> str: ...
def load_cuda_kernels(device: int) -> int: ...

class CommunicationError(RuntimeError):
    """A group of ranks no longer works; the message names the rank at fault and the collective."""

class Element(enum.Enum):
    f32 = 0
    f16 = 1
    bf16 = 2
    f64 = 3
    byte = 4

class Collective(enum.Enum):
    barrier = 0
    all_reduce = 1
    reduce_scatter = 2
    all_gather = 3
    broadcast = 4

class Reduction(enum.Enum):
    """What becomes of the ranks' values."""

    sum = 0
    average = 1
    max = 2

def reduce(to: Span, sources: list[Span], reduction: Reduction, threads: int) -> None: ...

class Listener:
    """A rank's open door, until all ranks of its group have met."""

    def __init__(self) -> None: ...
    @property
    def address(self) -> bytes: ...
    def close(self) -> None: ...

class SharedBuffer(Buffer):
    """Memory that all ranks of a group can read; freed with the object."""

class MappedSlices(Buffer):
    """Memory with a slice of each rank, which all ranks read and write; unmapped with the object."""

class Operation:
    """A collective under way."""

    def wait(self) -> None: ...

class Transfer:
    """A send or a receive under way."""

    def wait(self) -> None: ...

class SharedMemoryGroup:
    """The ranks of one host."""

    def __init__(
        self,
        listener: Listener,
        rank: int,
        addresses: list[bytes],
        token: bytes,
        timeout_seconds: float,
        threads: int,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def committed_bytes(self) -> int: ...
    def allocate(self, nbytes: int) -> SharedBuffer: ...
    def map_slices(self, nbytes_per_rank: int) -> MappedSlices: ...
    def launch(
        self,
        collective: Collective,
        address: int,
        numel: int,
        element: Element,
        reduction: Reduction = ...,
        root: int = ...,
        call: str = ...,
    ) -> Operation: ...
    def send(self, address: int, numel: int, element: Element, to: int) -> Transfer: ...
    def receive(self, address: int, numel: int, element: Element, source: int) -> Transfer: ...
    def waited_ns(self) -> list[int]: ...
    def barrier(self, call: str = ...) -> None: ...
    def close(self, reason: str = ...) -> None: ...

def xxh3_64(address: int, nbytes: int) -> int: ...

class FileQueue:
    """Threads that write memory to files and read files into memory, with an XXH3-64 digest of the bytes."""

    def __init__(self, threads: int) -> None: ...
    def write(self, fd: int, offset: int, address: int, nbytes: int, direct: int = -1) -> int: ...
    def read(self, fd: int, offset: int, address: int, nbytes: int) -> int: ...
    def read_part(self, fd: int, offset: int, nbytes: int, first: int, address: int, kept: int) -> int: ...
    def sync(self, fd: int) -> int: ...
    def take_over(self, first: int, last: int, address: int) -> int: ...
    def wait(self, count: int | None = None) -> list[tuple[int, int]]: ...
    def idle(self) -> bool: ...
