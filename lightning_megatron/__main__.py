"""``python -m lightning_megatron``: the ``lightning-megatron`` command."""

from lightning_megatron.cli.main import main

if __name__ == "__main__":
    main()
