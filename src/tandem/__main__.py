"""`python -m tandem` is the `tandem` command."""

from tandem.cluster.cli import main

if __name__ == "__main__":
    main()
