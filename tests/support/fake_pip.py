"""Stands in for `pip download`: writes tiny wheels."""

import pathlib
import subprocess
import zipfile


class Pip:
  """Called as `subprocess.run`; remembers what it was asked for.

  packages: name==version -> member -> content.
  """

  def __init__(self, packages: dict[str, dict[str, bytes]]) -> None:
    self.asked: list[str] = []
    self.stderr = ''  # if set, the download fails with it
    self.packages = {name: dict(members) for name, members in packages.items()}
    self.truncate = False

  def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    package, directory = command[-1], pathlib.Path(command[command.index('--dest') + 1])
    self.asked.append(package)
    if self.stderr:
      return subprocess.CompletedProcess(command, 1, '', self.stderr)
    directory.mkdir(exist_ok=True)
    wheel = directory / (package.replace('-', '_').replace('==', '-') + '-py3-none-any.whl')
    with zipfile.ZipFile(wheel, 'w') as file:
      for member, content in self.packages[package].items():
        file.writestr(member, content)
    if self.truncate:
      wheel.write_bytes(wheel.read_bytes()[:100])
    return subprocess.CompletedProcess(command, 0, '', '')
