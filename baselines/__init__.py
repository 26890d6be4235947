import signal
import sys

if sys.argv[0] == "-m":  # `python -m baselines.NAME` begins: as in m3po.py's first lines
    signal.signal(signal.SIGINT, signal.SIG_DFL)
