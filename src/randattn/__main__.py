"""``python -m randattn``: the same as the ``randattn`` command."""

from randattn.cli import main

if __name__ == "__main__":
    main()
