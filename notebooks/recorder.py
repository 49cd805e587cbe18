"""Watch a Triton kernel at work: every load and store of the real, unchanged kernel, on a CPU.

    os.environ["TRITON_INTERPRET"] = "1"            # before anything imports triton
    with Recorder({"x": x, "out": out}) as rec:
        add_kernel[(4,)](x, out, 100, BLOCK=32)
    rec.bytes_read("x"), rec.times_written("out"), rec.events[0].index

How the interpreter is tapped. With TRITON_INTERPRET=1, `@triton.jit` makes an object that runs the
kernel as plain Python, one program after the other: a tensor of the kernel is a numpy array, a
pointer is a numpy array of addresses, and each `tl.` function ends in a method of one object, the
interpreter's *builder* (on a GPU, a builder of the same interface emits compiler code instead).
While a recorder is active it stands in four places, and puts everything back when it leaves:

1. before a launch (`GridExecutor.__call__`), to learn the kernel's name and its tensor arguments;
2. where a tensor argument becomes an address (`_implicit_cvt`), to write the tensor's number into
   the 16 top bits of the address, which no address on a 64-bit machine uses. Every pointer that the
   kernel computes from it keeps the number, so an access that runs off one tensor into its
   neighbour is still known for what it is;
3. at the builder's masked load and store and its atomics, through which all traffic passes: the
   numbers are read and taken off again, the bounds checked, an Event written down;
4. at `set_grid_idx`, which says which program runs next.

Local variables (`watch=`) come from `sys.settrace`, Python's own hook for debuggers.

All of this is private to Triton, so all of it is in this file; `check_interpreter` says what moved.
The interpreter itself promises less than a GPU: it reads out of bounds in silence (the recorder
does not), and computes bfloat16 wrongly in silence (the recorder refuses it).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_TAG_SHIFT = 48
_ADDRESS_BITS = np.uint64((1 << _TAG_SHIFT) - 1)
_SUPPORTED = "3.6 to 3.9"
# Everything of `triton.runtime.interpreter` used here, with the leading parameters relied on.
_PRIVATE: dict[str, tuple[str, ...] | None] = {
    "interpreter_builder.create_masked_load": ("ptrs", "mask"),
    "interpreter_builder.create_masked_store": ("ptrs", "value", "mask"),
    "interpreter_builder.create_atomic_rmw": ("rmwOp", "ptr", "val", "mask"),
    "interpreter_builder.create_atomic_cas": ("ptr", "cmp", "val"),
    "interpreter_builder.set_grid_idx": ("x", "y", "z"),
    "GridExecutor": ("fn", "arg_names", "grid"),
    "GridExecutor.__call__": ("self",),
    "InterpretedFunction.rewritten_fn": None,
    "TensorHandle": ("data", "dtype"),
    "_implicit_cvt": ("arg",),
}

Program = tuple[int, int, int]


class RecorderError(ValueError):
    """The recorder was used in a way it cannot honour; the message names the remedy."""


class OutOfBoundsError(RecorderError):
    """A kernel touched memory outside the tensor that its pointer came from."""


@dataclass(frozen=True)
class Event:
    """One load, store or atomic instruction of one program, as far as it touches one tensor.

    Attributes:
        order: running number of the instruction over the whole recording.
        launch: index into `Recorder.launches`.
        kind: "load", "store" or "atomic" (which counts as both a read and a write).
        tensor: name of the tensor, whose shape is `shape`.
        offsets: distance of each lane from the tensor's first element in memory, in elements. The
            three arrays have the shape of the instruction's block of pointers, `(1,)` for a scalar.
        elements: each lane's element as a row-major position in the tensor; -1 where masked off.
        mask: which lanes are active.
        file, line: the line of the kernel, or of the helper function that it called.
    """

    order: int
    launch: int
    kernel: str
    program: Program
    kind: str
    tensor: str
    shape: tuple[int, ...]
    offsets: np.ndarray
    elements: np.ndarray
    mask: np.ndarray
    element_bytes: int
    file: str
    line: int

    @property
    def bytes(self) -> int:
        """Bytes asked for: active lanes times element size, a repeated element counted again."""
        return int(self.mask.sum()) * self.element_bytes

    @property
    def index(self) -> tuple[np.ndarray, ...]:
        """Indices of the active lanes, one flat array for each dimension of the tensor."""
        elements = self.elements[self.mask]
        return np.unravel_index(elements, self.shape) if self.shape else ()


@dataclass(frozen=True)
class Snapshot:
    """A watched local variable, right after a line of the kernel bound it anew.

    `order` is how many load, store and atomic instructions had run by then.
    """

    order: int
    launch: int
    program: Program
    line: int
    name: str
    value: np.ndarray


@dataclass(frozen=True)
class Launch:
    """One kernel launch, and its programs in the order in which they ran."""

    kernel: str
    programs: list[Program] = field(default_factory=list)


class _Region:
    """A named tensor, and which of its elements lies at which offset of its memory."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor = name, tensor  # keeps the memory alive and the address its own
        self.base, self.item = tensor.data_ptr(), tensor.element_size()
        self.shape = tuple(tensor.shape)
        offsets = np.zeros(self.shape, dtype=np.int64)
        for dim, (size, stride) in enumerate(zip(self.shape, tensor.stride(), strict=True)):
            steps = np.arange(size, dtype=np.int64) * stride
            offsets += steps.reshape([-1 if d == dim else 1 for d in range(offsets.ndim)])
        self.offsets = offsets.ravel()
        # A strided view has gaps that are not its own: the table says -1 there. Where elements
        # share memory (an expanded tensor) the first one stands for all.
        self.table = np.full(int(self.offsets.max(initial=-1)) + 1, -1, dtype=np.int64)
        self.table[self.offsets[::-1]] = np.arange(self.offsets.size)[::-1]

    def element_at(self, addresses: np.ndarray) -> np.ndarray:
        """Row-major position of the element at each address; -1 where there is none."""
        distance = addresses.astype(np.int64) - self.base
        offsets = distance // self.item
        inside = (offsets >= 0) & (offsets < self.table.size) & (distance % self.item == 0)
        found = np.full(addresses.shape, -1, dtype=np.int64)
        found[inside] = self.table[offsets[inside]]
        return found

    def contains(self, other: _Region) -> bool:
        return (
            self.item == other.item
            and (self.element_at(other.base + other.offsets * other.item) >= 0).all()
        )


class Recorder:
    """Context manager that records the kernels launched inside it.

    Args:
        tensors: CPU tensors by the names that the events and counts shall use. A kernel argument
            that is a view of a named tensor is counted under the tensor's name.
        register_arguments: also record tensor arguments that nobody named, under the name of the
            kernel's parameter (`kernel.parameter` where that is taken); else they are refused.
        watch: names of local variables of the kernel to take snapshots of.

    Raises:
        RecorderError: the interpreter is off, another recorder is active, a tensor is bfloat16 or
            not on the CPU, or an argument is not among `tensors`.
        OutOfBoundsError: from the launch, when an active lane falls outside its tensor.
        ImportError: triton is not installed.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        register_arguments: bool = False,
        watch: Sequence[str] = (),
    ) -> None:
        if isinstance(watch, str):
            raise RecorderError(f"watch={watch!r} is one string; pass a tuple: ({watch!r},)")
        self.register_arguments, self.watch = register_arguments, tuple(watch)
        self.events: list[Event] = []
        self.snapshots: list[Snapshot] = []
        self.launches: list[Launch] = []
        self._regions: list[_Region] = []
        self._numbers: dict[tuple, int] = {}  # a tensor's identity -> 1 + index into _regions
        self._undo: list[Callable[[], None]] = []
        self._order = 0
        self._fault: RecorderError | None = None
        self._is_kernel: dict[CodeType, bool] = {}
        for name, tensor in (tensors or {}).items():
            self._add_region(name, tensor)

    # ---- what was recorded -------------------------------------------------------------------

    @property
    def programs(self) -> list[Program]:
        """Ids of all programs that ran, launch after launch, in the order in which they ran."""
        return [program for launch in self.launches for program in launch.programs]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each recorded tensor, by name."""
        return {region.name: region.shape for region in self._regions}

    def select(
        self,
        tensor: str | None = None,
        kind: str | Sequence[str] | None = None,
        *,
        program: Program | None = None,
        kernel: str | None = None,
        line: int | None = None,
    ) -> list[Event]:
        """The events that fit every filter given, in order. `program` is a full 3-tuple."""
        if not self.launches:
            raise RecorderError(
                "nothing was recorded: no kernel was launched inside the `with` block by way of "
                "Triton's interpreter; launch it there"
            )
        if tensor is not None and tensor not in self.shapes:
            raise RecorderError(f"no tensor named {tensor!r}; recorded are {list(self.shapes)}")
        kinds = (kind,) if isinstance(kind, str) else kind
        if kinds is not None and not set(kinds) <= {"load", "store", "atomic"}:
            raise RecorderError(f"kind={kind!r}: choose from load, store, atomic")
        return [
            event
            for event in self.events
            if (tensor is None or event.tensor == tensor)
            and (kinds is None or event.kind in kinds)
            and (program is None or event.program == program)
            and (kernel is None or event.kernel == kernel)
            and (line is None or event.line == line)
        ]

    def bytes_read(self, tensor: str | None = None, **where: Any) -> int:
        """Bytes that loads and atomics asked for; `where` as in `select`."""
        return sum(event.bytes for event in self.select(tensor, ("load", "atomic"), **where))

    def bytes_written(self, tensor: str | None = None, **where: Any) -> int:
        """Bytes that stores and atomics wrote; `where` as in `select`."""
        return sum(event.bytes for event in self.select(tensor, ("store", "atomic"), **where))

    def times_read(self, tensor: str, **where: Any) -> np.ndarray:
        """How often each element was read: an integer array of the tensor's shape."""
        return self._times(self.select(tensor, ("load", "atomic"), **where), tensor)

    def times_written(self, tensor: str, **where: Any) -> np.ndarray:
        """How often each element was written: an integer array of the tensor's shape."""
        return self._times(self.select(tensor, ("store", "atomic"), **where), tensor)

    def loads_by_program(
        self, tensor: str | None = None, **where: Any
    ) -> dict[Program, list[Event]]:
        """The loads and atomics of each program; a program that read nothing has an empty list."""
        return self._by_program(self.select(tensor, ("load", "atomic"), **where))

    def stores_by_program(
        self, tensor: str | None = None, **where: Any
    ) -> dict[Program, list[Event]]:
        """The stores and atomics of each program; one that wrote nothing has an empty list."""
        return self._by_program(self.select(tensor, ("store", "atomic"), **where))

    def _times(self, events: list[Event], tensor: str) -> np.ndarray:
        shape = self.shapes[tensor]
        count = np.zeros(int(np.prod(shape)), dtype=np.int64)
        for event in events:
            np.add.at(count, event.elements[event.mask], 1)
        return count.reshape(shape)

    def _by_program(self, events: list[Event]) -> dict[Program, list[Event]]:
        grouped: dict[Program, list[Event]] = {program: [] for program in self.programs}
        for event in events:
            grouped[event.program].append(event)
        return grouped

    # ---- getting in and out ------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        interpreter = check_interpreter()
        builder = interpreter.interpreter_builder
        if "set_grid_idx" in vars(builder):
            raise RecorderError("another Recorder is active; leave its `with` block first")
        if self.launches:
            raise RecorderError("this Recorder has been used; make a new one for a new recording")
        self._interpreter = interpreter
        self._undo.append(patch_interpreter())
        self._replace(interpreter.GridExecutor, "__call__", self._wrap_launch)
        self._replace(interpreter, "_implicit_cvt", self._wrap_conversion)
        self._replace(builder, "set_grid_idx", self._wrap_grid_index)
        self._replace(builder, "create_masked_load", self._wrap_access("load", 0, 1))
        self._replace(builder, "create_masked_store", self._wrap_access("store", 0, 2))
        self._replace(builder, "create_atomic_rmw", self._wrap_access("atomic", 1, 3))
        self._replace(builder, "create_atomic_cas", self._wrap_access("atomic", 0, None))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
        own = vars(owner).get(name)  # None: the builder inherits it from its class
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(wrap(original)))
        self._undo.append(lambda: setattr(owner, name, own) if own else delattr(owner, name))

    def _wrap_launch(self, original: Callable) -> Callable:
        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            kernel = executor.fn.__name__
            known = {key: value for key, value in kwargs.items() if key in executor.arg_names}
            for name, value in inspect.getcallargs(executor.fn, *args, **known).items():
                self._register_argument(kernel, name, value)
            self.launches.append(Launch(kernel))
            tracer = sys.gettrace()
            try:
                if self.watch:
                    sys.settrace(self._trace_call)
                return original(executor, *args, **kwargs)
            except Exception:
                if self._fault is not None:  # Triton would wrap it as text in an error of its own
                    raise self._fault from None
                raise
            finally:
                sys.settrace(tracer)

        return launch

    def _wrap_conversion(self, original: Callable) -> Callable:
        def convert(argument: Any) -> Any:
            converted = original(argument)
            if hasattr(argument, "data_ptr"):
                number = self._numbers[_identity(_unwrapped(argument))]
                converted.handle.data = converted.handle.data | np.uint64(number << _TAG_SHIFT)
            return converted

        return convert

    def _wrap_grid_index(self, original: Callable) -> Callable:
        def set_grid_idx(x: int, y: int, z: int) -> None:
            self.launches[-1].programs.append((x, y, z))
            original(x, y, z)

        return set_grid_idx

    def _wrap_access(self, kind: str, pointer: int, mask: int | None) -> Callable:
        """A wrapper for a builder method with its pointers and mask at these positions."""

        def wrap(original: Callable) -> Callable:
            def access(*args: Any, **kwargs: Any) -> Any:
                handle = args[pointer]
                active = np.array(True) if mask is None else args[mask]
                # Triton 3.6 passes a descriptor's mask as a bare array.
                active = active if isinstance(active, np.ndarray) else active.data
                element = handle.get_element_ty()
                self._record(kind, handle.data, active, max(1, element.primitive_bitwidth // 8))
                plain = type(handle)(handle.data & _ADDRESS_BITS, handle.dtype)
                return original(*args[:pointer], plain, *args[pointer + 1 :], **kwargs)

            return access

        return wrap

    # ---- tensors -----------------------------------------------------------------------------

    def _checked(self, name: str, tensor: Any) -> _Region:
        if not _is_tensor(tensor):
            raise RecorderError(f"{name!r} is a {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.device.type != "cpu":
            raise RecorderError(f"{name!r} is on {tensor.device}; record its .cpu() copy")
        if str(tensor.dtype) == "torch.bfloat16":
            raise RecorderError(
                f"{name!r} is bfloat16, which Triton's interpreter computes wrongly without saying "
                "so; use float32 or float16"
            )
        return _Region(name, tensor)

    def _add_region(self, name: str, tensor: Any) -> None:
        self._regions.append(self._checked(name, tensor))
        self._numbers.setdefault(_identity(tensor), len(self._regions))

    def _register_argument(self, kernel: str, name: str, value: Any) -> None:
        if isinstance(value, tuple):
            for place, item in enumerate(value):
                self._register_argument(kernel, f"{name}[{place}]", item)
            return
        value = _unwrapped(value)
        if not _is_tensor(value) or _identity(value) in self._numbers:
            return
        view = self._checked(name, value)
        for number, region in enumerate(self._regions, start=1):
            if region.contains(view):
                self._numbers[_identity(value)] = number
                return
        if not self.register_arguments:
            raise RecorderError(
                f"argument {name!r} of {kernel} is no view of a named tensor "
                f"({list(self.shapes)}); name it in Recorder(tensors=...), or pass "
                "register_arguments=True"
            )
        numbered = (f"{kernel}.{name}.{number}" for number in itertools.count(2))
        names = itertools.chain([name, f"{kernel}.{name}"], numbered)
        self._add_region(next(free for free in names if free not in self.shapes), value)

    # ---- events ------------------------------------------------------------------------------

    def _record(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        numbers = pointers >> np.uint64(_TAG_SHIFT)
        addresses = pointers & _ADDRESS_BITS
        mask = np.broadcast_to(mask, pointers.shape).astype(bool)
        # Usually one; a kernel may choose between pointers lane by lane.
        touched = np.unique(numbers[mask]) if mask.any() else np.unique(numbers)[:1]
        for number in touched:
            lanes = mask & (numbers == number)
            region = self._region(int(number), addresses[lanes])
            frame = self._kernel_frame()
            code, line = frame.f_code, frame.f_lineno
            launch, program = self.launches[-1], self.launches[-1].programs[-1]
            where = f"{kind} in {code.co_name}, {code.co_filename}:{line}, program {program}"
            if region is None:
                self._fail(OutOfBoundsError(f"{where}: the address is in no named tensor"))
            if size != region.item:
                text = f"{where}: elements of {size} bytes, while those of {region.name!r} have "
                self._fail(RecorderError(f"{text}{region.item}; pass the kernel such a view of it"))
            offsets = (addresses.astype(np.int64) - region.base) // size
            elements = np.where(lanes, region.element_at(addresses), -1)
            wrong = offsets[lanes & (elements < 0)]
            if wrong.size:
                text = f"{where}: {wrong.size} of {lanes.sum()} active lanes leave {region.name!r} "
                text += f"(shape {region.shape}, offsets 0 to {region.table.size - 1}); the first "
                text += f"is at offset {wrong[0]}, byte {wrong[0] * size}. Check mask and strides"
                self._fail(OutOfBoundsError(text))
            self.events.append(
                Event(
                    order=self._order,
                    launch=len(self.launches) - 1,
                    kernel=launch.kernel,
                    program=program,
                    kind=kind,
                    tensor=region.name,
                    shape=region.shape,
                    offsets=offsets,
                    elements=elements,
                    mask=lanes,
                    element_bytes=size,
                    file=code.co_filename,
                    line=line,
                )
            )
        self._order += 1

    def _region(self, number: int, addresses: np.ndarray) -> _Region | None:
        if 0 < number <= len(self._regions):
            return self._regions[number - 1]
        # A pointer that the kernel itself loaded from memory carries no number: search by address.
        owners = (r for r in self._regions if (r.element_at(addresses) >= 0).all())
        return next(owners, None)

    def _fail(self, fault: RecorderError) -> None:
        self._fault = fault
        raise fault

    # ---- frames of the kernel ----------------------------------------------------------------

    def _runs_kernel_code(self, code: CodeType) -> bool:
        """Whether the code is a kernel's or a helper's, but not one of Triton's own helpers."""
        if code not in self._is_kernel:
            rewritten = self._interpreter.InterpretedFunction.rewritten_fn.values()
            library = os.path.dirname(sys.modules["triton"].__file__) + os.sep
            self._is_kernel[code] = not code.co_filename.startswith(library) and any(
                function.__code__ is code for function in rewritten
            )
        return self._is_kernel[code]

    def _kernel_frame(self) -> FrameType:
        frame = sys._getframe(1)
        while not self._runs_kernel_code(frame.f_code):
            frame = frame.f_back
        return frame

    def _trace_call(self, frame: FrameType, event: str, argument: Any) -> Callable | None:
        if not self._runs_kernel_code(frame.f_code):
            return None
        last: dict[str, Any] = {name: frame.f_locals.get(name) for name in self.watch}
        line = frame.f_lineno

        def trace_line(frame: FrameType, event: str, argument: Any) -> Callable:
            # A "line" event comes before its line runs, so it shows what the line before has done.
            nonlocal line
            local = frame.f_locals
            for name in self.watch:
                value = local.get(name)
                if value is not None and value is not last[name]:
                    last[name] = value
                    self._snap(line, name, value)
            line = frame.f_lineno
            return trace_line

        return trace_line

    def _snap(self, line: int, name: str, value: Any) -> None:
        if hasattr(value, "handle"):
            array = np.array(value.handle.data)
            array = array if value.type.is_block() else array.reshape(())
        else:
            array = np.asarray(getattr(value, "value", value))  # a constexpr holds a plain value
        program = self.launches[-1].programs[-1]
        launch = len(self.launches) - 1
        self.snapshots.append(Snapshot(self._order, launch, program, line, name, array))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "data_ptr") and hasattr(value, "stride")


def _unwrapped(value: Any) -> Any:
    """The tensor inside a tensor descriptor or a reinterpreted tensor, else the value itself."""
    return getattr(value, "base", value)


def _identity(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _has_moved(interpreter: ModuleType, path: str, parameters: tuple[str, ...] | None) -> bool:
    try:
        found = operator.attrgetter(path)(interpreter)
        if parameters is None:
            return False
        return tuple(inspect.signature(found).parameters)[: len(parameters)] != parameters
    except (AttributeError, TypeError, ValueError):
        return True


def check_interpreter() -> ModuleType:
    """Return Triton's interpreter module, or say what keeps the recorder from tapping it.

    Raises:
        ImportError: triton is not installed.
        RecorderError: the interpreter is off, or a private name of Triton has moved.
    """
    try:
        import triton
    except ImportError as error:
        raise ImportError(
            "the recorder needs triton, which has wheels for Linux only; elsewhere use a Linux "
            "container or a hosted notebook"
        ) from error
    import triton.language as tl
    from triton.runtime import interpreter

    moved = [path for path, names in _PRIVATE.items() if _has_moved(interpreter, path, names)]
    if moved:
        raise RecorderError(
            f"Triton {triton.__version__} has moved {', '.join(moved)}; the recorder was written "
            f"for {_SUPPORTED}: adapt notebooks/recorder.py or install one of these"
        )
    # Triton reads the variable when it is imported and again at each @triton.jit.
    started = isinstance(tl.standard._sum_combine, interpreter.InterpretedFunction)
    if not started or not triton.knobs.runtime.interpret:
        raise RecorderError(
            "Triton's interpreter is off; set os.environ['TRITON_INTERPRET'] = '1' before anything "
            "imports triton (restart a notebook's kernel, and set it in the first cell)"
        )
    return interpreter


def patch_interpreter() -> Callable[[], None]:
    """Let `range` take a kernel's scalars under triton 3.6 with numpy 2.4 or newer.

    There, `for i in range(n)` fails with "only 0-dimensional arrays can be converted". From 3.7 on
    nothing is left to mend and nothing is touched. May be called more than once.

    Returns:
        A function that takes the patch back out.
    """
    import triton
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version >= (3, 7) or original.__module__ == __name__:
        return lambda: None

    def patched(tensor: type, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    return lambda: setattr(interpreter, "_patch_lang_tensor", original)
