"""The benchmark of a CUDA GPU that is available for minutes only: `python -m bench.gpu`.

run       the command: stages in order, each with its share of the time
stages    what each stage does
session   jobs in order, as many as there is time for; writes their rows
worker    jobs in a process that can be stopped; programs: other programs, likewise
device    timer, peak memory, CUDA graphs, clock and power of a device
outcome   the events that a job emits while it runs
jobs/     what can run on the device
    cases     the jobs of a run, most important first; job: the types of jobs
    measure   one comparison: checked, timed in interleaved rounds, replayed as a CUDA graph
    checks    operators; models: whole models; steps: CUDA graph, torch.compile, DDP
    profile   kernels of one step by time; tiles: times of candidate tiles
    warm      kernels compiled ahead by all cores; keys: stable keys of Triton's cache
    sanitized small launches for compute-sanitizer
results/  what a run leaves behind
    record    the results file and the log; counts: FLOP and bytes of a results file
    counted   FLOP, bytes and modelled time of one row; page: plots of a results file
"""
