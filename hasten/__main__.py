"""``python -m hasten``, and ``torchrun -m hasten`` for several processes."""

from hasten.cli import main

main()
