"""``python -m disthess`` is the command ``disthess``."""

from disthess.cli.main import main

if __name__ == "__main__":
    main()
