"""The kernels in C (decode.c), compiled where they are first needed."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import torch

from .codes import Codes
from .faults import fault_of
from .kernels import ScaledNumbers
from .packed import PackedFloats
from .tiles import TILES

_SOURCE = Path(__file__).with_name("decode.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    *("-O3", "-march=native", "-fno-fast-math", "-ffp-contract=off", "-std=gnu11"),
    *("-shared", "-fPIC"),
)
"""The results have the bits of torch: no two operations are contracted to one. Fast
math, which CC may ask for, would also have the whole process lose small numbers."""
_SECONDS = 60.0
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of `enum dtype`."""
_KINDS = {Codes.INT8: 1, Codes.FLOAT8_E4M3: 2}
"""The numbers of `enum kind`; 0 for others."""


class CannotCompileError(Exception):
    """There is no compiler, or what it made cannot be used: says why."""


class _Job(ctypes.Structure):
    """`struct job` of decode.c."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("code_stride", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("block_rows", ctypes.c_int64),
        ("block_columns", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("per_byte", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class _Packed(ctypes.Structure):
    """`struct packed` of decode.c."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("byte_stride", ctypes.c_int64),
        ("escapes", ctypes.c_void_p),
        ("most_escapes", ctypes.c_int64),
        ("block_rows", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class Compiled:
    """See `Kernels`. What the C code does not do is left to torch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._decode = library.penstock_decode
        self._decode.argtypes = (ctypes.POINTER(_Job),)
        self._decode.restype = None
        self._unpack = library.penstock_unpack
        self._unpack.argtypes = (ctypes.POINTER(_Packed),)
        self._unpack.restype = None
        self._dtypes = dict(_DTYPES)
        if not library.penstock_has_float16():
            del self._dtypes[torch.float16]

    def __repr__(self) -> str:
        return "<Compiled kernels>"

    def write_scaled(self, target: torch.Tensor, numbers: ScaledNumbers) -> None:
        codes, offsets = numbers.bytes, numbers.offsets
        is_known = {target.dtype, numbers.rounding} <= self._dtypes.keys()
        if not is_known or codes.stride(1) != 1 or not target.numel():
            TILES.write_scaled(target, numbers)
            return
        table, scales = numbers.codes.numbers, numbers.scales
        job = _Job(
            codes.data_ptr(),
            codes.stride(0),
            table.data_ptr(),
            scales.data_ptr(),
            None if offsets is None else offsets.data_ptr(),
            *target.shape,
            numbers.blocks.rows,
            numbers.blocks.columns,
            target.data_ptr(),
            *target.stride(),
            numbers.codes.per_byte,
            _KINDS.get(numbers.codes, 0),
            self._dtypes[numbers.rounding],
            self._dtypes[target.dtype],
        )
        self._decode(ctypes.byref(job))  # drops the GIL

    def write_packed(self, target: torch.Tensor, numbers: PackedFloats) -> None:
        is_known = target.dtype in (torch.float32, torch.bfloat16)
        stored, found = numbers.bytes, numbers.escapes
        is_known = is_known and target.stride(1) == 1 == stored.stride(1)
        if not is_known or not target.numel():
            TILES.write_packed(target, numbers)
            return
        if found is not None:
            found = found.contiguous()
        job = _Packed(
            stored.data_ptr(),
            stored.stride(0),
            None if found is None else found.data_ptr(),
            0 if found is None else found.shape[1],
            numbers.block_rows,
            *target.shape,
            target.data_ptr(),
            target.stride(0),
            _DTYPES[target.dtype],
        )
        self._unpack(ctypes.byref(job))  # drops the GIL


def compiled(folder: Path) -> Compiled:
    """The kernels as C code, compiled into `folder` unless that was done before and
    the file is as it was then.

    Raises CannotCompileError where there is no compiler, where it fails, and where its
    code computes other bits than torch does.
    """
    compiler = _compiler()
    try:
        stem = f"decode-{_key(compiler)}"
        found = _kept(folder, stem) or _compile(compiler, folder, stem)
        made = Compiled(ctypes.CDLL(str(found)))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        raise CannotCompileError(f"{' '.join(compiler)} failed: {error}") from error
    if (fault := fault_of(made)) is not None:
        raise CannotCompileError(fault)
    return made


def _compiler() -> list[str]:
    """The command of the C compiler: that of the variable CC, or a usual one."""
    said = os.environ.get("CC", "")
    try:
        asked = shlex.split(said)
    except ValueError as error:  # a quotation that does not end
        raise CannotCompileError(f"CC is {said!r:.100}: {error}") from error
    for command in [asked] if asked else [[name] for name in _COMPILERS]:
        if (path := shutil.which(command[0])) is not None:
            return [path, *command[1:]]
    raise CannotCompileError("there is no C compiler (cc, gcc or clang, or that of CC)")


def _key(compiler: list[str]) -> str:
    """Changes with whatever the compiled code depends on: several machines may share
    the folder."""
    path = Path(compiler[0]).resolve()
    parts = (
        _SOURCE.read_text(),
        *_FLAGS,
        *compiler,
        str(path),
        str(path.stat().st_mtime_ns),
        platform.machine(),
        _processor(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the CPU can do, as Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    words = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(words)}))


def _kept(folder: Path, stem: str) -> Path | None:
    """What was compiled before; None if there is nothing.

    A file that is damaged is removed: a process that loaded it would end.
    """
    for path in folder.glob(f"{stem}-*.so"):
        with contextlib.suppress(OSError):
            if path.name == _name(stem, path.read_bytes()):
                return path
            path.unlink()
    return None


def _name(stem: str, content: bytes) -> str:
    """The name of a file, which says what its content must be."""
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _compile(compiler: list[str], folder: Path, stem: str) -> Path:
    """Compiles into `folder`, which other processes may do at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made_in:
        made = Path(made_in) / f"{stem}.so"
        code, said = _run([*compiler, *_FLAGS, str(_SOURCE), "-o", str(made)])
        if code:
            lines = said.strip().splitlines()
            raise OSError(lines[0] if lines else f"exit code {code}")
        return made.replace(folder / _name(stem, made.read_bytes()))


def _run(command: list[str]) -> tuple[int, str]:
    """Runs `command`. Returns its exit code, and what it printed.

    It has no terminal, where it could ask something, and is a group of processes: none
    of them is left when this raises, as it does with OSError after `_SECONDS`.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=_SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OSError(f"it did not end in {_SECONDS:g} seconds") from None
            raise
    return process.returncode, said
