"""A stand-in for the Hugging Face hub: the endpoints that an upload calls, over HTTP on this machine."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import pytest

WRITES, READS = 'hf_writes', 'hf_reads'  # tokens of a user of the organisation `org`


class Hub(http.server.ThreadingHTTPServer):
  """repos: {'org/name': {path: bytes}}. broken: whether uploads of large files fail."""

  def __init__(self) -> None:
    super().__init__(('127.0.0.1', 0), _Handler)
    self.repos: dict[str, dict[str, bytes]] = {}
    self.stored: dict[str, bytes] = {}
    self.broken = False
    self.url = f'http://127.0.0.1:{self.server_port}'


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
  """The server, running."""
  with Hub() as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      yield server
    finally:
      server.shutdown()


def use(server: Hub, patch: pytest.MonkeyPatch) -> None:
  """Lets huggingface_hub use the server, without the storage xet, whose protocol it does not have."""
  patch.setattr(huggingface_hub.constants, 'ENDPOINT', server.url)
  patch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True)
  patch.setenv('HF_TOKEN', WRITES)


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Hub

  def log_message(self, format: str, *args: Any) -> None:
    pass

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length', 0)))
    parts = []
    while size := int(self.rfile.readline(), 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(parts)

  def _answer(self, values: Any, status: int = 200, **headers: str) -> None:
    content = json.dumps(values).encode()
    self.send_response(status)
    for name, value in {'Content-Length': str(len(content)), **headers}.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    self.wfile.write(content)

  def _refuse(self, status: int, message: str, **headers: str) -> None:
    self._answer({'error': message}, status, X_Error_Message=message, **headers)

  def _refused(self, repo: str = '', write: bool = False) -> bool:
    """Refuses a token that is nobody's, a repository that is not there, and a write that is not allowed."""
    token = self.headers.get('Authorization', '').removeprefix('Bearer ')
    if token not in (WRITES, READS):
      self._refuse(401, 'Invalid username or password.')
    elif repo and repo not in self.server.repos:
      self._refuse(404, 'Repository not found', X_Error_Code='RepoNotFound')
    elif write and (token != WRITES or not repo.startswith('org/')):
      self._refuse(403, 'You do not have write access to this repository')
    else:
      return False
    return True

  def do_GET(self) -> None:
    repo, kind, rest = re.fullmatch(
      r'/api/(?:whoami-v2|models/(.+?)(?:/(tree/main|auth-check)(.*))?)', self.path
    ).groups('')  # type: ignore[union-attr]
    if not self._refused(repo, rest == '/write'):
      files = self.server.repos.get(repo, {})
      rows = [{'type': 'file', 'path': name, 'size': len(x), 'oid': '0' * 40} for name, x in files.items()]
      self._answer(rows if kind == 'tree/main' else {'id': repo, 'name': 'user'})

  def do_PUT(self) -> None:
    content, oid = self._body(), self.path.rpartition('/')[2]
    if self.server.broken:
      self._refuse(403, 'the storage is down')
    elif hashlib.sha256(content).hexdigest() != oid:
      self._refuse(400, 'another checksum')
    else:
      self.server.stored[oid] = content
      self._answer({})

  def do_POST(self) -> None:
    body = self._body()
    if self.path == '/api/validate-yaml':
      self._answer({'errors': [], 'warnings': []})
    elif self.path == '/api/repos/create':
      self._create(json.loads(body))
    else:
      repo, kind = re.fullmatch(
        r'/(?:api/models/)?(.+?)(?:\.git/info/lfs)?/(preupload/main|objects/batch|commit/main)', self.path
      ).groups()  # type: ignore[union-attr]
      if self._refused(repo, write=True):
        return
      if kind == 'commit/main':
        self._commit(repo, [json.loads(line) for line in body.splitlines()])
      elif kind == 'preupload/main':
        self._answer({'files': [_mode(file['path']) for file in json.loads(body)['files']]})
      else:
        objects = [
          {**x, 'actions': {'upload': {'href': f'{self.server.url}/lfs/{x["oid"]}'}}}
          for x in json.loads(body)['objects']
        ]
        self._answer({'transfer': 'basic', 'objects': objects})

  def _create(self, asked: dict[str, Any]) -> None:
    repo = f'{asked["organization"]}/{asked["name"]}'
    if self._refused():
      return
    if READS in self.headers['Authorization'] or asked['organization'] != 'org':
      self._refuse(403, 'You do not have the rights to create a model under this namespace')
    elif repo in self.server.repos:
      self._answer({'error': 'You already created this model repo', 'url': f'{self.server.url}/{repo}'}, 409)
    else:
      self.server.repos[repo] = {}
      self._answer({'url': f'{self.server.url}/{repo}'})

  def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
    files = self.server.repos[repo]
    for key, value in ((line['key'], line['value']) for line in lines):
      if key == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif key == 'lfsFile':
        files[value['path']] = self.server.stored[value['oid']]
      elif key == 'deletedFile':
        del files[value['path']]
    self._answer({'commitUrl': f'{self.server.url}/{repo}/commit/1', 'commitOid': '1' * 40})


def _mode(path: str) -> dict[str, Any]:
  large = path.endswith(('.safetensors', '.gguf', 'tokenizer.json'))
  return {'path': path, 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False}
