"""`python -m mtpdecode`: plain and MTP decoding side by side."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
