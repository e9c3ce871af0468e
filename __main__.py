"""`python -m penstock`, for programs such as torchrun that start modules."""

from .offload.cli import main

if __name__ == "__main__":  # worker processes import this file, too
    main()
