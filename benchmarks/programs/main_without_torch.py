"""main.py as in a default installation: transformers imports PyTorch if it is installed, 0.2 GB."""

import runpy
import sys

if __name__ == '__main__':
  sys.modules['torch'] = None  # type: ignore[assignment]
  runpy.run_path('main.py', run_name='__main__')
