"""Files of TensorBoard, written without it.

A file is a list of records: the length of an event and its checksum, the event and its
checksum. Events are Protocol Buffers messages (tensorboard/compat/proto/event.proto and
summary.proto); the few fields that are needed are encoded here.
"""

import os
import socket
import struct
import time


class EventFile:
    """A file of scalars and pictures for TensorBoard.

    Args:
        folder: folder of the file, made if there is none.
    """

    _count = 0

    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        EventFile._count += 1
        name = (
            f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}."
            f"{os.getpid()}.{EventFile._count}"
        )
        self.path = os.path.join(folder, name)
        self._file = open(self.path, "wb")
        self._write(_text(3, "brain.Event:2"))

    def add_scalar(self, tag, value, step):
        """Adds a number."""
        self._add(tag, _field(2, 5) + struct.pack("<f", value), step)

    def add_image(self, tag, png, width, height, step):
        """Adds a picture: the bytes of a PNG file, of a size in pixels."""
        image = _integer(1, height) + _integer(2, width) + _integer(3, 4)
        self._add(tag, _bytes(4, image + _bytes(4, png)), step)

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()

    def _add(self, tag, content, step):
        value = _text(1, tag) + content
        self._write(_integer(2, step) + _bytes(5, _bytes(1, value)))

    def _write(self, event):
        event = _field(1, 1) + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        for part in (length, event):
            self._file.write(part + struct.pack("<I", _masked_checksum(part)))


def _varint(value):
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _field(number, kind):
    return _varint(number << 3 | kind)


def _integer(number, value):
    return _field(number, 0) + _varint(int(value))


def _bytes(number, value):
    return _field(number, 2) + _varint(len(value)) + value


def _text(number, value):
    return _bytes(number, value.encode())


def _make_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _make_table()


def _masked_checksum(data):
    """CRC-32C, turned as TFRecord files have it."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = checksum >> 8 ^ _TABLE[(checksum ^ byte) & 0xFF]
    checksum ^= 0xFFFFFFFF
    turned = (checksum >> 15 | checksum << 17) & 0xFFFFFFFF
    return (turned + 0xA282EAD8) & 0xFFFFFFFF
