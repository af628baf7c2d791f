"""Best GB/s of a copy in memory by one thread, and of a write of SIZE bytes to PATH with a sync."""

import json
import os
import sys
import time

_BLOCK = 1 << 28


def run(path: str, size: int) -> None:
  source, target = os.urandom(_BLOCK), bytearray(_BLOCK)
  memory, disk = [], []
  for _ in range(5):
    start = time.perf_counter()
    memoryview(target)[:] = source
    memory.append(_BLOCK / (time.perf_counter() - start) / 1e9)
  for _ in range(2):
    start = time.perf_counter()
    with open(path, 'wb', buffering=0) as file:
      left = size
      while left:
        left -= file.write(memoryview(source)[: min(left, 1 << 18)])
      os.fsync(file.fileno())
    disk.append(size / (time.perf_counter() - start) / 1e9)
  os.unlink(path)
  print(json.dumps({'memory': max(memory), 'disk': max(disk)}))


if __name__ == '__main__':
  run(sys.argv[1], int(sys.argv[2]))
