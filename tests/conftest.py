"""The scripts lie one folder up and are imported from there. One thread a process: another number
of threads changes the last bits of a sum."""
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..")))
