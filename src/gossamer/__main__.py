"""``python -m gossamer`` and ``torchrun -m gossamer``: the command line."""

from gossamer.launch.cli import main

if __name__ == "__main__":
    main()
