"""``python -m vmm`` is ``vmm``."""

from .cli.main import main

main()
