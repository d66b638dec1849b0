"""The benchmark of a CUDA GPU, for one that is there for minutes: `python -m bench.gpu`.

run         the command: stages in order, each with its minutes
stages      what a stage does; cases: what is measured, what matters most first
worker      jobs in a process that can be stopped; programs: others' programs, likewise
measure     one comparison: checked, timed in turns, replayed as a CUDA graph
checks      operators, models  checked against fp64; steps: graph, torch.compile, DDP
warm        kernels compiled beforehand, by all cores
counts      FLOP and bytes of a results file, afterwards and elsewhere; page: its picture
"""
