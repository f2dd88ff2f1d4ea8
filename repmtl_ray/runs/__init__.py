"""One run: its step, its epochs, what it leaves behind, and how its workers survive.

Everything but `fault_tolerance`, `tune_reporting`, `worker_loss` and `worker` is without Ray. `fit`,
which places a run, is in `train.py`; the trials of searches and benchmarks are in `search/trial.py`.
"""
