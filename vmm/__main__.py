"""``python -m vmm`` is ``vmm``."""

from .main import main

main()
