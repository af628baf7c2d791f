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

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_port}'


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
  """The server, running."""
  server = Hub()
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()


def use(server: Hub, patch: pytest.MonkeyPatch, token: str = WRITES) -> None:
  """Lets huggingface_hub of this process use the server; in another process `environment` does."""
  patch.setattr(huggingface_hub.constants, 'ENDPOINT', server.url)
  patch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True)
  patch.setenv('HF_TOKEN', token)


def environment(server: Hub, token: str = WRITES) -> dict[str, str]:
  """Of a process that uses the server: without the storage xet, whose protocol it does not have."""
  return {'HF_ENDPOINT': server.url, 'HF_HUB_DISABLE_XET': '1', 'HF_TOKEN': token}


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Hub

  def log_message(self, format: str, *args: Any) -> None:
    pass

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') == 'chunked':
      parts = []
      while size := int(self.rfile.readline(), 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(parts)
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def _answer(self, values: Any, status: int = 200, **headers: str) -> None:
    content = json.dumps(values).encode()
    self.send_response(status)
    for name, value in {'Content-Length': str(len(content)), **headers}.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    self.wfile.write(content)

  def _refuse(self, status: int, message: str, code: str = '') -> None:
    self._answer(
      {'error': message}, status, X_Error_Message=message, **({'X_Error_Code': code} if code else {})
    )

  def _token(self) -> str:
    return self.headers.get('Authorization', '').removeprefix('Bearer ')

  def _unknown(self) -> bool:
    """Refuses a token that is nobody's."""
    if self._token() in (WRITES, READS):
      return False
    self._refuse(401, 'Invalid username or password.')
    return True

  def _refused(self, repo: str, write: bool) -> bool:
    if self._unknown():
      return True
    if repo not in self.server.repos:
      self._refuse(404, 'Repository not found', 'RepoNotFound')
    elif write and (self._token() != WRITES or not repo.startswith('org/')):
      self._refuse(403, 'You do not have write access to this repository')
    else:
      return False
    return True

  def do_GET(self) -> None:
    if self.path == '/api/whoami-v2':
      if not self._unknown():
        self._answer({'name': 'user'})
      return
    repo, _, rest = self.path.removeprefix('/api/models/').partition('/auth-check')
    write = rest == '/write'
    repo, listed, _ = repo.partition('/tree/main')
    if not self._refused(repo, write):
      files = self.server.repos[repo]
      rows = [{'type': 'file', 'path': name, 'size': len(x), 'oid': '0' * 40} for name, x in files.items()]
      self._answer(rows if listed else {'id': repo})

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
    elif found := re.fullmatch(r'/api/models/(.+)/preupload/main', self.path):
      if not self._refused(found[1], write=True):
        self._answer({'files': [_mode(file['path']) for file in json.loads(body)['files']]})
    elif found := re.fullmatch(r'/(.+)\.git/info/lfs/objects/batch', self.path):
      if not self._refused(found[1], write=True):
        objects = [
          {
            'oid': x['oid'],
            'size': x['size'],
            'actions': {'upload': {'href': f'{self.server.url}/lfs/{x["oid"]}'}},
          }
          for x in json.loads(body)['objects']
        ]
        self._answer({'transfer': 'basic', 'objects': objects})
    elif found := re.fullmatch(r'/api/models/(.+)/commit/main', self.path):
      if not self._refused(found[1], write=True):
        self._commit(found[1], [json.loads(line) for line in body.splitlines()])
    else:
      self._refuse(404, f'{self.path}: the stand-in has no such endpoint')

  def _create(self, asked: dict[str, Any]) -> None:
    repo = f'{asked["organization"]}/{asked["name"]}'
    token = self.headers.get('Authorization', '').removeprefix('Bearer ')
    if token not in (WRITES, READS):
      self._refuse(401, 'Invalid username or password.')
    elif token == READS or asked['organization'] != 'org':
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
