"""One canvas on several processes or machines, each under a ceiling of its own, on dask.distributed.

This process keeps the canvas, the schedule and the job; workers (`tiler worker`) have the weights on their own disks,
get tiles and give back guided predictions. They hold nothing that cannot be lost. Nothing outside this room imports
dask.
"""
