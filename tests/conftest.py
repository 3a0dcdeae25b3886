import os

# Small networks run fastest on one thread, and two threads fight with whatever else the machine does.
os.environ.setdefault("OMP_NUM_THREADS", "1")
