"""`python -m raymerge` is the `raymerge` command."""

from raymerge.cli import main

if __name__ == "__main__":
    main()
