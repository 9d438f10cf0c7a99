"""``python -m horizonplan``."""

from horizonplan.cli import main

if __name__ == "__main__":
    main()
