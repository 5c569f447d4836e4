"""`python -m afbus.cli` is the same as `afbus`."""

from .main import main

main()
