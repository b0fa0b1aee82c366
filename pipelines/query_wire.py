"""What a query and the process it runs in say to each other."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import IO

import pyarrow as pa

from pipelines.schemas import SCHEMAS


@dataclass(frozen=True)
class QueryLimits:
    """What a query may use.

    Attributes:
        seconds: Wall-clock time, after which it is stopped.
        memory_mb: Memory of the database engine.
        rows: Longest result; a longer one is an error, not a silent cut.
        result_mb: Largest result, likewise.
        threads: Cores.
    """

    seconds: float = 60.0
    memory_mb: int = 1024
    rows: int = 1_000_000
    result_mb: int = 512
    threads: int = 2


def view_names() -> dict[str, str]:
    """View → its table: each table's latest rows by its own name, all its rows as NAME_all."""
    return {name: name for name in SCHEMAS} | {f"{name}_all": name for name in SCHEMAS}


def send(stream: IO[bytes], data: bytes) -> None:
    """One message: its length, then its bytes."""
    stream.write(struct.pack(">Q", len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes], most: int = 2**40) -> bytes:
    """The next message.

    Raises:
        EOFError: The other side is gone, or wants to send more than `most` bytes.
    """
    head = stream.read(8)
    size = struct.unpack(">Q", head)[0] if len(head) == 8 else most + 1
    data = stream.read(size) if size <= most else b""
    if size > most or len(data) < size:
        raise EOFError
    return data


def pack(table: pa.Table) -> bytes:
    """A table as an Arrow stream."""
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def unpack(data: bytes) -> pa.Table:
    """The table of an Arrow stream."""
    return pa.ipc.open_stream(data).read_all()
