"""`python -m mergectl`."""

from mergectl.cli import entry

if __name__ == "__main__":
    entry()
