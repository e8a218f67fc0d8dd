"""``python -m disthess`` is the command ``disthess``."""

from disthess.cli import main

if __name__ == "__main__":
    main()
