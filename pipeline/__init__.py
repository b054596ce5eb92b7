"""Trainmark: what is a machine worth for training?"""

import sys

if sys.argv[0] == "-m":  # a command starts, and its imports may fail
    from pipeline import startup

    sys.excepthook = startup.excepthook
