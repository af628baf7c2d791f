"""The command `adapt-jax` from a checkout: python main.py --config=configs/demo.py --workdir=out"""

from adapt_jax import cli

if __name__ == '__main__':
  cli.run()
