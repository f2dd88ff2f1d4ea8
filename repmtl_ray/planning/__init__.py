"""What a search will take on a cluster, before it is paid for: machines, hours and cost.

`simulation.py` simulates a search event by event, `timing.py` measures an epoch or reads the times of
a finished search, `figure.py` draws, and `command.py` is the command line of
`pipelines/plan_cluster.py`. No other part of the package imports this one, and it imports no Ray.
"""
