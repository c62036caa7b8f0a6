"""``python -m vmm`` is ``vmm``."""

from .cli import main

main()
