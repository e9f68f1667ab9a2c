"""From a recipe and a number of devices to a plan and the command that starts it; and the servers that sample.

Nothing here supervises processes: one machine is `accelerate launch`, several are SLURM (or whatever starts
`memfactory launch --node-rank` on each of them).
"""
